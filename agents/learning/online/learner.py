"""Learner: an agent that learns from the searches of planners, and hands them its newest Q."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self
from weakref import WeakKeyDictionary

import gymnasium as gym
from stable_baselines3.common.logger import Logger

from ....checks import check_flag, check_integer, check_number, check_writable
from ....envs import DecodingMDP, Prompt
from ....envs.mdp import mdp_of
from ....errors import ConfigurationError
from ....files import locked
from ...heuristics import BoundHeuristic, Heuristic
from ...search.state import Search
from ..checkpoints import check_replaceable, find_checkpoint, wrap_damage
from ..config import check_objective, objective_of
from ..q_function import QFunction, load_q_function
from ..q_heuristic import QHeuristic
from .guard import Guard, Use
from .lessons import JOURNAL, Lesson, append, lessons_of, read

__all__ = ["News", "OnlineLearner", "Watcher", "environment_like"]

_MOST_DUE = 64  # searches whose gradient steps may be put off; those of older ones are left out


class News(NamedTuple):
    """What searches elsewhere need to know: see :meth:`OnlineLearner.news`.

    Attributes:
        version: Of Q; 0 for one that has not learned.
        q: The newest Q, which later learning does not change.
        guard: What is known of the heuristics.
        bound_targets: See :func:`~qstar_decoding.agents.learning.extract_targets`.
    """

    version: int
    q: QFunction
    guard: Guard
    bound_targets: bool


class Watcher(ABC):
    """Hands out heuristics for searches, and takes lessons from those that end."""

    group = 8
    _bound_targets = False  # see extract_targets

    def __init__(self, guard: Guard) -> None:
        """Choose by ``guard``, at first among the bound alone."""
        self._guard, self._lock = guard, threading.RLock()
        self._heuristics: dict[str, Heuristic] = {"bound": BoundHeuristic()}
        self._running: WeakKeyDictionary[Search, str] = WeakKeyDictionary()  # the heuristics of searches that run

    def choose(self, given: Heuristic | None) -> tuple[str, Heuristic]:
        """Return the heuristic of the next search, and its name.

        Args:
            given: The planner's own heuristic.
        """
        with self._lock:
            if given is not None and not isinstance(given, BoundHeuristic) and not self._is_own(given):
                self._heuristics.setdefault("given", given)
            name = self._guard.draw([*self._heuristics], [*self._running.values()])
            return name, self._heuristics[name]

    def begin(self, search: Search, name: str) -> None:
        """Enter a search that was begun with the heuristic of this name."""
        with self._lock:
            self._running[search] = name

    def finish(self, searches: Sequence[Search]) -> None:
        """Take lessons from searches that ended; those that were not entered by :meth:`begin` are left out."""
        with self._lock:
            names = {search: self._running.pop(search) for search in searches if search in self._running}
            if names:
                self.enter(lessons_of(names, self._newest, self._bound_targets))

    @abstractmethod
    def enter(self, lessons: Sequence[Lesson]) -> None:
        """Take lessons."""

    @property
    @abstractmethod
    def _newest(self) -> QFunction:
        """The newest Q."""

    def _is_own(self, given: Heuristic) -> bool:
        """Whether a planner's heuristic is the Q that learns."""
        return False


