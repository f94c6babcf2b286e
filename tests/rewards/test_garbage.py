"""Garbage as a reward: an error of the package in a short message, never a traceback of Python's."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from qstar_decoding.errors import ConfigurationError, QStarError
from qstar_decoding.rewards import (
    Reward,
    WeightedSum,
    as_reward,
    clip,
    make_reward,
    minimum,
    normalise,
    parse_spec,
    register_reward,
    registry,
    reward_names,
)
from qstar_decoding.rewards.composition import product
from qstar_decoding.rewards.library.creativity import Distinct, Novelty
from qstar_decoding.rewards.library.guidelines import ForbiddenWords, Length, MatchesJSON, MatchesRegex, ShortSentences
from qstar_decoding.rewards.library.language import Preference
from qstar_decoding.rewards.library.likelihood import Coherence
from qstar_decoding.rewards.library.relevance import StaticRelevance

from .samples import call, constant

HUGE = 10**400
LARGE_SPECS = {
    "parentheses": "(" * 5000,
    "closed parentheses": "(" * 5000 + "length" + ")" * 5000,
    "minus": "-" * 5000 + "length",
    "more minus": "-" * 100_000 + "length",
    "sum": "length+" * 50_000 + "length",
    "product": "length*" * 400 + "length",
    "minima": "min(" * 80 + "length" + ",length)" * 80,
    "clips": "clip(" * 40 + "length" + ",0,1)" * 40,
    "name": "a" * 100_000,
    "deep list": "novelty(" + "[" * 5000 + "]" * 5000 + ")",
    "digits": "9" * 5000 + "*length",
    "calls": "length" + "()" * 3000,
    "attributes": "length" + ".a" * 5000,
    "many": "min(" + "length," * 200 + "length)",
    "spaces": " " * 100_000,
    "late mistake": "length + " * 300 + "lenght",
}


@pytest.mark.parametrize("spec", LARGE_SPECS.values(), ids=LARGE_SPECS)
def test_deep_and_long_specs(spec: str) -> None:
    for read in (as_reward, lambda spec: parse_spec(spec, reward_names())):
        with pytest.raises(ConfigurationError) as caught:
            read(spec)
        assert len(str(caught.value)) < 2500
        assert max(map(len, str(caught.value).splitlines())) < 1500


def test_a_long_sum_and_thirty_levels_are_fine() -> None:
    assert len(parse_spec("a + " * 500 + "b - a", known="ab")) == 502
    assert call(as_reward("min(" * 30 + "length" + ", length)" * 30), "x") == call(as_reward("length"), "x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length({[]: 1})", "a reward's arguments are strings"),
        ("length({[1]})", "a reward's arguments are strings"),
        ("length(**{'most': 1})", "an argument is written name=value, each name once"),
        ("length(most=1, most=2)", "an argument is written name=value, each name once"),
        ("length(*[1])", "a reward's arguments are strings"),
        ("length(most='3')", "most is an integer"),
        ("0.5 * length(-3)", r"^length\(…\): most is an integer >= 1, got -3$"),
        ("length(name=[1])", "a reward's name is a string"),
        ("length(on_error='penalty', penalty=" + "9" * 400 + ")", "expected a finite number"),
        ("classifier([1])", "a classifier is a folder"),
        ("preference([1])", "no trained preference"),
        ("novelty(3)", "references are several texts"),
        ("novelty([3])", "references are several texts"),
        ("novelty([])", "references are several texts"),
        ("novelty(" + "[" * 90 + "]" * 90 + ")", "references are several texts"),
        ("static_relevance([1])", "model is the name of a language model"),
        ("matches_regex([1])", "no regular expression"),
        ("matches_regex(None)", "no regular expression"),
        ("matches_regex(b'a')", "pattern is a string"),
        ("matches_json(3)", "no JSON Schema"),
        ("matches_json({'a': {1}})", "no JSON Schema"),
        ("forbidden_words([1])", "words of letters"),
        ("coherence(floor='x')", "floor"),
        ("pointwise_mutual_information(0)", "limit"),
        ("pointwise_mutual_information(references=[])", "references are several prompts"),
        ("pointwise_mutual_information(references='It')", "references are several prompts"),
        ("pointwise_mutual_information(references=[3])", "references are several prompts"),
        ("relevance(batch_size=[])", "batch_size"),
        ("1e308 * 10 * length", "a number alone is no reward"),
        ("10 * (1e308 * length)", "has the weight inf"),
        ("\ud800 * length", "this is no expression"),
        ("length\0", "this is no expression"),
    ],
)
def test_wrong_arguments_in_specs(spec: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_reward(spec)


LENGTH = Length()


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_reward(["length"]),  # type: ignore[arg-type]
        lambda: make_reward(None),  # type: ignore[arg-type]
        lambda: make_reward({}),  # type: ignore[arg-type]
        lambda: register_reward(3),  # type: ignore[arg-type]
        lambda: register_reward(["x"]),  # type: ignore[arg-type]
        lambda: as_reward({"length": HUGE}),
        lambda: as_reward({"length": float("nan")}),
        lambda: as_reward({("a", "b"): 1.0}),  # type: ignore[dict-item]
        lambda: as_reward({"length": [1]}),  # type: ignore[dict-item]
        lambda: HUGE * LENGTH,
        lambda: WeightedSum([(1, "length")]),  # type: ignore[list-item]
        lambda: WeightedSum([("x", LENGTH)]),  # type: ignore[list-item]
        lambda: WeightedSum([3]),  # type: ignore[list-item]
        lambda: WeightedSum(3),  # type: ignore[arg-type]
        lambda: WeightedSum([LENGTH]),  # type: ignore[list-item]
        lambda: product(),
        lambda: product(LENGTH, 3),  # type: ignore[arg-type]
        lambda: minimum([LENGTH, LENGTH]),  # type: ignore[arg-type]
        lambda: clip("length", 0, 1),  # type: ignore[arg-type]
        lambda: clip(LENGTH, "0", 1),  # type: ignore[arg-type]
        lambda: clip(LENGTH, None, 1),  # type: ignore[arg-type]
        lambda: clip(LENGTH, 0, float("nan")),
        lambda: normalise(LENGTH, "a", 1),  # type: ignore[arg-type]
        lambda: normalise(LENGTH, 0, [1]),  # type: ignore[arg-type]
        lambda: normalise(LENGTH, 1, 1),
        lambda: normalise(constant(1.0)),
        lambda: Length(lower=HUGE),  # type: ignore[call-arg]
        lambda: Length(lower="x"),  # type: ignore[call-arg]
        lambda: Length(name=3),  # type: ignore[arg-type]
        lambda: Length(on_error="penalty", penalty=HUGE),
        lambda: Length(on_error=["skip"]),  # type: ignore[arg-type]
        lambda: Length(on_error={}),  # type: ignore[arg-type]
        lambda: Length(True),
        lambda: Distinct("2"),  # type: ignore[arg-type]
        lambda: Distinct(2.0),  # type: ignore[arg-type]
        lambda: ShortSentences(None),  # type: ignore[arg-type]
        lambda: Novelty(None),  # type: ignore[arg-type]
        lambda: Novelty([None]),  # type: ignore[list-item]
        lambda: ForbiddenWords(None),  # type: ignore[arg-type]
        lambda: ForbiddenWords(["a"]),  # type: ignore[arg-type]
        lambda: MatchesRegex(3),  # type: ignore[arg-type]
        lambda: MatchesRegex("(" * 5000),
        lambda: MatchesRegex("a{99999999999999999999}"),
        lambda: MatchesJSON({"a": {1}}),
        lambda: MatchesJSON([1]),  # type: ignore[arg-type]
        lambda: MatchesJSON("[" * 100_000),
        lambda: MatchesJSON({"type": 3}),
        lambda: Preference(3),  # type: ignore[arg-type]
        lambda: Coherence(floor=None),  # type: ignore[arg-type]
        lambda: Coherence([]),
        lambda: StaticRelevance(["x"]),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_errors_in_one_line(make: Callable[[], Any]) -> None:
    with pytest.raises(QStarError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_numbers_of_other_kinds_are_numbers() -> None:
    for weight in (Fraction(1, 2), np.float32(0.5), np.array(0.5)):
        assert WeightedSum([(weight, LENGTH)]).upper == 0.5  # type: ignore[list-item]
    assert Length(on_error="penalty", penalty=Fraction(1, 4)).penalty == 0.25  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered")
def test_a_factory_that_fails_is_told_with_its_cause() -> None:
    def broken(size: int = 3) -> Reward:
        raise KeyError("no such thing")

    register_reward("broken")(broken)
    with pytest.raises(ConfigurationError, match=r"'broken' cannot be made as broken\(size=4\): KeyError") as caught:
        make_reward("broken", size=4)
    assert isinstance(caught.value.__cause__, KeyError)


PIECES = [
    *[
        "length",
        "pangram",
        "sentiment",
        "distinct",
        "forbidden_words",
        "matches_regex",
        "novelty",
        "repetition",
        "x",
        "min",
        "clip",
        "normalise",
    ],
    *[
        "(",
        ")",
        "(",
        ")",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ",",
        "+",
        "-",
        "*",
        "*",
        "/",
        "**",
        "=",
        "0.5",
        "2",
        "-1",
        "1e308",
        "1j",
        "True",
        "None",
        "...",
        "'a'",
        "b'a'",
        "f'{x}'",
        "'(a'",
        "lambda:",
        ":",
    ],
    *[
        "é",
        "🐕",
        "�",
        "\\",
        "#",
        ";",
        "if",
        "else",
        "for",
        "in",
        "await",
        "yield",
        ":=",
        "@",
        "~",
        "most=",
        "n=",
        "on_error=",
        "penalty=",
        "name=",
        "most=3",
    ],
    *[" ", "\n", "\t", "\0", "9" * 330, "on_error='skip'"],
]
VALUES = [
    *[None, True, 0, 1, -1, 3, 2.5, HUGE, -HUGE, float("nan"), float("inf"), 1j, np.float32(1), np.zeros(2)],
    *["", "a", "b c", "(", "skip", "\ud800", b"a", [], ["a"], [[]], (), ("a",), {}, {"a": 1}, {1: {2}}, set(), {1}],
    *[object(), len, Reward],
]


def told(make: Callable[[], Any]) -> None:
    """Check that a reward is made, or that a short error of the package says why not."""
    message = ""
    try:
        assert isinstance(make(), Reward)
    except QStarError as error:
        message = str(error)
    assert len(message) < 3000


@pytest.mark.parametrize("seed", range(40))
def test_random_specs_are_rewards_or_errors_of_the_package(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(25):
        spec = "".join(generator.choices(PIECES, k=generator.randint(1, 14)))
        told(functools.partial(as_reward, spec))


# Those whose first argument may be the name of a model, which would be looked for.
WITH_MODELS = {"classifier", "coherence", "relevance", "semantic_repetition", "static_relevance", "preference"}


@pytest.mark.parametrize("name", sorted({*reward_names(), *registry.WITH_ARGUMENTS} - WITH_MODELS))
def test_random_arguments_are_rewards_or_errors_of_the_package(name: str) -> None:
    generator = random.Random(name)
    names = [
        "most",
        "n",
        "words",
        "references",
        "pattern",
        "schema",
        "on_error",
        "penalty",
        "name",
        "lower",
        "upper",
        "self",
    ]
    for _ in range(30):
        args = generator.choices(VALUES, k=generator.randint(0, 2))
        chosen = generator.sample(names, generator.randint(0, 2))
        options = {option: generator.choice(VALUES) for option in chosen}
        told(functools.partial(make_reward, name, *args, **options))
