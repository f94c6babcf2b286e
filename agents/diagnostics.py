"""How far a learned Q can be trusted: its values beside the best that searches found, and its worth by budget."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from ..envs import load_prompts
from ..errors import ConfigurationError
from . import plots
from .astar import AStarPlanner
from .evaluation import evaluate
from .experience import best_found
from .heuristics import QHeuristic
from .planning import mdp_of, run_searches, score_completions
from .search import Budget, Search, Values

__all__ = ["Calibration", "Diagnostics", "calibrate", "calibration", "read_curves"]


class Calibration(NamedTuple):
    """Q beside what it estimates, for ``n`` edges that searches followed to the end of a text.

    The best J found through an edge is a lower bound of the best there is. So where Q is below it, Q is certainly too
    low there, a violation of admissibility; where Q is above it, Q may be right and the search at fault.

    Attributes:
        estimate: float64 [n], f = g + Q.
        found: float64 [n], J of the best completion found through the edge.
        depth: int64 [n], tokens from the prompt to the edge.
    """

    estimate: Values
    found: Values
    depth: Any

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read the three arrays from an .npz file.

        Raises:
            ConfigurationError: They are not in it.
        """
        try:
            with np.load(path) as stored:
                return cls(*(stored[name] for name in cls._fields))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{path} is not a calibration that qstar evaluate wrote: {error}") from error

    def summary(self) -> dict[str, float]:
        """Return the numbers that are logged, in units of J but for shares and correlation."""
        error = self.estimate - self.found
        violated = error < -1e-6
        spread = self.estimate.std() > 0 and self.found.std() > 0
        return {
            "bias": float(error.mean()),
            "mean_absolute_error": float(np.abs(error).mean()),
            "correlation": float(np.corrcoef(self.estimate, self.found)[0, 1]) if spread else 0.0,
            "violations": float(violated.mean()),
            "mean_violation": float(-error[violated].mean()) if violated.any() else 0.0,
            "mean_overestimation": float(error[~violated].mean()) if not violated.all() else 0.0,
        }


def calibration(searches: Sequence[Search]) -> Calibration:
    """Compare f with the best J found, over all edges of ``searches`` that lead to a finished text.

    Args:
        searches: Finished searches of A* with w = 1 on the Q in question. Those with ``score="q"`` must have had their
            completions scored.

    Raises:
        ConfigurationError: No search has finished a text.
    """
    estimate, found, depth = [], [], []
    for search in searches:
        best = best_found(search)
        rows, actions = np.nonzero(np.isfinite(best))
        estimate.append(search.f[rows, actions])
        found.append(best[rows, actions])
        depth.append(search.depth[rows])
    if not sum(map(len, found)):
        raise ConfigurationError("no search has finished a text; give a larger budget")
    return Calibration(np.concatenate(estimate), np.concatenate(found), np.concatenate(depth))


def calibrate(planner: AStarPlanner, prompts: Any, budget: int) -> Calibration:
    """Search each prompt with ``budget`` LM tokens and compare the planner's heuristic with what was found.

    Raises:
        ConfigurationError: No search has finished a text.
    """
    searches = run_searches(planner, load_prompts(prompts), Budget(budget))
    if planner.score == "q":
        score_completions(searches)
    return calibration(searches)


class Diagnostics(BaseCallback):
    """A callback that tries the current Q on held-out prompts now and then, for any agent with a Q-network.

    Logs ``held_out/objective_B`` (mean J of A* at each budget B), ``held_out/arg_max`` and ``calibration/…`` to the
    agent's logger, appends the same to ``FOLDER/diagnostics.jsonl``, and draws ``FOLDER/diagnostics.svg`` in the end
    where matplotlib is installed (the extra ``plots``).
    """

    def __init__(
        self,
        prompts: Any,
        folder: Path | str,
        *,
        budgets: Sequence[int] = (50, 200),
        every: int = 25_000,
        planner_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Set up the callback.

        Args:
            prompts: Held-out prompts; see :func:`~qstar_decoding.envs.load_prompts`.
            folder: Where to write.
            budgets: LM tokens a prompt; calibration is measured at the largest.
            every: Time steps between two measurements; there is one more in the end.
            planner_kwargs: Arguments of :class:`AStarPlanner`.
        """
        super().__init__()
        self.prompts, self.folder, self.budgets, self.every = (
            load_prompts(prompts),
            Path(folder),
            sorted(budgets),
            every,
        )
        self.planner_kwargs = planner_kwargs or {}
        self.history: list[dict[str, float]] = []

    def _on_training_start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._log.is_file():  # of the run that is resumed: what it measured after its last checkpoint is done again
            measured = [json.loads(line) for line in self._log.read_text(encoding="utf-8").splitlines() if line]
            self.history = [point for point in measured if 0 < point["time_steps"] <= self.num_timesteps]
        self._log.write_text("".join(json.dumps(point) + "\n" for point in self.history), encoding="utf-8")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        last = self.history[-1]["time_steps"] if self.history else 0
        if self.num_timesteps - last >= self.every:
            self.measure()

    def _on_training_end(self) -> None:
        compared = self.measure()
        if plots.available():
            plots.save(plots.plot_diagnostics(self.history, compared), self.folder / "diagnostics.svg")

    def measure(self) -> Calibration:
        """Measure now, log it and return the calibration."""
        mdp, heuristic = mdp_of(self.training_env), QHeuristic(self.model)
        planner = AStarPlanner(mdp, heuristic=heuristic, **self.planner_kwargs)
        point: dict[str, float] = {"time_steps": self.num_timesteps}
        for budget in self.budgets:
            point[f"held_out/objective_{budget}"] = float(
                np.nanmean(evaluate(planner, self.prompts, budget).objectives)
            )
        compared = calibrate(planner, self.prompts, self.budgets[-1])
        point |= {f"calibration/{name}": value for name, value in compared.summary().items()}
        for name, value in point.items():
            self.logger.record(name, value, exclude="stdout" if name == "time_steps" else None)
        self.history.append(point)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(point) + "\n")
        return compared

    @property
    def _log(self) -> Path:
        return self.folder / "diagnostics.jsonl"


def read_curves(folder: Path) -> plots.Curves:
    """Return what a training has logged into a folder: diagnostics.jsonl, and the scalars of TensorBoard's files below.

    Returns:
        Of each quantity its steps and values, the steps ascending. Where a run was resumed, the later value counts.

    Raises:
        ConfigurationError: Nothing was logged there.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    curves: dict[str, dict[float, float]] = {}
    for events in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        log = EventAccumulator(str(events), size_guidance={SCALARS: 0}).Reload()
        for name in log.Tags()[SCALARS]:
            curves.setdefault(name, {}).update((event.step, event.value) for event in log.Scalars(name))
    if (path := folder / "diagnostics.jsonl").is_file():
        points = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                points.append(json.loads(line))
            except ValueError as error:
                raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
        for name in {name for point in points for name in point if name != "time_steps"}:
            curves[name] = {point["time_steps"]: point[name] for point in points if name in point}
    if not curves:
        raise ConfigurationError(
            f"{folder} has no diagnostics.jsonl and no TensorBoard log; give what qstar train wrote"
        )
    return {name: (sorted(found), [found[step] for step in sorted(found)]) for name, found in sorted(curves.items())}
