"""`qstar evaluate`: every cell once, whatever interrupts it, and a report that says what was measured."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from qstar_decoding.agents import CONTENDERS, QStar, TokenQPolicy, evaluate_tasks
from qstar_decoding.agents.evaluation import comparison as comparison_module
from qstar_decoding.agents.evaluation import plots
from qstar_decoding.agents.evaluation.comparison import Comparison
from qstar_decoding.agents.evaluation.report import write_report
from qstar_decoding.agents.evaluation.results import Results
from qstar_decoding.cli import app as cli
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.errors import ConfigurationError, PromptError, UnknownNameError
from qstar_decoding.tasks import Task, load_task

TASK = load_task("toy")


@pytest.fixture(scope="module")
def q(tmp_path_factory):
    folder = tmp_path_factory.mktemp("q") / "q"
    vec = TokenDecodingVecEnv(2, prompts=TASK.prompts.of("train"), **TASK.env)
    options = {"searches_per_round": 4, "tokens_per_search": 12, "policy_kwargs": {"width": 16}}
    QStar(TokenQPolicy, vec, seed=0, **options).learn(100).save(folder, training_state=False)
    return str(folder)


def compare(folder, **changes):
    options = {"decoders": ["greedy", "best-of-n", "Q*"], "budgets": [20, 10], "seeds": 2, "tune": False}
    return Comparison(TASK, folder, **{**options, **changes})


def test_every_cell_is_decoded_once(tmp_path, q, monkeypatch):
    comparison = compare(tmp_path, qs=[q])
    # greedy needs one cell, best-of-n two seeds at two budgets, Q* one training seed at two budgets.
    assert len(list(comparison.cells())) == 1 + 4 + 2
    decoded = []
    evaluate = comparison_module.evaluate
    monkeypatch.setattr(
        comparison_module, "evaluate", lambda decoder, *args: decoded.append(decoder) or evaluate(decoder, *args)
    )
    comparison.run()
    prompts = len(TASK.prompts.of("test"))
    timed = len(comparison.names) * 2  # prompts
    assert len(decoded) == 7 + timed
    assert len(comparison.rows()) == 7 * prompts
    again = compare(tmp_path, qs=[q], budgets=[10, 20, 40])
    decoded.clear()
    again.run()
    assert len(decoded) == 3  # the new budget only: two seeds of best-of-n, and Q*


def test_an_interrupted_comparison_goes_on(tmp_path, q, monkeypatch):
    comparison, calls = compare(tmp_path, qs=[q]), []
    evaluate = comparison_module.evaluate

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(comparison_module, "evaluate", failing)
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    assert len(list((tmp_path / "cells").glob("*.json"))) == 3
    comparison.run()
    whole = compare(tmp_path / "other", qs=[q])
    monkeypatch.setattr(comparison_module, "evaluate", evaluate)
    whole.run(texts_only=True)
    assert comparison.rows() == whole.rows()
    assert comparison.timings().keys() == {*comparison.names}
    assert whole.timings() == {}
    whole.run()
    assert whole.timings().keys() == {*comparison.names}
    assert comparison.rows() == whole.rows()


def test_what_is_measured_is_what_the_plans_say(tmp_path, q):
    comparison = compare(tmp_path, qs=[q])
    comparison.run()
    for row in comparison.rows():
        assert row["objective"] == pytest.approx(row["reward"] + TASK.env["logprob_weight"] * row["logprob"])
        assert row["budget"] is None or row["lm_tokens"] <= row["budget"]
        assert row["certified"] in (0, 1)
    results = Results(comparison.rows())
    one = [r["objective"] for r in comparison.rows() if r["decoder"] == "best-of-n" and r["budget"] == 10]
    assert results.mean("best-of-n", 10, "objective") == pytest.approx(np.mean(one))
    assert results.mean("greedy", 10, "objective") == results.mean("greedy", 20, "objective")
    mean, low, high = results.ahead("best-of-n", 20)
    assert low <= mean <= high
    assert mean == pytest.approx(results.mean("Q*", 20, "objective") - results.mean("best-of-n", 20, "objective"))


def test_what_is_unfinished_is_marked_and_not_taken_for_the_j_of_a_completion(tmp_path, q):
    comparison = compare(tmp_path, qs=[q])
    comparison.run()
    assert "†" not in write_report(comparison, "qstar evaluate toy", []).read_text(encoding="utf-8")
    for path in (tmp_path / "cells").glob("best-of-n-10-*.json"):
        cut = [{**row, "stop": "partial", "objective": 1e3} for row in json.loads(path.read_text(encoding="utf-8"))]
        path.write_text(json.dumps(cut), encoding="utf-8")
    page = write_report(comparison, "qstar evaluate toy", []).read_text(encoding="utf-8")
    assert "| best-of-n | 1000.000† | " in page
    assert "scored as they stand" in page
    results = Results(comparison.rows())
    assert not results.finishes("best-of-n", 10)
    assert results.finishes("best-of-n", 20)
    assert results.tokens_for("best-of-n", 1e2) == np.inf


def test_tuning_takes_the_best_of_the_grid_and_keeps_it(tmp_path, q):
    comparison = compare(tmp_path, qs=[q], tune=True)
    setting = comparison.setting("best-of-n")
    trials = json.loads((tmp_path / "settings.json").read_text())["best-of-n"]["dev"]
    assert len(trials) == len(CONTENDERS["best-of-n"].grid) == 8
    assert max(trials, key=trials.get) == repr(setting)
    assert comparison.setting("greedy") == {}


def test_the_report_has_a_row_for_every_decoder(tmp_path, q):
    comparison = compare(tmp_path, qs=[q])
    comparison.run()
    path = write_report(comparison, "qstar evaluate toy", [{"time_steps": 100}])
    page = path.read_text(encoding="utf-8")
    for text in (
        "| greedy |",
        "| best-of-n |",
        "| **Q\\*** |".replace("\\", ""),
        "`qstar evaluate toy`",
        "100 LM tokens",
    ):
        assert text in page
    for plot in re.findall(r"!\[\]\((.*?)\)", page):
        assert (tmp_path / plot).is_file()
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparison.rows())
    assert float(rows[0]["objective"]) == pytest.approx(comparison.rows()[0]["objective"])


def test_a_folder_belongs_to_one_comparison(tmp_path, q):
    compare(tmp_path, qs=[q])
    with pytest.raises(ConfigurationError, match="differs in tune"):
        compare(tmp_path, qs=[q], tune=True)
    with pytest.raises(ConfigurationError, match="differs in qs"):
        compare(tmp_path, decoders=["greedy"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"decoders": ["gredy"]}, UnknownNameError, "unknown decoder 'gredy'; known, nearest first: 'greedy'"),
        ({"decoders": ["Q*"]}, ConfigurationError, "needs a Q-function"),
        ({"budgets": [0]}, ConfigurationError, "budget"),
        ({"budgets": []}, ConfigurationError, "at least one budget"),
        ({"budgets": [10**20]}, ConfigurationError, "a budget is at most 1,000,000,000 LM tokens"),
        ({"seeds": 0}, ConfigurationError, "seeds"),
    ],
)
def test_what_cannot_be_compared_is_said_before_any_work(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        compare(tmp_path, **changes)
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"planner": {"width": -1}}, ConfigurationError, "width is an integer"),
        ({"prompts": {"test": ["xyz"]}}, PromptError, "the test prompts of the task 'toy'"),
        ({"prompts": {"dev": []}}, PromptError, "the dev prompts of the task 'toy'"),
        ({"env": {**TASK.env, "reward": "exact_answer"}}, ConfigurationError, "the column 'answer'"),
    ],
)
def test_a_wrong_task_is_told_before_any_work(tmp_path, q, changes, error, message):
    given = {**TASK.model_dump(), **changes}
    given["prompts"] = {split: ["ab"[i:]] for i, split in enumerate(("test", "dev"))} | {"train": ["c"]}
    given["prompts"] |= changes.get("prompts", {})
    with pytest.raises(error, match=message):
        Comparison(Task.model_validate(given), tmp_path, qs=[q], decoders=["Q*"], budgets=[10])
    assert not list(tmp_path.iterdir())


def test_two_tasks_of_one_name_are_told_before_any_work(tmp_path):
    other = TASK.model_copy(update={"budgets": [9]})
    with pytest.raises(ConfigurationError, match="two tasks are named 'toy'"):
        evaluate_tasks([TASK, other], tmp_path, decoders=["greedy"], budgets=[8], seeds=1, tune=False)
    assert not list(tmp_path.iterdir())


def test_without_the_reward_nobody_takes_part_who_looks_at_it(tmp_path, q):
    task = TASK.model_copy(update={"planner": {"score": "q"}})
    comparison = Comparison(task, tmp_path, qs=[q], budgets=[10], tune=False)
    assert "best-of-n" not in comparison.names
    assert {"greedy", "majority", "VAS", "Q*"} <= set(comparison.names)
    with pytest.raises(ConfigurationError, match="keeps from the decoders"):
        Comparison(task, tmp_path / "x", qs=[q], decoders=["best-of-n"])


def test_the_command_writes_one_page_for_all_tasks(tmp_path, q):
    arguments = ["evaluate", "toy", "--decoders", "greedy,Q*", "--budgets", "5,10", "--seeds", "1", "--q", q]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path), "--no-tune"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "## toy" in page
    for plot in re.findall(r"!\[\]\((.*?)\)", page):
        assert (tmp_path / plot).is_file()
    with pytest.raises(ConfigurationError, match="--budgets is a list"):
        CliRunner().invoke(cli.app, ["evaluate", "toy", "--budgets", "many"], catch_exceptions=False)


def spoil(path, how):
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text)
    if how == "emptied":
        path.write_text("")
    elif how == "an empty list":
        path.write_text("[]")
    elif how == "cut off":
        path.write_text(text[: len(text) // 2])
    elif how == "a row lost":
        path.write_text(json.dumps(rows[:-1]))
    elif how == "a row twice":
        path.write_text(json.dumps([rows[0], *rows[:-1]]))
    elif how == "a key lost":
        path.write_text(json.dumps([{k: v for k, v in row.items() if k != "gap"} for row in rows]))
    elif how == "a word for a number":
        path.write_text(json.dumps([{**row, "objective": "much"} for row in rows]))
    elif how == "a mapping":
        path.write_text(json.dumps({"rows": rows}))
    elif how == "another encoding":
        path.write_bytes(text.encode("utf-16"))
    elif how == "bytes":
        path.write_bytes(bytes(range(256)))
    elif how == "too deep":
        path.write_text("[" * 100_000)


SPOILT = ["emptied", "an empty list", "cut off", "a row lost", "a row twice", "a key lost", "a word for a number"]
SPOILT += ["a mapping", "another encoding", "bytes", "too deep"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, q):
    folder = tmp_path_factory.mktemp("finished")
    comparison = compare(folder, qs=[q], budgets=[8], seeds=1)
    comparison.run()
    return folder, comparison.rows()


def test_a_picture_highlights_decoders_that_were_measured(tmp_path):
    evaluate_tasks([TASK], tmp_path, decoders=["greedy"], budgets=[8], seeds=1, tune=False)
    with pytest.raises(UnknownNameError, match="unknown decoder 'gredy'; known, nearest first: 'greedy'"):
        plots.draw("objective", [str(tmp_path)], names=["gredy"])


@pytest.mark.parametrize("how", SPOILT)
def test_a_cell_that_is_not_whole_is_decoded_again(tmp_path, q, finished, how):
    folder, rows = finished
    shutil.copytree(folder, tmp_path / "run")
    cell = tmp_path / "run" / "cells" / "best-of-n-8-0.json"
    spoil(cell, how)
    comparison = compare(tmp_path / "run", qs=[q], budgets=[8], seeds=1)
    assert len(comparison.rows()) == len(rows) - len(TASK.prompts.of("test"))  # never trusted
    comparison.run()
    assert comparison.rows() == rows
    assert cell.read_bytes() == (folder / "cells" / cell.name).read_bytes()


@pytest.mark.parametrize("name", ["settings.json", "timings.json", "calibration.npz"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"Q*": 3}', '{"Q*": {"chosen": 99, "dev": {}}}', "\x00\xff"])
def test_the_other_files_of_a_folder_are_made_again(tmp_path, q, finished, name, content):
    folder, rows = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content, encoding="latin-1")
    comparison = compare(tmp_path / "run", qs=[q], budgets=[8], seeds=1)
    comparison.run()
    assert comparison.rows() == rows
    assert comparison.timings().keys() == {"greedy", "best-of-n", "Q*"}
    assert len(comparison.calibration().estimate)
    assert comparison.setting("Q*") == {}


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\xff", "3"])
def test_a_folder_that_does_not_say_what_it_holds_is_refused(tmp_path, q, finished, content):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "comparison.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"comparison\.json (is not|does not describe)"):
        compare(tmp_path / "run", qs=[q], budgets=[8], seeds=1)


def test_a_report_shows_texts_and_says_who_is_left_out_and_why(tmp_path):
    comparison = compare(tmp_path, decoders=["greedy", "best-of-n"], budgets=[8], seeds=1)
    comparison.run()
    page = write_report(comparison, "a command").read_text(encoding="utf-8")
    assert "There is no Q* row, so nothing is compared with it." in page
    why = next(line for line in page.splitlines() if line.startswith("- arg max Q"))
    assert "Q*" in why.split(":")[0]
    assert why.endswith("it needs a Q-function; none was given (--q), and the package ships none for the task.")
    assert re.search(r"^- .*beam.*: not among the decoders asked for\.$", page, re.MULTILINE)
    for row in comparison.rows():
        if row["prompt_index"] < 3 and row["text"]:
            assert f"| {row['decoder']} | {row['objective']:.3f} | `{row['text']}`" in page


def test_texts_in_a_report_stay_in_their_cells():
    from qstar_decoding.agents.evaluation.report import _code

    assert _code("a|b\nc") == "`a\\|b⏎c`"
    assert _code("`x` and ``y``") == "``` `x` and ``y`` ```"
    assert _code("") == ""


def test_evaluate_tasks_is_a_function_that_goes_on(tmp_path, q):
    told = []
    options = {"decoders": ["greedy"], "budgets": [5], "seeds": 1, "tune": False, "qs": [q]}
    first = evaluate_tasks(["toy"], tmp_path, **options, progress=lambda *step: told.append(step))
    assert first.page.read_text(encoding="utf-8").startswith("# Results\n\n## toy")
    assert told[0] == ("toy: loading the language model", 0, None)
    assert any(text == "toy: greedy, any LM tokens, seed 0" and total for text, _, total in told)
    again = evaluate_tasks([TASK], tmp_path, **options)
    assert again.results["toy"].rows == first.results["toy"].rows
    for wrong, message in (({"budgets": []}, "at least one budget"), ({"decoders": ["gredy"]}, "unknown decoder")):
        with pytest.raises(ConfigurationError, match=message):
            evaluate_tasks(["toy"], tmp_path / "new", **{**options, **wrong})
    assert not (tmp_path / "new").exists()
