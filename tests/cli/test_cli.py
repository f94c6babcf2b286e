"""The command line, on the real model."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

import qstar_decoding
from qstar_decoding.agents import AStarPlanner, QHeuristic
from qstar_decoding.cli import app as cli
from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import as_reward, register_reward, registry
from qstar_decoding.tasks import load_task

TINY = {
    "description": "Six tokens of a review, for the tests.",
    "env": {"reward": "sentiment", "top_k": 4, "max_new_tokens": 6},
    "prompts": {"train": ["The movie was", "The food was"], "dev": ["A dog"], "test": ["The play was", "My week"]},
    "steps": 60,
    "training": {"searches_per_round": 2, "tokens_per_search": 20, "gradient_steps": 2, "policy_kwargs": {"width": 16}},
}


def qstar(*arguments, **kwargs):
    """Run the command as `main` does, exit codes included."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], **kwargs)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_decode_prints_the_text_its_objective_and_the_bounds():
    output = qstar("decode", "The movie was", "--budget", 60, "--n", 2).stdout
    assert "1. The movie was" in output
    assert "reward" in output
    assert "LB" in output
    assert "UB" in output
    assert "60 LM tokens" in output


def test_decode_writes_the_searched_tree(tmp_path):
    qstar("decode", "The sea", "--budget", 30, "--tree", tmp_path / "tree.html")
    assert "The sea" in (tmp_path / "tree.html").read_text(encoding="utf-8")


def test_decode_shows_each_part_of_a_composed_reward():
    output = qstar("decode", "The sea", "--budget", 40, "--reward", "0.5*min(sentiment, length) - 0*pangram").stdout
    assert re.search(r"sentiment -?0\.\d+, length 0\.\d+, pangram 0\.\d+", output)


@pytest.mark.parametrize("decoder", ["astar", "greedy", "beam", "sample", "mcts", "rebase"])
def test_decode_as_json_is_what_the_library_returns(decoder):
    result = json.loads(
        qstar("decode", "-", "--decoder", decoder, "--budget", 40, "--json", input="The play was\n").stdout
    )
    assert result["prompt"] == "The play was"
    assert result["usage"]["lm_tokens"] <= 40
    assert (
        result["lower_bound"]
        == result["objective"]
        == pytest.approx(result["reward"] + load_task("review").env["logprob_weight"] * result["logprob"])
    )
    assert result["gap"] == pytest.approx(result["upper_bound"] - result["lower_bound"])
    if decoder == "astar":
        task = load_task("review")
        planner = AStarPlanner(task.mdp(), heuristic=QHeuristic("review"), **task.planner)
        assert planner.plan("The play was", 40).text == result["text"]


def test_decode_with_another_k_says_that_the_shipped_q_does_not_fit():
    result = qstar("decode", "The movie was", "--top-k", 3, "--max-new-tokens", 4, "--budget", 400, "--json")
    assert "top_k 8 (trained) against 3 (here)" in result.stderr.replace("\n", " ")
    assert json.loads(result.stdout)["certified"] is True


def test_an_unfinished_text_is_said_to_be_unfinished():
    output = qstar("decode", "The play was", "--budget", 5).stdout
    assert "unfinished" in output
    assert "--budget 31" in output
    assert "nan" not in output


def test_an_unbounded_bound_is_null_in_json():
    result = json.loads(
        qstar("decode", "The movie was", "--budget", 5, "--decoder", "greedy", "--json", "--max-new-tokens", 9).stdout
    )
    assert result["objective"] is None  # nothing was finished
    assert result["stop"] == "partial"


def test_train_writes_logs_and_a_checkpoint_that_resumes_and_decodes(task_file, tmp_path):
    out = tmp_path / "run"
    first = qstar("train", task_file, "--out", out)
    for name in ("random legal actions", "greedy LM", "arg max Q"):
        assert name in first.stdout
    assert list((out / "tensorboard").rglob("events*"))
    assert json.loads((out / "q" / "config.json").read_text())["description"]["held_out"]["arg max Q"]["reward"] <= 1
    assert json.loads(qstar("decode", "A cat", "--task", task_file, "--q", out, "--json").stdout)["text"]
    with pytest.raises(ConfigurationError, match="--resume"):
        qstar("train", task_file, "--out", out)
    again = qstar("train", task_file, "--out", out, "--resume", "--steps", 120)
    assert "resuming at" in again.stderr
    assert json.loads((out / "checkpoint" / "training_state.json").read_text())["num_timesteps"] >= 120


