"""Bounds of prefixes: no continuation may exceed them, whatever its characters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.errors import RewardError
from qstar_decoding.rewards import Reward, as_reward, clip, make_reward, minimum, normalise, registry, reward_names
from qstar_decoding.rewards.composition import product
from qstar_decoding.rewards.library.guidelines import ForbiddenWords, MatchesRegex
from qstar_decoding.rewards.pool import PooledReward

# Letters whose case depends on their neighbours or on the language, that fold to several, that combine; spaces of many
# kinds; a character that stands for broken bytes.
TRICKY = "ΣσςΑα" + "İiıIKkKſsSßẞŉǰ" + "\u0307\u0301\u0345'’·.:-_0²" + " \t\n\x1c\x85\xa0\u2028\u3000" + "\ufffd字🐕aAbB"
texts = st.lists(st.sampled_from(TRICKY), max_size=12).map("".join)

BOUNDED: dict[str, Reward] = {
    "forbidden": ForbiddenWords("ας", "ΣΑΣ", "is", "K", "strasse", "ŉa", "ǰ", "İI", "straße", "字"),
    "regex": MatchesRegex(r"(?i)[aαkßſ]*(?:σς|is|İ)?.{0,3}"),
    "regex_flags": MatchesRegex(r"(?si:s+|k).*\S"),
    "exact_answer": make_reward("exact_answer"),
    "countdown": make_reward("countdown"),
    "length": make_reward("length", most=4),
    "sum": 0.7 * ForbiddenWords("ας") - 0.3 * as_reward("length") + 0.1 * as_reward("pangram"),
    "product": ForbiddenWords("ας") * make_reward("length"),
    "negative": product(as_reward("sentiment"), as_reward("sentiment"), ForbiddenWords("ας") - as_reward("length")),
    "minimum": minimum(ForbiddenWords("ας"), normalise(as_reward("length"), 0.2, 0.5)),
    "clip": clip(2 * as_reward("length") - ForbiddenWords("is"), -0.5, 0.5),
    "pool": PooledReward(ForbiddenWords("ας"), workers=1),
}


def check(reward: Reward, text: str, **columns: Any) -> None:
    """Check the bound at every beginning of the text, each character a token."""
    [value] = reward.score([""], [text], [list(range(len(text)))], **{name: [one] for name, one in columns.items()})
    assert value is not None
    count = len(text) + 1
    bounds = reward.upper_bound(
        [""] * count,
        [text[:n] for n in range(count)],
        list(range(count))[::-1],
        [list(range(n)) for n in range(count)],
        **{name: [one] * count for name, one in columns.items()},
    )
    assert bounds.min() >= value, (text, text[: int(bounds.argmin())])


class Broken(Reward):
    """Its bound does what it is told."""

    lower, upper = 0.0, 1.0

    def __init__(self, bound: Any) -> None:
        super().__init__()
        self.bound = bound

    def score(self, prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> Any:
        return [0.5] * len(completions)

    def bound_prefixes(self, *arguments: Any, **columns: Any) -> Any:
        return self.bound(*arguments)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (lambda prompts, completions, remaining: [1.0], "raised TypeError: .*; bound_prefixes takes"),
        (lambda *_: 1 / 0, "raised ZeroDivisionError: .*; bound_prefixes takes"),
        (lambda *_: ["0.9"], "is '0.9' for the unfinished text 'a'"),
        (lambda *_: [None], "is None for the unfinished text 'a'"),
        (lambda *_: [[0.9]], r"is \[0.9\] for the unfinished text 'a'"),
        (lambda *_: 0.9, "returned 0.9 .* where a list was expected"),
    ],
)
def test_a_bound_that_fails_is_told_by_the_name_of_its_reward(bound: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"^the bound of reward 'Broken' {message}"):
        Broken(bound).upper_bound([""], ["a"], [3])


def test_every_reward_of_the_library_with_bounds_is_among_them() -> None:
    bounded = {name for name in {*reward_names()} - {*registry.WITH_ARGUMENTS} if _has_bounds(name)}
    assert bounded == {"countdown", "exact_answer", "length", "reasoning_gym"}  # the last one: test_reasoning.py
    with_arguments = {
        name for name in registry.WITH_ARGUMENTS if _class(name).bound_prefixes is not Reward.bound_prefixes
    }
    assert with_arguments == {"forbidden_words", "matches_regex"}


def _class(name: str) -> Any:
    return registry._load(str(registry.WITH_ARGUMENTS[name]))


def _has_bounds(name: str) -> bool:
    return make_reward(name).has_prefix_bounds


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=300)
@given(text=texts, answer=texts)
def test_no_continuation_exceeds_the_bound(name: str, text: str, answer: str) -> None:
    of_reward = {"exact_answer": {"answer": answer}, "countdown": {"numbers": [3, 7, 25], "target": 4}}
    columns = of_reward.get(name, {})
    check(BOUNDED[name], text, **columns)
    if name == "exact_answer":
        check(BOUNDED[name], f" {answer}\n", **columns)


@settings(max_examples=300)
@given(
    parts=st.lists(
        st.sampled_from(["3", "7", "25", "2", *"+-*/()= ", ", ", "*7=21", " (21 25)", "25-21=4"]), max_size=9
    ),
    target=st.sampled_from([4, 21, 10, 35]),
)
def test_no_answer_of_countdown_exceeds_its_bound(parts: list[str], target: int) -> None:
    for text in ("".join(parts), "25-3*7", "3*7=21, 25-21=4", "3*7=21 (21 25), 25-21=4", "(7+25)+3"):
        check(BOUNDED["countdown"], text, numbers=[3, 7, 25], target=target)
        check(BOUNDED["countdown"], text, numbers=[3, 7], target=target)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("οδος",), "ΟΔΟΣ.Α"),  # lower() makes a final sigma of Σ only where no letter follows, full stop or not
        (("οδος",), "ΟΔΟΣ'Α"),
        (("οδοσ",), "ΟΔΟΣ Α"),
        (("ΑΣ",), "ας σ"),
        (("straße",), "STRASSE."),
        (("istanbul",), "İSTANBUL!"),
        (("masse",), "MASẞE."),
    ],
)
def test_forbidden_words_in_scripts_whose_case_is_odd(words: tuple[str, ...], text: str) -> None:
    check(ForbiddenWords(*words), text)


def test_case_folding_finds_a_word_in_any_case_and_with_either_sigma() -> None:
    values = ForbiddenWords("ΟΔΟΣ", "straße")([""] * 5, ["η οδος", "ΟΔΟΣ.Α", "οδοσ", "STRASSE", "οδοστρωμα"])
    assert values.tolist() == [0, 0, 0, 0, 1]


@st.composite
def patterns(draw: st.DrawFn, depth: int = 3) -> tuple[str, str]:
    """A plain pattern and a text that it matches."""
    kind = draw(st.sampled_from(["literal", "set", "dot", "escape", *(["sequence", "either", "repeat", "flags"] * 2)]))
    if depth == 0 or kind in ("literal", "set", "dot", "escape"):
        char = draw(st.sampled_from(TRICKY.replace("\n", "")))
        other = draw(st.sampled_from("abkσς"))
        written = char if char.isalnum() else "\\" + char if char in ".-'" else f"[{char}]"
        forms = {"set": f"[{other}{written.strip('[]')}]", "dot": ".", "escape": r"\S" if char.strip() else r"\s"}
        return forms.get(kind, written), char
    one, its = draw(patterns(depth - 1))
    two, others = draw(patterns(depth - 1))
    if kind == "sequence":
        return f"(?:{one}){two}", its + others
    if kind == "either":
        return f"({one}|{two})", draw(st.sampled_from([its, others]))
    if kind == "flags":
        return f"(?i:{one})", draw(st.sampled_from([its, its.swapcase(), its.upper(), its.lower()]))
    low, extra = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    sign = draw(st.sampled_from(["", "?"]))
    return f"(?:{one}){{{low},{low + extra}}}{sign}{two}", its * draw(st.integers(low, low + extra)) + others


@settings(max_examples=1500)
@given(case=patterns(), flags=st.sampled_from(["", "(?s)", "(?i)", "(?is)", "(?a)", "(?im)"]))
def test_what_a_plain_pattern_matches_it_may_match_at_every_beginning(case: tuple[str, str], flags: str) -> None:
    pattern, text = case
    reward = MatchesRegex(flags + pattern)
    assert reward.has_prefix_bounds
    check(reward, text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(?r)ab", "ab"),
        (r"(?ri)[a-z]+1", "ab1"),
        (r"a(?r)b", "ab"),
        (r"(?if)strasse", "straße"),
        (r"(?V1i)strasse", "STRAẞE"),
        (r"(?b)(?:ab){e<=1}", "aab"),
        (r"(?e)(?:ab){i<=1}", "axb"),
        (r"(?:abc){s<=1}", "abd"),
        (r"(?p)a|ab", "ab"),
        (r"(?w)a\b.b", "a b"),
        (r"(?x) a b # c", "ab"),
        (r"(?>a|ab)c?", "ac"),
        (r"(?|(a)|(b))\1", "bb"),
        (r"a\Kb", "ab"),
        (r"\X+", "e\u0301"),
        (r"a\Rb", "a\r\nb"),
        (r"(?(DEFINE)(?<q>b))a(?&q)", "ab"),
        (r"a(?<=a)b", "ab"),
        (r"^a+$", "aa"),
        (r"\ba\b", "a"),
        (r"\Aa\Z", "a"),
        (r"a++b", "aab"),
        (r"a{2}+b", "aab"),
        (r"(a)(?(1)b|c)", "ab"),
        (r"[[a-z]--[aeiou]]+", "xyz"),
        (r"(?m)^a$\n^b$", "a\nb"),
    ],
)
def test_any_other_pattern_has_no_bound(pattern: str, text: str) -> None:
    reward = MatchesRegex(pattern)
    assert not reward.has_prefix_bounds
    check(reward, text)
