"""Reward functions of other libraries work as they were written."""

import asyncio
from abc import ABC, abstractmethod
from types import SimpleNamespace

import pytest

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.envs.prompts import as_prompt, columns_of
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


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def columns(*prompts):
    """The texts and the columns of prompts, as a reward of an environment gets them."""
    read = [as_prompt(prompt) for prompt in prompts]
    return [prompt.text for prompt in read], columns_of(read)


@pytest.mark.parametrize("adapter", [from_trl, from_verifiers])
def test_a_chat_is_given_as_the_messages_that_it_was(adapter):
    seen = []

    def trl(prompts, completions, answer):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [1.0] * len(prompts)

    def verifiers(prompt, completion, answer, state):
        assert (state["prompt"], state["completion"]) == (prompt, completion)
        seen.append((prompt, completion, answer))
        prompt.append("changed")
        return 1.0

    texts, further = columns({"prompt": CHAT, "answer": "a"}, {"prompt": "plain", "answer": "b"}, CHAT[1:])
    reward = adapter(trl if adapter is from_trl else verifiers, conversational=True)
    reward(texts, [" x", " y", " z"], **further)
    chats = [given[:n] for (given, _, _), n in zip(seen, (2, 1, 1), strict=True)]
    assert chats == [CHAT, [{"role": "user", "content": "plain"}], CHAT[1:]]
    assert [said for _, said, _ in seen] == [[{"role": "assistant", "content": text}] for text in (" x", " y", " z")]
    assert [answer for _, _, answer in seen] == ["a", "b", None]
    assert columns({"prompt": CHAT, "answer": "a"})[1]["messages"] == [CHAT]  # no function can change the prompt's own


def test_chats_of_one_text_are_scored_apart():
    asked = []

    def reward(prompts, completions):
        asked.append(prompts)
        return [float(prompt[0]["role"] == "system") for prompt in prompts]

    adapted = from_trl(reward, conversational=True)
    other = [{"role": "user", "content": "be brief\nhi"}]
    texts, further = columns(CHAT, other)
    assert texts[0] == texts[1]
    assert adapted(texts, ["x", "x"], **further).tolist() == [1.0, 0.0]


def test_the_messages_of_a_chat_are_not_a_column_of_the_data_set():
    with pytest.warns(UserWarning, match="the column 'messages' of the prompts is left out"):
        assert columns({"prompt": CHAT, "messages": "x"})[1] == {"messages": [CHAT]}
    assert columns({"prompt": "plain", "messages": "x"})[1] == {"messages": ["x"]}


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (from_trlx(lambda samples, prompts, outputs: [float(o == "gold") for o in outputs]), "outputs"),
        (from_trlx(lambda samples, **columns: [float(s == "gold") for s in samples]), "samples"),
        (from_verifiers(lambda completion, **columns: float(completion == "gold")), "completion"),
        (from_verifiers(lambda completion, state: float("gold" in (state, state["completion"]))), "state"),
        (from_verifiers(lambda completion, prompt: float(prompt == "gold")), "prompt"),
    ],
)
def test_a_column_never_replaces_what_the_model_wrote(reward, name):
    with pytest.warns(UserWarning, match=f"the column '{name}' .* is left out.*for instance to 'data_{name}'"):
        assert reward(["p"], ["written"], **{name: ["gold"]}) == [0]


def test_async_functions_of_every_library():
    async def trl(prompts, completions, **kwargs):
        return [float(len(c[0]["content"])) for c in completions]

    async def trlx(samples, **kwargs):
        return [float(len(sample)) for sample in samples]

    async def rl4lms(prompt_texts, gen_texts, ref_texts, dones, meta_infos):
        return [float(len(text)) for text in gen_texts]

    async def single(current_observation, action, next_observation, done, meta_info):
        return float(len(next_observation.context_text))

    check(from_trl(trl, conversational=True), [3.0, 1.0])
    check(from_trlx(trlx), [10.0, 5.0])
    check(from_rl4lms(rl4lms), [3.0, 1.0])
    check(from_rl4lms(single), [3.0, 1.0])

    async def jupyter():
        check(from_trl(trl, conversational=True), [3.0, 1.0])
        check(
            from_verifiers(lambda completion: single(None, 0, SimpleNamespace(context_text="ab"), True, {})), [2.0, 2.0]
        )

    asyncio.run(jupyter())


def test_adapted_functions_take_the_options_of_all():
    reward = from_trlx(lambda samples: [7.0] * len(samples), name="mine", upper=1.0, on_error="penalty", penalty=0.5)
    assert reward.name == "mine"
    check(reward, [0.5, 0.5])
    with pytest.raises(ConfigurationError, match="takes no argument 'uper'; did you mean 'upper'"):
        from_verifiers(lambda completion: 0.0, uper=1.0)
