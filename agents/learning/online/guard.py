"""Guard: the choice among heuristics, by what the searches with each have brought so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

__all__ = ["Guard", "Use"]

# Share of the evidence that is left after one more search. Q improves, so that old results mislead; with .98 the last
# fifty searches count most.
_MEMORY = 0.98
_TRIALS = 3  # searches by each heuristic before they are compared
_LEAST_DEVIATION = 1e-6  # of J, where all results are equal


class Use(NamedTuple):
    """How often a heuristic was used, and with what result.

    Attributes:
        searches: Finished searches that it ordered.
        objective: Their mean J; NaN where no text was finished.
        recent: Their mean J, the late ones counting most; what the guard compares.
    """

    searches: int
    objective: float
    recent: float


@dataclass
class Results:
    """Results of the searches that one heuristic ordered; those of long ago are discounted in the first three.

    Attributes:
        weight: Number of searches.
        total: Sum of their J.
        squares: Sum of the squares of their J.
        searches: Number of searches, all alike.
        objectives: Sum of their J, all alike.
        unfinished: Number of searches that found no text, those of long ago discounted.
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    searches: int = 0
    objectives: float = 0.0
    unfinished: float = 0.0

    @property
    def recent(self) -> float:
        """The mean J, the late searches counting most; NaN where they are forgotten."""
        return self.total / self.weight if self.weight else math.nan

    @property
    def tried(self) -> float:
        """The number of searches, with a text or without; without one, a trial is repeated when it is long ago."""
        return self.searches + self.unfinished

    def forget(self) -> None:
        """Discount all results by one search."""
        self.weight, self.total, self.squares = self.weight * _MEMORY, self.total * _MEMORY, self.squares * _MEMORY
        self.unfinished *= _MEMORY

    def add(self, objective: float) -> None:
        """Enter the J of a search."""
        self.weight, self.total, self.squares = self.weight + 1, self.total + objective, self.squares + objective**2
        self.searches, self.objectives = self.searches + 1, self.objectives + objective


class Guard:
    """Chooses the heuristic of each search by Thompson sampling over their J so far.

    It draws each heuristic's mean J from what is known of it, and takes the largest (Thompson 1933; with discounted
    evidence: Raj & Kalyani 2017, arXiv 1707.09727). So a heuristic that does harm is soon used seldom, and tried again
    when it may have improved.

    Attributes:
        results: By the heuristic's name.
    """

    def __init__(self, seed: int | None = 0) -> None:
        """Know nothing yet.

        Args:
            seed: Of the draws; None for another one each time.
        """
        self.results: dict[str, Results] = {}
        self._rng = np.random.default_rng(seed)

    def draw(self, names: Sequence[str], running: Sequence[str] = ()) -> str:
        """Return the heuristic of the next search.

        Args:
            names: The heuristics, those to be tried first in front.
            running: The heuristics of searches that run, which count as tried, so that a group is not all one.
        """
        for name in names:
            found = self.results.get(name)
            if (found.tried if found else 0) + running.count(name) < _TRIALS:
                return name
        known = {name: found for name, found in self.results.items() if name in names and found.weight}
        weight, total, squares = (
            sum(getattr(found, field) for found in known.values()) for field in ("weight", "total", "squares")
        )
        if not weight:
            return names[0]
        deviation = math.sqrt(max(squares / weight - (total / weight) ** 2, 0.0)) + _LEAST_DEVIATION
        draws = {
            name: self._rng.normal(found.recent, deviation / math.sqrt(found.weight)) for name, found in known.items()
        }
        return max(draws, key=lambda name: draws[name])

    def enter(self, name: str, objective: float) -> None:
        """Enter the J of a search that a heuristic ordered; NaN, without a text, counts as a trial only."""
        if not math.isfinite(objective):
            self.results.setdefault(name, Results()).unfinished += 1
            return
        for found in self.results.values():
            found.forget()
        self.results.setdefault(name, Results()).add(objective)

    def use(self, name: str) -> Use:
        """Return how often a heuristic was used and with what result."""
        found = self.results.get(name)
        if found is None or not found.searches:
            return _UNUSED
        return Use(found.searches, found.objectives / found.searches, found.recent)

    def restore(self, saved: Any) -> None:
        """Take back the results as JSON has them; anything else is no evidence."""
        try:
            self.results = TypeAdapter(dict[str, Results]).validate_python(saved)
        except ValidationError:
            self.results = {}


_UNUSED = Use(0, math.nan, math.nan)
