"""Conversion of names, weighted sums and plain functions to rewards."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any, Unpack, cast

from ..errors import ConfigurationError
from .base import Reward
from .checking import as_number, check_keywords
from .composition import WeightedSum, clip, minimum, normalise, product
from .registry import make_reward, required_parameters, reward_names
from .specs import Call, Made, Terms, parse_spec
from .types import Column, FunctionOptions, Scores, Texts, TokenIds

__all__ = ["FunctionReward", "RewardSpec", "as_reward"]

RewardSpec = Reward | str | Mapping[str, float] | Callable[..., Any]

_SHAPES = """A reward function has one of two shapes:
    def reward(prompts, completions, completion_ids=None, **columns) -> list[float | None]  # all texts at once
    def reward(prompt: str, completion: str) -> float  # one text
The first is recognised by a parameter named prompts, completions or completion_ids, or by **; it may take just some of
them, and columns by their names. The second has exactly two required parameters, of any names."""
_BATCHED_NAMES = {"prompts", "completions", "completion_ids"}


def as_reward(
    spec: RewardSpec, *, potential: Callable[..., Any] | None = None, **options: Unpack[FunctionOptions]
) -> Reward:
    """Return the `Reward` that `spec` stands for.

    ::

        as_reward("sentiment")                                      # a registered name
        as_reward("0.7 * sentiment - 0.3 * length")                 # a weighted sum of them
        as_reward("sentiment - forbidden_words('very')")            # with arguments
        as_reward({"sentiment": 0.7, "length": -0.3})               # the same
        as_reward(lambda prompt, completion: len(completion), lower=0)
        as_reward(trl_reward_function)                              # batched, in TRL's shape

    Args:
        spec: A reward, which is returned as it is; a registered name; the spec of a weighted sum, as text or as a
            mapping from names to weights; or a callable, in one of the two shapes that `FunctionReward` describes.
        potential: A callable that scores unfinished texts, in either shape; only with a callable.
        **options: ``lower``, ``upper``, ``on_error``, ``penalty`` and ``name`` of a callable; see `FunctionOptions`.

    Returns:
        The reward.

    Raises:
        UnknownNameError: A name is not registered.
        ConfigurationError: The spec is nothing of the above, or the other arguments contradict it or each other.
    """
    describes_a_function = potential is not None or any(value not in (None, "raise") for value in options.values())
    if describes_a_function and isinstance(spec, Reward | str | Mapping):
        raise ConfigurationError(
            "lower, upper, potential, on_error and penalty describe a function, but the reward given is "
            f"{spec!r}, which has its own; leave them out, or give them to make_reward or to the Reward's class."
        )
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        return _weighted_sum(parse_spec(spec, reward_names()))
    if isinstance(spec, Mapping):
        return _weighted_sum(_checked_weights(spec))
    return FunctionReward(spec, potential=potential, **options)


class FunctionReward(Reward):
    """A plain function as a reward.

    The function has one of two shapes::

        def reward(prompts, completions, completion_ids=None, **columns) -> list[float | None]
        def reward(prompt: str, completion: str) -> float

    The first is TRL's. It gets all texts at once, and by name the arguments that it has: a function that takes
    ``completions`` and ``answer`` works if the prompts have a column ``answer``. The second gets one text at a time, by
    position; the completion comes first if its name or that of ``prompt`` says so. None means that a text cannot be
    scored. Either may be ``async``: then all texts of a batch are awaited together.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        potential: Callable[..., Any] | None = None,
        **options: Unpack[FunctionOptions],
    ) -> None:
        """Wrap a function; `as_reward` describes the arguments.

        Raises:
            ConfigurationError: The function or the potential has neither of the two shapes, or the bounds or the
                penalty contradict each other.
        """
        check_keywords("FunctionReward", options, ["potential", *FunctionOptions.__annotations__])
        self._function = _shaped(function)
        self._potential = None if potential is None else _shaped(potential)
        self.reads_token_ids = any(f.reads_token_ids for f in (self._function, self._potential) if f is not None)
        own: FunctionOptions = {
            "name": _name(function),
            "lower": getattr(function, "lower", None),
            "upper": getattr(function, "upper", None),
        }
        given = {option: value for option, value in options.items() if value is not None}
        super().__init__(**cast(FunctionOptions, {**own, **given}))

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Call the function."""
        scores: Scores = _awaited(self._function(prompts, completions, completion_ids, columns))
        return scores

    def score_prefixes(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column
    ) -> Scores:
        """Call the function that was given as the potential."""
        if self._potential is None:
            return super().score_prefixes(prompts, completions, completion_ids, **columns)
        scores: Scores = _awaited(self._potential(prompts, completions, completion_ids, columns))
        return scores

    @property
    def has_potential(self) -> bool:
        """Whether a potential was given."""
        return self._potential is not None


@dataclass(frozen=True)
class _Batched:
    """A function that takes all texts at once, by name."""

    function: Callable[..., Any]
    accepted: frozenset[str] | None  # the names of the arguments that it takes; None if it takes any
    required: frozenset[str]  # those without which it cannot be called

    @property
    def reads_token_ids(self) -> bool:
        return self.accepted is None or "completion_ids" in self.accepted

    def __call__(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds, columns: Mapping[str, Column]
    ) -> Any:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        missing = self.required - given.keys()
        if missing:
            raise ConfigurationError(
                f"the reward function {_name(self.function)!r} needs {', '.join(map(repr, sorted(missing)))}, and "
                f"there are just {', '.join(map(repr, given))}. Give the prompts such columns, or change the function. "
                f"{_SHAPES}"
            )
        return self.function(**{k: v for k, v in given.items() if self.accepted is None or k in self.accepted})


@dataclass(frozen=True)
class _PerText:
    """A function that takes one prompt and one completion, by position."""

    function: Callable[[str, str], float | None]
    completion_first: bool = False
    reads_token_ids = False

    def __call__(
        self, prompts: Texts, completions: Texts, completion_ids: TokenIds, columns: Mapping[str, Column]
    ) -> list[float | None]:
        first, second = (completions, prompts) if self.completion_first else (prompts, completions)
        return [self.function(*texts) for texts in zip(first, second, strict=True)]


def _shaped(function: Any) -> _Batched | _PerText:
    """Recognise a function's shape from its signature.

    Raises:
        ConfigurationError: It is not callable, or has neither shape.
    """
    if isinstance(function, type) and issubclass(function, Reward):
        raise ConfigurationError(f"{function.__name__} is a class; expected one of its rewards: {function.__name__}().")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # not callable; a built-in that does not tell
        raise ConfigurationError(
            f"cannot use {function!r} as a reward: it is no function, or hides its signature. {_SHAPES}"
        ) from None

    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    by_position = {p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
    required = frozenset(required_parameters(function))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_any or by_name & _BATCHED_NAMES:
        if required <= by_name:
            return _Batched(function, accepted=None if takes_any else frozenset(by_name), required=required)
    elif len(required) == 2 and required <= by_position - _BATCHED_NAMES:
        first, second = required_parameters(function)
        return _PerText(function, completion_first=first == "completion" or second == "prompt")
    signature = ", ".join(map(str, parameters))
    raise ConfigurationError(f"cannot use {_name(function)}({signature}) as a reward. {_SHAPES}")


def _awaited(returned: Any) -> Any:
    """Return what a function returned, with everything awaited that is to be awaited, all at the same time."""
    if inspect.isawaitable(returned):
        return _run(returned)
    if isinstance(returned, list) and any(map(inspect.isawaitable, returned)):
        return _run(_gathered(returned))
    return returned


async def _gathered(values: list[Any]) -> list[Any]:
    awaitables = [value for value in values if inspect.isawaitable(value)]
    results = iter(await asyncio.gather(*awaitables))
    return [next(results) if inspect.isawaitable(value) else value for value in values]


def _run(awaitable: Awaitable[Any]) -> Any:
    """Await in a loop in a thread of its own, for the caller's thread may run one, as in Jupyter.

    The loop lives as long as the process: clients that a function keeps between calls belong to it.
    """

    async def result() -> Any:
        return await awaitable

    loop = _loop(os.getpid())
    if asyncio._get_running_loop() is loop:  # an async function that asks for the score of another one
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(asyncio.run, result()).result()
    future = asyncio.run_coroutine_threadsafe(result(), loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.lru_cache(1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of a process; a forked one has no thread of its parent's."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def _name(function: Any) -> str:
    """Return a function's own name, or that of what it is made from."""
    if isinstance(function, functools.partial):
        return _name(function.func)
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def _built(it: str | Call | Made) -> Reward:
    if isinstance(it, Made):
        try:
            return make_reward(it.name, *it.arguments, **dict(it.options))
        except ConfigurationError as error:
            if it.name in str(error):
                raise
            raise ConfigurationError(f"{it.name}(…): {error}") from error
    return make_reward(it) if isinstance(it, str) else _composed(it)


def _composed(call: Call) -> Reward:
    functions: dict[str, Callable[..., Reward]] = {
        "clip": clip,
        "min": minimum,
        "normalise": normalise,
        "product": product,
    }
    return functions[call.function](*map(_weighted_sum, call.rewards), *call.numbers)


def _checked_weights(weights: Mapping[Any, Any]) -> Terms:
    """Return the items of a mapping from names to weights, as `parse_spec` returns terms."""
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, Real):
            raise ConfigurationError(
                f"the reward mapping has {name!r}: {weight!r}; expected registered names with numbers as weights, "
                "such as {'sentiment': 0.7}."
            )
    return [(as_number(weight), name) for name, weight in weights.items()]


def _weighted_sum(terms: Terms) -> Reward:
    """Build a weighted sum of registered rewards and functions of them; a single one of weight 1 stays what it is."""
    rewards = [(weight, _built(it)) for weight, it in terms]
    match rewards:
        case [(1.0, reward)]:
            return reward
    return WeightedSum(rewards)
