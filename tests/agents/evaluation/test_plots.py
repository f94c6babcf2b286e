"""Plots: what is drawn is what was measured, the same numbers give the same file, and wrong sources are named."""

import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.text import Text
from typer.testing import CliRunner

from qstar_decoding.agents import AStarPlanner, BeamSearch
from qstar_decoding.agents.evaluation.calibration import Calibration
from qstar_decoding.agents.evaluation.curves import read_curves
from qstar_decoding.agents.evaluation.plots import (
    plot_calibration,
    plot_results,
    plot_traces,
    result_lines,
    run_lines,
    save,
    spread,
    standing_out,
)
from qstar_decoding.agents.evaluation.results import Results
from qstar_decoding.agents.planning.registry import CONTENDERS
from qstar_decoding.cli import app as cli
from qstar_decoding.envs import DecodingMDP, TabularLM
from qstar_decoding.errors import ConfigurationError, UnknownNameError

BUDGETS = (50, 100, 200)


def qstar(*arguments, **kwargs):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], **kwargs)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(prompts=12, names=tuple(CONTENDERS), task="sentiment"):
    """What a comparison of every decoder could have measured."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        for budget in BUDGETS if CONTENDERS[name].budgeted else (None,):
            for seed in range(2 if CONTENDERS[name].random else 1):
                for prompt in range(prompts):
                    value = 0.03 * i + math.log10(budget or 30) / 10 + rng.normal(0, 0.1)
                    gap = 1 - value if name in standing_out("gap") else None
                    cell = {"task": task, "decoder": name, "budget": budget, "seed": seed, "prompt_index": prompt}
                    others = dict.fromkeys(("reward", "gold", "logprob", "tokens", "lm_tokens", "reward_calls"), 0.5)
                    texts = {"prompt": "a, b", "text": 'c\n"d"', "stop": "eos"}
                    yield {**cell, "objective": value, **others, "gap": gap, "certified": 0.0, **texts}


@pytest.fixture
def evaluation(tmp_path):
    """A folder as `qstar evaluate` leaves it."""
    folder = tmp_path / "evaluation" / "sentiment"
    folder.mkdir(parents=True)
    Results(list(rows())).write(folder / "results.csv")
    rng = np.random.default_rng(1)
    np.savez(folder / "calibration.npz", estimate=rng.normal(size=90), found=rng.normal(size=90), depth=np.zeros(90))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one training, and one of another, measured at different steps."""
    for name, steps, slope in (("toy-0", (100, 200, 300), 1), ("toy-1", (100, 250, 300), 3), ("other", (100, 300), 0)):
        (tmp_path / name).mkdir()
        points = [{"time_steps": s, "held_out/objective_8": slope * s, "calibration/bias": -s} for s in steps]
        (tmp_path / name / "diagnostics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return tmp_path


def test_unfinished_texts_are_not_drawn():
    cut = [{**row, "stop": "partial"} if row["budget"] == 50 and row["decoder"] == "Levin" else row for row in rows()]
    by_name = {line.label: line for line in result_lines(Results(cut), "objective", ["Q*"])}
    assert by_name["Levin"].x.tolist() == [100, 200]
    assert by_name["Q*"].x.tolist() == [50, 100, 200]


def test_results_come_back_from_the_file_as_they_were(evaluation):
    again, before = Results.read(evaluation / "results.csv"), Results(list(rows()))
    assert list(again.rows) == list(before.rows)
    assert again.names == list(CONTENDERS)
    assert json.dumps(again.table()) == json.dumps(before.table())  # which takes NaN for equal


def test_lines_are_the_means_and_the_intervals_are_around_them():
    results = Results(list(rows()))
    lines = {line.label: line for line in result_lines(results, "objective", ["Q*"])}
    assert lines.keys() == CONTENDERS.keys()
    for budget, y in zip(BUDGETS, lines["best-of-n"].y, strict=True):
        values = [r["objective"] for r in results.rows if r["decoder"] == "best-of-n" and r["budget"] == budget]
        assert y == pytest.approx(np.mean(values))
    assert len(set(lines["greedy"].y)) == 1  # has no use for a budget
    assert (lines["Q*"].low < lines["Q*"].y).all()
    assert (lines["Q*"].y < lines["Q*"].high).all()
    assert lines["beam"].low is None
    assert {line.label for line in result_lines(results, "gap", standing_out("gap"))} == set(standing_out("gap"))


def test_twenty_labels_do_not_overlap_and_their_names_are_all_there():
    figure = plot_results([Results(list(rows()))])
    [axes] = figure.axes
    figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the connecting lines
    assert boxes.keys() == CONTENDERS.keys()
    ordered = sorted(boxes.values(), key=lambda box: box.y0)
    assert all(low.y0 + 0.9 * low.height <= high.y0 for low, high in itertools.pairwise(ordered))
    assert all(box.x1 <= figure.bbox.width for box in ordered)


@pytest.mark.parametrize("seed", range(20))
def test_spreading_keeps_the_distance_and_moves_as_little_as_possible(seed):
    heights = np.sort(np.random.default_rng(seed).uniform(size=8))
    moved = spread(heights, 0.1)
    assert (np.diff(moved) >= 0.1 - 1e-12).all()
    # Least squares over a convex set: no direction that stays in it leads to something nearer.
    for trial in np.random.default_rng(seed).uniform(size=(200, 8)):
        other = np.cumsum(np.append(trial[0], 0.1 + 0.2 * trial[1:]))
        assert (heights - moved) @ (other - moved) <= 1e-9
    assert spread(np.array([0.1, 0.5]), 0.1).tolist() == [0.1, 0.5]


def test_seeds_become_a_mean_and_a_range(runs):
    groups = {"toy": [read_curves(runs / "toy-0"), read_curves(runs / "toy-1")], "other": [read_curves(runs / "other")]}
    toy, other = run_lines(groups, "held_out/objective_8")
    assert toy.x.tolist() == [100, 200, 250, 300]
    np.testing.assert_allclose(toy.y, 2 * toy.x)
    np.testing.assert_allclose(toy.low, toy.x)
    np.testing.assert_allclose(toy.high, 3 * toy.x)
    assert other.low is None
    assert run_lines(groups, "nothing") == []


def test_tensorboards_log_of_any_agent_is_read(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "DQN_1")) as writer:
        for step in (10, 20):
            writer.add_scalar("rollout/ep_rew_mean", step / 10, step)
    assert read_curves(tmp_path) == {"rollout/ep_rew_mean": ([10, 20], [1.0, 2.0])}
    out = tmp_path / "curve.svg"
    drawn = json.loads(qstar("plot", "learning", tmp_path, "--out", out, "--json").stdout)["drawn"]
    assert drawn["rollout/ep_rew_mean"][0]["y"] == [1.0, 2.0]


