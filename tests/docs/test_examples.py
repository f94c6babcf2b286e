"""Examples: each runs, shortened; `EXAMPLES=full pytest tests/docs/test_examples.py` runs them in full."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# The text of an example, and its replacement in the test: minutes become seconds, and no line is left out.
BRIEF = {
    "api_model.py": {"budget=100": "budget=24"},
    "chat_constraints.py": {"budget=100": "budget=50", "max_new_tokens=32": "max_new_tokens=24"},
    "cleanrl_dqn.py": {"STEPS, ENVS = 4_000, 8": "STEPS, ENVS = 200, 8"},
    "custom_reward.py": {
        "learn(5_000)": "learn(100)",
        "searches_per_round=16": "searches_per_round=2, gradient_steps=8",
    },
    "environment.py": {"range(1000)": "range(60)", "learn(2000)": "learn(110)", "lm_tokens=200": "lm_tokens=50"},
    "minari_offline.py": {"300, 600,": "20, 50,"},
    "own_heuristic.py": {'prompts.of("test")': 'prompts.of("test")[:4]'},
    "quickstart.py": {"learn(2_000)": "learn(110)", "budget=200": "budget=50"},
    "reasoning_gym_reward.py": {
        "learn(5_000)": "learn(20)",
        "prompts[:100], ": "prompts[:10], ",
        "searches_per_round=64, gradient_steps=128": "searches_per_round=8, gradient_steps=8",
    },
    "reward_model.py": {
        "range(20)": "range(3)",
        "learn(2_000)": "learn(20)",
        "searches_per_round=16": "searches_per_round=2, gradient_steps=8",
    },
    "rllib_ppo.py": {"ROUNDS = 12": "ROUNDS = 2"},
    "sb3_agents.py": {
        "STEPS, BUDGET = 4000, 16": "STEPS, BUDGET = 264, 8",
        '"learning_starts": 500': '"learning_starts": 200',
    },
    "torchrl_dqn.py": {"FRAMES = 6_400": "FRAMES = 256", "range(50)": "range(5)"},
    "trl_reward.py": {"learn(5_000)": "learn(100)", "searches_per_round=16": "searches_per_round=2, gradient_steps=8"},
}


# tests/serve/test_example.py runs it, with a server.
SERVED = {"openai_client.py"}


def test_none_is_left_out():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(BRIEF) | SERVED


@pytest.mark.parametrize("name", BRIEF)
def test_example(name, tmp_path, monkeypatch, capfd):
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    assert source.startswith('"""')
    for written, brief in BRIEF[name].items():
        assert source.count(written) == 1, f"{name} no longer has {written!r}"
        source = source.replace(written, brief)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if os.environ.get("EXAMPLES") == "full":
        # -W error: "without a warning" is part of what they show; deprecations inside libraries are not ours.
        subprocess.run([sys.executable, "-W", "error::UserWarning", EXAMPLES / name], check=True)
    else:
        # In this process, which has the libraries and the language model in memory already.
        (tmp_path / name).write_text(source, encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            runpy.run_path(str(tmp_path / name), run_name="__main__")
    shown = capfd.readouterr().out
    assert any(character.isdigit() for character in shown), shown
