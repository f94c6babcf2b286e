"""Output on terminals of any encoding, and files of results that are damaged: nothing ends in a traceback."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from qstar_decoding.agents.evaluation import evaluate_tasks
from qstar_decoding.cli import app as cli


def run_in(encoding, monkeypatch, *arguments):
    """Run the command with standard streams of an encoding; return exit code, output and errors."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr("sys.argv", ["qstar", *map(str, arguments)])
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = []
    for stream in streams:
        stream.flush()
        said.append(stream.buffer.getvalue().decode(encoding))
    return left.value.code, *said


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-16", "utf-8"])
def test_no_result_is_lost_to_an_encoding(tmp_path, monkeypatch, encoding):
    prompt = "The café 中🎉 was"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    small = ["--budget", 30, "--max-new-tokens", 4]
    for arguments, expected in (
        (["decode", prompt, *small], "LB"),
        (["tasks"], "toy"),
        (["decoders"], "beam on g + Q"),
        (["--help"], "Examples"),
        (["demo", "--task", "toy", "--prompts", 1, "--budget", 9], "How close"),
    ):
        code, said, told = run_in(encoding, monkeypatch, *arguments)
        assert code in (0, None), told
        assert expected in said
    for arguments in (["decode", prompt, *small, "--json"], ["decode", "--input", file, *small]):
        code, said, told = run_in(encoding, monkeypatch, *arguments)
        assert code in (0, None), told
        assert json.loads(said)["prompt"] == prompt  # JSON loses nothing
    code, _, told = run_in(encoding, monkeypatch, "decode", "中🎉", "--task", "toy")
    assert code == 2
    assert told.startswith("error: ")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_shell_of_another_encoding(environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    command = [sys.executable, "-m", "qstar_decoding.cli", "decoders"]
    result = subprocess.run(command, capture_output=True, env={**kept, **environment})
    assert result.returncode == 0, result.stderr
    assert b"beam on g + Q" in result.stdout
    assert not result.stderr


def test_json_is_whole_whatever_the_terminal_can_show(monkeypatch):
    """The characters that an encoding lacks are escaped, and a lone half of a pair too."""
    from qstar_decoding.cli import console

    content = {"text": "é中🎉 \ud83c", "number": float("nan")}
    for encoding in ("ascii", "cp1252", "utf-8"):
        monkeypatch.setattr(type(console.out), "encoding", encoding)
        line = console.json_line(content)
        line.encode(encoding)
        assert json.loads(line) == {"text": content["text"], "number": None}
    monkeypatch.setattr(type(console.out), "encoding", "utf-8")
    assert "中" in console.json_line({"text": "中"})


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/x]", ":smile:", "[red]", "a [link=x] b"])
def test_texts_are_printed_as_they_are(capsys, monkeypatch, tmp_path, text):
    from qstar_decoding.cli import console

    monkeypatch.setattr(console, "out", console.Console(**console._PLAIN))
    console.say(text)
    console.out.print(f"file: {tmp_path}/{text}", soft_wrap=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == text
    assert said[1].endswith(f"/{text}")
    with pytest.raises(SystemExit):
        console.fail(f"unknown name {text!r}\nsecond line")
    assert capsys.readouterr().err == f"error: unknown name {text!r} second line\n"


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qstar_decoding.cli.console._EVERY", 0)
    monkeypatch.setattr("sys.argv", ["qstar"])
    names = ["--decoders", "greedy,beam", "--budgets", "5", "--seeds", "1", "--no-tune"]
    cli.app(["evaluate", "toy", *names, "--out", str(tmp_path)], standalone_mode=False)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "toy: loading the language model"
    assert re.fullmatch(r"toy: beam, 5 LM tokens, seed 0 \(\d of 7 steps\)", lines[2])
    assert "toy: calibration of Q (6 of 7 steps)" in lines
    assert "steps" not in said.out
    (tmp_path / "prompts.txt").write_text("ab\nba\n")
    out = tmp_path / "out.jsonl"
    cli.app(
        ["decode", "--input", str(tmp_path / "prompts.txt"), "--task", "toy", "--out", str(out)], standalone_mode=False
    )
    said = capsys.readouterr()
    assert "decoding (1 of 2 prompts)" in said.err
    assert not said.out


# -- damaged results


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate_tasks(["toy"], folder, decoders=["greedy", "best-of-n", "Q*"], budgets=[4, 8], seeds=1, tune=False)
    run = folder / "run"
    run.mkdir()
    points = [{"time_steps": s, "held_out/objective_8": s / 2, "calibration/bias": -s} for s in (1, 2, 3)]
    (run / "diagnostics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    plan = {"decoder": "astar", "prompt": "ab", "trace": [[1, 0.1, None, 2.0], [3, 0.2, 0.5, 1.0]]}
    (run / "plan.jsonl").write_text(json.dumps(plan) + "\n" + json.dumps({**plan, "prompt": "ba"}) + "\n")
    return folder


VALUES = [
    b"",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"0",
    b"99999999999999999999",
    b'"x"',
    b"[]",
    b"{}",
    b"[1]",
    b"\xff",
    b"\x00",
]
VALUES += [b"true", b'"\\ud800"', b"'", b'"', b",", b"\n", b"\r", b"{" * 2000, b"[" * 100_000]


def damage(rng, data):
    """Return a file cut off, emptied, re-encoded, or with some of its parts replaced by something else."""
    how = rng.random()
    if how < 0.05:
        return b""
    if how < 0.2:
        return data[: rng.randrange(len(data))]
    if how < 0.25:
        return data.decode("latin-1").encode("utf-16")
    if how < 0.5:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    parts = re.split(rb"([,:\n\[\]{}])", data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        parts[rng.randrange(len(parts))] = rng.choice(VALUES)
    return b"".join(parts)


COMMANDS = {
    "toy/results.csv": [["plot", "objective", "toy"], ["plot", "gap", "toy"]],
    "toy/calibration.npz": [["plot", "calibration", "toy"]],
    "run/diagnostics.jsonl": [["plot", "learning", "run"], ["plot", "errors", "run"]],
    "run/plan.jsonl": [["plot", "trace", "run/plan.jsonl"]],
    "toy/comparison.json": [["evaluate", "toy"]],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", COMMANDS)
def test_damaged_results_give_one_line(tmp_path, monkeypatch, capsys, evaluation, file):
    shutil.copytree(evaluation, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    whole = (evaluation / file).read_bytes()
    codes = []
    for seed in range(12 if file == "toy/comparison.json" else 40):
        rng = random.Random(seed)
        (tmp_path / "runs" / file).write_bytes(damage(rng, whole))
        command = rng.choice(COMMANDS[file])
        out = ["--out", "x.svg"]
        if command[0] == "evaluate":
            out = ["--out", ".", "--decoders", "greedy,best-of-n,Q*", "--budgets", "4,8", "--seeds", "1", "--no-tune"]
        monkeypatch.setattr("sys.argv", ["qstar", *command, *out])
        try:
            with pytest.raises(SystemExit) as left:
                cli.main()
        except BaseException as error:
            error.add_note(f"seed {seed}: {(tmp_path / 'runs' / file).read_bytes()[:1000]!r}")
            raise
        said = capsys.readouterr().err
        assert left.value.code in (0, None, 2), said
        if left.value.code == 2:
            assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
            assert said.splitlines()[-1].startswith("error: "), said
        codes.append(left.value.code)
    assert 2 in codes


@pytest.mark.parametrize(
    "arrays",
    [
        {"estimate": np.zeros(3), "found": np.zeros(3)},
        {"estimate": np.zeros(3), "found": np.zeros(2), "depth": np.zeros(3, int)},
        {"estimate": np.zeros(0), "found": np.zeros(0), "depth": np.zeros(0, int)},
        {"estimate": np.zeros((2, 2)), "found": np.zeros((2, 2)), "depth": np.zeros((2, 2), int)},
        {"estimate": np.array(["a"]), "found": np.zeros(1), "depth": np.zeros(1, int)},
        {"estimate": np.array([np.nan]), "found": np.zeros(1), "depth": np.zeros(1, int)},
        {"estimate": np.array([np.inf]), "found": np.zeros(1), "depth": np.zeros(1, int)},
        {"estimate": np.array([{}], dtype=object), "found": np.zeros(1), "depth": np.zeros(1, int)},
        {"estimate": np.array([1j]), "found": np.zeros(1), "depth": np.zeros(1, int)},
    ],
)
def test_a_calibration_of_other_shapes_is_named(tmp_path, monkeypatch, capsys, arrays):
    np.savez(tmp_path / "calibration.npz", **arrays)
    monkeypatch.setattr("sys.argv", ["qstar", "plot", "calibration", str(tmp_path), "--out", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "is not a calibration that qstar evaluate wrote" in capsys.readouterr().err


def test_a_single_array_in_place_of_an_archive(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "calibration.npz")
    monkeypatch.setattr("sys.argv", ["qstar", "plot", "calibration", str(tmp_path), "--out", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "is not a calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["decode", "ab", "--task", "toy", "--budget", "8", "--tree"], ["demo", "--task", "toy", "--budget", "8", "--svg"]],
    ids=["tree", "picture"],
)
def test_a_file_is_prepared_before_the_work_and_no_result_is_lost(command, tmp_path, monkeypatch):
    made = tmp_path / "new" / "folder" / "page"
    assert run_in("utf-8", monkeypatch, *command, made)[0] in (0, None)
    assert made.stat().st_size > 1000
    monkeypatch.setattr("qstar_decoding.tasks.Task.mdp", lambda *_, **__: pytest.fail("the work has begun"))
    for place, reason in ((tmp_path, "give the name of a file"), (made / "beneath", "nothing can be written")):
        code, _, said = run_in("utf-8", monkeypatch, *command, place)
        assert (code, len(said.splitlines())) == (2, 1)
        assert reason in said


@pytest.mark.parametrize("command", [["decode", "ab", "--task", "toy"], ["evaluate", "toy", "--out", "new"], ["demo"]])
def test_ctrl_c_is_told_in_one_line(command, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qstar_decoding.tasks.Task.mdp", interrupt)
    code, said, errors = run_in("utf-8", monkeypatch, *command)
    assert (code, said, errors.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in errors
