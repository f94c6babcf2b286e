"""Heads for the terms of a reward: what they learn, and how other weights are used without training."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QFunction, QHeuristic, QStar, TokenQPolicy
from qstar_decoding.agents.learning.experience import asymmetric_loss, extract_targets, states_of
from qstar_decoding.agents.learning.hub import model_card
from qstar_decoding.agents.search.backup import backup, sources
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.cli.decode import _heuristic
from qstar_decoding.envs import Observer, TabularLM, TokenDecodingVecEnv, load_prompts
from qstar_decoding.errors import CheckpointError, ConfigurationError
from qstar_decoding.rewards import as_reward
from qstar_decoding.rewards.composition import terms_of

SMALL = {
    "searches_per_round": 2,
    "tokens_per_search": 60,
    "gradient_steps": 8,
    "batch_size": 32,
    "policy_kwargs": {"width": 16, "dropout": 0.0},
}


def share(letter, potential=True):
    def value(prompt, completion):
        return completion.count(letter) / max(len(completion), 1)

    return as_reward(value, name=f"share_{letter}", lower=0, upper=1, potential=value if potential else None)


A, B, C = share("a"), share("b"), share("c", potential=False)


def make(reward=0.6 * A + 0.4 * B, **kwargs):
    given = {
        "model": TabularLM.random(5, 2, seed=0),
        "prompts": ["ab", "c"],
        "top_k": 3,
        "max_new_tokens": 4,
        "logprob_weight": 0.1,
        "candidate_dims": 8,
        "components": True,
    }
    return gym.make("TokenDecoding-v0", reward=reward, **{**given, **kwargs})


def explored(env, budget=10_000):
    """Return a search of the first prompt, by default of its whole tree."""
    mdp = env.unwrapped.mdp
    return AStarPlanner(mdp, margin=float("inf")).run_searches(load_prompts(["ab"]), Budget(budget))[0]


# -- observation ------------------------------------------------------------------------------------------------------


def test_the_environment_shows_each_terms_potential_and_weight():
    env = make(0.6 * A - 0.4 * C + 0 * B)
    check_env(env.unwrapped, skip_render_check=True)
    check_env_sb3(env.unwrapped)
    env.reset(options={"prompt": "ab"})
    letters = ""
    for _ in range(3):
        observation, _, _, _, info = env.step(2)
        letters += info["token_text"]
        np.testing.assert_allclose(observation["weights"], [0.1, 0.6, -0.4], rtol=1e-6)
        np.testing.assert_allclose(observation["term_potentials"], [letters.count("a") / len(letters), 0])


def test_without_components_nothing_is_added():
    assert not {"weights", "term_potentials"} & set(make(components=False).observation_space.spaces)


def test_the_observer_takes_the_weights_of_the_reward_at_hand():
    mdp, terms = make().unwrapped.mdp, {"share_a": 0.6, "share_b": 0.4}

    def weights(reward):
        return Observer(mdp.with_changes(reward=reward, logprob_weight=0.5), terms=terms).weights.tolist()

    assert weights(2 * B - A) == [0.5, -1, 2]
    assert weights(3 * A) == [0.5, 3, 0]  # the other term counts 0
    assert weights(3 * A + C) == [0.5, 3, 0]
    assert weights(C) == [0.5, 0.6, 0.4]  # none of them is there: those of training


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10, 10_000])
def test_the_parts_of_a_target_add_up_to_the_whole_one(budget):
    env = make(0.6 * A - 0.4 * C)
    mdp, search = env.unwrapped.mdp, explored(env, budget)
    whole, in_parts = Observer(mdp, 8), env.unwrapped.observer
    returns = np.random.default_rng(0).normal(size=(search.size, 3, 3))
    plain = extract_targets(search, whole, returns @ in_parts.weights)
    parts = extract_targets(search, in_parts, returns)
    np.testing.assert_allclose(parts["target"] @ in_parts.weights, plain["target"], atol=1e-6)
    for name in ("found", "tokens", "hidden"):
        np.testing.assert_array_equal(parts[name], plain[name])


def test_each_part_is_that_of_the_best_completion_below_the_edge():
    env = make(0.6 * A - 0.4 * B)
    mdp, search = env.unwrapped.mdp, explored(env)
    states = extract_targets(search, env.unwrapped.observer, np.zeros((search.size, 3, 3)))
    for action in range(3):
        text, logprob = max(
            ((c.text, c.logprob) for c in search.completions.values() if mdp_starts_with(mdp, search, c, action)),
            key=lambda found: 0.1 * found[1] + 0.6 * A([""], [found[0]])[0] - 0.4 * B([""], [found[0]])[0],
        )
        expected = [logprob, A([""], [text])[0], B([""], [text])[0]]  # the empty prefix has no potential to take off
        np.testing.assert_allclose(states["target"][0, action], expected, atol=1e-6)


def mdp_starts_with(mdp, search, completion, action):
    return completion.token_ids[0] == mdp.tree.tokens[search.node[0], action]


@pytest.mark.parametrize("budget", [6, 30, 10_000])
def test_a_target_comes_from_the_edge_that_has_it(budget):
    search = explored(make(), budget)
    estimate = np.random.default_rng(0).normal(size=(search.size, 3)) - 3
    value, source = sources(search, estimate)
    np.testing.assert_array_equal(value, backup(search, estimate))
    at_the_source = estimate.copy()
    for edge, completion in search.completions.items():
        at_the_source[edge] = completion.objective
    known = ~np.isnan(value)
    assert known.any()
    np.testing.assert_array_equal(at_the_source.ravel()[source[known]], value[known])


def test_a_search_asks_for_each_terms_potentials_once(monkeypatch):
    env = make()
    q, search = QStar(TokenQPolicy, env, seed=0, **SMALL).q_function(), explored(env, 30)
    search.mdp.potential([search.prompt] * search.size, search.node[: search.size])  # that of the sum, kept from now on
    asked = []
    monkeypatch.setattr(type(A), "potential", lambda self, prompts, *rest: asked.append(self) or np.zeros(len(prompts)))
    states_of(search, q)
    assert sorted(term.name for term in asked) == ["share_a", "share_b"]


def test_the_experience_keeps_the_best_target_found_with_all_its_parts():
    env = make()
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL)
    early, late = (extract_targets(s := explored(env, b), env.unwrapped.observer, np.zeros((s.size, 3, 3)))
                   for b in (12, 10_000))  # fmt: skip
    for order in ((early, late), (late, early)):
        agent.experience = None
        agent.add([{name: column.copy() for name, column in states.items()} for states in order])
        stored = agent.experience.state()
        rows = {key: row for row, key in enumerate(stored["key"].tolist())}
        for i, key in enumerate(late["key"].tolist()):
            np.testing.assert_allclose(stored["target"][rows[key]], late["target"][i], atol=1e-6)


def test_the_whole_error_says_which_parts_are_too_low():
    parts = torch.tensor([[1.0, -3.0], [2.0, 1.0]])
    whole, found = parts.sum(dim=1), torch.tensor([True, True])
    loss = asymmetric_loss(whole, found, optimism=0.8, estimate_weight=0.3, parts=parts)
    torch.testing.assert_close(loss, torch.tensor([0.2 * 10, 0.8 * 5]))
    alone = asymmetric_loss(whole, ~found, optimism=0.8, estimate_weight=0.3, regression="quantile", parts=parts)
    torch.testing.assert_close(alone, torch.tensor([0.3 * 4, 0.0]))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """An environment, and an agent that has seen its whole tree."""
    env = make()
    settings = {"tokens_per_search": 200, "gradient_steps": 500, "batch_size": 128, "optimism": 0.5}
    policy = {"policy_kwargs": {"width": 64, "dropout": 0.0}}
    return env, QStar(TokenQPolicy, env, seed=0, **{**SMALL, **settings, **policy}).learn(400)


def test_heads_learn_the_returns_of_the_best_texts(learned):
    env, agent = learned
    mdp, search = env.unwrapped.mdp, explored(env)
    states = extract_targets(search, env.unwrapped.observer, np.zeros((search.size, 3, 3)))
    nodes, prompts = search.node[: search.size], [search.prompt] * search.size
    q = agent.q_function()
    returns, rows = q.returns(mdp, prompts, nodes), np.flatnonzero(np.isfinite(states["target"]).any(axis=(1, 2)))
    returns[..., 1:] -= env.unwrapped.observer.term_potentials(prompts, nodes)[:, None]
    errors = (returns[rows] - states["target"]) * [0.1, 0.6, 0.4]
    assert np.nanmax(np.abs(errors)) < 0.1  # an untrained Q is wrong by .56
    assert np.sqrt(np.nanmean(errors**2)) < 0.02


def test_q_is_the_weighted_sum_of_its_heads_and_follows_the_weights(learned):
    env, agent = learned
    mdp, q, prompts = env.unwrapped.mdp, agent.q_function(), load_prompts(["ab"])
    orders = set()
    for reward in (0.6 * A + 0.4 * B, A, B, -1 * A, 0.1 * A + 0.9 * B):
        changed = mdp.with_changes(reward=reward)
        nodes = changed.roots(prompts)
        weights = [
            0.1,
            *(terms_of(reward)[name].weight if name in reward.name else 0 for name in ("share_a", "share_b")),
        ]
        values = q.values(changed, prompts, nodes)
        np.testing.assert_allclose(values, q.returns(changed, prompts, nodes) @ weights, atol=1e-5)
        orders.add(tuple(np.argsort(values[0])))
    assert len(orders) > 1


def test_other_weights_find_other_texts_without_training(learned):
    env, agent = learned
    greedy = GreedyDecoder(env, heuristic=QHeuristic(agent))
    for reward in (A, B):
        best = AStarPlanner(env).plan("ab", reward=reward).objective
        of_training = GreedyDecoder(env).plan("ab", reward=reward).objective
        found = greedy.plan("ab", reward=reward).objective
        assert found > best - 0.15
        assert found >= of_training


def test_a_term_without_a_head_counts_by_its_potential(learned):
    env, agent = learned
    mdp, q, prompts = env.unwrapped.mdp, agent.q_function(), load_prompts(["ab"])
    more = mdp.with_changes(reward=0.6 * A + 0.4 * B + as_reward(lambda p, c: 0.5, name="half", lower=0, upper=1,
                                                                  potential=lambda p, c: 0.5))  # fmt: skip
    other = mdp.with_changes(reward=C)
    here, there, elsewhere = (q.values(m, prompts, m.roots(prompts)) for m in (mdp, more, other))
    np.testing.assert_allclose(there, here + 0.5, atol=1e-6)
    np.testing.assert_allclose(elsewhere, here, atol=1e-6)  # nothing in common: Q is as in training


@pytest.mark.parametrize(
    ("reward", "note"),
    [
        (0.6 * A + 0.4 * B, ""),
        (0.2 * A, "Q's heads are weighted 0.2 share_a (0.6 in training), 0 share_b (0.4 in training)"),
        (
            B + C,
            "Q's heads are weighted 0 share_a (0.6 in training), 1 share_b (0.4 in training); it has none for share_c",
        ),
        (C, "Q has heads for share_a, share_b, none of which is in this reward; it keeps its own weights"),
    ],
)
def test_the_weights_used_are_told(learned, reward, note):
    env, agent = learned
    assert QHeuristic(agent).describe_weights(env.unwrapped.mdp.with_changes(reward=reward)) == note


def test_checkpoint_and_card_tell_the_terms(learned, tmp_path):
    env, agent = learned
    agent.save(tmp_path / "q", training_state=False)
    again = QFunction.from_pretrained(tmp_path / "q", env)
    assert again.spec.terms == {"share_a": 0.6, "share_b": 0.4}
    card = model_card(again, "me/q")
    assert "components=True" in card
    assert "0.6 for share_a, 0.4 for share_b" in card
    mdp, prompts = env.unwrapped.mdp.with_changes(reward=B - A), load_prompts(["ab"])
    expected = agent.q_function().values(mdp, prompts, mdp.roots(prompts))
    np.testing.assert_allclose(again.values(mdp, prompts, mdp.roots(prompts)), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"terms=\['share_a', 'share_b'\], the environment has \[\]"):
        QStar.load(tmp_path / "q", make(components=False))
    with pytest.raises(CheckpointError, match=r"the environment has \['share_c'\]"):
        QStar.load(tmp_path / "q", make(C))


def test_the_command_line_says_which_weights_the_heads_get(learned, tmp_path, capsys):
    env, agent = learned
    agent.save(tmp_path / "q", training_state=False)
    _heuristic(env.unwrapped.mdp.with_changes(reward=B), None, str(tmp_path / "q"))
    assert "0 share_a (0.6 in training), 1 share_b (0.4 in training)" in capsys.readouterr().err


def test_a_q_without_components_is_written_as_before():
    env = make(components=False)
    config = QStar(TokenQPolicy, env, seed=0, **SMALL).q_function().config()
    assert not {"terms", "context_tokens"} & (config["network"].keys() | config["trained_on"].keys())


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_equals_an_uninterrupted_one_to_the_last_bit(tmp_path):
    def train(steps, agent=None):
        agent = agent or QStar(TokenQPolicy, make(), **{**SMALL, "learning_rate": 1e-3}, seed=3)
        return agent.learn(steps - agent.num_timesteps, reset_num_timesteps=not agent.num_timesteps)

    whole, half = train(400), train(1)
    half.save(tmp_path / "half")
    resumed = train(400, QStar.load(tmp_path / "half", make()))
    assert resumed.num_timesteps == whole.num_timesteps
    assert resumed.q_function().fingerprint() == whole.q_function().fingerprint()


@pytest.mark.parametrize(
    ("file", "section", "setting", "unused", "used"),
    [
        ("config.json", "network", "conditioned", False, True),
        ("training_state.json", "arguments", "weight_factors", [1.0, 1.0], [-1.0, 2.0]),
    ],
)
def test_a_setting_that_was_given_up_is_named(tmp_path, file, section, setting, unused, used):
    QStar(TokenQPolicy, make(), seed=0, **SMALL).learn(1).save(tmp_path / "q")
    path = tmp_path / "q" / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, section: {**content[section], setting: unused}}))
    QStar.load(tmp_path / "q", make())
    path.write_text(json.dumps({**content, section: {**content[section], setting: used}}))
    with pytest.raises(CheckpointError, match=f"{setting}=.*no longer has; train it again") as raised:
        QStar.load(tmp_path / "q", make())
    assert "\n" not in str(raised.value)


def test_vector_environments_and_dueling_take_components():
    env = TokenDecodingVecEnv(2, **make().unwrapped.spec.kwargs)
    policy = {"width": 8, "dueling": True}
    agent = QStar(TokenQPolicy, env, seed=0, **{**SMALL, "policy_kwargs": policy}).learn(60)
    assert agent.predict(env.reset())[0].shape == (2,)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(components="yes"), "components is true or false, got 'yes'"),
        (lambda: make(A + share("a")), "two terms named 'share_a'"),
        (lambda: QStar(env=make(), policy_kwargs={"heads": 2}), "heads=2 estimate the whole return"),
        (lambda: QStar(env=make(), policy_kwargs={"conditioned": True}), "conditioned"),
        (lambda: QStar(env=make(), weight_factors=(0, 2)), "weight_factors"),
        (lambda: QStar(env=make(), bound_targets=True), "bound_targets"),
    ],
)
def test_bad_settings_are_reported_in_one_line(call, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
