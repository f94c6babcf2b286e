"""A training that is killed at any moment, and goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

KILLS = 5


def command(folder, *more):
    arguments = ["train", "toy", "--seed", "1", "--deterministic", "--save-every", "100", "--out", str(folder), *more]
    return [sys.executable, "-m", "qstar_decoding.cli", *arguments]


def steps_saved(folder):
    try:
        return json.loads((folder / "checkpoint" / "training_state.json").read_text())["num_timesteps"]
    except FileNotFoundError:  # before the first checkpoint, and for an instant while one replaces another
        return 0


def kill_after(folder, steps, *more):
    """Start or resume the training, and kill it some instants after it has saved a checkpoint of ``steps``."""
    process = subprocess.Popen(command(folder, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while steps_saved(folder) < steps:
            if process.poll() is not None:
                pytest.fail(f"ended by itself before {steps} steps: {process.stderr.read().decode()[-2000:]}")
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_training_killed_five_times_equals_an_uninterrupted_one_to_the_last_bit(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    subprocess.run(command(whole), check=True, capture_output=True)
    for i in range(KILLS):
        kill_after(pieces, 100 + 700 * i + random.randrange(500), *(["--resume"] if i else []))
    subprocess.run(command(pieces, "--resume"), check=True, capture_output=True)
    one, other = (load_file(folder / "q" / "q_network.safetensors") for folder in (whole, pieces))
    assert one.keys() == other.keys()
    for name, weights in one.items():
        assert weights.tobytes() == other[name].tobytes(), name
    held_out = [json.loads((f / "q" / "config.json").read_text())["description"]["held_out"] for f in (whole, pieces)]
    assert held_out[0] == held_out[1]
    logs = [
        [json.loads(line)["time_steps"] for line in (f / "diagnostics.jsonl").read_text().splitlines()]
        for f in (whole, pieces)
    ]
    assert logs[0] == logs[1]  # nothing measured twice, nothing missing
