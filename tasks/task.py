"""A task, read from its YAML file: environment, prompts, training and planner."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from ..checks import check_keywords
from ..errors import ConfigurationError, PromptError, RewardError, UnknownNameError
from .prompt_sets import PromptSet, Strict

if TYPE_CHECKING:
    from ..envs import DecodingMDP

__all__ = ["Task", "load_task", "task_names"]

# Arguments that a task file cannot give, by the key under which they would stand, and where they come from.
_GIVEN_ELSEWHERE = {
    "env": {"prompts": "prompts are a key of the task"},
    "training": {"seed": "it is given to the training (--seed)"},
}
_NOT_OF_THE_MDP = {"shaping", "gamma", "candidate_dims", "context_tokens", "components"}

_FOLDER = Path(__file__).parent


class Task(Strict):
    """An environment, its prompts, and how Q is trained for it.

    Attributes:
        name: The file's name without ``.yaml``.
        description: One sentence.
        env: Arguments of ``gym.make("TokenDecoding-v0")`` other than ``prompts``.
        prompts: The prompts.
        steps: LM tokens to train for.
        training: Arguments of :class:`~qstar_decoding.agents.QStar`.
        planner: Arguments of :class:`~qstar_decoding.agents.AStarPlanner`, chosen on the dev prompts.
        training_reward: The reward that Q learns from, where it is not the environment's own. ``exact_answer`` knows of
            every beginning whether it is wrong, so that its bounds teach more than a score that gives part marks.
            Everything is measured with the environment's.
        gold: A second reward that is measured beside the first and never optimised.
        budgets: LM tokens a prompt at which Q is evaluated during and after the training.
    """

    name: str
    description: str
    env: dict[str, Any]
    prompts: PromptSet
    steps: int = Field(ge=1)
    training: dict[str, Any] = Field(default_factory=dict)
    planner: dict[str, Any] = Field(default_factory=dict)
    training_reward: Annotated[str, Field(min_length=1)] | None = None
    gold: Annotated[str, Field(min_length=1)] | None = None
    budgets: list[Annotated[int, Field(ge=1, le=10**9)]] = Field([50, 200], min_length=1)

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip(". ") or any(char in "/\\" or not char.isprintable() for char in name):
            raise ValueError(f"it names folders, so it is a word or several, without / and \\; got {name!r}")
        return name

    @field_validator(*_GIVEN_ELSEWHERE)
    @classmethod
    def _given_here(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for name, origin in _GIVEN_ELSEWHERE[str(info.field_name)].items():
            if name in given:
                raise ValueError(f"{name!r} has no place here, since {origin}; leave it out")
        return given

    @field_validator("env")
    @classmethod
    def _known_arguments(cls, env: dict[str, Any]) -> dict[str, Any]:
        from ..envs.token_decoding import environment_arguments

        check_keywords("the environment", env, environment_arguments())
        return env

    def mdp(self, **changes: Any) -> DecodingMDP:
        """Return the decoding process of this task; ``changes`` replace arguments of its environment.

        Arguments that concern only step rewards and observations, such as shaping, are left out.
        """
        from ..envs.steps import make_process

        arguments = {**self.env, **changes}
        return make_process(**{key: value for key, value in arguments.items() if key not in _NOT_OF_THE_MDP})

    def check_prompts(self, split: str, mdp: DecodingMDP) -> None:
        """Check that the prompts of a split can be decoded and scored, which costs no forward of the language model.

        What depends on columns is tried on one prompt for each set of columns.

        Args:
            split: ``"train"``, ``"dev"`` or ``"test"``.
            mdp: The process that is to decode them.

        Raises:
            PromptError: There is no prompt, or one is none or too long.
            ConfigurationError: The reward or the constraint needs a column that a prompt lacks.
        """
        from ..envs.prompts import load_prompts

        nothing = np.empty(0, dtype=np.int64)
        try:
            prompts = load_prompts(self.prompts.of(split))
            for prompt in prompts:
                mdp.encode(prompt)
            for prompt in {frozenset(prompt.columns): prompt for prompt in prompts}.values():
                mdp.grow_request([prompt], nothing, nothing)
                with contextlib.suppress(RewardError):  # it may refuse this text and take others
                    mdp.rewards([prompt], [""], [[]])
        except (PromptError, ConfigurationError) as error:
            kind = PromptError if isinstance(error, PromptError) else ConfigurationError
            raise kind(f"the {split} prompts of the task {self.name!r}: {error}") from error


def task_names() -> list[str]:
    """Return the names of the tasks that the package ships."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_task(name: str | Path, *, trust_remote_code: bool = False, engine: str | None = None) -> Task:
    """Read a task by name, or from the path of a YAML file.

    Args:
        name: A task's name, or a path that ends in ``.yaml`` or ``.yml``.
        trust_remote_code: Let the language model run the Python code in its own repository. A task file cannot allow
            this by itself: it is data, which may come from a stranger.
        engine: The engine of the language model in place of the task's (see :func:`load_language_model`).

    Raises:
        UnknownNameError: There is no such task or file.
        ConfigurationError: A key is unknown or missing, a value has the wrong type, the file is not YAML, or it asks to
            run code.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        raise UnknownNameError("task", str(name), task_names(), "The path of a .yaml file works too.")
    try:
        content = yaml.safe_load(path.read_bytes())
    # PyYAML raises more than its own errors for values that it cannot construct, such as the month 13.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        task = Task.model_validate({"name": path.stem, **content} if isinstance(content, dict) else content)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(f"task file {path}: {problems}") from error
    except RecursionError as error:
        raise ConfigurationError(f"task file {path}: a value contains itself") from error
    for key in ("model", "reward"):
        if not isinstance(task.env.get(key, ""), str):
            raise ConfigurationError(f"task file {path}: env.{key} is a text, got {task.env[key]!r}")
    if not isinstance(task.env.get("model_kwargs") or {}, dict):
        raise ConfigurationError(
            f"task file {path}: env.model_kwargs is a mapping of arguments, got {task.env['model_kwargs']!r}"
        )
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    options |= {} if engine is None else {"engine": engine}
    changed = {**task.env, "model_kwargs": {**(task.env.get("model_kwargs") or {}), **options}}
    task = task.model_copy(update={"env": changed}) if options else task
    asked = next(_code_runners(task.env.get("model_kwargs"), "env.model_kwargs"), None)
    if asked and not trust_remote_code:
        raise ConfigurationError(
            f"task file {path}: {asked} would run code of the model's author; read that code, then allow it with "
            "--trust-remote-code, or load_task(..., trust_remote_code=True)"
        )
    return task


def _code_runners(value: Any, place: str) -> Iterator[str]:
    """Yield the places of arguments of ``from_pretrained`` that let it run code which comes with a model."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        here = f"{place}.{key}"
        if (
            (key in ("trust_remote_code", "use_kernels", "kernel_config", "pickle_module") and item)
            or (key == "weights_only" and not item)
            # A name with a slash is a repository of kernels.
            or (key == "attn_implementation" and "/" in str(item))
        ):
            yield here
        yield from _code_runners(item, here)


def _describe(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), [*Task.model_fields, *PromptSet.model_fields], n=1)
        return f"unknown key {place!r}" + (f", did you mean {near[0]!r}?" if near else "")
    if problem["type"] == "missing":
        return f"missing key {place!r}"
    return f"{place}: {problem['msg']}" if place else f"a mapping of keys is needed, got {problem['input']!r:.80}"
