"""Rewards made of rewards: weighted sums, products, minima, clipping and normalising; their bounds follow."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_number
from ..errors import ConfigurationError
from .base import Reward
from .checking import as_number, interval, shown
from .types import Bounds, Column, Counts, FloatArray, Scores, Texts, TokenIds

__all__ = ["Composition", "Term", "WeightedSum", "clip", "minimum", "normalise", "product", "terms_of"]


class Composition(Reward):
    """A function of other rewards' values; a text that one of them cannot score has no score.

    Attributes:
        parts: The rewards.
    """

    def __init__(self, parts: Sequence[Reward], name: str, lower: float, upper: float) -> None:
        """Compose ``parts``."""
        self.parts = tuple(parts)
        self.reads_token_ids = any(part.reads_token_ids for part in parts)
        super().__init__(name=name, lower=lower, upper=upper)

    @abstractmethod
    def combine(self, values: FloatArray) -> FloatArray:
        """Return the composed values, float64 [n], of the parts' values, float64 [parts, n]."""

    def bound(self, uppers: FloatArray) -> FloatArray:
        """Return an upper bound, float64 [n], where the parts are at most ``uppers``, float64 [parts, n]."""
        return self.combine(uppers)  # most are larger where their parts are

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Combine the parts' scores."""
        values = self.combine(np.stack([part(prompts, completions, completion_ids, **columns) for part in self.parts]))
        return [None if math.isnan(value) else value for value in values.tolist()]

    def score_prefixes(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> Scores:
        """Combine the parts' potentials."""
        parts = [part.potential(prompts, completions, completion_ids, **columns) for part in self.parts]
        values: list[float] = self.combine(np.stack(parts)).tolist()
        return values

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Bound the composition by the values that its parts can still reach."""
        parts = [part.upper_bound(prompts, completions, remaining, completion_ids, **columns) for part in self.parts]
        bounds: list[float] = self.bound(np.stack(parts)).tolist()
        return bounds

    def components(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> dict[str, FloatArray]:
        """Score finished texts by each part, unweighted; see `Reward.components`."""
        return {
            name: values
            for part in self.parts
            for name, values in part.components(prompts, completions, completion_ids, **columns).items()
        }

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether any part has bounds for prefixes."""
        return any(part.has_prefix_bounds for part in self.parts)

    @property
    def has_potential(self) -> bool:
        """Whether every part has a potential: half of a product says nothing."""
        return all(part.has_potential for part in self.parts)


class WeightedSum(Composition):
    """A weighted sum of rewards: Σᵢ wᵢ · rᵢ.

    Its bounds follow by interval arithmetic: the lower one is Σᵢ wᵢ · (lowerᵢ if wᵢ > 0 else upperᵢ), where a weight
    of 0 makes any term 0, and the upper one likewise. They hold, but need not be reached: ``a - a`` does not know that
    it is 0. The terms' own ``on_error`` apply. A term of weight 0 only shows its values in `components`.

    Attributes:
        terms: The weights and rewards; sums within the sum have been multiplied out.
    """

    def __init__(self, terms: Iterable[tuple[float, Reward]]) -> None:
        """Build the sum; ``0.7 * a + 0.3 * b`` does it more readably.

        Args:
            terms: The weights, finite, and the rewards.

        Raises:
            ConfigurationError: There is no term, a weight is not finite, or a term is no reward.
        """
        try:
            pairs = [(as_number(weight), reward) for weight, reward in terms]
        except (TypeError, ValueError):
            raise ConfigurationError(f"a sum takes pairs of a number and a reward, got {shown(terms)}") from None
        self.terms: tuple[tuple[float, Reward], ...] = tuple(
            (weight * inner_weight, inner)
            for weight, reward in pairs
            for inner_weight, inner in (reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)])
        )
        if not self.terms:
            raise ConfigurationError("a sum of rewards needs at least one term.")
        parts = _checked("a sum", [reward for _, reward in self.terms])
        for weight, reward in self.terms:
            if not math.isfinite(weight):
                raise ConfigurationError(f"reward {reward.name!r} has the weight {weight}; expected a finite number.")
        lower = upper = 0.0
        for w, r in self.terms:  # one by one, for sum() rounds otherwise than `combine`
            lower += _scaled(w, r.lower if w > 0 else r.upper)
            upper += _scaled(w, r.upper if w > 0 else r.lower)
        super().__init__(parts, _sum_name(self.terms), lower, upper)

    def combine(self, values: FloatArray) -> FloatArray:
        """Add up the terms, in the same order as the bounds, so that rounding cannot carry the sum past them."""
        total = np.zeros(values.shape[1])
        for (weight, _), part in zip(self.terms, values, strict=True):
            total += weight * part
        return total

    def bound(self, uppers: FloatArray) -> FloatArray:
        """Add up the terms' bounds; a term that is subtracted counts with its least value."""
        total = np.zeros(uppers.shape[1])
        for (weight, reward), upper in zip(self.terms, uppers, strict=True):
            total += weight * upper if weight > 0 else _scaled(weight, reward.lower)
        return total

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether any term that is added has bounds for prefixes."""
        return any(weight > 0 and reward.has_prefix_bounds for weight, reward in self.terms)

    @property
    def has_potential(self) -> bool:
        """Whether any term has a potential."""
        return any(reward.has_potential for reward in self.parts)


class Term(NamedTuple):
    """A term of a weighted sum.

    Attributes:
        weight: Its weight.
        reward: The reward itself, unweighted.
    """

    weight: float
    reward: Reward


def terms_of(reward: Reward) -> dict[str, Term]:
    """Return the terms of a reward by name, those of weight 0 included; one that is no sum is its only term.

    Raises:
        ConfigurationError: Two different rewards of the sum have the same name.
    """
    terms: dict[str, Term] = {}
    for weight, part in reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]:
        before = terms.get(part.name, Term(0.0, part))
        if before.reward is not part:
            raise ConfigurationError(
                f"{reward.name!r} has two terms named {part.name!r}; write a reward once, or give one another name="
            )
        terms[part.name] = Term(before.weight + weight, part)
    return terms


def term_weights(reward: Reward) -> dict[str, float]:
    """Return the weights of a reward's terms by name, those of weight 0 left out; see :func:`terms_of`."""
    return {name: term.weight for name, term in terms_of(reward).items() if term.weight}


