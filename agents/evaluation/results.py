"""Numbers of a comparison: means over prompts and seeds, intervals and differences, from memory or from results.csv.

Means are over the prompts. Where a decoder ran with several seeds, each prompt's value is first averaged over them.
Intervals resample the prompts (paired bootstrap, 95 %).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ...checks import describe_invalid
from ...errors import ConfigurationError
from ...files import read_text
from ..planning.registry import CONTENDERS
from ..search.state import Values
from .outcomes import paired_bootstrap

__all__ = ["OURS", "Results"]

OURS = "Q*"
_TOLERATED = 0.1  # share of unfinished texts up to which a mean J is one of completions

_MEANS = ("objective", "reward", "gold", "logprob", "tokens", "lm_tokens", "reward_calls", "gap", "certified")
_TEXTS = {"task", "decoder", "prompt", "text", "stop"}


class _Row(BaseModel):
    """A row of results.csv. The columns that are not named here hold numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    task: str
    decoder: str
    budget: int | None = Field(ge=1)
    seed: int
    prompt_index: int = Field(ge=0)
    prompt: str = ""
    text: str = ""
    objective: FiniteFloat | None
    gap: float | None
    stop: str = ""


class Results:
    """The measurements of one comparison, averaged over seeds.

    Attributes:
        rows: The rows of :meth:`Comparison.rows`: one dict per prompt and cell.
        task: The task's name.
        names: The decoders, in the order of :data:`CONTENDERS`.
        budgets: LM tokens a prompt, ascending.
        prompts: Number of prompts.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], budgets: Sequence[int] = ()) -> None:
        """Sort the rows into cells.

        Args:
            rows: Of the cells that are finished.
            budgets: Those that belong to the comparison, finished or not; by default those of the rows.

        Raises:
            ConfigurationError: There are none.
        """
        if not rows:
            raise ConfigurationError("a comparison with no finished cell has no results")
        self.rows = rows
        self.task: str = rows[0]["task"]
        self.budgets: list[int] = sorted({*budgets, *(row["budget"] for row in rows if row["budget"] is not None)})
        self.prompts = 1 + max(row["prompt_index"] for row in rows)
        self._cells: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for row in rows:
            self._cells.setdefault((row["decoder"], row["budget"]), []).append(row)
        found = {row["decoder"] for row in rows}
        self.names = [*(name for name in CONTENDERS if name in found), *sorted(found - CONTENDERS.keys())]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results.csv, as :meth:`write` has written it.

        Raises:
            ConfigurationError: It is not such a file.
        """
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        needed = {name for name, field in _Row.model_fields.items() if field.is_required()}
        try:
            if missing := needed - set(reader.fieldnames or ()):
                raise ConfigurationError(
                    f"{path} is not what qstar evaluate writes: it has no column {', '.join(sorted(missing))}"
                )
            rows = [
                _Row.model_validate({key: _value(key, cell) for key, cell in row.items()}).model_dump()
                for row in reader
            ]
            if rows and max(row["prompt_index"] for row in rows) >= len(rows):
                raise ConfigurationError(f"{path} has a prompt_index of at least its number of rows; evaluate again")
            return cls(rows)
        except ValidationError as error:
            raise ConfigurationError(f"{path}, line {reader.line_num}: {describe_invalid(error)}") from error
        except (csv.Error, AttributeError, TypeError) as error:  # more cells than columns, quotes that do not end
            raise ConfigurationError(f"{path}, line {reader.line_num} is not a row of CSV: {error}") from error

    def write(self, path: Path) -> None:
        """Write the rows as CSV; what is not known is an empty cell."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def budgeted(self, name: str) -> bool:
        """Tell whether a decoder's outcome depends on the budget."""
        return (name, None) not in self._cells

    def has(self, name: str, budget: int) -> bool:
        """Tell whether a decoder's cells of this budget are there."""
        return (name, self._budget(name, budget)) in self._cells

    def rows_at(self, name: str, budget: int, **values: Any) -> list[dict[str, Any]]:
        """Return a decoder's rows of a budget that have these values; none where the cell is missing."""
        rows = self._cells.get((name, self._budget(name, budget)), [])
        return [row for row in rows if all(row[key] == value for key, value in values.items())]

    def per_prompt(self, name: str, budget: int, what: str) -> Values:
        """Return a quantity of each prompt, mean over the seeds, float64 [prompts], NaN where it is not known."""
        rows = self._cells[name, self._budget(name, budget)]
        total, seen = np.zeros(self.prompts), np.zeros(self.prompts)
        for row in rows:
            if (value := row[what]) is not None:
                total[row["prompt_index"]] += value
                seen[row["prompt_index"]] += 1
        with np.errstate(invalid="ignore"):
            result: Values = total / seen
        return result

    def mean(self, name: str, budget: int, what: str) -> float:
        """Return the mean over the prompts; NaN where nothing is known."""
        values = self.per_prompt(name, budget, what)
        return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan

    def interval(self, name: str, budget: int, what: str = "objective") -> tuple[float, float]:
        """Return the 95 % interval of the mean over the prompts whose value is known."""
        values = self.per_prompt(name, budget, what)
        known = values[~np.isnan(values)]
        return paired_bootstrap(known) if len(known) else (math.nan, math.nan)

    def ahead(self, name: str, budget: int, what: str = "objective") -> tuple[float, float, float]:
        """Return Q* minus a decoder, paired by prompt: mean and 95 % interval."""
        difference = self.per_prompt(OURS, budget, what) - self.per_prompt(name, budget, what)
        return float(difference.mean()), *paired_bootstrap(difference)

    def perplexity(self, name: str, budget: int) -> float:
        """Return exp of minus the mean log-probability per token of the texts, pooled over the prompts."""
        rows = self._cells[name, self._budget(name, budget)]
        tokens = sum(row["tokens"] for row in rows)
        return math.exp(-sum(row["logprob"] for row in rows) / tokens) if tokens else math.nan

    def distinct(self, name: str, budget: int, n: int = 2) -> float:
        """Return the share of different n-grams of words among all of the texts' (Li et al. 2016), mean over seeds."""
        by_seed: dict[int, list[tuple[str, ...]]] = {}
        for row in self._cells[name, self._budget(name, budget)]:
            words = row["text"].lower().split()
            by_seed.setdefault(row["seed"], []).extend(zip(*(words[i:] for i in range(n)), strict=False))
        shares = [len(set(grams)) / len(grams) for grams in by_seed.values() if grams]
        return float(np.mean(shares)) if shares else math.nan

    def finishes(self, name: str, budget: int) -> bool:
        """Tell whether nearly all texts are finished; one that is not is scored as it stands, which is no text's J."""
        rows = self._cells[name, self._budget(name, budget)]
        unfinished = sum(1 for row in rows if row.get("stop") == "partial")
        return unfinished <= _TOLERATED * len(rows)

    def spent(self, name: str, budget: int) -> tuple[float, float, float]:
        """Return the LM tokens that were used: mean, least and most over prompts and seeds."""
        tokens = [row["lm_tokens"] for row in self._cells[name, self._budget(name, budget)]]
        return float(np.mean(tokens)), min(tokens), max(tokens)

    def tokens_for(self, name: str, objective: float) -> float:
        """Return the LM tokens at which a decoder reaches a mean J, between its budgets; infinite if it never does.

        Budgets with which it leaves texts unfinished do not count.
        """
        points = sorted(
            (self.mean(name, budget, "lm_tokens"), self.mean(name, budget, "objective"))
            for budget in self.budgets
            if self.has(name, budget) and self.finishes(name, budget)
        )
        before: tuple[float, float] | None = None
        for tokens, value in points:
            if value >= objective:
                if before is None or value == before[1]:
                    return tokens
                return before[0] + (objective - before[1]) / (value - before[1]) * (tokens - before[0])
            before = tokens, value
        return math.inf

    def table(self) -> list[dict[str, Any]]:
        """Return the means of every decoder at every budget, with the 95 % interval of J, as plain values."""
        rows = []
        for name, budget in self._cells:
            at = self.budgets[0] if budget is None else budget
            low, high = self.interval(name, at)
            means = {what: self.mean(name, at, what) for what in _MEANS}
            rows.append({"decoder": name, "budget": budget, **means, "objective_95": [low, high]})
        return rows

    def _budget(self, name: str, budget: int) -> int | None:
        return budget if self.budgeted(name) else None


def _value(key: str, cell: str) -> str | None:
    """Return a cell of the CSV; an empty one of a number is None."""
    return cell if cell or key in _TEXTS else None
