"""A request: a prompt, a budget, and all that may differ from one call of a planner to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypedDict

from ...checks import CheckedKeywords, check_keywords
from ...envs.prompts import as_prompt, load_prompts
from ...errors import PromptError
from .budget import Budget
from .problem import Heuristic

__all__ = ["CHANGES", "Changes", "Request", "as_request", "load_requests"]


class Changes(TypedDict, total=False):
    """What a call may change of its planner; None, like nothing, leaves it as it is.

    Attributes:
        reward: What texts are worth; see :func:`~qstar_decoding.rewards.as_reward`. A learned Q still estimates the
            reward that it was trained with, and orders the search by that, unless its terms have heads: these take the
            new weights. Bounds and J are the new reward's.
        max_new_tokens: The horizon, in tokens.
        stop: Strings that end a completion; an empty list for none.
        constraint: A constraint or a list of them; an empty list for none.
        logprob_weight: α, the weight of a nat of log-probability.
        top_k: Number k of next tokens considered.
        n: As in the planner's constructor: how many texts are wanted, or how many are drawn.
        seed: Of the draws; planners that draw nothing ignore it.
        heuristic: Orders the search.
    """

    reward: Any
    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    constraint: Any
    logprob_weight: float | None
    top_k: int | None
    n: int | None
    seed: int | None
    heuristic: Heuristic | None


CHANGES = tuple(Changes.__annotations__)


@dataclass(frozen=True)
class Request(CheckedKeywords):
    """A prompt and how it is to be completed.

    None leaves a setting as the planner has it; see :class:`Changes`.

    Attributes:
        prompt: A string, chat messages, a dict with the key ``prompt``, or a :class:`Prompt`.
        budget: When to stop; an integer means LM tokens.
        decoder: The decoder that serves it, in a :class:`SearchEngine`: a name, or a :class:`Decoder` on the engine's
            language model.
    """

    prompt: Any
    budget: Budget | int | None = None
    _: KW_ONLY
    reward: Any = None
    max_new_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    constraint: Any = None
    logprob_weight: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    heuristic: Heuristic | None = None
    decoder: Any = None

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the planner's."""
        return {name: value for name in CHANGES if (value := getattr(self, name)) is not None}


def as_request(source: Any, budget: Budget | int | None = None, changes: Changes | None = None) -> Request:
    """Return a prompt as a request; a :class:`Request` keeps what it says itself.

    The request's prompt is a :class:`Prompt`, and its budget a :class:`Budget`.

    Raises:
        PromptError: The prompt is empty, or no prompt.
        ConfigurationError: The budget is no budget, or there is no such setting.
    """
    given: dict[str, Any] = dict(changes or {})
    check_keywords("a request", given, CHANGES)
    request = source if isinstance(source, Request) else Request(source)
    budget = Budget.of(budget if request.budget is None else request.budget)
    return replace(request, prompt=as_prompt(request.prompt), budget=budget, **{**given, **request.changes})


def load_requests(source: Any, budget: Budget | int | None = None, changes: Changes | None = None) -> list[Request]:
    """Return the requests of ``source``, at least one; see :func:`as_request`.

    Args:
        source: See :func:`~qstar_decoding.envs.load_prompts`; a request, or several, may stand among the prompts.
        budget: Of the prompts and requests that have none.
        changes: The settings of the prompts, and of the requests as far as they leave them open.

    Raises:
        PromptError: There is no prompt, or one is none.
    """
    if source is None:
        raise PromptError("there are no prompts, got None; give a list of them, or a file")
    source = list(source) if isinstance(source, Iterator) else source
    several = isinstance(source, (list, tuple)) and any(isinstance(item, Request) for item in source)
    items = source if several else [source] if isinstance(source, Request) else load_prompts(source)
    return [as_request(item, budget, changes) for item in items]
