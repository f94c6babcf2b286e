"""Tasks and rewards for the trainers of other libraries, whose models write whole texts: games of turns, TRL."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..checks import check_integer
from ..envs.prompts import Prompt, load_prompts
from ..errors import ConfigurationError
from ..rewards import Reward, as_reward
from ..tasks import Task, load_task
from .planning.astar import AStarPlanner
from .search.budget import Budget
from .search.plan import Plan

__all__ = ["Turn", "WritingGame", "trl_environment", "trl_reward"]


class Turn(NamedTuple):
    """What follows an answer in a :class:`WritingGame`.

    Attributes:
        message: What the model is told, an invitation to try again included.
        reward: By how much the answer's score exceeds the best one before; the first turn's is its score.
        score: The answer's score, as the task's reward gives it.
        done: Whether the game is over.
    """

    message: str
    reward: float
    score: float
    done: bool


class WritingGame:
    """A task as a game of turns: a model continues a prompt, the task's reward scores the text, and it may try again.

    The sum of the rewards of a game is the best score. No language model is loaded, unless :meth:`reference` is called.

    Attributes:
        task: The task.
        prompts: The prompts that games begin with.
        prompt: The prompt of this game.
        best: The best score of this game; None before the first answer.
    """

    prompt: Prompt
    best: float | None

    def __init__(
        self,
        task: Task | str | Path = "sentiment",
        *,
        split: str = "train",
        turns: int = 2,
        reward: Any = None,
    ) -> None:
        """Take the prompts and the reward of a task.

        Args:
            task: A task, its name, or the path of a YAML file.
            split: ``"train"``, ``"dev"`` or ``"test"``.
            turns: Answers in a game.
            reward: A reward in place of the task's: a name, a spec, a function or a :class:`Reward`.

        Raises:
            UnknownNameError: There is no such task or split.
            ConfigurationError: ``turns`` is no positive integer, or there is no such reward.
        """
        self.task = task if isinstance(task, Task) else load_task(task)
        self.prompts: Sequence[Prompt] = load_prompts(self.task.prompts.of(split))
        self.turns = check_integer("turns", turns)
        self._reward: Reward = as_reward(self.task.env.get("reward", "sentiment") if reward is None else reward)
        self.reset(index=0)

    def reset(self, *, index: int | None = None, seed: int | None = None) -> str:
        """Begin a game; return the instruction.

        Args:
            index: Of the prompt; by default one is drawn.
            seed: Of the draw.

        Raises:
            ConfigurationError: The seed is no integer of at least 0.
        """
        if index is None:
            chosen = None if seed is None else check_integer("seed", seed, low=0)
            index = int(np.random.default_rng(chosen).integers(len(self.prompts)))
        self.prompt, self.best, self._turn = self.prompts[index % len(self.prompts)], None, 0
        return self.instruction(self.prompt)

    def instruction(self, prompt: Prompt) -> str:
        """Return what a model is asked for a prompt."""
        return (
            f"{self.task.description.rstrip('.')}. Continue this text; answer with the continuation alone, of at most "
            f"{self.task.env.get('max_new_tokens', 32)} tokens:\n\n{prompt.text}"
        )

    def step(self, answer: str) -> Turn:
        """Score an answer; it follows the prompt after a space, unless it begins with white space itself.

        Raises:
            ConfigurationError: It is no text.
        """
        if not isinstance(given := cast("Any", answer), str):
            raise ConfigurationError(f"an answer is a text, got {type(given).__name__}")
        text = answer if answer[:1].isspace() else f" {answer}"
        columns = {name: [value] for name, value in self.prompt.columns.items()}
        score = float(self._reward([self.prompt.text], [text], **columns)[0])
        score = self._reward.lower if np.isnan(score) else score
        gained = score if self.best is None else max(score - self.best, 0.0)
        self.best, self._turn = score if self.best is None else max(self.best, score), self._turn + 1
        done = self._turn >= self.turns
        message = f"Score {score:.3f}, best so far {self.best:.3f}, of at most {self._reward.upper:g}."
        return Turn(message if done else f"{message} Try again with a better continuation.", gained, score, done)

    def reference(self, budget: Budget | int = 200) -> Plan:
        """Return the text that the task's planner finds for this game's prompt, with the task's language model."""
        return self._planner.plan(self.prompt, budget)

    @functools.cached_property
    def _planner(self) -> AStarPlanner:
        from .learning.q_heuristic import shipped_heuristic

        mdp = self.task.mdp()
        heuristic, _ = shipped_heuristic(self.task.name, mdp)
        return AStarPlanner(mdp, heuristic=heuristic, **self.task.planner)


def trl_environment(task: Task | str | Path = "sentiment", **options: Any) -> Callable[[], Any]:
    """Return an ``environment_factory`` for TRL's ``GRPOTrainer``: its model calls the tool ``write``.

    ::

        GRPOTrainer(model, environment_factory=trl_environment("sentiment"), train_dataset=dataset, …)

    A column ``index`` of the data set chooses the prompt. The reward is the best score of the calls, or the reward's
    lower bound without any.

    Args:
        task: A task, its name, or the path of a YAML file.
        options: Further arguments of :class:`WritingGame`.
    """
    spec = task if isinstance(task, Task) else load_task(task)

    class QStarWriting:
        """A game of one rollout."""

        def __init__(self) -> None:
            self._game = WritingGame(spec, **options)

        def reset(self, index: int | None = None, **columns: Any) -> str:
            """Begin a game with the prompt of this index, or a drawn one."""
            del columns
            return self._game.reset(index=index)

        def write(self, text: str) -> str:
            """Hand in a continuation of the text and learn its score.

            Args:
                text: The continuation alone.

            Returns:
                The score.
            """
            return self._game.step(text).message

        def get_reward(self) -> float:
            """Return the best score of this game."""
            return self._game._reward.lower if self._game.best is None else self._game.best

    return QStarWriting


def trl_reward(reward: Any, *, name: str | None = None) -> Callable[..., list[float | None]]:
    """Return a reward function for TRL's trainers, made of any reward.

    Args:
        reward: A name, a spec such as ``"0.7*relevance + 0.3*engagement"``, a function or a :class:`Reward`.
        name: Under which TRL logs it; by default the reward's.

    Returns:
        A function from ``prompts`` and ``completions``, texts or messages, and the columns of the data set to one
        number each, None for a text that cannot be scored.

    Raises:
        ConfigurationError: There is no such reward.
    """
    scored = as_reward(reward)

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        kept = {k: v for k, v in columns.items() if isinstance(v, Sequence) and len(v) == len(completions)}
        values = scored(list(map(_text, prompts)), list(map(_text, completions)), **kept)
        return [None if np.isnan(value) else float(value) for value in values]

    score.__name__ = name or scored.name
    return score


def _text(given: Any) -> str:
    """Return a text, or the last message of a conversation."""
    return given if isinstance(given, str) else str(given[-1].get("content") or "") if given else ""
