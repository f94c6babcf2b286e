"""Tasks: one YAML file each, with environment, prompts (train / dev / test, disjoint) and training."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigurationError, UnknownNameError

__all__ = ["PromptSet", "Task", "load_task", "task_names"]

_FOLDER = Path(__file__).parent


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Templates(_Strict):
    """Prompts made from templates: every ``{slot}`` is filled with every word of its list.

    Attributes:
        templates: Strings with ``{slot}`` in them.
        slots: The words for each slot.
    """

    templates: list[str] = Field(min_length=1)
    slots: dict[str, list[str]] = {}

    def expand(self) -> list[str]:
        """Return every filling of every template, in order."""
        filled: list[str] = []
        for template in self.templates:
            names = [name for name in self.slots if "{" + name + "}" in template]
            fillings = itertools.product(*(self.slots[name] for name in names))
            filled.extend(template.format(**dict(zip(names, words, strict=True))) for words in fillings)
        return filled


class PromptSet(_Strict):
    """Where a task's prompts come from; each part is a list of strings or :class:`Templates`."""

    train: list[str] | Templates
    dev: list[str] | Templates
    test: list[str] | Templates

    @model_validator(mode="after")
    def _disjoint(self) -> PromptSet:
        parts = {name: set(self.of(name)) for name in ("train", "dev", "test")}
        for a, b in itertools.combinations(parts, 2):
            if shared := parts[a] & parts[b]:
                raise ValueError(f"{a} and {b} share prompts, e.g. {sorted(shared)[0]!r}")
        return self

    def of(self, split: str) -> list[str]:
        """Return the prompts of ``"train"``, ``"dev"`` or ``"test"``."""
        part = getattr(self, split)
        return part.expand() if isinstance(part, Templates) else list(part)


class Task(_Strict):
    """What to decode, how it is rewarded, and how Q is trained for it.

    Attributes:
        name: The file's name without ``.yaml``.
        description: One sentence.
        env: Arguments of ``gym.make("TokenDecoding-v0")`` other than ``prompts``.
        prompts: The prompts.
        steps: LM tokens to train for.
        training: Arguments of :class:`~qstar_decoding.agents.QStar`.
        planner: Arguments of :class:`~qstar_decoding.agents.AStarPlanner`, chosen on the dev prompts.
    """

    name: str
    description: str
    env: dict[str, Any]
    prompts: PromptSet
    steps: int = Field(ge=1)
    training: dict[str, Any] = {}
    planner: dict[str, Any] = {}


def task_names() -> list[str]:
    """Return the names of the tasks that the package ships."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_task(name: str | Path) -> Task:
    """Read a task by name, or from the path of a YAML file.

    Raises:
        UnknownNameError: There is no such task or file.
        ConfigurationError: A key is unknown or missing, or a value has the wrong type; all are named.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UnknownNameError("task", str(name), task_names(), "The path of a .yaml file works too.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    try:
        return Task.model_validate({"name": path.stem, **content} if isinstance(content, dict) else content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(f"task file {path}: {problems}") from error


def _describe(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), [*Task.model_fields, *PromptSet.model_fields], n=1)
        return f"unknown key {place!r}" + (f", did you mean {near[0]!r}?" if near else "")
    return f"missing key {place!r}" if problem["type"] == "missing" else f"{place}: {problem['msg']}"