class OnlineLearner(Watcher):
    """A Q that learns from the searches of a planner while they go on, and the choice of the heuristic for each.

    A search is experience: the best returns found below its edges are targets for Q, as in :class:`QStar`'s training.
    A planner with ``learn=`` hands over every search that ends. Q then takes some gradient steps, and becomes a new
    version. A search keeps the version that it began with.

    The guard chooses the heuristic of each new search among these:

    - ``"bound"``: no Q, :class:`BoundHeuristic`;
    - ``"given"``: the planner's own heuristic, such as a Q that was trained for another reward;
    - ``"learned"``: the newest version of Q.

    It compares their J on the prompts so far; see :class:`Guard`. So a Q that does harm is soon used seldom, and tried
    again when it may have improved.

    No LM token is used for learning. With ``share=None`` the outcome depends on seeds and prompts alone.

    Attributes:
        agent: The agent whose Q learns.
        version: Of Q; 0 until it has learned for the first time. Checkpoints state it.
        seconds: Time spent learning in this process, in seconds.
    """

    def __init__(
        self,
        agent: Any,
        *,
        gradient_steps: int = 16,
        group: int = 8,
        share: float | None = None,
        guard: bool = True,
        seed: int = 0,
        folder: str | Path | None = None,
        save_every: float = 60.0,
    ) -> None:
        """Learn with an agent.

        Args:
            agent: A :class:`QStar`, untrained or trained; its environment's reward, α and k are what it can learn from.
            gradient_steps: Gradient steps for each search that ends.
            group: How many prompts ``plan_many`` searches together; Q learns after each group.
            share: The largest share of the time, searches included, that learning may take, from 0 to 1. Steps beyond
                it are put off. None is without limit.
            guard: Whether to choose among heuristics; else the newest Q is always used, once there is one.
            seed: Of the guard's draws.
            folder: Where the agent is saved from time to time, with all that it needs to go on; None for nowhere.
                Lessons since the last save stand in a journal there, so that a kill loses none.
            save_every: Least time between two saves, in seconds.

        Raises:
            ConfigurationError: An argument is out of range, there is no agent with an environment, or nothing can be
                saved in ``folder``.
        """
        if not callable(getattr(agent, "q_function", None)) or getattr(agent, "env", None) is None:
            raise ConfigurationError(
                f"learning needs a QStar agent with an environment, QStar(env=env); got {type(agent).__name__}"
            )
        super().__init__(Guard(check_integer("seed", seed, low=0)))
        self.agent, self.mdp = agent, mdp_of(agent.env)
        self.gradient_steps = check_integer("gradient_steps", gradient_steps, low=0)
        self.group, self.guard = check_integer("group", group), check_flag("guard", guard)
        self.share = None if share is None else check_number("share", share, low=0, high=1)
        self.folder = None if folder is None else _checked(Path(folder))
        self.save_every = check_number("save_every", save_every, low=0)
        self.version, self.seconds = 0, 0.0
        self._searching_seconds, self._steps_due = 0.0, 0
        self._bound_targets = agent.config.bound_targets
        self._q: QFunction = agent.q_function()  # its network is the agent's, which learns
        self._saved, self._is_changed = -1.0, False  # the time of the last save; never, at first
        if not hasattr(agent, "_logger"):
            agent.set_logger(Logger(None, []))
        if agent._n_updates:
            self._heuristics["learned"] = QHeuristic(self._snapshot())

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | Path, agent: Callable[[Path | None], Any], **settings: Any) -> Iterator[Self]:
        """Go on with the agent saved in a folder, or begin with a new one there; it is saved at the end too.

        Args:
            folder: The folder; made if there is none. No other process may learn there meanwhile.
            agent: Returns the agent saved in a folder, or a new one, given None.
            settings: See the constructor.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another environment, reward or α.
            ConfigurationError: The folder holds something else, another process learns there, or see the constructor.
        """
        folder = _checked(Path(folder))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock", wait=False):
            # A folder with a part of a checkpoint is damaged: loading it says so, and nothing is overwritten.
            is_begun = folder.is_dir() and any(folder.iterdir())
            saved = find_checkpoint(folder) or (folder.resolve() if is_begun else None)
            learner = cls(agent(folder if saved else None), folder=folder, **settings)
            if saved is not None:
                learner._restore(saved)
                if saved != folder.resolve():  # a save was killed half-way; this one ends it
                    learner._save(folder)
            try:
                yield learner
            finally:
                with learner._lock:
                    if learner._is_changed:
                        learner._save(folder)

    def __reduce__(self) -> NoReturn:
        """Say what to do instead: only one process learns.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "a Q learns in one process, so an OnlineLearner, and a planner with learn=…, cannot be copied or pickled; "
            "make the planner there, with the Q that was saved: AStarPlanner(env, heuristic=QHeuristic(folder))"
        )

    # -- what a planner asks ------------------------------------------------------------------------------------------

    def fits(self, mdp: DecodingMDP) -> bool:
        """Return whether searches in ``mdp`` teach this Q, and may use it: same model, k, reward, α and constraint."""
        own = self.mdp
        same = ("model", "reward", "constraint")
        return all(getattr(mdp, name) is getattr(own, name) for name in same) and (
            (mdp.top_k, mdp.logprob_weight) == (own.top_k, own.logprob_weight)
        )

    def choose(self, given: Heuristic | None) -> tuple[str, Heuristic]:
        """See :class:`Watcher`; without a guard, the newest Q is always chosen."""
        if self.guard or "learned" not in self._heuristics:
            return super().choose(given)
        return "learned", self._heuristics["learned"]

    def enter(self, lessons: Sequence[Lesson]) -> None:
        """Take lessons, of this process or another; their gradient steps are due then, see :meth:`learn`."""
        with self._lock:
            self._take(lessons)
            if self.folder is not None and self._saved >= 0:
                append(self.folder / JOURNAL, lessons)

    def learn(self, seconds: float | None = None) -> bool:
        """Take the gradient steps that are due, as far as the share of the time allows.

        Args:
            seconds: About how long, at most; None is without limit.

        Returns:
            Whether more could be taken now.
        """
        with self._lock:
            if self._may_learn():
                start = time.perf_counter()
                while self._may_learn() and (seconds is None or time.perf_counter() - start < seconds):
                    steps = self._steps_due if seconds is None and self.share in (None, 1) else 1
                    before = time.perf_counter()
                    self.agent.train(steps, self.agent.batch_size)
                    self.seconds += time.perf_counter() - before
                    self._steps_due -= steps
                before = time.perf_counter()
                self.version, self._is_changed = self.version + 1, True
                self._heuristics["learned"] = QHeuristic(self._snapshot())
                self.seconds += time.perf_counter() - before
            is_first = self._saved < 0 and self.version > 0
            is_late = time.monotonic() - self._saved >= self.save_every
            if self.folder is not None and self._is_changed and (is_first or is_late):
                self._save(self.folder)
            return self._may_learn()

    # -----------------------------------------------------------------------------------------------------------------

    def uses(self) -> dict[str, Use]:
        """Return, by name, how often each heuristic was used and with what result."""
        with self._lock:
            names = dict.fromkeys([*self._heuristics, *self._guard.results])  # workers may have others
            return {name: self._guard.use(name) for name in names}

    def searches(self, name: str) -> int:
        """Return the number of finished searches that a heuristic ordered."""
        return self._guard.use(name).searches

    def newest(self) -> Heuristic:
        """Return the newest Q, or the bound as long as there is none."""
        return self._heuristics.get("learned", self._heuristics["bound"])

    def news(self) -> News:
        """Return what a :class:`Watcher` of another process needs."""
        with self._lock:
            return News(self.version, self._snapshot(), copy.deepcopy(self._guard), self._bound_targets)

    def save(self, folder: str | Path, **description: Any) -> None:
        """Write the agent with all that it needs to go on learning; see :meth:`QStar.save`."""
        with self._lock:
            self._save(Path(folder), **description)

    def _save(self, folder: Path, **description: Any) -> None:
        guard = {name: asdict(results) for name, results in self._guard.results.items()}
        description |= {"version": self.version, "heuristics": guard, "steps_due": self._steps_due}
        description["objective"] = objective_of(self.mdp)
        self.agent.save(folder, **description)  # an older checkpoint's journal goes with it
        if folder == self.folder:
            self._saved, self._is_changed = time.monotonic(), False

    def _restore(self, folder: Path) -> None:
        """Take back what :meth:`save` wrote, and the lessons since then.

        Raises:
            CheckpointError: Q learned from values of another objective there.
        """
        description = load_q_function(folder).description
        advice = f"may begin with this Q as its own heuristic (--q {folder}, QHeuristic({str(folder)!r}))"
        check_objective(folder, description, self.mdp, f"Learn in another folder; a planner {advice}")
        self._guard.restore(description.get("heuristics"))
        self.version = _integer(description.get("version"), int(self.agent._n_updates > 0))
        self._steps_due = _integer(description.get("steps_due"), 0)
        with wrap_damage(folder):
            self._take([*read(folder / JOURNAL)])
        self._saved, self._is_changed = time.monotonic(), self._steps_due > 0

    def _take(self, lessons: Sequence[Lesson]) -> None:
        start = time.perf_counter()
        for lesson in lessons:
            self._guard.enter(lesson.heuristic, lesson.objective)
            self._searching_seconds += lesson.seconds
            self.agent.add([lesson.states])
            self.agent.num_timesteps += lesson.lm_tokens
        due = self._steps_due + self.gradient_steps * len(lessons)
        self._steps_due = due if self.share is None else min(due, self.gradient_steps * _MOST_DUE)
        self.seconds += time.perf_counter() - start

    def _may_learn(self) -> bool:
        """Whether gradient steps are due, and the share of the time allows one."""
        experience = self.agent.experience
        if not self._steps_due or experience is None or experience.size < 2:
            return False
        share = self.share
        return share is None or share == 1 or self.seconds < share / (1 - share) * self._searching_seconds

    @property
    def _newest(self) -> QFunction:
        return self._q

    def _is_own(self, given: Heuristic) -> bool:
        return isinstance(given, QHeuristic) and given.q.network is self.agent.q_net

    def _snapshot(self) -> QFunction:
        """Return the newest Q, which later learning does not change."""
        q = self._q
        return QFunction(copy.deepcopy(q.network), q.spec, q.shaped, q.candidate_dims)


def _checked(folder: Path) -> Path:
    """Return a folder in which an agent can be saved.

    Raises:
        ConfigurationError: It cannot.
    """
    check_replaceable(folder)
    check_writable(folder.parent)
    return folder


def _integer(saved: Any, default: int) -> int:
    """Return what a description holds, if it is an integer."""
    return saved if type(saved) is int else default


def environment_like(mdp: DecodingMDP, prompts: Any = None, **settings: Any) -> Any:
    """Return an environment for an agent that learns from searches in ``mdp``.

    Args:
        mdp: The process; model and settings are its own.
        prompts: Of the environment. Learning from searches never asks for them, so that one token will do.
        settings: Other arguments of ``TokenDecoding-v0``.
    """
    own = {"model": mdp.model, "action": mdp.action, **mdp.settings()}
    prompts = [Prompt(mdp.model.decode([0]) or "-", token_ids=(0,))] if prompts is None else prompts
    return gym.make("TokenDecoding-v0", prompts=prompts, **{**settings, **own})
