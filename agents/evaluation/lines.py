"""Lines of pictures: means and intervals of results, of runs and of traces, as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import ConfigurationError
from ..search.budget import TracePoint
from ..search.state import Values
from .curves import Curves
from .results import OURS, Results

__all__ = ["CERTIFYING", "HIGHLIGHTED", "Line", "result_lines", "run_lines", "standing_out", "trace_lines"]

# Decoders that stand out in a picture of J: ours, the strongest others with and without Q, and ours without Q.
HIGHLIGHTED = (OURS, "beam on g + Q", "best-of-n", "A* without Q")
# Decoders that search for a certificate. The upper bounds of the others say little.
CERTIFYING = (OURS, "A* without Q", "best-first h=bound")


class Line(NamedTuple):
    """One line of a picture.

    Attributes:
        label: Its name.
        x: float64 [n].
        y: float64 [n], NaN where nothing is known.
        low: float64 [n], the lower end of the interval; None where there is none.
        high: float64 [n], the upper end.
    """

    label: str
    x: Values
    y: Values
    low: Values | None = None
    high: Values | None = None


def standing_out(what: str) -> tuple[str, ...]:
    """Return the decoders that a picture of ``"objective"`` or ``"gap"`` is about."""
    return CERTIFYING if what == "gap" else HIGHLIGHTED


def result_lines(results: Results, what: str, names: Sequence[str]) -> list[Line]:
    """Return a line per decoder: means by budget, and for those in ``names`` 95 % intervals over the prompts.

    Of the gap only those in ``names`` are of interest. A mean J is left out where it is that of unfinished texts.

    Raises:
        ConfigurationError: There is nothing to draw.
    """
    lines = []
    for name in results.names:
        have = [
            budget
            for budget in results.budgets
            if results.has(name, budget) and (what == "gap" or results.finishes(name, budget))
        ]
        y = np.array([results.mean(name, budget, what) for budget in have])
        if (what == "gap" and name not in names) or np.isnan(y).all():
            continue
        ends = [results.interval(name, budget, what) for budget in have] if name in names else None
        low, high = np.array(ends).T if ends else (None, None)
        lines.append(Line(name, np.array(have, dtype=np.float64), y, low, high))
    if not lines:
        raise ConfigurationError(f"{results.task}: no {what} was measured of {', '.join(names)} at any budget")
    return lines


def run_lines(groups: Mapping[str, Sequence[Curves]], name: str) -> list[Line]:
    """Return a line per group of runs: the mean of a quantity over the runs, and from the least of them to the most.

    Runs that were measured at different steps are interpolated, as far as all of them reach.

    Args:
        groups: Runs that differ in their seed only, by what they are called.
        name: The quantity.
    """
    lines = []
    for label, runs in groups.items():
        curves = [np.array(run[name], dtype=np.float64) for run in runs if name in run]  # [2, n] each
        if not curves:
            continue
        start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        x = np.unique(np.concatenate([x for x, _ in curves]))
        x = x[(x >= start) & (x <= end)]
        values = np.array([np.interp(x, steps, found) for steps, found in curves])
        spread = (values.min(axis=0), values.max(axis=0)) if len(curves) > 1 else (None, None)
        lines.append(Line(label, x, values.mean(axis=0), *spread))
    return lines


def trace_lines(traces: Mapping[str, Sequence[TracePoint]]) -> list[Line]:
    """Return two lines per search, its LB and its UB by LM tokens; NaN where there is none yet."""
    lines = []
    for label, trace in traces.items():
        tokens = np.array([point.lm_tokens for point in trace], dtype=np.float64)
        for bound, at in (("LB", "lower_bound"), ("UB", "upper_bound")):
            values = np.array([getattr(point, at) for point in trace], dtype=np.float64)
            values[~np.isfinite(values)] = np.nan
            lines.append(Line(f"{label}, {bound}" if label else bound, tokens, values))
    return lines
