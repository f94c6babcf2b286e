"""The last tokens as a feature of Q, and the reward's bounds as targets and as a teacher."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QFunction, QHeuristic, QStar, TokenQPolicy
from qstar_decoding.agents.learning.config import CollectConfig
from qstar_decoding.agents.learning.experience import collect
from qstar_decoding.agents.learning.q_heuristic import export_sb3
from qstar_decoding.agents.learning.scorer import TokenScorer
from qstar_decoding.envs import TabularLM, TokenDecodingVecEnv, load_prompts
from qstar_decoding.errors import CheckpointError, ConfigurationError

SMALL = {
    "searches_per_round": 8,
    "tokens_per_search": 12,
    "gradient_steps": 64,
    "batch_size": 64,
    "policy_kwargs": {"width": 32, "dropout": 0.0},
}
LETTERS = "abcd"


def mirrored(count, seed=0):
    """Prompts of three letters whose answer is their first letter, which a model that sees one token cannot know."""
    texts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    order = np.random.default_rng(seed).permutation(64)[:count]
    return [{"prompt": texts[i], "answer": texts[i][0]} for i in order]


def make(**kwargs):
    given = {
        "model": TabularLM.random(5, 2, seed=0),
        "prompts": mirrored(48),
        "reward": "exact_answer",
        "top_k": 5,
        "max_new_tokens": 2,
        "logprob_weight": 0.01,
        "candidate_dims": 8,
        "shaping": False,
    }
    return gym.make("TokenDecoding-v0", **{**given, **kwargs})


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_context_holds_the_last_tokens_prompt_and_completion_alike(tabular_env, width):
    env = tabular_env(candidate_dims=4, context_tokens=width)
    mdp, observer = env.unwrapped.mdp, env.unwrapped.observer
    root = mdp.roots(load_prompts(["abca"]))
    child = mdp.tree.expand(root, np.array([1]))
    other = mdp.roots(load_prompts(["d"]))
    nodes = np.concatenate((root, child, other))
    ids = [
        mdp.model.encode("abca"),
        [*mdp.model.encode("abca"), int(mdp.tree.tokens[root[0], 1])],
        mdp.model.encode("d"),
    ]
    seen = observer.observe(np.zeros(3), nodes)["context"].reshape(3, width, 4)
    for row, tokens in zip(seen, ids, strict=True):
        last = tokens[-width:]
        np.testing.assert_array_equal(row[: width - len(last)], 0)
        np.testing.assert_array_equal(row[width - len(last) :], observer.features[last])
    np.testing.assert_array_equal(mdp.tree.recent(nodes, 0), np.zeros((3, 0)))


def test_the_last_tokens_stay_known_when_prefixes_are_evicted(tabular_env):
    mdp = tabular_env(context_tokens=3).unwrapped.mdp
    first, second = mdp.roots(load_prompts(["abc"])), mdp.roots(load_prompts(["dba"]))
    child = mdp.tree.expand(second, np.array([0]))
    before = mdp.tree.recent(np.concatenate((second, child)), 3)
    new = mdp.tree.evict(2)
    assert new[first[0]] == -1
    np.testing.assert_array_equal(mdp.tree.recent(new[np.concatenate((second, child))], 3), before)
    assert mdp.tree.recent(mdp.roots(load_prompts(["abc"])), 3).tolist() == [mdp.model.encode("abc")]


@pytest.mark.parametrize("vector", [False, True])
def test_environments_and_sb3_take_the_context(vector):
    kwargs = {**make().unwrapped.spec.kwargs, "context_tokens": 3}
    env = TokenDecodingVecEnv(2, **kwargs) if vector else make(context_tokens=3)
    space = env.observation_space["context"]
    assert space.shape == (24,)
    observation = env.reset() if vector else env.reset(seed=0)[0]
    assert observation["context"].shape == ((2, 24) if vector else (24,))
    from stable_baselines3 import DQN

    agent = DQN(TokenQPolicy, env, gamma=1.0, learning_starts=8, policy_kwargs={"width": 8}, buffer_size=50).learn(24)
    q = QHeuristic(agent).q
    assert (q.scorer.config.context_tokens, q.spec.context_tokens) == (3, 3)
    assert AStarPlanner(make(), heuristic=QHeuristic(agent)).plan(mirrored(1)[0], 8).text is not None


def train(env, steps=150, **settings):
    return QStar(env=env, seed=0, score="q", optimism=0.7, estimate_weight=0.7, **{**SMALL, **settings}).learn(steps)


def right(agent, env, prompts):
    plans = GreedyDecoder(env, heuristic=QHeuristic(agent), score="q").plan_many(prompts)
    return np.mean([plan.text == prompt["answer"] for plan, prompt in zip(plans, prompts, strict=True)])


def test_with_its_context_q_answers_what_the_state_does_not_tell():
    unseen = mirrored(64)[48:]
    teacher = {"bound_share": 0.5, "bound_targets": True}
    blind, seeing = make(), make(context_tokens=4)  # the prompt, and the letter written
    assert right(train(seeing, **teacher), seeing, unseen) >= 0.9
    assert right(train(blind, **teacher), blind, unseen) <= 0.7


def test_searches_led_by_the_bound_find_the_answer_and_spend_little():
    env = make()
    mdp, prompts = env.unwrapped.mdp, load_prompts(mirrored(32))
    q = QStar(env=env, seed=0, **SMALL).q_function()
    for score in ("q", "reward"):
        led = collect(mdp, q, CollectConfig(score=score, bound_share=1.0), prompts, np.random.default_rng(0))
        assert [text.reward for text in led.best] == [1.0] * 32
        assert led.tokens <= 2 * 32
    mixed = collect(mdp, q, CollectConfig(score="q", bound_share=0.5), prompts, np.random.default_rng(0))
    assert len(mixed.states) == 32
    assert mixed.tokens > 32


def test_the_bounds_label_every_legal_edge_and_never_raise_a_target():
    env = make()
    mdp, prompts = env.unwrapped.mdp, load_prompts(mirrored(16))
    q = QStar(env=env, seed=0, **SMALL).q_function()
    plain, bounded = (
        collect(mdp, q, CollectConfig(score="q", bound_share=0.5, bound_targets=on), prompts, np.random.default_rng(0))
        for on in (False, True)
    )
    for without, with_bounds in zip(plain.states, bounded.states, strict=True):
        rows = {key: row for row, key in enumerate(with_bounds["key"].tolist())}
        legal = with_bounds["action_mask"] == 1
        assert np.isfinite(with_bounds["target"][legal]).all()
        assert np.isnan(with_bounds["target"][~legal]).all()
        same = with_bounds["target"][[rows[key] for key in without["key"].tolist()]]
        known = np.isfinite(without["target"])
        assert (same[known] <= without["target"][known] + 1e-9).all()
        found = without["found"]
        np.testing.assert_allclose(same[found], without["target"][found])


def test_bounds_are_no_targets_where_the_reward_states_none(tabular_env):
    env = tabular_env(candidate_dims=4)
    q = QStar(env=env, seed=0, **SMALL).q_function()
    states = [
        collect(env.mdp, q, CollectConfig(bound_targets=on), env.prompts, np.random.default_rng(0)).states
        for on in (False, True)
    ]
    for without, with_bounds in zip(*states, strict=True):
        np.testing.assert_array_equal(without["target"], with_bounds["target"])


def test_a_checkpoint_keeps_its_context_and_is_refused_elsewhere(tmp_path):
    env = make(context_tokens=3)
    agent = train(env, 60)
    agent.save(tmp_path / "agent")
    again = QStar.load(tmp_path / "agent", env)
    np.testing.assert_array_equal(again.experience.state()["context_ids"], agent.experience.state()["context_ids"])
    q = QFunction.from_pretrained(tmp_path / "agent", make())  # a Q brings its context along
    prompts = load_prompts(mirrored(8))
    mdp = make().unwrapped.mdp
    values = [f.values(mdp, prompts, mdp.roots(prompts)) for f in (q, agent.q_function())]
    np.testing.assert_allclose(*values, atol=1e-5)
    with pytest.raises(CheckpointError, match="context_tokens=3, the environment has 0"):
        QStar.load(tmp_path / "agent", make())
    with pytest.raises(CheckpointError, match="context_tokens=3, the environment has 2"):
        export_sb3(agent, tmp_path / "x.zip", make(context_tokens=2))
    bad = {**agent.experience.state()}
    bad["context_ids"] = bad["context_ids"] + 1000
    with pytest.raises(ValueError, match="vocabulary"):
        agent.experience.restore(bad, 0)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(context_tokens=-1), "context_tokens"),
        (lambda: make(context_tokens=1.5), "context_tokens"),
        (lambda: QStar(env=make(), bound_share=1.5), "bound_share"),
        (lambda: QStar(env=make(), bound_targets="yes"), "bound_targets is true or false"),
    ],
)
def test_bad_values_are_named(make_it, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        make_it()
    assert "\n" not in str(error.value)


def test_without_a_context_the_network_is_what_it_was():
    torch.manual_seed(0)
    names = set(QStar(env=make(), seed=0, **SMALL).q_net.scorer.state_dict())
    assert not any(name.startswith("context") for name in names)


@pytest.mark.parametrize("settings", [{}, {"heads": 3}, {"dueling": True}, {"context_tokens": 2}])
def test_outputs_of_some_edges_are_those_of_all_edges(settings):
    torch.manual_seed(0)
    network = TokenScorer(6, 4, width=8, dropout=0.0, **settings)
    torch.nn.init.normal_(network.head.weight)
    shapes = {"hidden": 6, "candidates": 20, "logprobs": 5, "potential": 1, "remaining": 1, "context": 8}
    seen = {name: torch.randn(7, size) for name, size in shapes.items()} | {"action_mask": torch.ones(7, 5)}
    only = torch.rand(7, 5) < 0.4
    gradients = []
    for wanted in (None, only):
        outputs = network.head_outputs(seen, wanted)
        assert outputs.shape == (7, 5, settings.get("heads", 1))
        network.zero_grad()
        (outputs[only] ** 2).sum().backward()
        gradients.append([outputs[only].detach(), *(p.grad.clone() for p in network.parameters())])
    for all_edges, some in zip(*gradients, strict=True):
        torch.testing.assert_close(all_edges, some)
    assert network.head_outputs(seen, torch.zeros(7, 5, dtype=torch.bool)).shape == (7, 5, settings.get("heads", 1))
