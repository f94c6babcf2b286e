"""Generators of prompts: each returns disjoint train, dev and test prompts made by a rule."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..checks import check_integer
from ..envs.constraints.countdown import Format
from ..errors import ConfigurationError
from .number_puzzles import draw_problems, is_solvable, write_prompts

__all__ = ["GENERATORS", "Splits", "addition", "countdown", "game_of_24", "keyword_sets", "letters", "reasoning_gym"]
__all__ += ["star_graph"]

Splits = dict[str, list[Any]]  # train, dev, test; strings, or dicts with the key "prompt"


def addition(*, low: int, high: int, dev: int, test: int, train: int | None = None, seed: int = 0) -> Splits:
    """Return few-shot additions "12+25=37 ⏎ … ⏎ 27+14=" with the column ``answer``.

    Args:
        low: Smallest operand.
        high: Largest operand, included.
        dev: Number of dev problems.
        test: Number of test problems.
        train: Number of training problems; None for all that are left.
        seed: Seed of the shuffling. Every prompt has the same three solved examples, which are no problems themselves.
    """
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(range(low, high + 1), repeat=2))
    order = rng.permutation(len(pairs))
    shots, problems = [pairs[i] for i in order[:3]], [pairs[i] for i in order[3:]]
    given = "".join(f"{a}+{b}={a + b}\n" for a, b in shots)
    prompts = [{"prompt": f"{given}{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    return _split(prompts, dev, test, train)


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
    for name, value in {"shots": shots, "dev": dev, "test": test, "train": train}.items():
        check_integer(name, value)
    rng, count = np.random.default_rng(seed), shots + test + dev + train
    problems = draw_problems(
        numbers=numbers, low=low, high=high, target=target, count=count, operators=operators, rng=rng
    )
    prompts = write_prompts(problems[shots:], problems[:shots], format, operators)
    return _split(prompts, dev, test, train)


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
    rng, operators = np.random.default_rng(seed), "+-*/"
    check_integer("shots", shots)
    try:
        tested = [tuple(int(number) for number in problem.split()) for problem in test]
    except (AttributeError, ValueError) as error:
        raise ConfigurationError(f"test problems are texts such as '4 5 6 10': {error}") from error
    taken = {tuple(sorted(problem)) for problem in tested}
    solvable = [n for n in itertools.combinations_with_replacement(range(1, 14), 4) if is_solvable(n, 24, operators)]
    others = [solvable[i] for i in rng.permutation(len(solvable)) if solvable[i] not in taken]
    solved, tried, left = others[:shots], others[shots : shots + dev], others[shots + dev :]
    orders = [order for numbers in left for order in sorted(set(itertools.permutations(numbers)))]
    chosen = [orders[i] for i in rng.permutation(len(orders))[:train]]
    if len(chosen) < train:
        raise ConfigurationError(f"the Game of 24 has {len(chosen)} training problems, and {train} are asked for")

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
    """
    rng = np.random.default_rng(seed)
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
    return {**_split(unseen, dev, test, 0), "train": seen[:train]}


def letters(*, vocabulary: str, train: int, dev: int, test: int, length: int = 4, seed: int = 0) -> Splits:
    """Return distinct random strings of ``length`` letters out of ``vocabulary``."""
    rng = np.random.default_rng(seed)
    strings: dict[str, None] = {}
    while len(strings) < train + dev + test:
        strings["".join(rng.choice(list(vocabulary), size=length))] = None
    return _split(list(strings), dev, test, train)


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

    splits: Splits = {"train": [], "dev": [], "test": []}
    for name, config in datasets.items():
        wanted = shots + dev + test + train
        entries = gym_module().create_dataset(name, seed=seed, size=4 * wanted, **config)
        by_question = list({entry["question"].strip(): entry for entry in entries}.items())[:wanted]
        if len(by_question) <= shots + dev + test:
            raise ConfigurationError(
                f"{name} with {config} has {len(by_question)} different questions in {4 * wanted}, too few for {shots} "
                f"solved ones, {dev} to tune and {test} to test; widen its configuration or ask for fewer"
            )
        given = "".join(f"Q: {question}\nA: {entry['answer']}\n\n" for question, entry in by_question[:shots])
        prompts = [
            {"prompt": f"{given}Q: {question}\nA:", "entry": entry, "answer": entry["answer"]}
            for question, entry in by_question[shots:]
        ]
        for part, some in _split(prompts, dev, test, train).items():
            splits[part] += some
    return splits


def star_graph(
    *, degrees: list[int], length: int, train: int, dev: int, test: int, shots: int = 3, seed: int = 0
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
        ConfigurationError: A graph would need more than the 26 letters and 26 capitals as names.
    """
    for name, value in {"length": length, "shots": shots, **{f"degree {d}": d for d in degrees}}.items():
        check_integer(name, value)
    if max(degrees) * length + 1 > len(string.ascii_letters):
        raise ConfigurationError(
            f"a star of {max(degrees)} paths of {length} edges has more nodes than the {len(string.ascii_letters)} "
            "letters that name them; take fewer or shorter paths"
        )
    rng = np.random.default_rng(seed)
    given = "".join(f"{p['prompt']}{p['answer']}\n" for p in (_star(min(degrees), length, rng) for _ in range(shots)))
    found: dict[str, Any] = {}
    while len(found) < train + dev + test:
        star = _star(int(rng.choice(degrees)), length, rng)
        found[star["prompt"]] = {**star, "prompt": given + star["prompt"]}
    return _split(list(found.values()), dev, test, train)


def _star(degree: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
    names = [str(name) for name in rng.permutation(list(string.ascii_letters))[: degree * length + 1]]
    start, paths = names[0], [[names[0], *names[1 + i * length : 1 + (i + 1) * length]] for i in range(degree)]
    edges = [[a, b] for path in paths for a, b in itertools.pairwise(path)]
    edges = [edges[i] for i in rng.permutation(len(edges))]
    path = paths[rng.integers(degree)]
    listed = " ".join(f"{a}>{b}" for a, b in edges)
    asked = f"Edges: {listed}. From {start} to {path[-1]}: "
    return {"prompt": asked, "edges": edges, "start": start, "answer": ">".join(path), "degree": degree}


def _split(prompts: list[Any], dev: int, test: int, train: int | None) -> Splits:
    check_integer("dev", dev)
    check_integer("test", test)
    end = None if train is None else dev + test + train
    return {"test": prompts[:test], "dev": prompts[test : test + dev], "train": prompts[test + dev : end]}


GENERATORS: dict[str, Callable[..., Splits]] = {
    "addition": addition,
    "countdown": countdown,
    "game_of_24": game_of_24,
    "keywords": keyword_sets,
    "letters": letters,
    "reasoning_gym": reasoning_gym,
    "star_graph": star_graph,
}
