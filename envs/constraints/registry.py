"""Constraints by name, as task files give them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigurationError, UnknownNameError
from .base import Constraint

__all__ = ["make_constraint"]

_BY_NAME = {
    "banned_strings": ".strings:BannedStrings",
    "countdown": ".countdown:CountdownConstraint",
    "forced_strings": ".strings:ForcedStrings",
    "grammar": ".grammars:GrammarConstraint",
    "json": ".grammars:JSONConstraint",
    "min_tokens": ".strings:MinTokens",
    "regex": ".grammars:RegexConstraint",
    "star_graph": ".star_graph:StarGraphConstraint",
}


def make_constraint(given: Any) -> Any:
    """Return constraints whose names are given, as a task file does; anything else is returned as it is.

    Args:
        given: A name such as ``"countdown"``; a mapping from names to arguments, such as ``{"regex": "[a-z]+"}`` or
            ``{"countdown": {"format": "steps"}}``; or a list of these and of constraints.

    Raises:
        UnknownNameError: There is no such constraint.
        ConfigurationError: It does not take these arguments.
    """
    if isinstance(given, str):
        return _make(given, {})
    if isinstance(given, Mapping):
        made = [_make(name, arguments) for name, arguments in given.items()]
        return made[0] if len(made) == 1 else made
    if isinstance(given, (list, tuple)):
        made = [make_constraint(one) for one in given]
        return [one for some in made for one in (some if isinstance(some, list) else [some])]
    return given


def _make(name: Any, arguments: Any) -> Constraint:
    if name not in _BY_NAME:
        raise UnknownNameError("constraint", str(name), sorted(_BY_NAME))
    module, _, kind = _BY_NAME[name].partition(":")
    make = getattr(importlib.import_module(module, __package__), kind)
    try:
        if isinstance(arguments, Mapping) and name != "json":
            constraint: Constraint = make(**arguments)
        else:
            constraint = make(*(arguments if isinstance(arguments, (list, tuple)) else [arguments]))
    except ConfigurationError as error:
        raise ConfigurationError(f"the constraint {name!r}: {error}") from error
    except TypeError as error:
        raise ConfigurationError(f"the constraint {name!r} does not take {arguments!r}: {error}") from error
    return constraint
