"""Helpers of the ready-made rewards: optional libraries, columns of the prompts, texts for tokenizers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigurationError
from ..checking import plain
from ..types import Column

__all__ = ["column_of", "library", "readable", "whole"]


def library(module: str, package: str, reward: str) -> Any:
    """Return a module that only one reward needs, from a package that need not be installed.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the reward {reward!r} needs {package}, which is not installed: run pip install {package}"
        ) from error


def readable(text: str) -> str:
    """Return a text without lone surrogates, which no tokenizer reads."""
    return text.encode("utf-8", "replace").decode()


def whole(begun: str) -> str:
    """Return an unfinished text without a last character whose bytes are not complete yet."""
    return begun.rstrip("\ufffd")


def column_of(columns: Mapping[str, Column], name: str, reward: str, example: str) -> Column:
    """Return a column of the prompts that a reward requires: arrays as lists, and None where a value is missing.

    Raises:
        ConfigurationError: There is none of that name; ``example`` shows a prompt that has it.
    """
    if name not in columns:
        raise ConfigurationError(f"the reward {reward!r} needs prompts with the column {name!r}, such as {example}")
    values = map(plain, columns[name])
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]  # as pandas says it
