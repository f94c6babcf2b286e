"""Fixtures of the tests of rewards."""

from __future__ import annotations

import pytest

from qstar_decoding.rewards import register_reward, registry

from .samples import constant


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rewards, `one` and `ten`, registered for one test, in a registry of its own."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register_reward("one")(lambda: constant(1.0, "one", 0, 2))
    register_reward("ten")(lambda: constant(10.0, "ten", 0, 20))
