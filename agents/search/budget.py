"""Budgets of a search, and what a search used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Protocol

from ...checks import CheckedKeywords
from ...errors import ConfigurationError

__all__ = ["Budget", "SharedBudget", "TracePoint", "Usage"]


@dataclass(frozen=True)
class Budget(CheckedKeywords):
    """When a search must stop; None is without limit.

    Attributes:
        lm_tokens: Prefixes that the language model may process. Every distinct prefix that the search asks for counts
            once, whether or not an earlier search left it in the token tree, and so do those it prunes later; the
            prompt itself does not count. A budget therefore means the same for every decoder and in every order.
        reward_calls: Completions that the reward model may score.
        seconds: Wall-clock time, looked at between steps. A search with a deadline finishes one text first, greedily,
            and widens then, as far as its measured speed allows. Where that text is not finished in time, the search
            may take as long again for it: an unfinished text is of no use.
        kv_bytes: Bytes of keys and values of the prefixes processed, the prompt's included.
        pops: Edges followed, those that end a text included.
        gap: The search stops once UB - LB is at most this, in units of J; a number >= 0.
        target: The search stops once J of a text is at least this.
        patience: The search stops after this many LM tokens without a better text.
    """

    lm_tokens: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None
    kv_bytes: int | None = None
    pops: int | None = None
    gap: float | None = None
    target: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            ConfigurationError: A limit is not a positive number, ``gap`` is negative, or ``target`` is no number.
        """
        given: dict[str, Any] = vars(self)
        for name, value in given.items():
            if value is None:
                continue
            is_number = type(value) is not bool and isinstance(value, Real) and not math.isnan(value)
            wanted = {"gap": "a number >= 0", "target": "a number"}.get(name, "a number > 0")
            if not is_number or (name != "target" and value < 0) or (name not in ("gap", "target") and value == 0):
                raise ConfigurationError(f"Budget({name}=…) is {wanted} or None, got {value!r}")

    @classmethod
    def of(cls, value: Budget | int | None) -> Budget:
        """Return ``value`` as a budget; a plain integer means LM tokens."""
        return value if isinstance(value, Budget) else cls(lm_tokens=value)

    def extended(self, by: Budget, usage: Usage) -> Budget:
        """Return the budget of a search that has used ``usage`` of this one and may use ``by`` more.

        What was not used of this budget is not lost; a limit that ``by`` does not set is lifted.
        """
        more: dict[str, float | None] = {name: getattr(by, name) for name in ("gap", "target", "patience")}
        for limit in ("lm_tokens", "reward_calls", "seconds", "kv_bytes", "pops"):
            had, extra = getattr(self, limit), getattr(by, limit)
            more[limit] = None if extra is None else extra + (getattr(usage, limit) if had is None else had)
        return Budget(**more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Usage:
    """What a search used.

    Attributes:
        lm_tokens: Distinct prefixes processed beyond the prompt, and those that the heuristic looked at.
        lm_forwards: Forwards of the language model that it took part in.
        reward_calls: Completions scored.
        seconds: Wall-clock time of the search's steps; of steps taken together with other searches, its share. The sum
            over the plans of one ``plan_many`` is the time of the whole batch.
        kv_bytes: Key-value memory of the prefixes processed, the prompt's included.
        pops: Edges followed, those that end a text included.
        prompt_tokens: Tokens of the prompt; not part of any budget.
    """

    lm_tokens: int
    lm_forwards: int
    reward_calls: int
    seconds: float
    kv_bytes: int
    pops: int
    prompt_tokens: int


class TracePoint(NamedTuple):
    """The bounds at one moment of a search; tokens and seconds count from its start."""

    lm_tokens: int
    seconds: float
    lower_bound: float
    upper_bound: float


class Member(Protocol):
    """A search that shares a budget."""

    is_exhausted: bool

    @property
    def is_over(self) -> bool:
        """Whether it goes on no more."""


class SharedBudget:
    """One budget of LM tokens for several searches, each of which may spend an equal share of what is left.

    A search that has followed everything promising is exhausted and leaves its share to the others.

    Attributes:
        remaining_tokens: LM tokens that no search has spent yet.
        members: The searches that share them.
    """

    def __init__(self, lm_tokens: int) -> None:
        """Share ``lm_tokens`` among the searches that will join."""
        self.remaining_tokens = lm_tokens
        self.members: list[Member] = []

    @property
    def all_exhausted(self) -> bool:
        """Whether no search that goes on has anything promising left."""
        return all(member.is_exhausted or member.is_over for member in self.members)

    def share(self, member: Member) -> int:
        """Return how many LM tokens a search may spend now."""
        if self.all_exhausted:
            return self.remaining_tokens // max(sum(not other.is_over for other in self.members), 1)
        if member.is_exhausted:
            return 0
        busy = sum(not (other.is_exhausted or other.is_over) for other in self.members)
        return -(-self.remaining_tokens // busy)
