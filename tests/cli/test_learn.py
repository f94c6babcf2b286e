"""`qstar decode --learn`, on the toy model: it goes on, it survives a kill, and one process at a time may learn."""

import itertools
import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from qstar_decoding.agents.learning.checkpoints import find_checkpoint
from qstar_decoding.cli import app as cli
from qstar_decoding.errors import CheckpointError, ConfigurationError
from qstar_decoding.files import locked

PAIRS = ["".join(pair) for pair in itertools.product("abcdefg", repeat=2)]


def qstar(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:16]))
    return file


def options(tmp_path, prompts, out):
    return ["decode", "--task", "toy", "--input", prompts, "--out", tmp_path / out, "--budget", 24]


def steps(folder):
    return json.loads((folder / "training_state.json").read_text())["num_timesteps"]


def test_the_next_call_goes_on_from_what_was_learned(tmp_path, prompts):
    folder = tmp_path / "runs" / "q"
    said = qstar(*options(tmp_path, prompts, "first.jsonl"), "--learn", folder).output
    assert "heuristics used: bound" in said
    assert len((tmp_path / "first.jsonl").read_text().splitlines()) == 16
    before = steps(folder)
    assert before == sum(
        json.loads(line)["usage"]["lm_tokens"] for line in (tmp_path / "first.jsonl").read_text().splitlines()
    )
    qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder)
    assert steps(folder) == before + 24
    assert "J" in qstar("decode", "ab", "--task", "toy", "--budget", 24, "--q", folder).output


def test_a_folder_learns_one_objective(tmp_path, prompts):
    """Values of another reward or α are in other units: neither the experience nor the guard may mix them."""
    folder = tmp_path / "q"
    qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder)
    before = (folder / "training_state.json").read_bytes()
    for option, value, named in (("--reward", "length", "3 \\* pangram"), ("--logprob-weight", "0.2", "0.05")):
        with pytest.raises(CheckpointError, match=f"{named}.*--q"):
            qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder, option, value)
    assert (folder / "training_state.json").read_bytes() == before
    qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder, "--max-new-tokens", 6)  # J as before
    other = qstar(
        "decode", "ab", "--task", "toy", "--budget", 24, "--learn", tmp_path / "r", "--reward", "length", "--q", folder
    )
    assert "given" in other.output


@pytest.mark.parametrize("file", ["config.json", "q_network.safetensors", "experience.safetensors"])
def test_a_damaged_folder_is_never_overwritten(tmp_path, file):
    folder = tmp_path / "q"
    qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder)
    (folder / file).unlink()
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((CheckpointError, ConfigurationError), match="checkpoint"):
        qstar("decode", "ab", "--task", "toy", "--budget", 24, "--learn", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == left


def test_a_kill_loses_no_result_and_q_goes_on(tmp_path):
    many, folder, out = tmp_path / "many.jsonl", tmp_path / "q", tmp_path / "out.jsonl"
    many.write_text("".join(json.dumps(pair * 3) + "\n" for pair in PAIRS * 4))
    command = [sys.executable, "-m", "qstar_decoding.cli", *map(str, options(tmp_path, many, "out.jsonl"))]
    process = subprocess.Popen([*command, "--learn", folder], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out.is_file() and len(out.read_text().splitlines()) >= 16):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = out.read_text().splitlines()
    kept = [json.loads(line) for line in found[: len(found) - 1]]  # the last line may be cut off
    assert len(kept) >= 15
    qstar(*options(tmp_path, many, "out.jsonl"), "--learn", folder)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["line"] for record in records) == list(range(1, len(PAIRS) * 4 + 1))
    by_line = {record["line"]: record for record in records}
    assert all(by_line[record["line"]] == record for record in kept)  # not decoded again
    assert find_checkpoint(folder) is not None


def test_a_second_process_is_refused_before_it_begins(tmp_path, prompts):
    folder = tmp_path / "q"
    with locked(tmp_path / ".q.lock"), pytest.raises(ConfigurationError, match=rf"another process.* {folder};"):
        qstar(*options(tmp_path, prompts, "out.jsonl"), "--learn", folder)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_learn_says_so(tmp_path, prompts):
    with pytest.raises(ConfigurationError, match="--learn is for --decoder astar"):
        qstar(*options(tmp_path, prompts, "out.jsonl"), "--learn", tmp_path / "q", "--decoder", "beam")
