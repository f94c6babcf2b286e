"""Tasks: one YAML file each, with environment, prompts (train / dev / test, disjoint) and training."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigurationError, UnknownNameError
from .generators import GENERATORS

if TYPE_CHECKING:
    from ..envs import DecodingMDP

__all__ = ["PromptSet", "Task", "load_task", "task_names"]

SPLITS = ("train", "dev", "test")

_NOT_OF_THE_MDP = {"shaping", "gamma", "candidate_dims"}

_FOLDER = Path(__file__).parent


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Templates(_Strict):
    """Prompts made from templates: every ``{slot}`` is filled with every word of its list.

    Attributes:
        templates: Strings with ``{slot}`` in them.
        slots: The words for each slot.
        chat: Whether each is a chat message of the user instead of plain text.
    """

    templates: list[str] = Field(min_length=1)
    slots: dict[str, list[str]] = {}
    chat: bool = False

    def expand(self) -> list[Any]:
        """Return every filling of every template, in order."""
        filled: list[Any] = []
        for template in self.templates:
            names = [name for name in self.slots if "{" + name + "}" in template]
            fillings = itertools.product(*(self.slots[name] for name in names))
            filled.extend(template.format(**dict(zip(names, words, strict=True))) for words in fillings)
        if self.chat:
            return [{"prompt": [{"role": "user", "content": request}]} for request in filled]
        return filled


Listed = list[str | dict[str, Any]]


class PromptSet(_Strict):
    """Where a task's prompts come from.

    Each part is listed (strings, or dicts with ``prompt`` and columns) or made from :class:`Templates`; or all three
    are made by a function of :mod:`~qstar_decoding.tasks.generators`.
    """

    train: Listed | Templates = []
    dev: Listed | Templates = []
    test: Listed | Templates = []
    generator: str | None = None
    arguments: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _generate(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "generator" not in given:
            missing = [f"missing key 'prompts.{name}'" for name in SPLITS if name not in given]
            if missing and isinstance(given, dict):
                raise ValueError("; ".join(missing))
            return given
        if made := {*SPLITS} & {*given}:
            raise ValueError(f"prompts are given by a generator or listed, not both: {sorted(made)}")
        name = given["generator"]
        if name not in GENERATORS:
            raise UnknownNameError("generator", str(name), sorted(GENERATORS))
        try:
            return {**given, **GENERATORS[name](**given.get("arguments", {}))}
        except TypeError as error:  # an argument that is unknown, missing or of the wrong type
            raise ValueError(f"generator {name!r}: {error}") from error

    @model_validator(mode="after")
    def _disjoint(self) -> PromptSet:
        parts = {name: {str(prompt) for prompt in self.of(name)} for name in SPLITS}
        for a, b in itertools.combinations(parts, 2):
            if shared := parts[a] & parts[b]:
                raise ValueError(f"{a} and {b} share prompts, e.g. {min(shared)!r}")
        return self

    def of(self, split: str) -> list[Any]:
        """Return the prompts of ``"train"``, ``"dev"`` or ``"test"``, as ``load_prompts`` takes them."""
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
        gold: A second reward, which nobody optimises; what it thinks of the texts is measured beside the first.
        budgets: LM tokens a prompt at which Q is tried during and after the training.
    """

    name: str
    description: str
    env: dict[str, Any]
    prompts: PromptSet
    steps: int = Field(ge=1)
    training: dict[str, Any] = {}
    planner: dict[str, Any] = {}
    gold: str | None = None
    budgets: list[Annotated[int, Field(ge=1)]] = Field([50, 200], min_length=1)

    def mdp(self, **changes: Any) -> DecodingMDP:
        """Return the process that this task's texts are decoded in; ``changes`` replace arguments of its environment.

        What concerns the environment's step rewards and observations only, such as shaping, is left out.
        """
        from ..envs import DecodingMDP

        arguments = {**self.env, **changes}
        return DecodingMDP(**{key: value for key, value in arguments.items() if key not in _NOT_OF_THE_MDP})


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
