"""Generators of prompts: each returns disjoint train, dev and test prompts made by a rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..checks import check_integer
from ..errors import ConfigurationError

__all__ = ["GENERATORS", "Splits", "addition", "keyword_sets", "letters", "reasoning_gym"]

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


def _split(prompts: list[Any], dev: int, test: int, train: int | None) -> Splits:
    check_integer("dev", dev)
    check_integer("test", test)
    end = None if train is None else dev + test + train
    return {"test": prompts[:test], "dev": prompts[test : test + dev], "train": prompts[test + dev : end]}


GENERATORS: dict[str, Callable[..., Splits]] = {
    "addition": addition,
    "keywords": keyword_sets,
    "letters": letters,
    "reasoning_gym": reasoning_gym,
}
