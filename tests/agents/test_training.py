"""``train_task``: what ``qstar train`` does, for a Python program."""

import contextlib
import json

import numpy as np
import pytest

from qstar_decoding.agents import InProcess, QHeuristic, QStar, evaluate, held_out_figures, mean_figures, train_task
from qstar_decoding.agents.learning.checkpoints import find_checkpoint
from qstar_decoding.agents.planning.greedy import GreedyDecoder
from qstar_decoding.errors import CheckpointError, ConfigurationError, PromptError, UnknownNameError
from qstar_decoding.files import locked
from qstar_decoding.tasks import Task

TASK = Task.model_validate(
    {
        "name": "tiny",
        "description": "Four letters.",
        "env": {"model": "toy", "reward": "pangram", "top_k": 3, "max_new_tokens": 4},
        "prompts": {"train": ["ab", "cd", "ef", "ga"], "dev": ["bc"], "test": ["de", "fa"]},
        "steps": 120,
        "training": {
            "searches_per_round": 2,
            "tokens_per_search": 12,
            "gradient_steps": 2,
            "policy_kwargs": {"width": 8},
        },
        "budgets": [5, 10],
    }
)


def weights(agent):
    return {name: value.numpy() for name, value in agent.q_net.state_dict().items()}


def saved_steps(folder):
    return json.loads((folder / "checkpoint" / "training_state.json").read_text())["num_timesteps"]


def test_a_python_program_trains_as_the_command_does(tmp_path):
    calls = []
    result = train_task(TASK, tmp_path / "run", seed=3, progress=lambda *call: calls.append(call))
    assert isinstance(result.agent, QStar)
    assert result.time_steps == result.agent.num_timesteps >= 120
    assert result.command == "qstar train tiny --steps 120 --seed 3"
    described = QHeuristic(tmp_path / "run").q.description
    assert described["seed"] == 3
    assert described["time_steps"] == result.time_steps
    assert described["held_out"]["arg max Q"]["objective"] == result.held_out["arg max Q"]["objective"]
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    assert (tmp_path / "run" / "diagnostics.jsonl").is_file()
    labels = list(dict.fromkeys(label for label, _, _ in calls))
    assert labels[:2] == ["loading the language model", "training, seed 3"]
    assert labels[2:] == [f"held-out prompts: {name}" for name in result.held_out]
    done = [(count, total) for label, count, total in calls if label == "training, seed 3"]
    assert done[0] == (0, 120)
    assert done[-1][0] >= 120
    assert done == sorted(done)


def test_the_figures_are_the_means_of_the_decoders_outcomes(tmp_path):
    result = train_task(TASK, tmp_path / "run")
    assert list(result.held_out) == [
        "random legal actions",
        "greedy LM",
        "arg max Q",
        "A* on the bound, 10",
        "A* on Q, 5",
        "A* on Q, 10",
    ]
    outcomes = evaluate(GreedyDecoder(result.agent.get_env()), ["de", "fa"])
    greedy = result.held_out["greedy LM"]
    assert greedy["objective"] == pytest.approx(np.mean([plan.objective for plan in outcomes.plans]), abs=1e-4)
    assert greedy["reward"] == pytest.approx(np.mean([plan.reward for plan in outcomes.plans]), abs=1e-4)
    assert {k: v for k, v in mean_figures([outcomes]).items() if k != "seconds"} == {
        k: v for k, v in greedy.items() if k != "seconds"
    }
    again = held_out_figures(result.agent, TASK)
    assert again["A* on Q, 10"]["objective"] == result.held_out["A* on Q, 10"]["objective"]


