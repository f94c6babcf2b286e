"""Evaluation and diagnostics: what they measure is what is there."""

import json

import numpy as np
import pytest

from qstar_decoding.agents import (
    AStarPlanner,
    Calibration,
    Diagnostics,
    GreedyDecoder,
    QHeuristic,
    QStar,
    calibration,
    evaluate,
    paired_bootstrap,
)
from qstar_decoding.agents.evaluation.plots import plot_diagnostics, save
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import as_reward


def share_of_b(prompt, completion):
    return completion.count("b") / 4


def make_mdp(**kwargs):
    reward = as_reward(share_of_b, lower=0.0, upper=1.0)
    model = TabularLM.random(4, 1, seed=0, eos_token_ids=[])
    return DecodingMDP(model, reward=reward, **{"top_k": 3, "max_new_tokens": 4, **kwargs})


def optimal(mdp, prompts, nodes):
    """h*, from an exhaustive search."""
    values = np.empty((len(nodes), mdp.top_k))
    for i, node in enumerate(nodes):
        for a in range(mdp.top_k):
            values[i, a] = best_below(mdp, int(node), a) - mdp.path_return(np.array([node]))[0]
    return values


def best_below(mdp, node, action):
    nodes, actions = np.array([node]), np.array([action])
    if mdp.finishes(nodes)[0, action]:
        return mdp.complete(load_prompts(["a"]), nodes, actions)[0].objective
    child = int(mdp.tree.expand(nodes, actions)[0])
    return max(best_below(mdp, child, a) for a in range(mdp.top_k))


def test_a_perfect_q_is_perfectly_calibrated():
    mdp = make_mdp()
    searches = AStarPlanner(mdp, heuristic=optimal, margin=np.inf).run_searches(load_prompts(["a", "b"]), Budget(200))
    summary = calibration(searches).summary()
    # Where the search did not find the best below an edge, even a perfect Q looks too high; never too low.
    assert summary["violations"] == 0
    assert summary["mean_absolute_error"] == pytest.approx(summary["bias"]) == pytest.approx(0, abs=1e-9)
    assert summary["correlation"] == pytest.approx(1)


@pytest.mark.parametrize(("error", "violations"), [(-0.2, 1.0), (0.2, 0.0)])
def test_a_constant_error_of_q_is_measured_as_it_is(error, violations):
    def off(mdp, prompts, nodes):
        return optimal(mdp, prompts, nodes) + error

    searches = AStarPlanner(make_mdp(), heuristic=off, margin=np.inf).run_searches(load_prompts(["a"]), Budget(200))
    summary = calibration(searches).summary()
    assert summary["bias"] == pytest.approx(error)
    assert summary["violations"] == violations
    assert summary["mean_violation"] == pytest.approx(max(-error, 0))
    assert summary["mean_overestimation"] == pytest.approx(max(error, 0))


def test_calibration_without_a_finished_text_says_what_to_do():
    searches = AStarPlanner(make_mdp()).run_searches(load_prompts(["a"]), Budget(1))
    with pytest.raises(ConfigurationError, match="larger budget"):
        calibration(searches)


def test_a_decoder_that_does_not_see_the_reward_is_scored_by_it():
    mdp = make_mdp()
    blind = evaluate(GreedyDecoder(mdp, heuristic=optimal, score="q"), ["a", "b"])
    seeing = evaluate(GreedyDecoder(mdp, heuristic=optimal), ["a", "b"])
    np.testing.assert_allclose(blind.rewards, [share_of_b("", plan.text) for plan in blind.plans])
    np.testing.assert_allclose(blind.objectives, seeing.objectives)
    assert blind.lm_tokens.tolist() == [3, 3]


def test_what_the_budget_did_not_finish_is_scored_as_it_stands():
    found = evaluate(AStarPlanner(make_mdp()), ["a"], 1)
    assert found.plans[0].stop == "partial"
    assert found.rewards[0] == share_of_b("", found.plans[0].text)


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = paired_bootstrap(rng.normal(0.3, 1.0, size=60), samples=500, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.9 <= covered / 300 <= 0.98
    assert paired_bootstrap([0.5] * 10) == (0.5, 0.5)


def test_the_callback_logs_writes_and_draws(tmp_path):
    mdp_arguments = {"reward": as_reward(share_of_b, lower=0, upper=1), "top_k": 3, "max_new_tokens": 4}
    import gymnasium as gym

    env = gym.make(
        "qstar_decoding:TokenDecoding-v0", model=TabularLM.random(4, 1, seed=0), prompts=["a"], **mdp_arguments
    )
    options = {"searches_per_round": 1, "tokens_per_search": 10, "gradient_steps": 2, "policy_kwargs": {"width": 8}}
    agent = QStar(env=env, seed=0, tensorboard_log=str(tmp_path / "tb"), **options)
    agent.learn(60, callback=Diagnostics(["b"], tmp_path, budgets=[4, 10], every=20))
    points = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    steps = [point["time_steps"] for point in points]
    assert steps == sorted(steps)
    assert len(steps) >= 3
    assert {"held_out/objective_4", "held_out/objective_10", "calibration/violations"} <= points[-1].keys()
    assert points[-1]["held_out/objective_10"] == pytest.approx(evaluate_now(agent, 10))
    assert b"<svg" in (tmp_path / "diagnostics.svg").read_bytes()
    agent.learn(20, callback=Diagnostics(["b"], tmp_path, budgets=[4, 10], every=20), reset_num_timesteps=False)
    more = [json.loads(line)["time_steps"] for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert more[: len(steps)] == steps
    assert more[-1] == agent.num_timesteps


def evaluate_now(agent, budget):
    return evaluate(AStarPlanner(agent.get_env(), heuristic=QHeuristic(agent)), ["b"], budget).objectives.mean()


def test_the_picture_is_drawn_from_one_measurement_too(tmp_path):
    rng = np.random.default_rng(0)
    compared = Calibration(rng.normal(size=50), rng.normal(size=50), np.zeros(50, dtype=int))
    history = [{"time_steps": 10, "held_out/objective_50": 0.1}]
    history[0] |= {f"calibration/{name}": value for name, value in compared.summary().items()}
    save(plot_diagnostics(history, compared), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
