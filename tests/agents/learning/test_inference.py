"""The scorer in numpy: the same outputs as the torch module's, and a search that never imports torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents.learning.inference import NATS_PER_UNIT, NumpyScorer, ScorerConfig
from qstar_decoding.agents.learning.scorer import TokenScorer

SIZES = {
    "hidden_size": st.integers(1, 40),
    "candidate_dims": st.integers(1, 8),
    "width": st.integers(4, 24),
    "dropout": st.just(0.5),  # off in evaluation, or the outputs would differ
    "dueling": st.booleans(),
    "context_tokens": st.integers(0, 3),
}
CONFIGS = st.one_of(
    st.builds(ScorerConfig, **SIZES, heads=st.integers(1, 3)),
    st.builds(ScorerConfig, **SIZES, n_quantiles=st.integers(1, 5)),
    st.builds(ScorerConfig, **SIZES, terms=st.integers(1, 3)),
)


def random_network(config, seed):
    torch.manual_seed(seed)
    network = TokenScorer.of(NumpyScorer(config, {n: np.zeros(s) for n, s in config.shapes().items()})).eval()
    for name, tensor in network.state_dict().items():
        # As trained weights: products keep the scale, no weight is 0, and the variance of an input is positive.
        tensor.copy_(torch.randn_like(tensor) / max(tensor.shape[-1], 1) ** 0.5 if tensor.ndim > 1 else tensor)
        if tensor.ndim == 1:
            tensor.copy_(
                torch.rand_like(tensor) + 0.5 if name.endswith(("weight", "scale")) else torch.randn_like(tensor)
            )
    return network


def random_observations(config, batch, k, seed):
    rng = np.random.default_rng(seed)
    found = {
        "hidden": rng.standard_normal((batch, config.hidden_size)),
        "candidates": rng.standard_normal((batch, k * config.candidate_dims)),
        "logprobs": -10 * rng.random((batch, k)),
        "potential": rng.standard_normal((batch, 1)),
        "remaining": rng.random((batch, 1)),
        "term_potentials": rng.standard_normal((batch, config.terms)),
        "weights": rng.standard_normal((batch, 1 + config.terms)),
    }
    found = {name: values.astype(np.float32) for name, values in found.items()}
    if config.context_tokens:
        context = rng.standard_normal((batch, config.context_tokens * config.candidate_dims))
        found["context"] = context.astype(np.float32)
    return {**found, "action_mask": rng.integers(0, 2, (batch, k), dtype=np.int8)}


@settings(deadline=None, max_examples=60)
@given(CONFIGS, st.integers(1, 9), st.integers(1, 6), st.integers(0, 999))
def test_numpy_and_torch_agree(config, batch, k, seed):
    network, observation = random_network(config, seed), random_observations(config, batch, k, seed)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(values) for name, values in observation.items()}
        expected = network.head_outputs(tensors).numpy()
        q = network(tensors) if config.n_quantiles is None else network(tensors).mean(dim=1)
    scorer = network.to_numpy()
    assert scorer.config == config
    rounding = 1e-5 * (NATS_PER_UNIT if config.terms else 1)
    np.testing.assert_allclose(scorer.head_outputs(observation), expected, rtol=1e-5, atol=rounding)
    np.testing.assert_allclose(scorer(observation), q.numpy(), rtol=1e-5, atol=rounding)
    assert scorer(observation).dtype == np.float32


@given(CONFIGS)
def test_the_config_tells_the_shapes_of_the_network(config):
    arguments = {name: getattr(config, name) for name in config.__dataclass_fields__}
    found = {name: tuple(tensor.shape) for name, tensor in TokenScorer(**arguments).state_dict().items()}
    assert found == config.shapes()


def test_observations_stay_as_they_are():
    config = ScorerConfig(6, 4, 8, context_tokens=2, dueling=True)
    observation = random_observations(config, 3, 2, 0)
    before = {name: values.copy() for name, values in observation.items()}
    random_network(config, 0).to_numpy()(observation)
    for name, values in before.items():
        np.testing.assert_array_equal(observation[name], values)


def test_large_numbers_do_not_overflow():
    config = ScorerConfig(6, 4, 8)
    scorer = random_network(config, 0).to_numpy()
    scorer.weights["body.0.weight"] *= 1e6
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(scorer(random_observations(config, 3, 2, 0))).all()


@pytest.mark.parametrize("change", ["missing", "other shape", "unknown"])
def test_weights_of_another_network_are_named(change):
    config = ScorerConfig(6, 4, 8)
    weights = random_network(config, 0).to_numpy().weights
    if change == "missing":
        del weights["head.bias"]
    elif change == "other shape":
        weights["head.bias"] = np.zeros(2)
    else:
        weights["head.bias_"] = np.zeros(1)
    with pytest.raises(ValueError, match=r"config and weights differ in 'head\.bias"):
        NumpyScorer(config, weights)


SEARCH = """
import sys
from qstar_decoding.agents import AStarPlanner, QHeuristic, SearchEngine, Request
from qstar_decoding.tasks import load_task

task = load_task("toy")
planner = AStarPlanner(task.mdp(), heuristic=QHeuristic("toy"))
plans = planner.plan_many(task.prompts.of("test")[:3], 50)
assert all(plan.text for plan in plans)
heavy = {"torch", "transformers", "stable_baselines3", "sb3_contrib", "matplotlib", "pandas", "datasets", "ray"}
print(*sorted(heavy & sys.modules.keys()))
"""

DECODE = """
import sys
from qstar_decoding.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted({"torch", "transformers", "stable_baselines3"} & sys.modules.keys()))
"""


def test_a_search_with_a_shipped_q_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_decode_with_a_shipped_q_imports_no_torch():
    command = [sys.executable, "-c", DECODE, "decode", "abc", "--task", "toy", "--budget", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["loaded:"], done.stderr
