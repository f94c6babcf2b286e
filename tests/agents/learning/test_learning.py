"""Learning: the policy, the agent that learns from its own searches, and its checkpoints."""

import itertools
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import (
    AStarPlanner,
    GreedyDecoder,
    QHeuristic,
    QStar,
    SamplingDecoder,
    TokenQPolicy,
    evaluate,
    pretrained_names,
)
from qstar_decoding.agents.learning.experience import SearchExperience, extract_targets
from qstar_decoding.agents.learning.policies import TokenScorer
from qstar_decoding.agents.search.backup import best_found
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.envs import DecodingMDP, TabularLM, TransformersLM
from qstar_decoding.errors import (
    CheckpointError,
    ConfigurationError,
    HeuristicError,
    TrainingDivergedError,
    UnknownNameError,
)
from qstar_decoding.rewards import as_reward

SMALL = {
    "searches_per_round": 2,
    "tokens_per_search": 20,
    "gradient_steps": 8,
    "batch_size": 32,
    "policy_kwargs": {"width": 32, "dropout": 0.0},
}


def reward(prompt, completion):
    """Likes b after a, which the language model below finds unlikely."""
    return min(completion.count("ab") / 3, 1.0)


def make_env(top_k=3, **kwargs):
    table = np.array([[0.6, 0.1, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.25] * 4])
    return gym.make(
        "TokenDecoding-v0",
        **{
            "model": TabularLM(table),
            "prompts": ["a", "b", "c"],
            "reward": as_reward(reward, lower=0.0, upper=1.0),
            "top_k": top_k,
            "max_new_tokens": 8,
            "logprob_weight": 0.02,
            "candidate_dims": 8,
            **kwargs,
        },
    )


@pytest.fixture(scope="module")
def trained():
    env = make_env()
    return QStar(TokenQPolicy, env, seed=0, **SMALL).learn(2000), env


def mean_objective(decoder, budget=None):
    return np.mean([plan.objective for plan in decoder.plan_many(["a", "b", "c"], budget)])


def test_the_learned_q_beats_greedy_and_random_decoding(trained):
    agent, env = trained
    random = np.mean([mean_objective(SamplingDecoder(env, n=1, temperature=1e6, seed=s)) for s in range(20)])
    greedy = mean_objective(GreedyDecoder(env))
    learned = mean_objective(GreedyDecoder(env, heuristic=QHeuristic(agent)))
    optimum = mean_objective(AStarPlanner(env))
    # Measured: random 0.07 ± 0.03, greedy -0.09, learned 0.52, 0.76, 0.76 (seeds 0 to 2), optimum 0.80.
    assert max(random, greedy) < 0.2
    assert 0.4 < learned <= optimum + 1e-6


def test_search_with_the_learned_q_needs_fewer_tokens_than_without(trained):
    agent, env = trained
    with_q = mean_objective(AStarPlanner(env, heuristic=QHeuristic(agent)), 14)
    without = mean_objective(AStarPlanner(env), 14)
    assert with_q > without + 0.3  # measured: 0.64 to 0.80 against -0.09


def test_predict_plan_and_callbacks_work_as_in_sb3(trained):
    agent, env = trained
    observation, info = env.reset(seed=0)
    action, _ = agent.predict(observation, deterministic=True)
    assert info["action_mask"][action] == 1
    assert agent.plan("a", 20).usage.lm_tokens <= 20

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    before = agent.num_timesteps
    agent.learn(10_000, callback=Stop(), reset_num_timesteps=False)
    assert before < agent.num_timesteps < before + 200


def test_the_scorer_does_not_mind_the_order_of_the_candidates():
    torch.manual_seed(0)
    scorer = TokenScorer(6, 4, width=16).eval()
    torch.nn.init.normal_(scorer.head.weight)
    observation = {
        "hidden": torch.randn(2, 6),
        "candidates": torch.randn(2, 5 * 4),
        "logprobs": -torch.rand(2, 5),
        "potential": torch.rand(2, 1),
        "remaining": torch.rand(2, 1),
    }
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {
        **observation,
        "candidates": observation["candidates"].view(2, 5, 4)[:, order].reshape(2, -1),
        "logprobs": observation["logprobs"][:, order],
    }
    torch.testing.assert_close(scorer(observation)[:, order], scorer(shuffled))
    assert scorer(observation).std() > 0.01


