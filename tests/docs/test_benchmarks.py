"""The benchmarks: each one starts, and what they write has one shape. What they measure is not for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name, *arguments):
    return subprocess.run([sys.executable, BENCHMARKS / name, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in ("rows.py", "solving.py"))
)
def test_starts_and_says_what_it_measures(name):
    help_ = run(name, "--help")
    assert help_.returncode == 0, help_.stderr
    assert f"python benchmarks/{name}" in help_.stdout
    assert "--json" in help_.stdout


def test_the_rows_have_a_name_a_value_a_unit_a_target_and_a_direction(tmp_path):
    file = tmp_path / "rows.json"
    done = run("masking.py", "--steps", "200", "--seeds", "0", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["name"] for row in rows[:2]] == ["score of MaskableDQN", "violations of MaskableDQN"]
    for row in rows:
        assert set(row) == {"name", "value", "unit", "target", "higher_is_better"}
        assert isinstance(row["value"], float)
        assert row["target"] is None or isinstance(row["target"], float)


def test_the_script_for_a_gpu_runs_dry(tmp_path):
    script = BENCHMARKS / "device.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", script, "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    checks = [row for row in rows if row["unit"] == "passed"]
    assert len(checks) == 18
    assert all(row["value"] == 1 for row in checks)
    assert json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--pack"]])
def test_the_script_for_a_gpu_explains_itself(arguments):
    done = subprocess.run(["bash", BENCHMARKS / "device.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--dry-run" in done.stdout or "--pack needs a folder" in done.stderr
