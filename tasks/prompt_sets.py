"""Prompts of a task in three disjoint splits: listed, made from templates, or made by a generator."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ..errors import UnknownNameError
from .generators import GENERATORS

__all__ = ["SPLITS", "PromptSet", "Strict", "Templates"]

SPLITS = ("train", "dev", "test")


class Strict(BaseModel):
    """Base class of a task file's parts: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Templates(Strict):
    """Prompts made from templates: every ``{slot}`` is filled with every word of its list.

    Attributes:
        templates: Strings with ``{slot}`` in them.
        slots: The words for each slot.
        chat: Whether each is a chat message of the user instead of plain text.
    """

    templates: list[str] = Field(min_length=1)
    slots: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    chat: bool = False

    @model_validator(mode="after")
    def _filled(self) -> Templates:
        for template in self.templates:
            try:
                self._fill(template)
            except (LookupError, ValueError, AttributeError) as error:
                known = ", ".join(f"{{{name}}}" for name in self.slots) or "none"
                raise ValueError(
                    f"the template {template!r} cannot be filled; its slots are {known}, and other braces are doubled"
                ) from error
        return self

    def expand(self) -> list[Any]:
        """Return every filling of every template, in order."""
        filled = [text for template in self.templates for text in self._fill(template)]
        if self.chat:
            return [{"prompt": [{"role": "user", "content": request}]} for request in filled]
        return filled

    def _fill(self, template: str) -> list[str]:
        names = [name for name in self.slots if "{" + name + "}" in template]
        fillings = itertools.product(*(self.slots[name] for name in names))
        return [template.format(**dict(zip(names, words, strict=True))) for words in fillings]


Listed = list[str | dict[str, Any]]


def _kind(given: Any) -> str:
    return "templates" if isinstance(given, (dict, Templates)) else "listed"


# Which of the two is decided first, so that a message speaks of that one alone.
Split = Annotated[Annotated[Listed, Tag("listed")] | Annotated[Templates, Tag("templates")], Discriminator(_kind)]


class PromptSet(Strict):
    """Prompts of a task.

    Each split is listed (strings, or dicts with ``prompt`` and columns) or made from :class:`Templates`. Alternatively,
    one function of :mod:`~qstar_decoding.tasks.generators` makes all three.
    """

    train: Split = []
    dev: Split = []
    test: Split = []
    generator: str | None = None
    arguments: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _generate(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # pydantic says what is wrong with it
        if "generator" not in given:
            missing = [f"missing key 'prompts.{name}'" for name in SPLITS if name not in given]
            if missing:
                raise ValueError("; ".join(missing))
            return given
        if made := {*SPLITS} & {*given}:
            raise ValueError(f"prompts are given by a generator or listed, not both: {sorted(made)}")
        name = given["generator"]
        if not isinstance(name, str) or name not in GENERATORS:
            raise UnknownNameError("generator", str(name), sorted(GENERATORS))
        try:
            return {**given, **GENERATORS[name](**given.get("arguments", {}))}
        except (TypeError, AttributeError, ArithmeticError) as error:  # unknown, missing or of the wrong type
            raise ValueError(f"generator {name!r}: {error}") from error

    @model_validator(mode="after")
    def _disjoint(self) -> PromptSet:
        parts = {name: {str(prompt) for prompt in self.of(name)} for name in SPLITS}
        for a, b in itertools.combinations(parts, 2):
            if shared := parts[a] & parts[b]:
                raise ValueError(f"{a} and {b} share prompts, e.g. {min(shared)!r}")
        return self

    def of(self, split: str) -> list[Any]:
        """Return the prompts of ``"train"``, ``"dev"`` or ``"test"``, as ``load_prompts`` takes them.

        Raises:
            UnknownNameError: There is no such split.
        """
        if split not in SPLITS:
            raise UnknownNameError("split", str(split), SPLITS)
        part = getattr(self, split)
        return part.expand() if isinstance(part, Templates) else list(part)
