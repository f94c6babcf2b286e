"""The class `Reward`: a batched score of finished texts within stated bounds, checked and cached.

A subclass of `Reward` writes one method, `score`. Callers call the reward itself.
The call scores equal texts once, checks every value, and treats a text that cannot be scored as ``on_error`` says.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Never, get_args

import numpy as np

from ..errors import ConfigurationError, RewardError
from .checking import CallSpec, TextBatch, as_number, check_keywords, interval, is_number, keywords_of, shown
from .types import Bounds, Column, Counts, FloatArray, OnError, RewardOptions, Scores, Texts, TokenIds

__all__ = ["Counters", "OnError", "Reward"]

logger = logging.getLogger(__name__)

_NOT_PICKLED = ("_scores", "_potentials", "_warned", "counters")
_CACHES = threading.Lock()  # several threads may ask one reward; held for no scoring


@dataclass
class Counters:
    """Work of a reward so far; finished and unfinished texts together.

    Attributes:
        asked: Texts that callers asked for.
        scored: Those that the reward looked at; the others came from the cache.
        seconds: Wall-clock time of the scoring.
    """

    asked: int = 0
    scored: int = 0
    seconds: float = 0.0


class Reward(ABC):
    """A score of finished texts.

    Calling a reward gives checked values; a subclass writes `score`::

        class Brevity(Reward):
            name, lower, upper = "brevity", 0.0, 1.0

            def score(self, prompts, completions, completion_ids=None, **columns):
                return [1 / (1 + len(text)) for text in completions]

        Brevity()(["Say hi:"], ["hi"])                 # array([0.33333333])

    A subclass with its own ``__init__`` calls ``super().__init__()``, which checks the configuration.

    Attributes:
        name: Name in errors, logs and the names of sums; the class's name by default.
        lower: The least value that `score` can return, ``-inf`` if unknown.
        upper: The greatest value that `score` can return, ``inf`` if unknown. A planner's certificate rests on it.
        on_error: Treatment of a text for which `score` raises, or returns something other than one finite number
            within the bounds: ``"raise"`` a `RewardError`, ``"skip"`` it like a text that cannot be scored,
            or give it the ``"penalty"``. If `score` raises for several texts, it is called again for each alone.
        penalty: The value that ``on_error="penalty"`` gives; `lower` by default.
        cache_size: The most texts' scores, and the most prefixes' potentials, that are cached.
        reads_token_ids: Whether `score` looks at ``completion_ids``. If False, completions of the same text share one
            score, whatever their tokens.
    """

    name: str
    lower: float = -math.inf
    upper: float = math.inf
    on_error: OnError = "raise"
    penalty: float | None = None
    cache_size: int = 65536
    reads_token_ids: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name a reward after its class unless the class states a name."""
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
        **unknown: Never,
    ) -> None:
        """Check the configuration.

        Args:
            name: Replaces the class's name.
            lower: Replaces the class's lower bound.
            upper: Replaces the class's upper bound.
            on_error: ``"raise"``, ``"skip"`` or ``"penalty"``; see the class.
            penalty: Finite and within the bounds; only with ``on_error="penalty"``.
            **unknown: Misspelt arguments, which raise.

        Raises:
            ConfigurationError: The bounds are not ``lower <= upper``, `on_error` is none of the three, the penalty
                is missing, superfluous, or outside the bounds, or an argument does not exist.
        """
        if unknown:
            check_keywords(type(self).__name__, unknown, keywords_of(type(self)) or RewardOptions.__annotations__)
        if name is not None and not isinstance(name, str):
            raise ConfigurationError(f"a reward's name is a string, got {shown(name)}")
        self.name = self.name if name is None else name
        self.lower = _bound(self.name, "lower", self.lower if lower is None else lower)
        self.upper = _bound(self.name, "upper", self.upper if upper is None else upper)
        if self.lower > self.upper or self.lower == math.inf or self.upper == -math.inf:
            raise ConfigurationError(
                f"reward {self.name!r} has the bounds {interval(self.lower, self.upper)}; expected lower <= upper, "
                "with -inf and inf for a bound that is not known."
            )
        if on_error not in get_args(OnError):
            expected = ", ".join(map(repr, get_args(OnError)))
            raise ConfigurationError(f"reward {self.name!r} has on_error={on_error!r}; expected one of {expected}.")
        self.on_error = on_error
        self.penalty = self._checked_penalty(penalty)

    @abstractmethod
    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Score finished texts; the raw method, which subclasses write and callers leave alone.

        It is a function of its arguments alone: equal texts get equal scores.

        Args:
            prompts: [n], the given texts.
            completions: [n], the text written after each.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, further fields of the prompts' data set, such as ``answer=[...]``.

        Returns:
            [n], one finite number within the bounds per text, or None for one that cannot be scored.
        """

    def score_prefixes(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> Scores:
        """Score unfinished texts; the raw method behind `potential`, which a subclass may write as well.

        Arguments and result are those of `score`, except that the values need not keep to the bounds.
        """
        return [0.0] * len(completions)

    def bound_prefixes(
        self, prompts: Texts, completions: Texts, remaining: Counts, completion_ids: TokenIds = None, **columns: Column
    ) -> Bounds:
        """Bound the scores that unfinished texts can still reach; the raw method behind `upper_bound`.

        A tighter bound lets a planner prune and certify more. A bound that one completion exceeds is an error: every
        certificate so far is void. The arguments are those of `upper_bound`.
        """
        return [self.upper] * len(completions)

    @property
    def has_prefix_bounds(self) -> bool:
        """Whether `upper_bound` may ever be below `upper`; if not, callers need not decode unfinished texts."""
        return type(self).bound_prefixes is not Reward.bound_prefixes

    @property
    def has_potential(self) -> bool:
        """Whether `potential` is anything but zero; if not, callers need not decode unfinished texts."""
        # A subclass may override `potential` itself, without the checks.
        return type(self).score_prefixes is not Reward.score_prefixes or type(self).potential is not Reward.potential

    def __call__(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> FloatArray:
        """Score finished texts, each distinct one once, and check every value.

        Args:
            prompts: [n], the given texts.
            completions: [n], the text written after each.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, further fields of the prompts' data set, such as ``answer=[...]``.

        Returns:
            float64 [n], within the bounds; NaN for a text that cannot be scored.

        Raises:
            RewardError: `score` raised, or returned something other than one finite number within the bounds, and
                `on_error` is ``"raise"``; or, whatever `on_error` is, it did not return one value per text.
            ConfigurationError: The arguments are not sequences of one length, or lack a column that `score` needs.
        """
        texts = TextBatch.of(prompts, completions, completion_ids, columns)
        fallback = self.penalty if self.on_error == "penalty" and self.penalty is not None else math.nan
        subject = f"reward {self.name!r}"
        spec = CallSpec(subject, self.score, self.lower, self.upper, self.on_error, fallback, self._warn)
        return self._cached(spec, texts, self._scores)

    def potential(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> FloatArray:
        """Score unfinished texts, for reward shaping; checked and cached as scores are.

        Args:
            prompts: [n], the given texts.
            completions: [n], the text written after each so far.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, further fields of the prompts' data set.

        Returns:
            float64 [n], finite; 0 where there is no potential: the reward defines none, or this prefix has none
            (None, or an error that `on_error` tolerates).

        Raises:
            RewardError: As for a call, except that potentials need not keep to the bounds.
            ConfigurationError: As for a call.
        """
        texts = TextBatch.of(prompts, completions, completion_ids, columns)
        if not self.has_potential:
            return np.zeros(len(texts))
        subject = f"the potential of reward {self.name!r}"
        spec = CallSpec(subject, self.score_prefixes, -math.inf, math.inf, self.on_error, math.nan, self._warn)
        return np.nan_to_num(self._cached(spec, texts, self._potentials), nan=0.0)

    def components(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> dict[str, FloatArray]:
        """Score finished texts by each of this reward's parts, by name, float64 [n] each.

        Scores come from the cache where they can, so this is cheap after a call. Raises as a call does.
        """
        return {self.name: self(prompts, completions, completion_ids, **columns)}

    def upper_bound(
        self,
        /,
        prompts: Texts,
        completions: Texts,
        remaining: Counts,
        completion_ids: TokenIds = None,
        **columns: Column,
    ) -> FloatArray:
        """Bound the score of every text that unfinished ones can become; certificates rest on it.

        Args:
            prompts: [n], the given texts.
            completions: [n], the text written after each so far.
            remaining: [n], the number of tokens that may still follow.
            completion_ids: [n][tokens], the completions as token ids, where the caller has them.
            **columns: [n] each, further fields of the prompts' data set.

        Returns:
            float64 [n], at most `upper`.

        Raises:
            RewardError: `bound_prefixes` raised, or did not return one number per text.
            ConfigurationError: As for a call.
        """
        texts = TextBatch.of(prompts, completions, completion_ids, columns, remaining)
        subject = f"the bound of reward {self.name!r}"
        spec = CallSpec(subject, self.bound_prefixes, -math.inf, math.inf, "raise", math.nan, self._warn)
        try:
            returned = self.bound_prefixes(prompts, completions, remaining, completion_ids, **texts.columns)
        except (ConfigurationError, RewardError):
            raise
        except Exception as error:
            raise RewardError(
                f"{subject} raised {type(error).__name__}: {shown(str(error))}; bound_prefixes takes (prompts, "
                "completions, remaining, completion_ids=None, **columns) and returns one number per text."
            ) from error
        bounds = np.empty(len(texts))
        for row, value in enumerate(spec.one_per_text(returned, len(texts))):
            bounds[row] = _number_or_nan(value)
            if math.isnan(bounds[row]):
                raise RewardError(
                    f"{subject} is {shown(value)} for the unfinished text {shown(completions[row])}; "
                    "return a number, or `upper` where nothing tighter is known."
                )
        return np.minimum(bounds, self.upper)

    # ------------------------------------------------------------------------------------------------ composition

    # Sums and products are rewards, so this module cannot import them: composition.py sets these two.
    _sum: ClassVar[Callable[[Iterable[tuple[float, Reward]]], Reward]]
    _product: ClassVar[Callable[[Reward, Reward], Reward]]

    # Makes NumPy's scalars leave `np.float64(0.7) * reward` to `__rmul__` instead of wrapping the reward in an array.
    __array_ufunc__ = None

    def __mul__(self, other: float | Reward) -> Reward:
        """Weigh the reward, or multiply it with another."""
        if isinstance(other, Reward):
            return Reward._product(self, other)
        return Reward._sum([(other, self)]) if is_number(other) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Reward:
        """Return the reward with its sign changed."""
        return Reward._sum([(-1.0, self)])

    def __add__(self, other: Reward) -> Reward:
        """Add two rewards."""
        return self._plus(1.0, other)

    def __sub__(self, other: Reward) -> Reward:
        """Subtract a reward from this one."""
        return self._plus(-1.0, other)

    def __radd__(self, zero: int) -> Reward:
        """Let ``sum([...])`` start from its 0; no other number can be added to a reward."""
        return self if zero == 0 else NotImplemented

    def _plus(self, weight: float, other: object) -> Reward:
        return Reward._sum([(1.0, self), (weight, other)]) if isinstance(other, Reward) else NotImplemented

    # ---------------------------------------------------------------------------------------------------- copying

    def __copy__(self) -> Reward:
        """Return the reward itself: Gymnasium copies an env's arguments, but a model and its cache are to be shared."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Reward:
        """Return the reward itself, for the same reason."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the caches."""
        return {key: value for key, value in vars(self).items() if key not in _NOT_PICKLED}

    def __repr__(self) -> str:
        """Show the name and the bounds."""
        return f"<{type(self).__name__} {self.name!r} in {interval(self.lower, self.upper)}>"

    # ---------------------------------------------------------------------------------------------------- caching

    # Created on first use, so that they exist even where a subclass forgot to call super().__init__().
    @cached_property
    def _scores(self) -> OrderedDict[Hashable, float]:
        return OrderedDict()

    @cached_property
    def _potentials(self) -> OrderedDict[Hashable, float]:
        return OrderedDict()

    @cached_property
    def counters(self) -> Counters:
        """Work of this reward so far, in this process."""
        return Counters()

    _warned = False

    def _warn(self, message: str) -> None:
        """Log the first text that `on_error` tolerates."""
        if not self._warned:
            self._warned = True
            logger.warning("%s on_error=%r applies; this is logged once per reward.", message, self.on_error)

    def _cached(self, spec: CallSpec, texts: TextBatch, cache: OrderedDict[Hashable, float]) -> FloatArray:
        """Score the texts that `cache` lacks, each distinct one once; `cache` changes only if all goes well."""
        keys = texts.keys(with_token_ids=self.reads_token_ids)
        with _CACHES:
            values = {key: cache[key] for key in keys if key in cache}
        first_rows: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key not in values:
                first_rows.setdefault(key, row)
        self.counters.asked += len(keys)
        if first_rows:
            start = time.perf_counter()
            scores = spec.run(texts.take(list(first_rows.values())))
            self.counters.seconds += time.perf_counter() - start
            self.counters.scored += len(first_rows)
            values.update(zip(first_rows, scores, strict=True))
        with _CACHES:
            for key, value in values.items():
                cache[key] = value
                cache.move_to_end(key)
            while len(cache) > self.cache_size:
                cache.popitem(last=False)
        return np.array([values[key] for key in keys], dtype=np.float64)

    def _checked_penalty(self, penalty: float | None) -> float | None:
        """Return the penalty to use: `lower` by default, None without a lower bound."""
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
        if not (is_number(penalty) and math.isfinite(as_number(penalty)) and self.lower <= penalty <= self.upper):
            raise ConfigurationError(
                f"reward {self.name!r} has penalty={shown(penalty)}; expected a finite number within the bounds "
                f"{interval(self.lower, self.upper)}, which certificates rest on. Change it, or widen the bounds."
            )
        return float(penalty)


def _bound(reward: str, which: str, value: Any) -> float:
    """Return a bound as a float, if it is one."""
    number = _number_or_nan(value)
    if math.isnan(number):
        raise ConfigurationError(
            f"reward {reward!r} has {which}={shown(value)}; expected a number, -inf or inf if unknown."
        )
    return number


def _number_or_nan(value: Any) -> float:
    """Return a number as a float, and NaN for anything else."""
    try:
        return as_number(value)
    except TypeError:
        return math.nan