class _Product(Composition):
    def __init__(self, parts: Sequence[Reward]) -> None:
        lower = upper = 1.0
        for part in parts:
            lower, upper = _range_of_product((lower, upper), (part.lower, part.upper))
        super().__init__(parts, " * ".join(f"({part.name})" for part in parts), lower, upper)

    def combine(self, values: FloatArray) -> FloatArray:
        result: FloatArray = values.prod(axis=0)
        return result

    def bound(self, uppers: FloatArray) -> FloatArray:
        bounds = []
        for column in uppers.T.tolist():
            product = (1.0, 1.0)
            for part, upper in zip(self.parts, column, strict=True):
                product = _range_of_product(product, (min(part.lower, upper), upper))
            bounds.append(product[1])
        return np.array(bounds)


class _Minimum(Composition):
    def __init__(self, parts: Sequence[Reward]) -> None:
        lower, upper = (min(getattr(part, side) for part in parts) for side in ("lower", "upper"))
        super().__init__(parts, f"min({', '.join(part.name for part in parts)})", lower, upper)

    def combine(self, values: FloatArray) -> FloatArray:
        result: FloatArray = values.min(axis=0)
        return result


class _Clipped(Composition):
    def __init__(self, part: Reward, low: float, high: float) -> None:
        self.low, self.high = low, high
        lower, upper = (float(np.clip(bound, low, high)) for bound in (part.lower, part.upper))
        super().__init__([part], f"clip({part.name}, {low:g}, {high:g})", lower, upper)

    def combine(self, values: FloatArray) -> FloatArray:
        result: FloatArray = np.clip(values[0], self.low, self.high)
        return result


