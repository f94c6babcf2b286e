"""Generators of prompts: each returns disjoint train, dev and test prompts made by a rule."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from ..checks import check_flag, check_integer, first_line
from ..envs.constraints.countdown import CountdownConstraint, Format
from ..errors import ConfigurationError
from .number_puzzles import draw_problems, is_solvable, write_prompts

__all__ = ["GENERATORS", "Splits", "addition", "countdown", "game_of_24", "keyword_sets", "letters", "reasoning_gym"]
__all__ += ["star_graph"]

Splits = dict[str, list[Any]]  # train, dev, test; strings, or dicts with the key "prompt"

_MOST_OPERANDS = 3000  # all pairs are listed: nine million
_MOST_NUMBERS = 6  # all solutions of the solved problems are listed; with seven, that takes minutes
_LARGEST = 10**9


def addition(*, low: int, high: int, dev: int, test: int, train: int | None = None, seed: int = 0) -> Splits:
    """Return few-shot additions "12+25=37 ⏎ … ⏎ 27+14=" with the column ``answer``.

    Args:
        low: Smallest operand.
        high: Largest operand, included.
        dev: Number of dev problems.
        test: Number of test problems.
        train: Number of training problems; None for all that are left.
        seed: Seed of the shuffling. Every prompt has the same three solved examples, which are no problems themselves.

    Raises:
        ConfigurationError: There are not so many different problems, or a number is out of range.
    """
    rng = _seeded(seed, dev=dev, test=test, train=train or 0)
    low = check_integer("low", low, low=0, high=_LARGEST)
    check_integer(
        "high", high, low=low, high=low + _MOST_OPERANDS - 1, meaning=f"low, and up to {_MOST_OPERANDS} numbers"
    )
    pairs = list(itertools.product(range(low, high + 1), repeat=2))
    order = rng.permutation(len(pairs))
    shots, problems = [pairs[i] for i in order[:3]], [pairs[i] for i in order[3:]]
    given = "".join(f"{a}+{b}={a + b}\n" for a, b in shots)
    prompts = [{"prompt": f"{given}{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    return _split(prompts, dev, test, train, f"sums of numbers from {low} to {high}")


def countdown(
    *,
    numbers: int,
    low: int,
    high: int,
    target: int,
    train: int,
    dev: int,
    test: int,
    shots: int = 6,
    format: Format = "expression",
    operators: str = "+-*/",
    seed: int = 0,
) -> Splits:
    """Return problems of Countdown after some solved ones, with the columns ``numbers`` and ``target``.

    Args:
        numbers: How many numbers a problem has.
        low: Smallest number.
        high: Largest number.
        target: Largest target.
        train: Number of training problems.
        dev: Number of dev problems.
        test: Number of test problems.
        shots: Solved problems before each, the same for all and in no split.
        format: In which the solved ones are answered; see
            :class:`~qstar_decoding.envs.constraints.CountdownConstraint`.
        operators: Operators of the solutions.
        seed: Seed of the drawing.

    Raises:
        ConfigurationError: There are not so many different problems.
    """
    rng, count = _seeded(seed, dev=dev, test=test, train=train, shots=shots), shots + test + dev + train
    CountdownConstraint(format, operators)  # says what is wrong with either
    check_integer("numbers", numbers, high=_MOST_NUMBERS, meaning="each problem's solutions are listed")
    low = check_integer("low", low, high=_LARGEST)
    check_integer("high", high, low=low, high=_LARGEST)
    check_integer("target", target)
    problems = draw_problems(
        numbers=numbers, low=low, high=high, target=target, count=count, operators=operators, rng=rng
    )
    prompts = write_prompts(problems[shots:], problems[:shots], format, operators)
    return _split(prompts, dev, test, train, "problems")


def game_of_24(
    *, test: list[str], train: int, dev: int, shots: int = 6, format: Format = "expression", seed: int = 0
) -> Splits:
    """Return problems of the Game of 24 after some solved ones: four numbers from 1 to 13, the target 24.

    Every four numbers that integer steps can solve are used once in dev, or in training in several orders.

    Args:
        test: The test problems, such as ``"4 5 6 10"``; the others never have their numbers.
        train: Number of training problems.
        dev: Number of dev problems.
        shots: See :func:`countdown`.
        format: See :func:`countdown`.
        seed: Seed of the order.

    Raises:
        ConfigurationError: A test problem is none, or there are too few others.
    """
    rng, operators = _seeded(seed, dev=dev, train=train, shots=shots), "+-*/"
    CountdownConstraint(format, operators)  # says what is wrong with the format
    tested = [_four_numbers(problem) for problem in _listed("test", test)]
    taken = {tuple(sorted(problem)) for problem in tested}
    solvable = [n for n in itertools.combinations_with_replacement(range(1, 14), 4) if is_solvable(n, 24, operators)]
    others = [solvable[i] for i in rng.permutation(len(solvable)) if solvable[i] not in taken]
    solved, tried, left = others[:shots], others[shots : shots + dev], others[shots + dev :]
    orders = [order for numbers in left for order in sorted(set(itertools.permutations(numbers)))]
    chosen = [orders[i] for i in rng.permutation(len(orders))[:train]]
    for kind, found, wanted in (("solved", solved, shots), ("dev", tried, dev), ("training", chosen, train)):
        if len(found) < wanted:
            raise ConfigurationError(
                f"the Game of 24 has {len(found)} {kind} problems left, and {wanted} are asked for; ask for fewer"
            )

    def ask(problems: Iterable[tuple[int, ...]]) -> list[Any]:
        return write_prompts([(n, 24) for n in problems], [(n, 24) for n in solved], format, operators)

    return {"train": ask(chosen), "dev": ask(tried), "test": ask(tested)}


def keyword_sets(
    *, groups: list[list[str]], template: str, dev: int, test: int, train: int, chat: bool = False, seed: int = 0
) -> Splits:
    """Return prompts that ask for a sentence with one word of each group, with the column ``keywords``.

    Args:
        groups: Lists of words.
        template: The request, with ``{words}`` where the words go.
        dev: Number of dev prompts.
        test: Number of test prompts.
        train: Number of training prompts.
        chat: Whether the request is a chat message of the user instead of plain text.
        seed: Seed of the drawing. A fifth of each group's words are in no training prompt. Dev and test prompts have
            at least one of these.

    Raises:
        ConfigurationError: There are not so many different sets of words, or an argument is of another kind.
    """
    rng = _seeded(seed, dev=dev, test=test, train=train)
    check_flag("chat", chat)
    for group in _listed("groups", groups):
        if not all(isinstance(word, str) and word for word in _listed("a group", group)):
            raise ConfigurationError(f"groups are lists of words, got {group!r}")
    if not _fits(template):
        raise ConfigurationError(f"template is a text with {{words}} and no other braces, got {template!r}")
    kept_back = [set(rng.permutation(group)[: max(len(group) // 5, 1)].tolist()) for group in groups]
    sets = list(itertools.product(*groups))
    new = [any(word in back for word, back in zip(words, kept_back, strict=True)) for words in sets]
    prompts = []
    for i in rng.permutation(len(sets)).tolist():
        words = rng.permutation(sets[i]).tolist()  # the order of the groups would give away the words' roles
        request = template.format(words=", ".join(words))
        content: Any = [{"role": "user", "content": request}] if chat else request
        prompts.append((new[i], {"prompt": content, "keywords": words}))
    seen, unseen = ([prompt for is_new, prompt in prompts if is_new is wanted] for wanted in (False, True))
    sets_of = f"sets of words of {len(groups)} groups"
    return {
        **_split(unseen, dev, test, 0, f"{sets_of} with a word that is kept back from training"),
        "train": _split(seen, 0, 0, train, f"{sets_of} without a word that is kept back from training")["train"],
    }


def letters(*, vocabulary: str, train: int, dev: int, test: int, length: int = 4, seed: int = 0) -> Splits:
    """Return distinct random strings of ``length`` letters out of ``vocabulary``.

    Raises:
        ConfigurationError: There are not so many different strings, or an argument is of another kind.
    """
    rng = _seeded(seed, dev=dev, test=test, train=train)
    if not isinstance(cast("Any", vocabulary), str) or not vocabulary:
        raise ConfigurationError(f"vocabulary is a text of letters, got {vocabulary!r}")
    check_integer("length", length)
    most, wanted = len({*vocabulary}) ** min(length, 64), train + dev + test  # 2 ** 64 are more than enough
    if most < wanted:  # else the drawing would not end
        raise _too_few(f"strings of {length} letters out of {vocabulary!r}", most, wanted)
    strings: dict[str, None] = {}
    while len(strings) < train + dev + test:
        strings["".join(rng.choice(list(vocabulary), size=length))] = None
    return _split(list(strings), dev, test, train, "strings")


def reasoning_gym(
    *, datasets: dict[str, dict[str, Any]], dev: int, test: int, train: int, shots: int = 3, seed: int = 0
) -> Splits:
    """Return few-shot questions of data sets of the library reasoning-gym, with the columns ``entry`` and ``answer``.

    Args:
        datasets: Their names, each with its configuration.
        dev: Number of dev prompts of each data set.
        test: Number of test prompts of each.
        train: The most training prompts of each; small data sets have fewer different questions.
        shots: Solved examples before each question, the same for all of a data set.
        seed: Seed of the data sets.

    Raises:
        ConfigurationError: The library is not installed, or a data set has not enough different questions.
    """
    from ..rewards.library.reasoning import gym_module

    _seeded(seed, dev=dev, test=test, train=train)
    check_integer("shots", shots, low=0)
    if (
        not isinstance(cast("Any", datasets), dict)
        or not datasets
        or not all(isinstance(c, dict) for c in datasets.values())
    ):
        raise ConfigurationError(
            f"datasets maps names to configurations, such as {{'chain_sum': {{'max_terms': 2}}}}; got {datasets!r:.200}"
        )
    splits: Splits = {"train": [], "dev": [], "test": []}
    for name, config in datasets.items():
        wanted, library = shots + dev + test + train, gym_module()
        try:
            entries = list(library.create_dataset(name, seed=seed, size=4 * wanted, **config))
        except Exception as error:  # the data sets check their configurations each in its own way
            raise ConfigurationError(
                f"reasoning-gym makes no data set {name!r} of {config}: {first_line(error)}"
            ) from error
        by_question = list({entry["question"].strip(): entry for entry in entries}.items())[:wanted]
        if len(by_question) < shots + dev + test + min(train, 1):
            raise ConfigurationError(
                f"{name} with {config} has {len(by_question)} different questions in {4 * wanted}, too few for {shots} "
                f"solved ones, {dev} to tune and {test} to test; widen its configuration or ask for fewer"
            )
        given = "".join(f"Q: {question}\nA: {entry['answer']}\n\n" for question, entry in by_question[:shots])
        prompts = [
            {"prompt": f"{given}Q: {question}\nA:", "entry": entry, "answer": entry["answer"]}
            for question, entry in by_question[shots:]
        ]
        for part, some in _split(prompts, dev, test, None, "questions").items():
            splits[part] += some
    return splits


def star_graph(
    *, degrees: Sequence[int], length: int, train: int, dev: int, test: int, shots: int = 3, seed: int = 0
) -> Splits:
    """Return few-shot searches for the path from the centre of a star to one of its leaves.

    The columns are ``edges``, ``start``, ``answer``, the path, and ``degree``. A path can be followed edge by edge, but
    its first step is one of ``degree`` that look alike (Bachmann & Nagarajan 2024, "The pitfalls of next-token
    prediction").

    Args:
        degrees: Numbers of paths that leave the centre; a prompt draws one of them.
        length: Edges of each path.
        train: Number of training prompts.
        dev: Number of dev prompts.
        test: Number of test prompts.
        shots: Solved examples before each, of the smallest degree, the same for all.
        seed: Seed of the drawing.

    Raises:
        ConfigurationError: A graph would need more than the 26 letters and 26 capitals as names, or there are not so
            many different graphs.
    """
    rng = _seeded(seed, dev=dev, test=test, train=train, shots=shots)
    check_integer("length", length)
    for degree in _listed("degrees", degrees):
        check_integer("a degree", degree)
    if max(degrees) * length + 1 > len(string.ascii_letters):
        raise ConfigurationError(
            f"a star of {max(degrees)} paths of {length} edges has more nodes than the {len(string.ascii_letters)} "
            "letters that name them; take fewer or shorter paths"
        )
    given = "".join(f"{p['prompt']}{p['answer']}\n" for p in (_star(min(degrees), length, rng) for _ in range(shots)))
    found: dict[str, Any] = {}
    most, wanted = sum(_number_of_stars(degree, length) for degree in {*degrees}), train + dev + test
    if most < wanted:  # else the drawing would not end
        raise _too_few(f"star graphs of {length} edges a path", most, wanted)
    while len(found) < wanted:
        star = _star(int(rng.choice(degrees)), length, rng)
        found[star["prompt"]] = {**star, "prompt": given + star["prompt"]}
    return _split(list(found.values()), dev, test, train, "star graphs")


def _number_of_stars(degree: int, length: int) -> int:
    """Return how many prompts there are: names, up to the order of the paths, orders of edges, and leaves."""
    edges = degree * length
    names = math.perm(len(string.ascii_letters), edges + 1) // math.factorial(degree)
    return names * math.factorial(edges) * degree


def _star(degree: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
    names = [str(name) for name in rng.permutation(list(string.ascii_letters))[: degree * length + 1]]
    start, paths = names[0], [[names[0], *names[1 + i * length : 1 + (i + 1) * length]] for i in range(degree)]
    edges = [[a, b] for path in paths for a, b in itertools.pairwise(path)]
    edges = [edges[i] for i in rng.permutation(len(edges))]
    path = paths[rng.integers(degree)]
    listed = " ".join(f"{a}>{b}" for a, b in edges)
    asked = f"Edges: {listed}. From {start} to {path[-1]}: "
    return {"prompt": asked, "edges": edges, "start": start, "answer": ">".join(path), "degree": degree}


def _seeded(
    seed: int, *, train: int, dev: int, test: int | None = None, shots: int | None = None
) -> np.random.Generator:
    """Check the numbers of prompts that a generator is asked for; return the random generator of its seed."""
    check_integer("train", train, low=0)
    check_integer("dev", dev)
    for name, value in (("test", test), ("shots", shots)):
        if value is not None:
            check_integer(name, value)
    return np.random.default_rng(check_integer("seed", seed, low=0))


def _listed(name: str, value: Any) -> Sequence[Any]:
    """Check that an argument is a list with something in it."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigurationError(f"{name} is a list that is not empty, got {value!r:.200}")
    return value


def _four_numbers(problem: Any) -> tuple[int, ...]:
    """Read a problem of the Game of 24."""
    words = problem.split() if isinstance(problem, str) else []
    if len(words) != 4 or not all(word.isdecimal() and 1 <= int(word) <= 13 for word in words):
        raise ConfigurationError(
            f"test problems are texts of four numbers from 1 to 13, such as '4 5 6 10'; got {problem!r}"
        )
    return tuple(map(int, words))


def _fits(template: Any) -> bool:
    """Tell whether a template takes words, and nothing else."""
    try:
        return isinstance(template, str) and template.format(words="\0") != template.format(words="")
    except (LookupError, ValueError, AttributeError):
        return False


def _too_few(what: str, found: int, wanted: int) -> ConfigurationError:
    return ConfigurationError(
        f"there are {found} different {what}, and {wanted} are asked for; widen the ranges or ask for fewer"
    )


def _split(prompts: list[Any], dev: int, test: int, train: int | None, what: str) -> Splits:
    """Return the first prompts as the test split, the next as dev, then ``train`` or all that are left."""
    wanted = dev + test + (train or 0)
    if len(prompts) < wanted:
        raise _too_few(what, len(prompts), wanted)
    return {
        "test": prompts[:test],
        "dev": prompts[test : test + dev],
        "train": prompts[test + dev : None if train is None else wanted],
    }


GENERATORS: dict[str, Callable[..., Splits]] = {
    "addition": addition,
    "countdown": countdown,
    "game_of_24": game_of_24,
    "keywords": keyword_sets,
    "letters": letters,
    "reasoning_gym": reasoning_gym,
    "star_graph": star_graph,
}