@pytest.fixture
def flaky():
    """A reward that fails on texts with an "e" in them, until it is mended."""
    bug = {"in": True}

    def score(prompt, completion):
        if "e" in completion and bug["in"]:
            raise ZeroDivisionError("a bug in the reward")
        return len(set(completion)) / 7

    register_reward("flaky")(lambda: as_reward(score, lower=0, upper=1))
    yield bug
    registry._factories.pop("flaky")


def test_a_reward_that_fails_in_training_leaves_a_checkpoint_to_go_on_from(tmp_path, flaky):
    training = {"searches_per_round": 4, "tokens_per_search": 20, "gradient_steps": 2, "policy_kwargs": {"width": 8}}
    env = {"model": "toy", "reward": "flaky", "top_k": 3, "max_new_tokens": 4}
    prompts = {"train": ["ab", "cd", "ef", "ga"], "dev": ["bc"], "test": ["de"]}
    task = {"description": "x", "env": env, "prompts": prompts, "steps": 600, "training": training, "budgets": [5]}
    path, out = tmp_path / "flaky.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(task))
    with pytest.raises(RewardError, match=r"a bug in the reward, for the completion '\w*e\w*'"):
        qstar("train", path, "--out", out)
    saved = json.loads((out / "checkpoint" / "training_state.json").read_text())["num_timesteps"]
    assert saved >= 0
    flaky["in"] = False
    result = qstar("train", path, "--out", out, "--resume")
    assert f"resuming at {saved:,}" in result.stderr
    assert "A* on Q, 5" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "x", "--decoder", "asta"], "unknown decoder 'asta'; known, nearest first: 'astar'"),
        (["decode", "x", "--task", "sentimint"], "unknown task 'sentimint'; known, nearest first: 'sentiment'"),
        (["decode", "x", "--reward", "sentimental"], "unknown reward 'sentimental'"),
        (["decode", "x", "--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["decode", "x", "--model", "SmolLM2-135M"], "known, nearest first: 'smollm2-135m-instruct'"),
        (["decode", "x", "--q", "nowhere"], "unknown checkpoint 'nowhere'"),
        (["decode", "x", "--budget", "0"], "lm_tokens"),
        (["decode", "x", "--top-k", "0"], "top_k is an integer"),
        (["decode", "x", "--max-new-tokens", "0"], "max_new_tokens is an integer >= 1"),
        (["decode", " "], "prompt is empty"),
        (["decode", ""], "prompt is empty"),
        (["train", "nothing"], "unknown task 'nothing'"),
        (["decoed", "x"], "No such command 'decoed'. Did you mean 'decode'"),
        (["decode", "x", "--bugdet", "3"], "No such option: --bugdet (Possible options: --budget"),
        (["decode", "x", "--n", "0"], "Invalid value for '--n'"),
        (["decode", "x", "--budget", "many"], "Invalid value for '--budget'"),
        (["train"], "Missing argument 'task'. See qstar train --help."),
        (["train", "toy", "--steps", "-4"], "Invalid value for '--steps'"),
        (["evaluate", "toy", "--decoders", "gredy"], "unknown decoder 'gredy'; known, nearest first: 'greedy'"),
        (["evaluate", "toy", "--budgets", "-5"], "a budget is an integer >= 1, got -5"),
        (["demo", "--task", "toy", "--budget", "-1"], "lm_tokens"),
        (["plot", "trace", "nowhere.json"], "No such file or directory: nowhere.json"),
        (["train-reward", "nowhere.jsonl"], "'nowhere.jsonl' cannot be read"),
        (["train", "sentiment", "--resume", "--out", "nowhere"], "nothing to resume"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qstar", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "ab", "--task", "toy", "--tree", "file/tree.html"],
        ["train", "toy", "--out", "file/run"],
        ["evaluate", "toy", "--out", "file/evaluation"],
        ["demo", "--task", "toy", "--svg", "file/demo.svg"],
        ["plot", "trace", "-", "--out", "file/trace.svg"],
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_any_work(arguments, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way, for root too, whom no permission stops")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qstar_decoding.tasks.Task.mdp", lambda *args, **kwargs: pytest.fail("work was begun"))
    with pytest.raises(ConfigurationError, match=r"nothing can be written into|no folder 'file'"):
        qstar(*arguments)


def test_json_is_one_object_on_standard_output_and_nothing_else(tmp_path):
    """Of every command that takes it; not even NaN, which is no JSON, and no colours."""
    run, evaluation = tmp_path / "run", tmp_path / "evaluation"
    found = {}
    for arguments in (
        ["train", "toy", "--steps", 200, "--out", run],
        ["decode", "ab", "--task", "toy", "--q", run],
        ["demo", "--task", "toy", "--prompts", 1, "--budget", 20],
        [
            "evaluate",
            "toy",
            "--decoders",
            "greedy,Q*",
            "--budgets",
            "5,9",
            "--seeds",
            1,
            "--no-tune",
            "--out",
            evaluation,
        ],
        ["plot", "objective", evaluation, "--out", tmp_path / "objective.svg"],
        ["tasks"],
        ["models"],
    ):
        output = qstar(*arguments, "--json").stdout
        found[arguments[0]] = json.loads(output, parse_constant=pytest.fail)
        assert isinstance(found[arguments[0]], dict)
        assert output.count("\n") == 1
        assert "\x1b" not in output
    assert found["train"]["held_out"]["arg max Q"]["lm_tokens"] > 0
    rows = {(row["decoder"], row["budget"]): row for row in found["evaluate"]["tasks"]["toy"]}
    assert rows.keys() == {("greedy", None), ("Q*", 5), ("Q*", 9)}
    low, high = rows["Q*", 9]["objective_95"]
    assert low <= rows["Q*", 9]["objective"] <= high
    line = next(line for line in found["plot"]["drawn"]["toy"] if line["label"] == "Q*")
    assert line["y"] == pytest.approx([rows["Q*", 5]["objective"], rows["Q*", 9]["objective"]])
    assert found["demo"]["decoders"]["Q*"]["plans"][0]["usage"]["lm_tokens"] <= 20


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("decode x --decoder b", {"beam", "blockwise"}),
        ("decode x --task to", {"toy"}),
        ("decode x --reward sent", {"sentiment"}),
        ("decode x --model smol", {"smollm2-135m-instruct"}),
        ("train key", {"keywords"}),
        ("evaluate toy --decoders greedy,MC", {"greedy,MCTS"}),
        ("plot ca", {"calibration"}),
    ],
)
def test_the_shell_completes_names(words, names):
    environment = {
        "_QSTAR_COMPLETE": "complete_bash",
        "COMP_WORDS": f"qstar {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    result = CliRunner().invoke(cli.app, [], prog_name="qstar", env=environment)
    assert set(result.stdout.split()) == names


def test_help_shows_examples_and_every_command():
    for arguments in ([], ["--help"]):
        text = CliRunner().invoke(cli.app, arguments).output
        assert all(word in text for word in ("decode", "train", "demo", "qstar decode"))


def test_the_version_and_the_exit_codes_are_told():
    assert qstar("--version").stdout == f"qstar-decoding {qstar_decoding.__version__}\n"
    assert "130 interrupted" in qstar("--help").stdout
    assert qstar().exit_code == 2


def test_texts_are_not_folded_where_nobody_watches(tmp_path):
    """One text is one line for whatever reads the pipe, however long it is."""
    prompt = "abcdefg" * 30
    assert qstar("decode", prompt, "--task", "toy", "--budget", 20).stdout.splitlines()[0].startswith(prompt)


def test_the_installed_command_runs():
    command = [sys.executable, "-m", "qstar_decoding.cli", "decode", "--help"]
    assert "budget" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_grammar_from_a_file_is_kept(tmp_path, task_file):
    grammar = tmp_path / "verdict.lark"
    grammar.write_text('start: " " ("great" | "dull") (" and " ("great" | "dull"))* "."')
    out = qstar("decode", "The movie was", "--task", task_file, "--grammar", grammar, "--q", "none", "--json")
    text = json.loads(out.stdout)["text"]
    assert re.fullmatch(r" (great|dull)( and (great|dull))*\.", text)
    grammar.write_text("start: missing")
    with pytest.raises(ConfigurationError, match="cannot be followed"):
        qstar("decode", "The movie was", "--task", task_file, "--grammar", grammar)
    with pytest.raises(FileNotFoundError):
        qstar("decode", "The movie was", "--task", task_file, "--grammar", tmp_path / "there-is-none")
