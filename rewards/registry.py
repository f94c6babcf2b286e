"""Registry of rewards by name: ``make_reward("sentiment")``.

The tables list the ready-made rewards by entry point; `make_reward` imports one when it is first used.
A new ready-made reward needs its own file in library/, a line in a table, and a line in docs/reference/rewards.md.
"""

from __future__ import annotations

import importlib
import inspect
import keyword
from collections.abc import Callable
from typing import Any, TypeVar

from ..checks import first_line
from ..errors import ConfigurationError, QStarError, UnknownNameError
from .base import Reward
from .checking import check_keywords, keywords_of, shown

__all__ = ["make_reward", "register_reward", "reward_names"]

RewardFactory = Callable[..., Reward]  # a subclass of Reward is one
Factory = TypeVar("Factory", bound=RewardFactory)

_factories: dict[str, str | RewardFactory] = {
    "address": ".library.engagement:Address",
    "afinn": ".library.sentiment:Afinn",
    "all_keywords": ".library.guidelines:AllKeywords",
    "answer_format": ".library.reasoning:AnswerFormat",
    "coherence": ".library.likelihood:Coherence",
    "complete_sentence": ".library.guidelines:CompleteSentence",
    "concreteness": ".library.engagement:Concreteness",
    "countdown": ".library.reasoning:Countdown",
    "distinct": ".library.creativity:Distinct",
    "engagement": ".library.engagement:engagement",
    "exact_answer": ".library.reasoning:ExactAnswer",
    "intensity": ".library.engagement:Intensity",
    "keyword_overlap": ".library.relevance:KeywordOverlap",
    "keywords": ".library.guidelines:Keywords",
    "length": ".library.guidelines:Length",
    "numeric_answer": ".library.reasoning:NumericAnswer",
    "pangram": ".library.guidelines:Pangram",
    "pointwise_mutual_information": ".library.likelihood:PointwiseMutualInformation",
    "profanity": ".library.classifier:Profanity",
    "readability": ".library.engagement:Readability",
    "reasoning_gym": ".library.reasoning:ReasoningGym",
    "relevance": ".library.relevance:Relevance",
    "repetition": ".library.creativity:Repetition",
    "semantic_repetition": ".library.relevance:SemanticRepetition",
    "sentiment": ".library.sentiment:Sentiment",
    "short_sentences": ".library.guidelines:ShortSentences",
    "static_relevance": ".library.relevance:StaticRelevance",
}
# Rewards that require arguments, such as forbidden_words("very").
WITH_ARGUMENTS: dict[str, str | RewardFactory] = {
    "classifier": ".library.classifier:Classifier",
    "forbidden_words": ".library.guidelines:ForbiddenWords",
    "matches_json": ".library.guidelines:MatchesJSON",
    "matches_regex": ".library.guidelines:MatchesRegex",
    "novelty": ".library.creativity:Novelty",
    "preference": ".library.language:Preference",
}


def register_reward(name: str) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a reward by name, for specs, the command line and `make_reward`.

    ::

        @register_reward("brevity")
        class Brevity(Reward): ...

        @register_reward("politeness")
        def politeness() -> Reward:
            return as_reward(count_thanks, lower=0, upper=1)

    Args:
        name: The name; a Python identifier, because a spec such as ``"0.7 * brevity - sentiment"`` is an expression.

    Returns:
        A decorator for a subclass of `Reward`, or for a function without required arguments that returns one.
        It returns what it is given.

    Raises:
        ConfigurationError: The name is taken or no identifier, or what is decorated cannot be such a factory.
    """
    if not str(name).isidentifier() or keyword.iskeyword(name):
        raise ConfigurationError(f"a reward cannot be named {name!r}; expected an identifier such as 'my_reward'.")
    if name in _factories or name in WITH_ARGUMENTS:
        raise ConfigurationError(f"there is a reward named {name!r} already; register this one under another name.")

    def register(factory: Factory) -> Factory:
        # The likely mistake is to decorate the reward function itself; this finds it before the first use.
        if not isinstance(factory, type) and required_parameters(factory):
            raise ConfigurationError(
                f"{factory!r} cannot be registered as the reward {name!r}, for it requires arguments; expected a "
                "subclass of Reward, or a function without arguments that returns a Reward. To register a reward "
                f"function f, write register_reward({name!r})(lambda: as_reward(f))."
            )
        _factories[name] = factory
        return factory

    return register


def reward_names() -> list[str]:
    """Return the names of all registered rewards, sorted."""
    return sorted(_factories | WITH_ARGUMENTS)


def make_reward(name: str, /, *args: Any, **kwargs: Any) -> Reward:
    """Build the reward registered as `name`.

    Args:
        name: One of `reward_names`.
        *args: Passed to its class or factory.
        **kwargs: Passed to its class or factory.

    Raises:
        UnknownNameError: There is no such reward.
        ConfigurationError: The registered factory does not take these arguments, cannot build the reward, or returned
            something other than a `Reward`.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"a reward's name is a string, got {shown(name)}")
    entry = _factories.get(name) or WITH_ARGUMENTS.get(name)
    if entry is None:
        raise UnknownNameError("reward", name, reward_names(), hint="register_reward adds one.")
    factory = _load(entry) if isinstance(entry, str) else entry
    if (known := keywords_of(factory)) is not None:
        check_keywords(f"the reward {name!r}", kwargs, known)
    signature = inspect.signature(factory)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        takes = ", ".join([*map(str, parameters), *(known or [])[len(parameters) :]])
        raise ConfigurationError(f"the reward {name!r}: {error}; it is made as {name}({takes})") from None
    try:
        reward = factory(*args, **kwargs)
    except QStarError:
        raise
    except Exception as error:  # an argument of a wrong type may raise anything
        given = ", ".join([*map(shown, args), *(f"{key}={shown(value)}" for key, value in kwargs.items())])
        raise ConfigurationError(
            f"the reward {name!r} cannot be made as {name}({given}): {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(reward, Reward):
        raise ConfigurationError(
            f"the factory of the reward {name!r} returned {shown(reward)}; expected a Reward: as_reward makes one."
        )
    return reward


def _load(entry_point: str) -> RewardFactory:
    """Import ``"module:attribute"``, the module relative to this package."""
    module, _, attribute = entry_point.partition(":")
    factory: RewardFactory = getattr(importlib.import_module(module, __package__), attribute)
    return factory


def required_parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which a call fails."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
