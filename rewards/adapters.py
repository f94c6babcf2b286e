"""Adapters for reward functions of other libraries: TRL, RL4LMs, trlX, verifiers, reasoning-gym."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from ..errors import ConfigurationError
from .base import Reward
from .functions import FunctionReward, as_reward
from .registry import required_parameters
from .types import OnError

__all__ = ["from_reasoning_gym", "from_rl4lms", "from_trl", "from_trlx", "from_verifiers"]

Function = Callable[..., Any]


def from_trl(
    function: Function,
    *,
    conversational: bool = False,
    lower: float | None = None,
    upper: float | None = None,
    on_error: OnError = "raise",
) -> Reward:
    """Return a reward function of TRL's GRPO and RLOO trainers as a reward.

    ``function(prompts, completions, completion_ids, **columns) -> list[float | None]`` is this package's own shape, so
    :func:`as_reward` does the same; only functions for chat data sets need this.

    Args:
        function: The function, or any part of that signature.
        conversational: Whether it expects each completion, and each prompt, as a list of messages.
        lower: The least that it returns, if known.
        upper: The most that it returns, if known; certificates rest on it.
        on_error: See `Reward`.

    Raises:
        ConfigurationError: It is a function of another shape.
    """
    if not conversational:
        reward = as_reward(function, lower=lower, upper=upper, on_error=on_error)
        _check_batched(function, "TRL", "function(prompts, completions, **columns) -> list of numbers")
        return reward
    _check_batched(function, "TRL", "function(prompts, completions, **columns) -> list of numbers")
    names = _names(function)

    def score(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        given = {
            "prompts": [_message("user", text) for text in prompts],
            "completions": [_message("assistant", text) for text in completions],
            "completion_ids": completion_ids,
            **columns,
        }
        scores: list[float | None] = function(**_taken(given, names))
        return scores

    return _made(score, function, lower, upper, on_error)


def from_trlx(
    function: Function, *, lower: float | None = None, upper: float | None = None, on_error: OnError = "raise"
) -> Reward:
    """Return trlX's ``reward_fn(samples, prompts, outputs, **columns) -> list of numbers`` as a reward.

    A sample is the prompt followed by the output. The other arguments are those of :func:`from_trl`.

    Raises:
        ConfigurationError: It takes none of ``samples``, ``prompts`` and ``outputs``.
    """
    names = _names(function)
    if names is not None and not {"samples", "prompts", "outputs"} & names:
        raise _wrong(function, "trlX", "reward_fn(samples, prompts, outputs, **columns) -> list of numbers")

    def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        columns.pop("completion_ids", None)
        samples = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        given = {"samples": samples, "prompts": list(prompts), "outputs": list(completions), **columns}
        return list(function(**_taken(given, names)))

    return _made(score, function, lower, upper, on_error)


def from_rl4lms(
    function: Function,
    *,
    references: str = "references",
    lower: float | None = None,
    upper: float | None = None,
    on_error: OnError = "raise",
) -> Reward:
    """Return an RL4LMs reward, single or batched, as a reward of finished texts.

    The single one is called as at the end of an episode, ``(observation, action, next_observation, True, meta_info)``,
    with observations that have ``prompt_or_input_text``, ``context_text`` and ``target_or_reference_texts``; the
    batched one as ``(prompt_texts, gen_texts, ref_texts, dones, meta_infos)``.

    Args:
        function: A ``RewardFunction`` or ``BatchedRewardFunction``, or anything that is called like one.
        references: The column that holds the list of reference texts of each prompt; without it there are none.
        lower: See :func:`from_trl`.
        upper: See :func:`from_trl`.
        on_error: See `Reward`.

    Raises:
        ConfigurationError: It is called like neither.
    """
    parameters = _positional(function)
    is_batched = parameters[:2] == ["prompt_texts", "gen_texts"]
    if not is_batched and (len(parameters) not in (4, 5) or "done" not in parameters):
        raise _wrong(
            function,
            "RL4LMs",
            "(current_observation, action, next_observation, done, meta_info) -> number, or "
            "(prompt_texts, gen_texts, ref_texts, dones, meta_infos) -> list of numbers",
        )

    def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        ids = columns.pop("completion_ids", None) or [[]] * len(prompts)
        targets = [[] if of is None else of for of in columns.pop(references, [None] * len(prompts))]
        infos = [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]
        further = [infos] if len(parameters) == 5 else []
        if is_batched:
            return list(function(list(prompts), list(completions), targets, [True] * len(prompts), *further))
        scores: list[float | None] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            shared = {"prompt_or_input_text": prompt, "target_or_reference_texts": targets[i], "meta_info": infos[i]}
            before, after = (SimpleNamespace(context_text=text, **shared) for text in ("", completion))
            action = int(ids[i][-1]) if len(ids[i]) else -1
            scores.append(function(before, action, after, True, *(part[i] for part in further)))
        return scores

    return _made(score, function, lower, upper, on_error)


def from_verifiers(
    function: Function,
    *,
    conversational: bool = True,
    lower: float | None = None,
    upper: float | None = None,
    on_error: OnError = "raise",
) -> Reward:
    """Return a reward function of a verifiers ``Rubric`` as a reward; ``async`` ones work too.

    It is called once a text with whatever it takes of ``prompt``, ``completion``, ``answer``, ``info``, ``task`` and
    ``state`` (a dict of these), and columns by their names.

    Args:
        function: The function.
        conversational: Whether it expects prompt and completion as lists of messages, as verifiers gives them.
        lower: See :func:`from_trl`.
        upper: See :func:`from_trl`.
        on_error: See `Reward`.

    Raises:
        ConfigurationError: It does not take a ``completion``.
    """
    names = _names(function)
    if names is not None and not names & {"completion", "state"}:
        raise _wrong(function, "verifiers", "function(prompt, completion, answer, state, …) -> number")

    def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        columns.pop("completion_ids", None)
        scores: list[Any] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {"answer": "", "info": {}, "task": "default"} | {name: values[i] for name, values in columns.items()}
            texts: dict[str, Any] = {"prompt": prompt, "completion": completion}
            if conversational:
                texts = {"prompt": _message("user", prompt), "completion": _message("assistant", completion)}
            scores.append(function(**_taken({**row, **texts, "state": {**row, **texts}}, names)))
        if scores and inspect.isawaitable(scores[0]):
            return _gathered(scores)
        return scores

    return _made(score, function, lower, upper, on_error)


def from_reasoning_gym(dataset: Any, *, on_error: OnError = "raise") -> Reward:
    """Return the ``score_answer`` of a reasoning-gym data set as a reward, from 0 to 1.

    The prompts need the column ``entry``, the data set's item: ``{"prompt": item["question"], "entry": item}``.

    Args:
        dataset: What ``reasoning_gym.create_dataset(name, …)`` returned.
        on_error: See `Reward`.

    Raises:
        ConfigurationError: It has no ``score_answer``.
    """
    scorer = getattr(dataset, "score_answer", None)
    if not callable(scorer):
        raise ConfigurationError(f"a reasoning-gym data set has a method score_answer; {dataset!r} has none")

    def score(completions: Sequence[str], entry: Sequence[Any]) -> list[float | None]:
        return [
            None if item is None else float(scorer(completion.strip(), item))
            for completion, item in zip(completions, entry, strict=True)
        ]

    return _made(score, type(dataset), 0.0, 1.0, on_error)


# ---------------------------------------------------------------------------------------------------------------------


def _made(
    score: Function, original: Any, lower: float | None, upper: float | None, on_error: OnError
) -> FunctionReward:
    functools.update_wrapper(score, original, assigned=("__name__", "__doc__"), updated=())
    del score.__wrapped__  # type: ignore[attr-defined]  # else its signature would be read for this one's
    if not hasattr(original, "__name__"):
        score.__name__ = type(original).__name__
    return FunctionReward(score, lower=lower, upper=upper, on_error=on_error)


def _names(function: Function) -> set[str] | None:
    """Return the names that a function takes; None if it takes any."""
    parameters = _signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _positional(function: Function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in _signature(function).parameters.values() if p.kind in kinds]


def _signature(function: Function) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{function!r} is no function, or hides its signature") from None


def _check_batched(function: Function, library: str, shape: str) -> None:
    names = _names(function)
    if names is not None and not names & {"prompts", "completions", "completion_ids"}:
        raise _wrong(function, library, shape)


def _taken(given: dict[str, Any], names: set[str] | None) -> dict[str, Any]:
    return given if names is None else {name: value for name, value in given.items() if name in names}


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _gathered(scores: Sequence[Awaitable[float]]) -> list[float | None]:
    """Await them all, in a loop of their own."""

    async def gather() -> list[float | None]:
        return list(await asyncio.gather(*scores))

    return asyncio.run(gather())


def _wrong(function: Any, library: str, shape: str) -> ConfigurationError:
    name = getattr(function, "__name__", type(function).__name__)
    needed = ", ".join(required_parameters(function)) or "nothing"
    return ConfigurationError(f"{name} takes {needed}; a reward function of {library} has the shape {shape}")