def test_sb3s_dqn_takes_the_policy_and_serves_as_heuristic(tmp_path):
    env = make_env()
    agent = DQN(TokenQPolicy, env, learning_starts=10, buffer_size=500, seed=0, policy_kwargs={"width": 32}).learn(60)
    agent.save(tmp_path / "dqn.zip")
    loaded = DQN.load(tmp_path / "dqn.zip", env)
    observation, _ = env.reset(seed=0)
    assert agent.predict(observation, deterministic=True)[0] == loaded.predict(observation, deterministic=True)[0]
    assert AStarPlanner(env, heuristic=QHeuristic(loaded)).plan("a", 10).completions


def test_quantile_networks_serve_as_heuristic():
    env = make_env()
    agent = QRDQN("MultiInputPolicy", env, learning_starts=10, buffer_size=500, seed=0).learn(30)
    assert AStarPlanner(env, heuristic=QHeuristic(agent)).plan("a", 10).completions


@pytest.mark.parametrize("shaping", [True, False])
def test_the_heuristic_adds_back_the_potential_of_a_shaped_q(shaping):
    def potential(prompt, completion):
        return 0.25 * completion.count("a")

    env = make_env(reward=as_reward(reward, lower=0.0, upper=1.0, potential=potential), shaping=shaping)
    agent = DQN(TokenQPolicy, env, buffer_size=500, seed=0)
    mdp = env.unwrapped.mdp
    root = mdp.roots(env.unwrapped.prompts[:1])
    node = mdp.tree.expand(root, np.array([0]))  # the text is "a": the potential is 0.25
    h = QHeuristic(agent)(mdp, env.unwrapped.prompts[:1], node)
    observation = env.unwrapped.observer.observe(env.unwrapped.mdp.potential(env.unwrapped.prompts[:1], node), node)
    with torch.no_grad():
        agent.policy.set_training_mode(False)
        q = agent.q_net({k: torch.from_numpy(v) for k, v in observation.items()}).numpy()
    np.testing.assert_allclose(h - q, 0.25 if shaping else 0.0, atol=1e-6)


