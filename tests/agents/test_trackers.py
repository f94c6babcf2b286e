"""Trackers: every figure of a training reaches them, and what is missing is said before any work."""

import sys
import types

import pytest
from stable_baselines3 import DQN

from qstar_decoding.agents import Tracking, train_task
from qstar_decoding.errors import ConfigurationError, UnknownNameError

from .test_training import TASK


@pytest.fixture(params=["trackio", "wandb"])
def recorded(request, monkeypatch):
    """A module in the place of a tracker, which writes down what it is called with."""
    module = types.ModuleType(request.param)
    module.calls = []
    for name in ("init", "log", "finish"):
        monkeypatch.setattr(module, name, lambda *a, _name=name, **k: module.calls.append((_name, a, k)), raising=False)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_training_begins_a_run_logs_and_ends_it(recorded, tmp_path):
    result = train_task(TASK, tmp_path / "tiny-7", seed=7, track=recorded.__name__)
    names = [name for name, _, _ in recorded.calls]
    assert names[0] == "init"
    assert names[-1] == "finish"
    assert names.count("init") == names.count("finish") == 1
    begun = recorded.calls[0][2]
    assert (begun["project"], begun["name"]) == ("qstar-decoding", "tiny-7")
    assert begun["config"]["seed"] == 7
    assert begun["config"]["env"]["reward"] == "pangram"
    logged = [(call[1][0], call[2]["step"]) for call in recorded.calls if call[0] == "log"]
    figures = {key: value for row, _ in logged for key, value in row.items()}
    assert {"search/objective", "train/loss", "train/underestimation", "train/n_updates"} <= figures.keys()
    assert any(key.startswith("dev") or "gap" in key or "objective" in key for key in figures)
    assert all(type(value) in (int, float) for value in figures.values())
    assert logged[-1][1] == result.time_steps
    assert list((tmp_path / "tiny-7" / "tensorboard").rglob("events*"))  # beside it, not in its place


def test_the_run_ends_where_the_training_fails(recorded, tmp_path):
    def interrupt(label, done, total):
        if label.startswith("training") and done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(TASK, tmp_path / "run", track=recorded.__name__, progress=interrupt)
    assert recorded.calls[-1][0] == "finish"


def test_any_agent_of_stable_baselines3_is_tracked(recorded):
    tracking = Tracking(recorded.__name__, name="pole", config={"gamma": 0.9}, mode="kept")
    agent = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, gamma=0.9)
    agent.learn(120, callback=tracking, log_interval=1)
    assert recorded.calls[0][2]["mode"] == "kept"
    logged = {key for name, arguments, _ in recorded.calls if name == "log" for key in arguments[0]}
    assert {"rollout/ep_rew_mean", "train/loss"} <= logged
    tracking.close()  # a second time
    assert [name for name, _, _ in recorded.calls].count("finish") == 1


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_an_absent_tracker_is_said_before_anything_is_written(tracker, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ConfigurationError, match=f"'{tracker}' is not installed.*pip install {tracker}"):
        train_task(TASK, tmp_path / "run", track=tracker)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnknownNameError, match="tracker"):
        train_task(TASK, tmp_path / "run", track="mlflow")


def test_a_tracker_that_cannot_begin_is_named(monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigurationError, match="wandb cannot begin a run: ZeroDivisionError: division by zero"):
        Tracking("wandb")


def test_the_real_trackio_keeps_the_figures(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    trackio = pytest.importorskip(
        "trackio", reason="trackio pins an older pillow than constraints.txt; docs/interop.md"
    )
    result = train_task(TASK, tmp_path / "tiny-0", track="trackio")
    run = trackio.Api().runs("qstar-decoding")[0]
    assert run.name == "tiny-0"
    tables = b"".join(path.read_bytes() for path in (tmp_path / "kept").rglob("qstar-decoding*"))
    assert b"train/loss" in tables
    assert result.time_steps >= 120


def test_the_real_wandb_writes_a_run_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    pytest.importorskip("wandb", reason="wandb is no dependency of the tests; docs/interop.md says how it was tried")
    train_task(TASK, tmp_path / "tiny-0", track="wandb")
    assert list(tmp_path.rglob("*.wandb"))
