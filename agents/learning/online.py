"""Learning while decoding: a Q that learns from a planner's own searches, and a guard that chooses the heuristic."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import TypeAdapter, ValidationError
from stable_baselines3.common.logger import Logger

from ...checks import check_integer, check_number, check_writable
from ...envs import DecodingMDP
from ...envs.mdp import mdp_of
from ...errors import CheckpointError, ConfigurationError
from ...files import locked
from ..heuristics import BoundHeuristic, Heuristic
from ..search.loop import score_completions
from ..search.state import Search
from .checkpoints import check_replaceable, find_checkpoint
from .experience import extract_targets
from .q_function import QFunction, load_q_function
from .q_heuristic import QHeuristic

__all__ = ["OnlineLearner", "Use"]

# How much of the evidence is left after one more search. Q improves, so that old results mislead; with .98 the
# last fifty searches count most.
_MEMORY = 0.98
_TRIALS = 3  # searches by each heuristic before they are compared
_LEAST_DEVIATION = 1e-6  # of J, where all results are equal


class Use(NamedTuple):
    """How often a heuristic was used, and with what result.

    Attributes:
        searches: Finished searches that it ordered.
        objective: Their mean J; NaN where no text was finished.
        recent: Their mean J, the late ones counting most; what the guard compares.
    """

    searches: int
    objective: float
    recent: float


@dataclass
class _Results:
    """Results of the searches that one heuristic ordered; those of long ago are discounted in the first three.

    Attributes:
        weight: Number of searches.
        total: Sum of their J.
        squares: Sum of the squares of their J.
        searches: Number of searches, all alike.
        objectives: Sum of their J, all alike.
    """

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    searches: int = 0
    objectives: float = 0.0

    @property
    def recent(self) -> float:
        """The mean J, the late searches counting most; NaN where they are forgotten."""
        return self.total / self.weight if self.weight else math.nan

    def forget(self) -> None:
        self.weight, self.total, self.squares = self.weight * _MEMORY, self.total * _MEMORY, self.squares * _MEMORY

    def add(self, objective: float) -> None:
        self.weight, self.total, self.squares = self.weight + 1, self.total + objective, self.squares + objective**2
        self.searches, self.objectives = self.searches + 1, self.objectives + objective


class OnlineLearner:
    """A Q that learns from the searches of a planner while they go on, and the choice of the heuristic for each.

    A search is experience: the best returns found below its edges are targets for Q, as in :class:`QStar`'s training.
    A planner with ``learn=`` hands over every search that ends. Q then takes some gradient steps, and becomes a new
    version. A search keeps the version that it began with.

    The guard chooses the heuristic of each new search among these:

    - ``"bound"``: no Q, :class:`BoundHeuristic`;
    - ``"given"``: the planner's own heuristic, such as a Q that was trained for another reward;
    - ``"learned"``: the newest version of Q.

    It compares their J on the prompts so far by Thompson sampling (Thompson 1933; with discounted evidence: Raj &
    Kalyani 2017, arXiv 1707.09727): it draws each one's mean J from what is known of it, and takes the largest. So a Q
    that does harm is soon used seldom, and tried again when it may have improved.

    No LM token is used for learning. With ``share=None`` the outcome depends on seeds and prompts alone.

    Attributes:
        agent: The agent whose Q learns.
        version: Of Q; 0 until this learner has learned for the first time.
        seconds: Time spent learning, in seconds.
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
            save_every: Least time between two of these, in seconds.

        Raises:
            ConfigurationError: An argument is out of range, or there is no agent with an environment.
        """
        if not callable(getattr(agent, "q_function", None)) or getattr(agent, "env", None) is None:
            raise ConfigurationError(
                f"learning needs a QStar agent with an environment, QStar(env=env); got {type(agent).__name__}"
            )
        self.agent, self.mdp = agent, mdp_of(agent.env)
        self.gradient_steps = check_integer("gradient_steps", gradient_steps, low=0)
        self.group, self.guard = check_integer("group", group), guard
        self.share = None if share is None else check_number("share", share, low=0, high=1)
        self.folder = None if folder is None else Path(folder)
        self.save_every = check_number("save_every", save_every, low=0)
        self._saved = time.monotonic()
        self.version, self.seconds = 0, 0.0
        self._rng = np.random.default_rng(check_integer("seed", seed, low=0))
        self._lock = threading.Lock()
        self._searching_seconds, self._steps_due = 0.0, 0
        self._heuristics: dict[str, Heuristic] = {"bound": BoundHeuristic()}
        self._results: dict[str, _Results] = {}
        self._running: WeakKeyDictionary[Search, str] = WeakKeyDictionary()  # the heuristics of searches that run
        if not hasattr(agent, "_logger"):
            agent.set_logger(Logger(None, []))
        if agent._n_updates:
            self._heuristics["learned"] = self._snapshot()

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: str | Path, agent: Callable[[Path | None], Any], **settings: Any) -> Iterator[Self]:
        """Go on with the agent saved in a folder, or begin with a new one there; it is saved at the end too.

        Args:
            folder: The folder; made if there is none.
            agent: Returns the agent saved in a folder, or a new one, given None.
            settings: See the constructor.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another environment, reward or α.
            ConfigurationError: The folder holds something else, another process learns there, or see the constructor.
        """
        folder = Path(folder)
        check_replaceable(folder)
        check_writable(folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock", wait=False):
            # A folder with a part of a checkpoint is damaged: loading it says so, and nothing is overwritten.
            begun = find_checkpoint(folder) or (folder.is_dir() and any(folder.iterdir()))
            saved = folder if begun else None
            learner = cls(agent(saved), folder=folder, **settings)
            if saved is not None:
                learner._restore(folder, load_q_function(saved).description)
            try:
                yield learner
            finally:
                if learner.version:
                    learner.save(folder)

    # -- what a planner asks ------------------------------------------------------------------------------------------

    def fits(self, mdp: DecodingMDP) -> bool:
        """Return whether searches in ``mdp`` teach this Q, and may use it: same model, k, reward, α and constraint."""
        own = self.mdp
        same = ("model", "reward", "constraint")
        return all(getattr(mdp, name) is getattr(own, name) for name in same) and (
            (mdp.top_k, mdp.logprob_weight) == (own.top_k, own.logprob_weight)
        )

    def choose(self, given: Heuristic | None) -> tuple[str, Heuristic]:
        """Return the heuristic of the next search, and its name.

        Args:
            given: The planner's own heuristic.
        """
        with self._lock:
            is_own = isinstance(given, QHeuristic) and given.q.network is self.agent.q_net
            if given is not None and not isinstance(given, BoundHeuristic) and not is_own:
                self._heuristics.setdefault("given", given)
            name = self._drawn() if self.guard else "learned" if "learned" in self._heuristics else "bound"
            return name, self._heuristics[name]

    def begin(self, search: Search, name: str) -> None:
        """Enter a search that was begun with the heuristic of this name."""
        with self._lock:
            self._running[search] = name

    def finish(self, searches: Sequence[Search]) -> None:
        """Learn from searches that ended; those that were not entered by :meth:`begin` are left out."""
        with self._lock:
            known = [search for search in searches if search in self._running]
            for search in known:
                self._enter(self._running.pop(search), search)
            self._searching_seconds += sum(search.busy_seconds for search in known)
            if known:
                self._learn(known)
                if self.folder is not None and time.monotonic() - self._saved >= self.save_every:
                    self._save(self.folder)

    # -----------------------------------------------------------------------------------------------------------------

    def uses(self) -> dict[str, Use]:
        """Return, by name, how often each heuristic was used and with what result."""
        with self._lock:
            return {
                name: Use(found.searches, found.objectives / found.searches, found.recent)
                if (found := self._results.get(name))
                else Use(0, math.nan, math.nan)
                for name in self._heuristics
            }

    def save(self, folder: str | Path, **description: Any) -> None:
        """Write the agent with all that it needs to go on learning; see :meth:`QStar.save`."""
        with self._lock:
            self._save(Path(folder), **description)

    def _save(self, folder: Path, **description: Any) -> None:
        guard = {name: asdict(results) for name, results in self._results.items()}
        self.agent.save(folder, version=self.version, heuristics=guard, objective=self._objective(), **description)
        self._saved = time.monotonic()

    def _objective(self) -> dict[str, Any]:
        """Return what the values that Q learns are made of."""
        return {"reward": self.mdp.reward.name, "logprob_weight": self.mdp.logprob_weight}

    def _restore(self, folder: Path, saved: Mapping[str, Any]) -> None:
        """Take back the results that :meth:`save` wrote; anything else is no evidence.

        Raises:
            CheckpointError: Q learned from values of another objective there.
        """
        here, there = self._objective(), saved.get("objective")
        known = there if isinstance(there, Mapping) else {}  # a folder that was trained otherwise does not say it
        different = [
            f"{name} {known[name]!r} (learned) against {value!r} (here)"
            for name, value in here.items()
            if known.get(name, value) != value
        ]
        if different:
            raise CheckpointError(
                f"{folder} learned another objective: {', '.join(different)}. Learn in another folder; a planner may "
                f"begin with this Q as its own heuristic (--q {folder}, QHeuristic({str(folder)!r}))"
            )
        with contextlib.suppress(ValidationError):
            self._results = TypeAdapter(dict[str, _Results]).validate_python(saved.get("heuristics"))

    def _drawn(self) -> str:
        """Draw a heuristic by Thompson sampling."""
        running = list(self._running.values())
        for name in self._heuristics:  # the searches that run count as tried, so that a group is not all one
            found = self._results.get(name)
            if (found.searches if found else 0) + running.count(name) < _TRIALS:
                return name
        known = {name: found for name, found in self._results.items() if name in self._heuristics and found.weight}
        weight, total, squares = (
            sum(getattr(found, field) for found in known.values()) for field in ("weight", "total", "squares")
        )
        if not weight:
            return "bound"
        deviation = math.sqrt(max(squares / weight - (total / weight) ** 2, 0.0)) + _LEAST_DEVIATION
        draws = {
            name: self._rng.normal(found.recent, deviation / math.sqrt(found.weight)) for name, found in known.items()
        }
        return max(draws, key=lambda name: draws[name])

    def _enter(self, name: str, search: Search) -> None:
        if search.best is None or not math.isfinite(search.best.objective):
            return
        for found in self._results.values():
            found.forget()
        self._results.setdefault(name, _Results()).add(search.best.objective)

    def _learn(self, searches: Sequence[Search]) -> None:
        start = time.perf_counter()
        score_completions([search for search in searches if search.score == "q"])
        q = self.agent.q_function()
        for search in searches:
            values = q.values(search.mdp, [search.prompt] * search.size, search.node[: search.size])
            self.agent.add([extract_targets(search, q.observer(search.mdp), values, self.agent.config.bound_targets)])
            self.agent.num_timesteps += search.lm_tokens
        self._steps_due += self.gradient_steps * len(searches)
        steps = self._steps_due
        if self.share is not None and self.share < 1:
            allowed = self.share / (1 - self.share) * self._searching_seconds - self.seconds
            steps = 0 if allowed <= 0 else steps
        if steps and self.agent.experience is not None and self.agent.experience.size > 1:
            self.agent.train(steps, self.agent.batch_size)
            self._steps_due -= steps
            self.version += 1
            self._heuristics["learned"] = self._snapshot()
        self.seconds += time.perf_counter() - start

    def _snapshot(self) -> QHeuristic:
        """Return the newest Q, which later learning does not change."""
        q = self.agent.q_function()
        return QHeuristic(QFunction(copy.deepcopy(q.network), q.spec, q.shaped, q.candidate_dims))
