"""A callback that measures the current Q on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from ...envs import DecodingMDP, load_prompts
from ...envs.mdp import mdp_of
from ..learning.q_heuristic import QHeuristic
from ..planning.astar import AStarPlanner
from . import plots
from .calibration import Calibration, calibrate
from .curves import read_points
from .outcomes import evaluate

__all__ = ["Diagnostics"]


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
        mdp: DecodingMDP | None = None,
    ) -> None:
        """Set up the callback.

        Args:
            prompts: Held-out prompts; see :func:`~qstar_decoding.envs.load_prompts`.
            folder: Where to write.
            budgets: LM tokens a prompt; calibration is measured at the largest.
            every: Time steps between two measurements; there is one more in the end.
            planner_kwargs: Arguments of :class:`AStarPlanner`.
            mdp: The process to measure in, for example with another reward; None for the agent's.
        """
        super().__init__()
        self.mdp = mdp
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
        if self._log.is_file():  # a resumed run measures again what came after its last checkpoint
            self.history = [
                p for p in read_points(self._log, resumed=True) if 0 < p["time_steps"] <= self.num_timesteps
            ]
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
        mdp, heuristic = self.mdp or mdp_of(self.training_env), QHeuristic(self.model)
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