@pytest.mark.parametrize(("suffix", "beginning"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_the_same_numbers_give_the_same_file(tmp_path, suffix, beginning):
    compared = Calibration(*np.random.default_rng(0).normal(size=(3, 60)))
    files = [save(plot_calibration({"toy": compared}), tmp_path / f"{i}.{suffix}") for i in range(2)]
    assert files[0].read_bytes().startswith(beginning)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_traces_of_plans_go_from_decode_to_plot(tmp_path):
    path = tmp_path / "trace.svg"
    arguments = ("decode", "ab", "--task", "toy", "--budget", 300, "--json")
    plans = [qstar(*arguments, "--decoder", name, "--q", "none").stdout for name in ("astar", "beam")]
    drawn = json.loads(qstar("plot", "trace", "-", "--out", path, "--json", input="".join(plans)).stdout)
    assert [line["label"] for line in drawn["drawn"]] == ["astar, LB", "astar, UB", "beam, LB", "beam, UB"]
    plan, lower, upper = json.loads(plans[0]), *drawn["drawn"][:2]
    assert (lower["y"][-1], upper["y"][-1]) == (plan["lower_bound"], plan["upper_bound"])
    assert lower["x"][-1] == plan["usage"]["lm_tokens"]
    assert b"<svg" in path.read_bytes()


def test_the_bounds_that_are_drawn_are_the_searchs():
    mdp = DecodingMDP(TabularLM.random(5, 1, seed=0), reward="pangram", top_k=3, max_new_tokens=4)
    plans = {"A*": AStarPlanner(mdp).plan("ab"), "beam": BeamSearch(mdp).plan("ab", 20)}
    [axes] = plot_traces({name: plan.trace for name, plan in plans.items()}).axes
    lower, upper = (line.get_ydata() for line in axes.lines[:2])
    known = np.isfinite(lower)
    assert (np.diff(lower[known]) >= 0).all()
    assert (np.diff(upper) <= 1e-12).all()
    assert lower[-1] == pytest.approx(upper[-1])  # certified


@pytest.mark.parametrize("kind", ["objective", "gap", "calibration"])
def test_an_evaluation_is_drawn_from_its_folder_or_the_one_above(evaluation, kind):
    for source in (evaluation, evaluation.parent):
        out = evaluation / f"{kind}.pdf"
        drawn = json.loads(qstar("plot", kind, source, "--out", out, "--json").stdout)
        assert drawn["kind"] == kind
        assert "sentiment" in drawn["drawn"]
        assert out.read_bytes().startswith(b"%PDF")


def test_trainings_are_drawn_by_their_names(runs):
    out = runs / "x.svg"
    sources = [runs / "toy-0", runs / "toy-1", f"mine={runs / 'other'}"]
    drawn = json.loads(qstar("plot", "learning", *sources, "--out", out, "--json").stdout)["drawn"]
    assert [line["label"] for line in drawn["held_out/objective_8"]] == ["toy", "mine"]
    drawn = json.loads(qstar("plot", "errors", runs / "other", "--out", out, "--json").stdout)["drawn"]
    assert list(drawn) == ["calibration/bias"]
    assert qstar("plot", "learning", runs / "other", "--out", out).stdout == f"{out}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["objectiv", "."], UnknownNameError, "unknown picture 'objectiv'; known, nearest first: 'objective'"),
        (["objective", "."], ConfigurationError, "no results.csv in '.'"),
        (["objective", ".", "--out", "x.jpg"], ConfigurationError, r"ends in .svg, .pdf, .png, got 'x.jpg'"),
        (["objective", ".", "--out", "no/x.svg"], ConfigurationError, "no folder 'no' to write x.svg into"),
        (["learning", "nowhere"], ConfigurationError, "no folder 'nowhere'"),
        (["learning", "."], ConfigurationError, "no diagnostics.jsonl and no TensorBoard log"),
        (["learning", "toy-0", "--curve", "los"], UnknownNameError, "unknown quantity 'los'"),
        (["learning", "toy-0", "--highlight", "greedy"], ConfigurationError, "leave them out for learning"),
        (["trace", "toy-0", "--curve", "loss"], ConfigurationError, "leave them out for trace"),
        (["learning", "cut"], ConfigurationError, "diagnostics.jsonl, line 2 is not JSON"),
        (["trace", "cut/diagnostics.jsonl"], ConfigurationError, "line 1 is not a plan of qstar decode --json"),
        (["calibration", "cut"], ConfigurationError, "is not a calibration"),
        (["gap", "cut"], ConfigurationError, "it has no column budget"),
    ],
)
def test_wrong_sources_are_named(runs, monkeypatch, arguments, error, message):
    monkeypatch.chdir(runs)
    (runs / "cut").mkdir()
    (runs / "cut" / "diagnostics.jsonl").write_text('{"time_steps": 1}\n{"time_st')
    (runs / "cut" / "calibration.npz").write_text("not an archive")
    (runs / "cut" / "results.csv").write_text("task,decoder\n")
    if arguments[1] == ".":
        monkeypatch.chdir(runs / "other")
        (runs / "other" / "diagnostics.jsonl").unlink()
    with pytest.raises(error, match=message):
        qstar("plot", *arguments)
    assert not list(runs.rglob("*.svg"))
