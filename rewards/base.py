"""What a reward is: a batched score of finished texts, within stated bounds, checked before anything rests on it.

A subclass of `Reward` writes one method, `score`. Everyone else calls the reward itself, and so gets what this module
adds around `score`: equal texts are scored once, every value is checked, and a text that cannot be scored is dealt with
by the reward's ``on_error``. ``0.7 * a - 0.3 * b`` is a reward too, a `WeightedSum`; its bounds follow from its terms'.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from ..errors import ConfigurationError, RewardError
from .checking import (
    FloatArray,
    _CallSpec,
    _interval,
    _is_number,
    _number,
    _shortened,
    _shown,
    _Texts,
)

__all__ = ["Counters", "OnError", "Reward", "WeightedSum", "column_of", "library", "readable"]


logger = logging.getLogger(__name__)


OnError = Literal["raise", "skip", "penalty"]


_NOT_PICKLED = ("_scores", "_potentials", "_warned", "counters")


@dataclass
class Counters:
    """How much a reward has worked; finished and unfinished texts together.

    Attributes:
        asked: Texts that somebody wanted the score of.
        scored: Those that the reward looked at; the others were remembered.
        seconds: Wall-clock time that it took.
    """

    asked: int = 0
    scored: int = 0
    seconds: float = 0.0


class Reward(ABC):
    """How good a finished text is.

    Calling a reward gives checked values; `score` is what a subclass writes::

        class Brevity(Reward):
            name, lower, upper = "brevity", 0.0, 1.0

            def score(self, prompts, completions, completion_ids=None, **columns):
                return [1 / (1 + len(text)) for text in completions]

        Brevity()(["Say hi:"], ["hi"])                 # array([0.33333333])

    A subclass that writes its own ``__init__`` calls ``super().__init__()``, which checks the configuration.

    Attributes:
        name: What errors, logs and the names of sums call it; the class's name by default.
        lower: The least value that `score` can return, ``-inf`` if unknown.
        upper: The greatest value that `score` can return, ``inf`` if unknown. A planner's certificate rests on it.
        on_error: What becomes of a text for which `score` raises or returns something that is not one finite number
            within the bounds: ``"raise"`` a `RewardError`, ``"skip"`` it like a text that cannot be scored,
            or give it the ``"penalty"``. Where `score` raises for several texts, it is called again for each alone.
        penalty: The value that ``on_error="penalty"`` gives; `lower` by default.
        cache_size: How many texts' scores, and how many prefixes' potentials, are remembered at most.
        reads_token_ids: Whether `score` looks at ``completion_ids``. False lets completions that differ only in
            how their text was cut into tokens share one score.
    """

    name: str
    lower: float = -math.inf
    upper: float = math.inf
    on_error: OnError = "raise"
    penalty: float | None = None
    cache_size: int = 65536
    reads_token_ids: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a reward after its class unless the class says otherwise."""
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __init__(
        self,
        *,
        name: str | None = None,
        lower: float | None = None,
        upper: float | None = None,
        on_error: OnError = "raise",
        penalty: float | None = None,
    ) -> None:
        """Check the configuration.

        Args:
            name: Replaces the class's name.
            lower: Replaces the class's lower bound.
            upper: Replaces the class's upper bound.
            on_error: ``"raise"``, ``"skip"`` or ``"penalty"``; see the class.
            penalty: Finite and within the bounds; only with ``on_error="penalty"``.

        Raises:
            ConfigurationError: The bounds are not ``lower <= upper``, `on_error` is none of the three, or the penalty
                is missing, superfluous, or outside the bounds.
        """
        self.name = self.name if name is None else name
        self.lower = _bound(self.name, "lower", self.lower if lower is None else lower)
        self.upper = _bound(self.name, "upper", self.upper if upper is None else upper)
        if self.lower > self.upper or self.lower == math.inf or self.upper == -math.inf:
            raise ConfigurationError(
                f"reward {self.name!r} has the bounds {_interval(self.lower, self.upper)}; expected lower <= upper, "
                "with -inf and inf for a bound that is not known."
            )
        if on_error not in get_args(OnError):
            expected = ", ".join(map(repr, get_args(OnError)))
            raise ConfigurationError(f"reward {self.name!r} has on_error={on_error!r}; expected one of {expected}.")
        self.on_error = on_error
        self.penalty = self._checked_penalty(penalty)

    @abstractmethod
    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Score finished texts; the raw method that a subclass writes and nobody else calls.

        It is a function of its arguments alone: equal texts get equal scores.

        Args:
            prompts: [n], the given texts.
            completions: [n], what was written after each.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, what else the prompts' data set says, such as ``answer=[...]``.

        Returns:
            [n], one finite number within the bounds per text, or None for one that cannot be scored.
        """

    def score_prefixes(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Score unfinished texts; the raw method behind `potential`, which a subclass may write as well.

        The arguments and the result are those of `score`, except that the values need not keep to the bounds.
        """
        return [0.0] * len(completions)

    def bound_prefixes(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        remaining: Sequence[int],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float]:
        """Bound what unfinished texts can still score; the raw method behind `upper_bound`, for subclasses to write.

        The tighter, the more a planner can prune and certify; but one completion above its bound is an error, as
        nothing proven so far could be trusted. The arguments are those of `upper_bound`.
        """
        return [self.upper] * len(completions)

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether `upper_bound` may ever be below `upper`; if not, callers need not decode unfinished texts."""
        return type(self).bound_prefixes is not Reward.bound_prefixes

    @property
    def has_potential(self) -> bool:
        """Whether `potential` is anything but zero; if not, callers need not decode unfinished texts at all."""
        # Overriding `potential` itself does without the checks, but is a potential all the same.
        return type(self).score_prefixes is not Reward.score_prefixes or type(self).potential is not Reward.potential

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> FloatArray:
        """Score finished texts, each distinct one once, and check every value.

        Args:
            prompts: [n], the given texts.
            completions: [n], what was written after each.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, what else the prompts' data set says, such as ``answer=[...]``.

        Returns:
            float64 [n], within the bounds; NaN for a text that cannot be scored.

        Raises:
            RewardError: `score` raised, or returned something that is not one finite number within the bounds, and
                `on_error` is ``"raise"``; or, whatever `on_error` is, it did not return one value per text.
            ConfigurationError: The arguments are not sequences of one length, or lack a column that `score` needs.
        """
        texts = _Texts.of(prompts, completions, completion_ids, columns)
        fallback = self.penalty if self.on_error == "penalty" and self.penalty is not None else math.nan
        measure = _CallSpec(f"reward {self.name!r}", self.score, self.lower, self.upper, fallback)
        return self._remembered(measure, texts, self._scores)

    def potential(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> FloatArray:
        """Score unfinished texts, for reward shaping; checked and remembered as scores are.

        Args:
            prompts: [n], the given texts.
            completions: [n], what was written after each so far.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, what else the prompts' data set says.

        Returns:
            float64 [n], finite; 0 where there is no potential: the reward defines none, or this prefix has none
            (None, or an error that `on_error` tolerates).

        Raises:
            RewardError: As for a call, save that potentials need not keep to the bounds.
            ConfigurationError: As for a call.
        """
        texts = _Texts.of(prompts, completions, completion_ids, columns)
        if not self.has_potential:
            return np.zeros(len(texts))
        subject = f"the potential of reward {self.name!r}"
        measure = _CallSpec(subject, self.score_prefixes, -math.inf, math.inf, fallback=math.nan)
        return np.nan_to_num(self._remembered(measure, texts, self._potentials), nan=0.0)

    def components(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> dict[str, FloatArray]:
        """Score finished texts by each of the rewards that this one is made of, by name, float64 [n] each.

        What was scored already is remembered, so this costs next to nothing after a call. Raises as a call does.
        """
        return {self.name: self(prompts, completions, completion_ids, **columns)}

    def upper_bound(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        remaining: Sequence[int],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> FloatArray:
        """Bound the score of every text that unfinished ones can become; certificates rest on it.

        Args:
            prompts: [n], the given texts.
            completions: [n], what was written after each so far.
            remaining: [n], how many tokens may still follow.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, what else the prompts' data set says.

        Returns:
            float64 [n], at most `upper`.

        Raises:
            RewardError: `bound_prefixes` did not return one number per text.
        """
        texts = _Texts.of(prompts, completions, completion_ids, {**columns, "remaining": remaining})
        measure = _CallSpec(f"the bound of reward {self.name!r}", self.bound_prefixes, -math.inf, math.inf, math.nan)
        returned = self.bound_prefixes(prompts, completions, remaining, completion_ids, **columns)
        bounds = np.empty(len(texts))
        for row, value in enumerate(measure.one_per_text(returned, len(texts))):
            bounds[row] = math.nan if value is None else _number(value)
            if math.isnan(bounds[row]):
                raise RewardError(
                    f"{measure.subject} is {_shown(value)} for the unfinished text {_shown(completions[row])}; "
                    "return a number, or `upper` where nothing tighter is known."
                )
        return np.minimum(bounds, self.upper)

    # ------------------------------------------------------------------------------------------------ composition

    # Makes NumPy's scalars leave `np.float64(0.7) * reward` to `__rmul__` instead of wrapping the reward in an array.
    __array_ufunc__ = None

    def __mul__(self, other: float | Reward) -> Reward:
        """Weigh the reward, or multiply it with another."""
        if isinstance(other, Reward):
            from .composition import product

            return product(self, other)
        return WeightedSum([(other, self)]) if _is_number(other) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> WeightedSum:
        """Turn the reward round: what was best becomes worst."""
        return WeightedSum([(-1.0, self)])

    def __add__(self, other: Reward) -> WeightedSum:
        """Add two rewards."""
        return self._plus(1.0, other)

    def __sub__(self, other: Reward) -> WeightedSum:
        """Subtract a reward from this one."""
        return self._plus(-1.0, other)

    def __radd__(self, zero: int) -> Reward:
        """Let ``sum([...])`` start from its 0; no other number can be added to a reward."""
        return self if zero == 0 else NotImplemented

    def _plus(self, weight: float, other: object) -> WeightedSum:
        return WeightedSum([(1.0, self), (weight, other)]) if isinstance(other, Reward) else NotImplemented

    # ---------------------------------------------------------------------------------------------------- copying

    def __copy__(self) -> Reward:
        """Return the reward itself: Gymnasium copies an env's arguments, but a model and its cache are to be shared."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Reward:
        """Return the reward itself, for the same reason."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but what has been remembered."""
        return {key: value for key, value in vars(self).items() if key not in _NOT_PICKLED}

    def __repr__(self) -> str:
        """Show the name and the bounds."""
        return f"<{type(self).__name__} {self.name!r} in {_interval(self.lower, self.upper)}>"

    # --------------------------------------------------------------------------------------------------- checking

    # Created on first use, so that they exist even where a subclass forgot to call super().__init__().
    @cached_property
    def _scores(self) -> OrderedDict[Hashable, float]:
        return OrderedDict()

    @cached_property
    def _potentials(self) -> OrderedDict[Hashable, float]:
        return OrderedDict()

    @cached_property
    def counters(self) -> Counters:
        """What was asked of this reward so far, by this process."""
        return Counters()

    _warned = False

    def _remembered(self, measure: _CallSpec, texts: _Texts, cache: OrderedDict[Hashable, float]) -> FloatArray:
        """Measure the texts that `cache` lacks, each distinct one once; `cache` changes only if all goes well."""
        keys = texts.keys(with_token_ids=self.reads_token_ids)
        values = {key: cache[key] for key in keys if key in cache}
        first_rows: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key not in values:
                first_rows.setdefault(key, row)
        self.counters.asked += len(keys)
        if first_rows:
            start = time.perf_counter()
            measured = self._measured(measure, texts.take(list(first_rows.values())))
            self.counters.seconds += time.perf_counter() - start
            self.counters.scored += len(first_rows)
            values.update(zip(first_rows, measured, strict=True))
        for key, value in values.items():
            cache[key] = value
            cache.move_to_end(key)
        while len(cache) > self.cache_size:
            cache.popitem(last=False)
        return np.array([values[key] for key in keys], dtype=np.float64)

    def _measured(self, measure: _CallSpec, texts: _Texts) -> list[float]:
        """Run the subclass's code on all `texts` at once, and check what it returns."""
        try:
            returned = measure.method(texts.prompts, texts.completions, texts.completion_ids, **texts.columns)
        except Exception as error:
            if isinstance(error, ConfigurationError) or (isinstance(error, RewardError) and self.on_error == "raise"):
                raise  # the one is no single text's fault; the other, from a reward within this one, says it all
            complaint = f"raised {type(error).__name__}: {_shortened(str(error))}"
            if len(texts) == 1:
                return [self._rejected(measure, complaint, texts, 0, error)]
            # One by one, so that only the guilty texts suffer, and the error names one of them.
            values = [value for row in range(len(texts)) for value in self._measured(measure, texts.take([row]))]
            if self.on_error == "raise":
                raise RewardError(
                    f"{measure.subject} {complaint}, for {len(texts)} texts at once, though for none of them alone. "
                    "Let it score any batch of texts."
                ) from error
            return values
        values = []
        for row, value in enumerate(measure.one_per_text(returned, len(texts))):
            try:
                values.append(measure.checked(value))
            except (TypeError, ValueError) as error:
                values.append(self._rejected(measure, f"returned {_shown(value)}, {error}", texts, row, None))
        return values

    def _rejected(self, measure: _CallSpec, complaint: str, texts: _Texts, row: int, cause: Exception | None) -> float:
        """Apply `on_error` to one text: raise, or warn once and return the fallback."""
        message = (
            f"{measure.subject} {complaint}, for the completion {_shown(texts.completions[row])} "
            f"of the prompt {_shown(texts.prompts[row])}."
        )
        if self.on_error == "raise":
            raise RewardError(
                f"{message} Return one finite number within {_interval(measure.lower, measure.upper)}, or None if the "
                "text cannot be scored; on_error='skip' or 'penalty' tolerates such texts."
            ) from cause
        if not self._warned:
            self._warned = True
            logger.warning("%s on_error=%r applies; this is logged once per reward.", message, self.on_error)
        return measure.fallback

    def _checked_penalty(self, penalty: float | None) -> float | None:
        """Return the penalty to use, `lower` by default, or None where there is none to be had."""
        if penalty is None and self.on_error == "penalty" and self.lower == -math.inf:
            raise ConfigurationError(
                f"reward {self.name!r} has on_error='penalty', but neither a penalty nor a lower bound to take its "
                "place; give penalty=... or lower=...."
            )
        if penalty is None:
            return self.lower if self.lower > -math.inf else None
        if self.on_error != "penalty":
            raise ConfigurationError(
                f"reward {self.name!r} has penalty={penalty!r}, which on_error={self.on_error!r} never gives; "
                "add on_error='penalty', or leave the penalty out."
            )
        if not (_is_number(penalty) and math.isfinite(penalty) and self.lower <= penalty <= self.upper):
            raise ConfigurationError(
                f"reward {self.name!r} has penalty={penalty!r}; expected a finite number within the bounds "
                f"{_interval(self.lower, self.upper)}, which certificates rest on. Change it, or widen the bounds."
            )
        return float(penalty)


