"""Adapters for reward functions of other libraries: TRL, RL4LMs, trlX, verifiers, reasoning-gym."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Unpack, cast

from ..errors import ConfigurationError
from .base import Reward
from .checking import passable
from .functions import FunctionReward, as_reward
from .library.reasoning import gym_score
from .registry import required_parameters
from .types import Column, FunctionOptions, Texts, TokenIds

__all__ = ["from_reasoning_gym", "from_rl4lms", "from_trl", "from_trlx", "from_verifiers"]

Function = Callable[..., Any]


def from_trl(function: Function, *, conversational: bool = False, **options: Unpack[FunctionOptions]) -> Reward:
    """Return a reward function of TRL's GRPO and RLOO trainers as a reward; ``async`` ones work too.

    ``function(prompts, completions, completion_ids, **columns) -> list[float | None]`` is this package's own shape, so
    :func:`as_reward` does the same; only functions for chat data sets need this.

    Args:
        function: The function, or any part of that signature.
        conversational: Whether it expects each prompt and each completion as a list of messages. A prompt that is a
            chat is given as its own messages, any other as one message of the user.
        **options: ``lower``, ``upper``, ``on_error``, ``penalty`` and ``name``; see `FunctionOptions`.

    Raises:
        ConfigurationError: It is a function of another shape.
    """
    names = _names(function)
    if names is not None and not names & {"prompts", "completions", "completion_ids"}:
        raise _wrong(function, "TRL", "function(prompts, completions, **columns) -> list of numbers")
    if not conversational:
        return as_reward(function, **options)

    def score(prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Any:
        given = {
            "prompts": _chats(prompts, columns.pop("messages", None)),
            "completions": [_message("assistant", text) for text in completions],
            "completion_ids": completion_ids,
            **columns,
        }
        return function(**_taken(given, names))

    return _adapted(score, function, options)


def from_trlx(function: Function, **options: Unpack[FunctionOptions]) -> Reward:
    """Return trlX's ``reward_fn(samples, prompts, outputs, **columns) -> list of numbers`` as a reward.

    A sample is the prompt followed by the output. The other arguments are those of :func:`from_trl`. Columns
    ``samples`` and ``outputs`` of the prompts are left out.

    Raises:
        ConfigurationError: It takes none of ``samples``, ``prompts`` and ``outputs``.
    """
    names = _names(function)
    if names is not None and not {"samples", "prompts", "outputs"} & names:
        raise _wrong(function, "trlX", "reward_fn(samples, prompts, outputs, **columns) -> list of numbers")

    def score(prompts: Texts, completions: Texts, **columns: Column) -> Any:
        columns = passable(columns, ("samples", "outputs"), "a reward function of trlX")
        columns.pop("completion_ids", None)
        samples = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        given = {"samples": samples, "prompts": list(prompts), "outputs": list(completions), **columns}
        return function(**_taken(given, names))

    return _adapted(score, function, options)


def from_rl4lms(function: Function, *, references: str = "references", **options: Unpack[FunctionOptions]) -> Reward:
    """Return an RL4LMs reward, single or batched, as a reward of finished texts.

    The single one is called as at the end of an episode, ``(observation, action, next_observation, True, meta_info)``,
    with observations that have ``prompt_or_input_text``, ``context_text`` and ``target_or_reference_texts``; the
    batched one as ``(prompt_texts, gen_texts, ref_texts, dones, meta_infos)``.

    Args:
        function: A ``RewardFunction`` or ``BatchedRewardFunction``, or anything that is called like one.
        references: The column that holds the list of reference texts of each prompt; without it there are none.
        **options: See :func:`from_trl`.

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

    def score(prompts: Texts, completions: Texts, **columns: Column) -> Any:
        ids = columns.pop("completion_ids", None) or [[]] * len(prompts)
        targets = [[] if of is None else of for of in columns.pop(references, [None] * len(prompts))]
        infos = [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]
        further = [infos] if len(parameters) == 5 else []
        if is_batched:
            return function(list(prompts), list(completions), targets, [True] * len(prompts), *further)
        scores: list[Any] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            shared = {"prompt_or_input_text": prompt, "target_or_reference_texts": targets[i], "meta_info": infos[i]}
            before, after = (SimpleNamespace(context_text=text, **shared) for text in ("", completion))
            action = int(ids[i][-1]) if len(ids[i]) else -1
            scores.append(function(before, action, after, True, *(part[i] for part in further)))
        return scores

    return _adapted(score, function, options)


