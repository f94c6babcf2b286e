"""Reward functions of other libraries work as they were written."""

from abc import ABC, abstractmethod

import pytest

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import as_reward
from qstar_decoding.rewards.adapters import from_reasoning_gym, from_rl4lms, from_trl, from_trlx, from_verifiers

PROMPTS, COMPLETIONS = ["Say hi:", "2+2="], [" hi", "4"]


def check(reward, expected, **columns):
    assert list(reward(PROMPTS, COMPLETIONS, [[1, 2], [3]], **columns)) == expected


def test_trl():
    def plain(completions, **kwargs):
        return [float(len(c)) for c in completions]

    def chat(prompts, completions, answer):
        assert prompts[0] == [{"role": "user", "content": "Say hi:"}]
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    check(from_trl(plain), [3.0, 1.0])
    check(from_trl(chat, conversational=True, lower=0, upper=1), [0.0, 1.0], answer=["x", "4"])
    assert from_trl(chat, conversational=True, lower=0, upper=1).upper == 1
    assert from_trl(plain).name == "plain"


def test_trlx():
    def reward_fn(samples, prompts, outputs, **kwargs):
        assert samples == [p + o for p, o in zip(prompts, outputs, strict=True)]
        return [len(s) + len(kwargs["topic"][0]) for s in samples]

    def older(samples):
        return [float(len(sample)) for sample in samples]

    check(from_trlx(reward_fn), [10.0 + 1, 5.0 + 1], topic=["a", "b"])
    check(from_trlx(older), [10.0, 5.0])


class RewardFunction(ABC):
    """The base class as RL4LMs has it."""

    @abstractmethod
    def __call__(self, current_observation, action, next_observation, done, meta_info=None):
        raise NotImplementedError


class Overlap(RewardFunction):
    def __call__(self, current_observation, action, next_observation, done, meta_info=None):
        assert current_observation.context_text == ""
        assert isinstance(action, int)
        if not done:
            return 0
        words = set(next_observation.context_text.split())
        return len(words & set(" ".join(next_observation.target_or_reference_texts).split()))


class Batched:
    def __call__(self, prompt_texts, gen_texts, ref_texts, dones, meta_infos=None):
        assert all(dones)
        texts = zip(prompt_texts, gen_texts, ref_texts, strict=True)
        return [len(p) + len(g) + len(r) + meta_infos[0]["bonus"] for p, g, r in texts]


def test_rl4lms():
    check(from_rl4lms(Overlap()), [1.0, 0.0], references=[["hi there"], None])
    check(from_rl4lms(Overlap()), [0.0, 0.0])
    check(from_rl4lms(Batched(), references="gold"), [17.0, 12.0], gold=[["a"], ["b"]], bonus=[6, 6])
    assert from_rl4lms(Overlap()).name == "Overlap"


def test_verifiers():
    def exact(completion, answer):
        return float(completion[-1]["content"].strip() == answer)

    async def slow(prompt, completion, state, **kwargs):
        assert state["completion"] == completion
        return float(len(completion))

    check(from_verifiers(exact), [0.0, 1.0], answer=["x", "4"])
    check(from_verifiers(slow, conversational=False), [3.0, 1.0])


def test_a_reasoning_gym_data_set():
    class Dataset:
        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 0.01

    reward = from_reasoning_gym(Dataset())
    check(reward, [0.01, 1.0], entry=[{"answer": "x"}, {"answer": "4"}])
    assert (reward.lower, reward.upper) == (0.0, 1.0)


def test_an_adapted_function_is_a_reward_like_any_other():
    reward = from_trlx(lambda samples, prompts, outputs: [o.count("a") / 4 for o in outputs], lower=0, upper=1)
    mdp = DecodingMDP(TabularLM.random(3, 1), reward=0.5 * reward + as_reward("length"), top_k=3, max_new_tokens=4)
    assert AStarPlanner(mdp).plan("a").certified


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_trl(lambda text: 0.0, conversational=True), "lambda> takes text; a reward function of TRL has"),
        (lambda: from_trl(lambda prompt, completion: 0.0), "takes prompt, completion; .* of TRL"),
        (lambda: from_trlx(lambda texts: 0.0), "of trlX has the shape reward_fn"),
        (lambda: from_rl4lms(lambda prompt, completion: 0.0), "of RL4LMs has the shape"),
        (lambda: from_verifiers(lambda text: 0.0), "of verifiers has the shape"),
        (lambda: from_reasoning_gym(object()), "score_answer"),
        (lambda: from_trlx("reward"), "is no function"),
    ],
)
def test_the_wrong_kind_of_function_is_told_the_right_one(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