class WeightedSum(Reward):
    """A weighted sum of rewards: Σᵢ wᵢ · rᵢ.

    Its bounds follow by interval arithmetic: the lower one is Σᵢ wᵢ · (lowerᵢ if wᵢ > 0 else upperᵢ), where a weight
    of 0 makes any term 0, and the upper one likewise. They hold, but need not be reached: ``a - a`` does not know that
    it is 0. A text that one term cannot score, the sum cannot score either. The terms' own ``on_error`` apply.

    Attributes:
        terms: The weights and rewards; sums within the sum have been multiplied out.
    """

    def __init__(self, terms: Iterable[tuple[float, Reward]]) -> None:
        """Build the sum; ``0.7 * a + 0.3 * b`` does it more readably.

        Args:
            terms: The weights, finite, and the rewards.

        Raises:
            ConfigurationError: There is no term, or a weight is not finite.
        """
        self.terms: tuple[tuple[float, Reward], ...] = tuple(
            (float(weight) * inner_weight, inner)
            for weight, reward in terms
            for inner_weight, inner in (reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)])
        )
        if not self.terms:
            raise ConfigurationError("a sum of rewards needs at least one term.")
        for weight, reward in self.terms:
            if not math.isfinite(weight):
                raise ConfigurationError(f"reward {reward.name!r} has the weight {weight}; expected a finite number.")
        self.reads_token_ids = any(reward.reads_token_ids for _, reward in self.terms)
        super().__init__(
            name=_sum_name(self.terms),
            lower=sum(_scaled(w, r.lower if w > 0 else r.upper) for w, r in self.terms),
            upper=sum(_scaled(w, r.upper if w > 0 else r.lower) for w, r in self.terms),
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Add up the terms, in the order in which the bounds were: so rounding cannot carry the sum past them."""
        total = np.zeros(len(completions))
        for weight, reward in self.terms:
            total += weight * reward(prompts, completions, completion_ids, **columns)
        return [None if math.isnan(value) else value for value in total.tolist()]

    def score_prefixes(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Add up the terms' potentials."""
        total = np.zeros(len(completions))
        for weight, reward in self.terms:
            total += weight * reward.potential(prompts, completions, completion_ids, **columns)
        return total.tolist()

    def components(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> dict[str, FloatArray]:
        """See `Reward.components`: those of all terms, unweighted; a weight of 0 only measures."""
        return {
            name: values
            for _, reward in self.terms
            for name, values in reward.components(prompts, completions, completion_ids, **columns).items()
        }

    def bound_prefixes(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        remaining: Sequence[int],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float]:
        """Add up the terms' bounds; what is subtracted counts with the least that it can be."""
        total = np.zeros(len(completions))
        for weight, reward in self.terms:
            if weight > 0:
                total += weight * reward.upper_bound(prompts, completions, remaining, completion_ids, **columns)
            else:
                total += _scaled(weight, reward.lower)
        return total.tolist()

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether any term that is added has bounds for prefixes."""
        return any(weight > 0 and reward.has_prefix_bounds for weight, reward in self.terms)

    @property
    def has_potential(self) -> bool:
        """Whether any term has a potential."""
        return any(reward.has_potential for _, reward in self.terms)


def library(module: str, package: str, reward: str) -> Any:
    """Return a module that only one reward needs, from a package that need not be installed.

    Raises:
        ConfigurationError: It is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the reward {reward!r} needs {package}, which is not installed: run pip install {package}"
        ) from error


def readable(text: str) -> str:
    """Return what a tokenizer can read: a lone surrogate is no text to it."""
    return text.encode("utf-8", "replace").decode()


def column_of(columns: Mapping[str, Sequence[Any]], name: str, reward: str, example: str) -> Sequence[Any]:
    """Return a column of the prompts that a reward cannot do without.

    Raises:
        ConfigurationError: There is none of that name; ``example`` shows a prompt that has it.
    """
    if name not in columns:
        raise ConfigurationError(f"the reward {reward!r} needs prompts with the column {name!r}, such as {example}")
    return columns[name]


def _bound(reward: str, which: str, value: Any) -> float:
    """Return a bound as a float, if it is one."""
    if not isinstance(value, Real) or math.isnan(value):
        raise ConfigurationError(f"reward {reward!r} has {which}={value!r}; expected a number, -inf or inf if unknown.")
    return float(value)


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