def from_verifiers(function: Function, *, conversational: bool = True, **options: Unpack[FunctionOptions]) -> Reward:
    """Return a reward function of a verifiers ``Rubric`` as a reward; ``async`` ones work too.

    It is called once a text with the arguments that it takes among ``prompt``, ``completion``, ``answer``, ``info``,
    ``task`` and ``state`` (a dict of these), and columns by their names. Columns ``prompt``,
    ``completion`` and ``state`` of the prompts are left out.

    Args:
        function: The function.
        conversational: Whether it expects prompt and completion as lists of messages, as verifiers gives them. A prompt
            that is a chat is given as its own messages, any other as one message of the user.
        **options: See :func:`from_trl`.

    Raises:
        ConfigurationError: It does not take a ``completion``.
    """
    names = _names(function)
    if names is not None and not names & {"completion", "state"}:
        raise _wrong(function, "verifiers", "function(prompt, completion, answer, state, …) -> number")

    def score(prompts: Texts, completions: Texts, **columns: Column) -> Any:
        columns = passable(columns, ("prompt", "completion", "state"), "a reward function of verifiers")
        columns.pop("completion_ids", None)
        said: Sequence[Any] = completions
        given: Sequence[Any] = prompts
        if conversational:
            given = _chats(prompts, columns.pop("messages", None))
            said = [_message("assistant", text) for text in completions]
        scores = []
        for i, (prompt, completion) in enumerate(zip(given, said, strict=True)):
            row = {"answer": "", "info": {}, "task": "default"} | {name: values[i] for name, values in columns.items()}
            row |= {"prompt": prompt, "completion": completion}
            scores.append(function(**_taken({**row, "state": dict(row)}, names)))
        return scores

    return _adapted(score, function, options)


def from_reasoning_gym(dataset: Any, **options: Unpack[FunctionOptions]) -> Reward:
    """Return the ``score_answer`` of a reasoning-gym data set as a reward, from 0 to 1.

    The prompts need the column ``entry``, the data set's item: ``{"prompt": item["question"], "entry": item}``.

    Args:
        dataset: The return value of ``reasoning_gym.create_dataset(name, …)``.
        **options: See :func:`from_trl`.

    Raises:
        ConfigurationError: It has no ``score_answer``.
    """
    scorer = getattr(dataset, "score_answer", None)
    if not callable(scorer):
        raise ConfigurationError(f"a reasoning-gym data set has a method score_answer; {dataset!r} has none")

    def score(completions: Texts, entry: Column) -> Any:
        return [
            None if item is None else gym_score(scorer, completion, item)
            for completion, item in zip(completions, entry, strict=True)
        ]

    bounds: FunctionOptions = {"lower": 0.0, "upper": 1.0}
    return _adapted(score, type(dataset), {**bounds, **options})


# ---------------------------------------------------------------------------------------------------------------------


def _adapted(score: Function, original: Any, options: FunctionOptions) -> FunctionReward:
    """Return ``score`` as a reward with the name and the bounds of the function that it calls."""
    own: dict[str, Any] = {"name": getattr(original, "__name__", type(original).__name__)}
    own |= {side: getattr(original, side, None) for side in ("lower", "upper")}
    return FunctionReward(score, **cast(FunctionOptions, {**own, **options}))


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


def _taken(given: dict[str, Any], names: set[str] | None) -> dict[str, Any]:
    return given if names is None else {name: value for name, value in given.items() if name in names}


def _chats(prompts: Texts, messages: Column | None) -> list[list[dict[str, Any]]]:
    """Return each prompt as messages: a chat's own, or one of the user's with the text."""
    chats = messages or [None] * len(prompts)
    return [
        _message("user", text) if chat is None else [dict(message) for message in chat]
        for text, chat in zip(prompts, chats, strict=True)
    ]


def _message(role: str, text: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def _wrong(function: Any, library: str, shape: str) -> ConfigurationError:
    name = getattr(function, "__name__", type(function).__name__)
    needed = ", ".join(required_parameters(function)) or "nothing"
    return ConfigurationError(f"{name} takes {needed}; a reward function of {library} has the shape {shape}")