def test_q_learns_from_the_training_reward_and_is_measured_by_the_tasks(tmp_path):
    other = TASK.model_copy(update={"training_reward": "-1 * pangram"})
    taught, plain = train_task(other, tmp_path / "taught"), train_task(TASK, tmp_path / "plain")
    alone = train_task(TASK.model_copy(update={"env": {**TASK.env, "reward": "-1 * pangram"}}), tmp_path / "alone")
    for name, value in weights(taught.agent).items():
        np.testing.assert_array_equal(weights(alone.agent)[name], value, err_msg=name)
    assert taught.held_out["greedy LM"]["objective"] == plain.held_out["greedy LM"]["objective"]
    assert taught.held_out["greedy LM"]["objective"] != alone.held_out["greedy LM"]["objective"]
    measured, by_itself = (
        json.loads((tmp_path / run / "diagnostics.jsonl").read_text().splitlines()[-1])["held_out/objective_10"]
        for run in ("taught", "alone")
    )
    assert measured != by_itself


@pytest.mark.parametrize("at", [30, 60])
def test_a_killed_training_has_saved_its_first_round_and_resumes_to_the_same_weights(tmp_path, at):
    whole = train_task(TASK, tmp_path / "whole")

    def kill(label, done, total):
        if label.startswith("training") and done >= at:
            raise SystemExit  # as a kill: nothing is saved on the way out

    with pytest.raises(SystemExit):
        train_task(TASK, tmp_path / "run", progress=kill)
    before = saved_steps(tmp_path / "run")
    assert 0 < before < at + 24
    resumed = train_task(TASK, tmp_path / "run", resume=True)
    assert resumed.time_steps == whole.time_steps
    assert resumed.held_out["A* on Q, 10"]["objective"] == whole.held_out["A* on Q, 10"]["objective"]
    for name, value in weights(whole.agent).items():
        np.testing.assert_array_equal(weights(resumed.agent)[name], value, err_msg=name)


def test_the_last_checkpoint_is_saved_before_the_last_measurement(tmp_path, monkeypatch):
    from qstar_decoding.agents import Diagnostics

    def killed(self):
        raise SystemExit

    monkeypatch.setattr(Diagnostics, "_on_training_end", killed)
    with pytest.raises(SystemExit):
        train_task(TASK, tmp_path / "run")
    assert saved_steps(tmp_path / "run") >= 120


def test_an_interrupt_saves_where_the_training_was(tmp_path):
    def interrupt(label, done, total):
        if label.startswith("training") and done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(TASK, tmp_path / "run", progress=interrupt)
    assert saved_steps(tmp_path / "run") > 50


def test_workers_are_started_after_the_checks_and_learn_the_same_whoever_they_are(tmp_path):
    started = []

    @contextlib.contextmanager
    def workers(make):
        started.append(make)
        yield InProcess(make())

    with pytest.raises(CheckpointError, match="nothing to resume"):
        train_task(TASK, tmp_path / "a", resume=True, workers=workers)
    assert not started
    a = train_task(TASK, tmp_path / "a", workers=workers)
    b = train_task(TASK, tmp_path / "b", workers=workers)
    assert len(started) == 2
    for name, value in weights(a.agent).items():
        np.testing.assert_array_equal(weights(b.agent)[name], value, err_msg=name)


def test_a_training_does_not_go_on_with_another_objective(tmp_path):
    train_task(TASK, tmp_path / "run", steps=1)
    for change, difference in (
        ({"training_reward": "distinct"}, f"reward {TASK.env['reward']!r} \\(learned\\) against 'distinct' \\(here\\)"),
        ({"env": {**TASK.env, "logprob_weight": 0.3}}, "logprob_weight .* against 0.3"),
    ):
        with pytest.raises(CheckpointError, match=f"learned another objective: {difference}.*another folder"):
            train_task(TASK.model_copy(update=change), tmp_path / "run", resume=True)
    assert train_task(TASK, tmp_path / "run", steps=40, resume=True).time_steps >= 40


