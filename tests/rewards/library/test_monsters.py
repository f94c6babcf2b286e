"""Model texts that ask for any amount of work: every reward answers, or says in one line that it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from qstar_decoding.errors import ConfigurationError, RewardError
from qstar_decoding.rewards import make_reward
from qstar_decoding.rewards.adapters import from_reasoning_gym
from qstar_decoding.rewards.library import guidelines, reasoning
from qstar_decoding.rewards.library.guidelines import MatchesJSON, MatchesRegex

MONSTERS = [
    "so it is 10^10^10",
    "9**9**9**9",
    r"\(2^{2^{2^{2^{2^{2}}}}}\)",
    r"$$99999999!$$",
    r"\(\binom{1000000000}{500000000}\)",
    r"$\sum_{i=1}^{1000000000000} i^i$",
    r"\(\prod_{k=1}^{10^{12}} k\)",
    r"$((((((3!)!)!)!)!)!)!$",
    "1" * 20_000,
    "(" * 3000 + "1" + ")" * 3000,
    r"\frac{" * 500 + "1" + "}{2}" * 500,
    r"$x^{" + "9" * 500 + "}$",
]


@pytest.mark.parametrize("text", MONSTERS, ids=range(len(MONSTERS)))
def test_numeric_answer_answers_whatever_the_text(text: str) -> None:
    assert make_reward("numeric_answer")([""], [text], answer=["3"]) == [0]


def test_after_a_monster_the_next_text_is_compared_as_ever() -> None:
    reward = make_reward("numeric_answer")
    texts = ["so it is 10^10^10", r"\(\frac{6}{2}\)", "9**9**9**9", "3"]
    assert reward([""] * 4, texts, answer=["3"] * 4).tolist() == [0, 1, 0, 1]


def test_an_answer_that_is_a_monster_itself_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'10\^10\^10', which math-verify does not evaluate within 2 s"):
        make_reward("numeric_answer")([""], ["3"], answer=["10^10^10"])


def test_countdown_of_reasoning_gym_answers_whatever_the_text() -> None:
    import reasoning_gym

    data = reasoning_gym.create_dataset("countdown", size=1, seed=0)
    entry = data[0]
    for reward, monster in (
        (make_reward("reasoning_gym"), "9**9**9**9"),
        (from_reasoning_gym(data), "factorial(10**9)"),
    ):
        scores = reward([entry["question"]] * 2, [monster, entry["answer"]], entry=[entry] * 2).tolist()
        assert scores[0] < 0.1
        assert scores[1] == 1


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a+)+b", "a" * 60 + "!"),
        (r"(a|a)*b", "a" * 60 + "!"),
        (r"(?:\w+\s?)+!", "word " * 40 + "?"),
        (r"(.*a){20}", "b" + "a" * 40 + "!"),
        (r"(x+x+)+y", "x" * 60 + "!"),
        (r"((a|aa)+|b)c?d", "a" * 60 + "c"),
        (r"((ab)*|(a|b)*)*c", "ab" * 30 + "!"),
    ],
)
def test_patterns_that_backtrack_in_other_libraries_are_matched(pattern: str, text: str) -> None:
    assert MatchesRegex(pattern)([""], [text]) == [0]


BACKTRACKING = [(r"(a|aa)+c?d", "a" * 60 + "c"), (r"(a|b|ab)*(?=c)", "ab" * 40)]


@pytest.mark.parametrize(("pattern", "text"), BACKTRACKING)
def test_a_pattern_that_backtracks_is_named(pattern: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidelines, "_SCORING_SECONDS", 0.2)
    with pytest.raises(RewardError, match=r"took more than 0.2 s to match .* it backtracks. Simplify the") as told:
        MatchesRegex(pattern)([""], [text])
    assert "\n" not in str(told.value)
    assert MatchesRegex(pattern, on_error="penalty")([""], [text]) == [0]
    assert MatchesRegex(pattern).upper_bound([""], [text], [3]) == [1]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"pattern": "^(a|aa)+c?d"}, '"' + "a" * 60 + 'c"'),
        ({"patternProperties": {"^(a|aa)+c?d": {"type": "integer"}}}, '{"' + "a" * 60 + 'c": 1}'),
        ({"items": {"pattern": r"^(a|b|ab)*(?=c)$"}}, '["' + "ab" * 40 + '"]'),
    ],
)
def test_a_pattern_of_a_schema_that_backtracks_is_named(
    schema: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidelines, "_SCORING_SECONDS", 0.2)
    with pytest.raises(RewardError, match=r"took more than 0.2 s over a pattern of its schema"):
        MatchesJSON(schema)([""], [text])
    assert MatchesJSON(schema, on_error="penalty")([""], [text]) == [0]


@pytest.mark.parametrize(
    ("schema", "text", "score"),
    [
        ({}, "[" * 100_000, 0),
        ({}, '{"a":' * 100_000, 0),
        ({"items": {"$ref": "#"}}, "[" * 900 + "]" * 900, 0),  # too deep to be judged
        ({}, "NaN", 0),
        ({}, "[Infinity]", 0),
        ({}, "-Infinity", 0),
        ({"multipleOf": 0.1}, "1e999", 0),
        ({"type": "integer"}, "1" * 10_000, 0),
        ({"pattern": "^a+$"}, '"aaa"', 1),
        ({"pattern": "^a+$"}, '"aab"', 0),
        ({"pattern": "^a+$"}, "3", 1),
        ({"patternProperties": {"^a": {"type": "integer"}}}, '{"ab": 1, "b": "x"}', 1),
        ({"patternProperties": {"^a": {"type": "integer"}}}, '{"ab": "x"}', 0),
        ({"patternProperties": {"^a": {}}, "additionalProperties": False}, '{"ab": 1, "b": 2}', 0),
    ],
)
def test_json_of_any_depth_and_kind_is_judged(schema: Any, text: str, score: float) -> None:
    assert MatchesJSON(schema)([""], [text]) == [score]


def test_no_process_of_a_reward_outlives_its_parent_or_holds_it_up() -> None:
    code = (
        "from qstar_decoding.rewards import make_reward;"
        "print(make_reward('numeric_answer')([''] * 2, ['10^10^10', '3'], answer=['3'] * 2).tolist());"
        "from qstar_decoding.rewards.library.reasoning import _compare; print(*_compare.pids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    values, pid = done.stdout.splitlines()
    assert values == "[0.0, 1.0]"
    assert not _lives(int(pid))
    assert done.stderr == ""


def _lives(pid: int) -> bool:
    psutil = pytest.importorskip("psutil")
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_script_without_a_main_guard_may_use_them(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from qstar_decoding.rewards import make_reward\n"
        "print(make_reward('numeric_answer')(['q'], ['1/2'], answer=['0.5']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[1.]\n"


def test_a_data_set_that_is_not_the_librarys_is_scored_here() -> None:
    asked = []

    def scorer(answer: str, entry: Any) -> float:
        asked.append(os.getpid())
        return 1.0

    assert reasoning.gym_score(scorer, "x", {}) == 1
    assert asked == [os.getpid()]
