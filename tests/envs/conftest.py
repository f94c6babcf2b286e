"""Fixtures that the tests of the environments share: a ranked tabular model, and a way to play and compare episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from qstar_decoding.envs import TabularLM

Transition = tuple[dict[str, Any], float, bool, bool, dict[str, Any]]


@pytest.fixture(scope="session")
def ranked() -> Callable[..., TabularLM]:
    """Make a model with tokens "a", "b", "c" and the end, always with the same probabilities, in this order."""

    def make(**kwargs: Any) -> TabularLM:
        return TabularLM([[0.4, 0.3, 0.2, 0.1]] * 4, **kwargs)

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Transition]]:
    """Play an episode; the actions are taken modulo the legal ones, and repeated if they do not suffice."""

    def play(env: Any, actions: Sequence[int], **reset: Any) -> list[Transition]:
        env.reset(**reset)
        transitions: list[Transition] = []
        while not transitions or not transitions[-1][2]:
            legal = np.flatnonzero(env.unwrapped.action_masks())
            transitions.append(env.step(legal[actions[len(transitions) % len(actions)] % len(legal)]))
        return transitions

    return play


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Any, Any], None]:
    """Compare observations, infos and transitions, with everything in them."""

    def compare(one: Any, other: Any) -> None:
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                compare(one[key], other[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other)
            for a, b in zip(one, other, strict=True):
                compare(a, b)
        else:
            np.testing.assert_array_equal(one, other)

    return compare