def test_mistakes_are_told_before_any_work(tmp_path):
    train_task(TASK, tmp_path / "run", steps=1)
    with pytest.raises(ConfigurationError, match="resume=True"):
        train_task(TASK, tmp_path / "run")
    with pytest.raises(ConfigurationError, match="steps is an integer >= 1, got 0"):
        train_task(TASK, tmp_path / "new", steps=0)
    with pytest.raises(ConfigurationError, match="save_every is an integer"):
        train_task(TASK, tmp_path / "new", save_every=0)
    for training, message in (
        ({"optimizm": 0.7}, r"no argument 'optimizm'; did you mean 'optimism'\?"),
        ({"env": "CartPole-v1"}, "no argument 'env'"),
        ({"optimism": 2}, "optimism"),
        ({"device": "tpu"}, "device 'tpu' is not one"),
    ):
        changed = TASK.model_copy(update={"training": training})
        with pytest.raises(ConfigurationError, match=message):
            train_task(changed, tmp_path / "new")
    with pytest.raises(ConfigurationError, match=r"no argument 'widht'; did you mean 'width'\?"):
        train_task(TASK.model_copy(update={"planner": {"widht": 3}}), tmp_path / "new")
    with pytest.raises(ConfigurationError, match="no argument 'heuristic'"):
        train_task(TASK.model_copy(update={"planner": {"heuristic": "toy"}}), tmp_path / "new")
    with pytest.raises(UnknownNameError, match="unknown task 'toyy'"):
        train_task("toyy", tmp_path / "new")
    assert find_checkpoint(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "run" / ".lock"), pytest.raises(ConfigurationError, match="another process is writing"):
        train_task(TASK, tmp_path / "run", resume=True)


def test_a_training_does_not_go_on_with_other_settings(tmp_path):
    train_task(TASK, tmp_path / "run", steps=1, seed=3)
    wider = {**TASK.training, "policy_kwargs": {"width": 16}}
    other = {**TASK.training, "gradient_steps": 3}
    for training, seed, difference in (
        (TASK.training, 0, "seed 3 \\(saved\\) against 0 \\(here\\)"),
        (other, 3, "gradient_steps 2 .* 3"),
        (wider, 3, "width 8 .* 16"),
    ):
        with pytest.raises(CheckpointError, match=f"trained with other settings: {difference}.*another folder"):
            train_task(TASK.model_copy(update={"training": training}), tmp_path / "run", resume=True, seed=seed)
    assert train_task(TASK, tmp_path / "run", steps=40, resume=True, seed=3).time_steps >= 40


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"planner": {"search": "x"}}, UnknownNameError, "unknown search 'x'"),
        ({"planner": {"width": -1}}, ConfigurationError, "width is an integer"),
        ({"prompts": {"test": []}}, PromptError, "the test prompts of the task 'tiny': the list of prompts is empty"),
        ({"prompts": {"dev": ["xyz"]}}, PromptError, "the dev prompts of the task 'tiny'"),
        ({"prompts": {"test": ["a" * 2000]}}, PromptError, "the test prompts .*2000 tokens"),
        ({"prompts": {"test": [{"promt": "a"}]}}, PromptError, "the test prompts .*the key 'prompt'"),
        ({"env": {"reward": "exact_answer"}}, ConfigurationError, "the test prompts .*the column 'answer'"),
        ({"env": {"constraint": "star_graph"}}, ConfigurationError, "the test prompts .*the columns 'edges'"),
    ],
)
def test_what_would_end_the_measurements_is_told_before_the_training(tmp_path, changes, error, message):
    columns = {"answer": "a", "edges": [["a", "b"]], "start": "a"}
    listed = {split: [{"prompt": one, **columns} for one in TASK.prompts.of(split)] for split in ("train", "dev")}
    given = {**TASK.model_dump(), **changes}
    given["env"] = {**TASK.env, **changes.get("env", {})}
    given["prompts"] = {**listed, "test": TASK.prompts.of("test"), **changes.get("prompts", {})}
    with pytest.raises(error, match=message):
        train_task(Task.model_validate(given), tmp_path)
    assert not (tmp_path / "diagnostics.jsonl").exists()