class _Normalised(Composition):
    def __init__(self, part: Reward, low: float, high: float) -> None:
        self.low, self.high = low, high
        lower, upper = ((bound - low) / (high - low) for bound in (part.lower, part.upper))
        super().__init__([part], f"normalise({part.name}, {low:g}, {high:g})", lower, upper)

    def combine(self, values: FloatArray) -> FloatArray:
        result: FloatArray = (values[0] - self.low) / (self.high - self.low)
        return result


def product(*rewards: Reward) -> Reward:
    """Return the product of rewards; ``a * b`` does it more readably.

    Raises:
        ConfigurationError: There is none, or something else than a reward is among them.
    """
    return _Product(_checked("product", rewards))


def minimum(*rewards: Reward) -> Reward:
    """Return the least of several rewards, ``"min(a, b)"`` in a spec: a good value of one cannot outweigh a bad one.

    Raises:
        ConfigurationError: There is none, or something else than a reward is among them.
    """
    return _Minimum(_checked("minimum", rewards))


def clip(reward: Reward, low: float, high: float) -> Reward:
    """Return a reward whose values are cut off at ``low`` and ``high``.

    Raises:
        ConfigurationError: It is no reward, or not ``low < high``.
    """
    return _Clipped(_checked("clip", [reward])[0], *_interval(low, high))


def normalise(reward: Reward, low: float | None = None, high: float | None = None) -> Reward:
    """Return a reward that is 0 where ``reward`` is ``low`` and 1 where it is ``high``, by default its bounds.

    Raises:
        ConfigurationError: It is no reward, or not ``low < high``, or a bound is needed that is not known.
    """
    [checked] = _checked("normalise", [reward])
    if (low is None and math.isinf(checked.lower)) or (high is None and math.isinf(checked.upper)):
        bounds = interval(checked.lower, checked.upper)
        raise ConfigurationError(
            f"reward {checked.name!r} has the bounds {bounds}; say what is to become 0 and 1: "
            "normalise(reward, low, high)"
        )
    low, high = checked.lower if low is None else low, checked.upper if high is None else high
    return _Normalised(checked, *_interval(low, high))


def _checked(what: str, rewards: Sequence[Any]) -> list[Reward]:
    if not rewards or not all(isinstance(reward, Reward) for reward in rewards):
        raise ConfigurationError(f"{what} needs rewards (as_reward makes one), got {shown(list(rewards))}")
    return list(rewards)


def _interval(low: Any, high: Any) -> tuple[float, float]:
    low, high = check_number("low", low), check_number("high", high)
    if not low < high:
        raise ConfigurationError(f"low < high is needed, got {low:g} and {high:g}")
    return low, high


def _range_of_product(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Multiply two intervals, with 0 · inf = 0: 0 times anything finite is 0, however large."""
    corners = [a * b if a and b else 0.0 for a in one for b in other]
    return min(corners), max(corners)


def _scaled(weight: float, bound: float) -> float:
    """Multiply a bound, with 0 · inf = 0: a weight of 0 leaves nothing to bound."""
    return weight * bound if weight else 0.0


def _sum_name(terms: Iterable[tuple[float, Reward]]) -> str:
    """Write a sum as its spec: ``"0.7 * sentiment - length"``."""
    name = ""
    for weight, reward in terms:
        sign = ("- " if weight < 0 else "+ ") if name else ("-" if weight < 0 else "")
        factor = "" if abs(weight) == 1 else f"{abs(weight):g} * "
        name += f"{' ' if name else ''}{sign}{factor}{reward.name}"
    return name


# The operators of `Reward`.
Reward._sum, Reward._product = WeightedSum, product
