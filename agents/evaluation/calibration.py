"""Calibration of a learned Q: its values beside the best that searches found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...checks import first_line
from ...envs import load_prompts
from ...errors import ConfigurationError
from ..planning.astar import AStarPlanner
from ..search.backup import best_found
from ..search.budget import Budget
from ..search.loop import score_completions
from ..search.state import Search, Values

__all__ = ["Calibration", "calibrate", "calibration"]


class Calibration(NamedTuple):
    """Q beside what it estimates, for ``n`` edges that searches followed to the end of a text.

    The best J found through an edge is a lower bound of the best there is. So where Q is below it, Q is certainly too
    low there, a violation of admissibility; where Q is above it, Q may be right and the search at fault.

    Attributes:
        estimate: float64 [n], f = g + Q.
        found: float64 [n], J of the best completion found through the edge.
        depth: int64 [n], tokens from the prompt to the edge.
    """

    estimate: Values
    found: Values
    depth: Any

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read the three arrays from an .npz file.

        Raises:
            ConfigurationError: They are not in it.
        """
        try:
            with np.load(path) as stored:
                arrays = [stored[name] for name in cls._fields]
            if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1 or not len(arrays[0]):
                raise ValueError("the arrays are not of one length")
            if not all(array.dtype.kind in "fiu" and np.isfinite(array).all() for array in arrays):
                raise ValueError("a value is not a finite number")
        except Exception as error:  # numpy, zipfile and zlib raise many types for a damaged file
            raise ConfigurationError(
                f"{path} is not a calibration that qstar evaluate wrote: {first_line(error)}; evaluate again"
            ) from error
        return cls(*arrays)

    def summary(self) -> dict[str, float]:
        """Return the numbers that are logged, in units of J but for shares and correlation."""
        error = self.estimate - self.found
        violated = error < -1e-6
        spread = self.estimate.std() > 0 and self.found.std() > 0
        return {
            "bias": float(error.mean()),
            "mean_absolute_error": float(np.abs(error).mean()),
            "correlation": float(np.corrcoef(self.estimate, self.found)[0, 1]) if spread else 0.0,
            "violations": float(violated.mean()),
            "mean_violation": float(-error[violated].mean()) if violated.any() else 0.0,
            "mean_overestimation": float(error[~violated].mean()) if not violated.all() else 0.0,
        }


def calibration(searches: Sequence[Search]) -> Calibration:
    """Compare f with the best J found, over all edges of ``searches`` that lead to a finished text.

    Args:
        searches: Finished searches of A* with w = 1 on the Q in question. Those with ``score="q"`` must have had their
            completions scored.

    Raises:
        ConfigurationError: No search has finished a text.
    """
    estimate, found, depth = [], [], []
    for search in searches:
        best = best_found(search)
        rows, actions = np.nonzero(np.isfinite(best))
        estimate.append(search.f[rows, actions])
        found.append(best[rows, actions])
        depth.append(search.depth[rows])
    if not sum(map(len, found)):
        raise ConfigurationError("no search has finished a text; give a larger budget")
    return Calibration(np.concatenate(estimate), np.concatenate(found), np.concatenate(depth))


def calibrate(planner: AStarPlanner, prompts: Any, budget: int) -> Calibration:
    """Search each prompt with ``budget`` LM tokens and compare the planner's heuristic with what was found.

    Raises:
        ConfigurationError: No search has finished a text.
    """
    searches = planner.run_searches(load_prompts(prompts), Budget(budget))
    if planner.score == "q":
        score_completions(searches)
    return calibration(searches)