def test_a_saved_agent_is_the_same_agent(trained, tmp_path):
    agent, env = trained
    agent.save(tmp_path / "agent", note="for a test")
    loaded = QStar.load(tmp_path / "agent", env)
    one, other = (a.plan("b", 30) for a in (agent, loaded))
    assert one.text == other.text
    assert one.tree.f.tolist() == other.tree.f.tolist()
    assert loaded.num_timesteps == agent.num_timesteps
    assert QHeuristic(tmp_path / "agent").q.description == {"note": "for a test"}
    assert {p.name for p in (tmp_path / "agent").iterdir()} == {
        "config.json",
        "experience.safetensors",
        "optimizer.safetensors",
        "q_network.safetensors",
        "training_state.json",
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing half-written is left


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    arguments = {**SMALL, "learning_rate": 1e-3, "seed": 3}
    whole = QStar(TokenQPolicy, make_env(), **arguments).learn(400)
    first = QStar(TokenQPolicy, make_env(), **arguments).learn(200)
    first.save(tmp_path / "agent")
    torch.manual_seed(99)  # loading must bring its own random state
    second = QStar.load(tmp_path / "agent", make_env())
    second.learn(whole.num_timesteps - second.num_timesteps, reset_num_timesteps=False)
    assert second.num_timesteps == whole.num_timesteps
    for a, b in zip(whole.q_net.parameters(), second.q_net.parameters(), strict=True):
        assert torch.equal(a, b)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not a checkpoint"),
        (lambda f: damage(f, "config.json", lambda b: b[: len(b) // 2]), "damaged"),
        (lambda f: damage(f, "config.json", lambda b: b"[]"), "does not hold an object"),
        (lambda f: damage(f, "config.json", lambda b: b.replace(b'"format": 1', b'"format": 9')), "format 9"),
        (lambda f: damage(f, "q_network.safetensors", lambda b: b[:-100]), "damaged"),
        (lambda f: damage(f, "q_network.safetensors", lambda b: b"\x80\x04 a pickle"), "damaged"),
        (lambda f: (f / "q_network.safetensors").unlink(), "damaged"),
        (lambda f: damage(f, "training_state.json", lambda b: b[:-1]), "damaged"),
        (lambda f: damage(f, "optimizer.safetensors", lambda b: b[:20]), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named(trained, tmp_path, harm, message):
    agent, env = trained
    agent.save(tmp_path / "agent")
    harm(tmp_path / "agent")
    with pytest.raises(CheckpointError, match=message):
        QStar.load(tmp_path / "agent", env)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"top_k": 2}, r"top_k 3 \(trained\) against 2 \(here\)"),
        ({"model": TabularLM.random(4, 2, name="another")}, r"model 'tabular' \(trained\) against 'another' \(here\)"),
        (
            {"model": TabularLM.random(3, 1, vocabulary="abc", eos_token_ids=[])},
            r"hidden_size 4 \(trained\) against 3 \(here\)",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_before_any_search(trained, tmp_path, other, message):
    agent, _ = trained
    agent.save(tmp_path / "agent", training_state=False)
    env = make_env(**other)
    with pytest.raises(CheckpointError, match=message):
        AStarPlanner(env, heuristic=QHeuristic(tmp_path / "agent")).plan("a", 10)
    with pytest.raises(CheckpointError, match=message):
        QStar.load(tmp_path / "agent", env)


def test_saving_replaces_a_checkpoint_or_leaves_it(trained, tmp_path, monkeypatch):
    agent, _ = trained
    agent.save(tmp_path / "agent", note="old")
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        agent.save(tmp_path / "agent", note="new")
    monkeypatch.undo()
    assert QHeuristic(tmp_path / "agent").q.description == {"note": "old"}
    agent.save(tmp_path / "agent", note="new")
    assert QHeuristic(tmp_path / "agent").q.description == {"note": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["agent"]


def test_unknown_checkpoints_and_wrong_agents_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown checkpoint 'sentimant'; known, nearest first: 'sentiment'"):
        QHeuristic("sentimant")
    with pytest.raises(ConfigurationError, match="DQN, QR-DQN, QStar"):
        QHeuristic(object())
    with pytest.raises(ConfigurationError, match="observations of TokenDecoding-v0"):
        DQN(TokenQPolicy, "CartPole-v1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimism": 1.0}, "optimism"),
        ({"q_free_share": 1.5}, "q_free_share"),
        ({"noise": -1.0}, "noise"),
        ({"searches_per_round": 0}, "searches_per_round"),
        ({"buffer_bytes": 10}, "buffer_bytes"),
    ],
)
def test_bad_arguments_of_the_agent_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        QStar(TokenQPolicy, make_env(), **{**SMALL, **arguments}).learn(1)


def test_a_reward_that_fails_in_training_leaves_the_checkpoint(tmp_path):
    calls = []

    def failing(prompt, completion):
        calls.append(completion)
        if len(calls) > 60:
            raise ZeroDivisionError("a bug in the reward")
        return 0.5

    env = make_env(reward=as_reward(failing, lower=0.0, upper=1.0))
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(40)
    agent.save(tmp_path / "agent")
    with pytest.raises(Exception, match="a bug in the reward"):
        agent.learn(5000, reset_num_timesteps=False)
    assert QStar.load(tmp_path / "agent", make_env()).learn(40, reset_num_timesteps=False).num_timesteps > 40


def test_the_shipped_q_function_tells_how_it_was_made():
    assert "sentiment" in pretrained_names()
    q = QHeuristic("sentiment").q
    assert q.spec is not None
    assert q.spec.model == "smollm2-135m-instruct"
    assert q.description["command"].startswith("qstar train sentiment")
    assert {"seed", "minutes", "held_out"} <= set(q.description)


def test_the_experience_is_a_ring():
    prompts = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
    small = QStar(TokenQPolicy, make_env(prompts=prompts), seed=0, **{**SMALL, "buffer_bytes": 75_000}).learn(4000)
    assert small.experience.size == small.experience.capacity < 1200
    keys = small.experience.state()["key"]
    assert len(set(keys.tolist())) == len(keys)
    assert np.isfinite(small.experience.sample(64, np.random.default_rng(0)).targets).any(axis=1).all()


def test_a_policy_without_mask_support_still_plans_within_the_mask():
    env = make_env(top_p=0.7)
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(100)
    plan = agent.plan("a", 20)
    status = np.array(plan.tree.status)
    assert (status == "masked").any()
    assert isinstance(env.unwrapped.mdp, DecodingMDP)


# -- what QStar learns from, and how


def test_the_hidden_states_are_standardized_once(trained):
    scorer = trained[0].q_net.scorer
    seen = torch.from_numpy(trained[0].experience.hidden[:50]).float()
    assert not torch.equal(scorer.hidden_scale, torch.ones_like(scorer.hidden_scale))
    fresh = TokenScorer(4, 8, width=16)
    hidden = torch.randn(100, 4) * torch.tensor([1.0, 50.0, 0.1, 1.0]) + torch.tensor([0.0, 3.0, -1.0, 0.0])
    fresh.standardize(hidden)
    standard = (hidden - fresh.hidden_mean) * fresh.hidden_scale
    torch.testing.assert_close(standard.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(4))
    assert torch.isfinite((seen - scorer.hidden_mean) * scorer.hidden_scale).all()


@pytest.mark.parametrize(
    "options",
    [
        {"score": "q", "optimism": 0.5},
        {"regression": "quantile", "optimism": 0.7},
        {"episode_share": 1.0, "epsilon": 0.3},
        {"policy_kwargs": {"width": 32, "dropout": 0.0, "dueling": True}},
        {"policy_kwargs": {"width": 32, "dropout": 0.0, "heads": 3}},
    ],
    ids=["without the reward", "quantile", "episodes", "dueling", "ensemble"],
)
def test_every_way_to_collect_and_to_regress_learns(options):
    env = make_env()
    agent = QStar(TokenQPolicy, env, seed=0, **{**SMALL, **options}).learn(2000)
    score = options.get("score", "reward")
    found = evaluate(GreedyDecoder(env, heuristic=QHeuristic(agent), score=score), ["a", "b", "c"])
    assert found.objectives.mean() > 0.35  # greedy: -0.09, the optimum: 0.80


def test_episodes_keep_to_the_budget_and_explore():
    env = make_env()
    agent = QStar(TokenQPolicy, env, seed=0, **{**SMALL, "episode_share": 1.0, "epsilon": 1.0, "tokens_per_search": 30})
    agent.learn(60)
    assert 0 < agent.num_timesteps <= 60
    assert agent.experience.size > 10


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_checkpoint(tmp_path):
    agent = QStar(TokenQPolicy, make_env(), seed=0, **SMALL).learn(40)
    agent.save(tmp_path / "agent", note="good")
    with torch.no_grad():
        agent.q_net.scorer.head.weight.fill_(float("nan"))
    with pytest.raises((TrainingDivergedError, HeuristicError)):
        agent.learn(200, reset_num_timesteps=False)
    agent = QStar.load(tmp_path / "agent", make_env(), learning_rate=1e30)
    with pytest.raises((TrainingDivergedError, HeuristicError), match=r"NaN|loss became"):
        agent.learn(2000, reset_num_timesteps=False)
    assert QHeuristic(tmp_path / "agent").q.description == {"note": "good"}


def test_further_layers_are_observed_where_asked_for(tiny_lm):
    plain = tiny_lm("Llama")
    tapped = TransformersLM(plain.model, plain.tokenizer, name="tapped", hidden_layers=[0, 1])
    d = plain.hidden_size
    assert tapped.hidden_size == 3 * d
    sequence = [3, 4, 5]
    (short, logprobs), (long, same) = plain.forward([sequence]), tapped.forward([sequence])
    np.testing.assert_allclose(logprobs, same, atol=1e-6)
    np.testing.assert_allclose(long[:, :d], short, atol=1e-5)
    with torch.inference_mode():
        states = plain.model(torch.tensor([sequence]), output_hidden_states=True).hidden_states
    expected = states[1][0, -1].numpy()  # the first layer's output, at the scale of the last state
    expected *= np.sqrt(np.mean(short**2) / np.mean(expected**2))
    np.testing.assert_allclose(long[0, d : 2 * d], expected, atol=1e-4)
    tree = DecodingMDP(tapped, reward=lambda p, c: 0.0, top_k=4, max_new_tokens=4).tree
    node = tree.expand(tree.roots([[3, 4]]), np.array([0]))
    whole = tapped.forward([[3, 4, int(tree.tokens[0, 0])]])[0]
    np.testing.assert_allclose(tree.hidden[node], whole, atol=1e-4)


@pytest.mark.parametrize("layers", [[2], [-1], [1, 0], [0, 0], ["a"]])
def test_layers_that_are_not_there_are_named(tiny_lm, layers):
    plain = tiny_lm("Llama")
    with pytest.raises(ConfigurationError, match="hidden_layers are ascending integers from 0 to 1"):
        TransformersLM(plain.model, plain.tokenizer, hidden_layers=layers)
    with pytest.raises(ConfigurationError, match="a model given by name"):
        DecodingMDP(plain, reward="sentiment", hidden_layers=[0])


def test_the_best_that_was_ever_found_stays_and_a_state_is_stored_once():
    env = make_env()
    mdp, prompt = env.unwrapped.mdp, env.unwrapped.prompts[:1]
    experience = SearchExperience(mdp, env.unwrapped.observer, 10**6)

    def add(budget, optimism):
        search = AStarPlanner(mdp, width=2, margin=np.inf).run_searches(prompt, Budget(budget))[0]
        q = np.full((search.size, mdp.top_k), optimism)
        experience.add(extract_targets(search, env.unwrapped.observer, q))
        return best_found(search)[0], search.size

    much, _ = add(60, 5.0)
    size = experience.size
    root = experience.state()["target"][0].copy()
    np.testing.assert_allclose(root[np.isfinite(much)], much[np.isfinite(much)], atol=1e-6)
    little, _ = add(8, 7.0)
    assert np.nanmax(little) < np.nanmax(much)  # or the test would show nothing
    assert experience.size == size
    after = experience.state()["target"][0]
    np.testing.assert_array_equal(after[np.isfinite(much)], root[np.isfinite(much)])


def test_states_that_q_gets_wrong_are_drawn_more_often():
    env = make_env()
    agent = QStar(TokenQPolicy, env, seed=0, **SMALL).learn(100)
    experience, rng = agent.experience, np.random.default_rng(0)
    experience.prioritize(np.arange(experience.size), np.zeros(experience.size))
    experience.prioritize(np.array([3]), np.array([10.0]))
    rows = experience.sample(400, rng, exponent=1.0)[0]
    expected = 10.01 / (10.01 + 0.01 * (experience.size - 1))
    assert abs(np.mean(rows == 3) - expected) < 0.05
    assert np.mean(experience.sample(400, rng)[0] == 3) < 0.2


def test_of_several_heads_the_largest_answer_counts_and_they_differ(tmp_path):
    env = make_env()
    options = {**SMALL, "policy_kwargs": {"width": 32, "dropout": 0.0, "heads": 3}}
    agent = QStar(TokenQPolicy, env, seed=0, **options).learn(300)
    observation = agent.experience.sample(20, np.random.default_rng(0)).observation
    inputs = {key: torch.from_numpy(value) for key, value in observation.items()}
    scorer = agent.q_net.scorer.eval()
    outputs = scorer.head_outputs(inputs)
    assert outputs.shape == (20, 3, 3)
    assert (outputs.std(dim=2) > 1e-4).all()
    assert torch.equal(scorer(inputs), outputs.amax(dim=2))
    with pytest.warns(DeprecationWarning, match="head_outputs"):
        assert torch.equal(scorer.answers(inputs), outputs)
    agent.save(tmp_path / "agent")
    assert torch.equal(QStar.load(tmp_path / "agent", env).q_net.scorer.eval()(inputs), scorer(inputs))
    with pytest.raises(ConfigurationError, match="heads is an integer >= 1"):
        TokenScorer(4, 8, heads=0)
