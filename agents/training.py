"""Training of a task's Q-function: everything that ``qstar train`` does, as functions."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from ..checks import check_integer, check_keywords, check_writable
from ..envs import DecodingMDP
from ..envs.mdp import mdp_of
from ..errors import CheckpointError, ConfigurationError, RewardError
from ..files import locked
from ..models.devices import resolve_device
from ..tasks import Task, load_task
from .distributed.jobs import Workers
from .evaluation.diagnostics import Diagnostics
from .evaluation.outcomes import evaluate, mean_figures
from .learning.checkpoints import find_checkpoint
from .learning.config import QStarConfig, check_objective, objective_of
from .learning.experience import Searcher
from .learning.q_function import load_q_function
from .learning.q_heuristic import QHeuristic
from .learning.qstar import QStar
from .planning.astar import AStarPlanner
from .planning.decoder import Decoder
from .planning.greedy import GreedyDecoder
from .planning.registry import PLANNER_SETTINGS
from .planning.sampling import SamplingDecoder
from .trackers import Tracking, check_tracker

__all__ = ["TrainingResult", "held_out_figures", "train_task"]

# Called with a few words on the work, the amount done, and the total (None: not known).
Progress = Callable[[str, int, "int | None"], object]
# Starts workers whose objects the given function makes, e.g. ``partial(RayWorkers, "local")``.
WorkersFactory = Callable[[Callable[[], Searcher]], contextlib.AbstractContextManager[Workers]]
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        agent: The trained agent, with its environment.
        folder: Folder of ``checkpoint`` (to resume), ``q`` (the Q-function alone), ``tensorboard``, the diagnostics.
        command: The command that repeats the training.
        seed: The seed.
        minutes: Duration, the runs that were resumed included, the held-out prompts not.
        time_steps: LM tokens trained for.
        held_out: Means on the task's test prompts by decoder; see :func:`held_out_figures`.
    """

    agent: QStar
    folder: Path
    command: str
    seed: int
    minutes: float
    time_steps: int
    held_out: Figures


def train_task(
    task: Task | str | Path,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    steps: int | None = None,
    seed: int = 0,
    save_every: int = 20_000,
    deterministic: bool = False,
    workers: WorkersFactory | None = None,
    verbose: int = 0,
    command: str | None = None,
    progress: Progress | None = None,
    track: str | None = None,
) -> TrainingResult:
    """Train a Q-function for a task by searching its training prompts, then try it on its held-out prompts.

    A checkpoint is saved after the first round, every ``save_every`` LM tokens, at the end, and when the training is
    interrupted or its reward fails. However the process ends, ``resume=True`` continues from the last one.

    Args:
        task: A task, its name, or the path of a YAML file.
        folder: The folder to write into; ``runs/TASK-SEED`` by default.
        resume: Continue from the checkpoint in ``folder``.
        steps: LM tokens to train for, resumed runs included; the task's by default.
        seed: Of network, prompts and exploration.
        save_every: LM tokens between two checkpoints.
        deterministic: Set torch to one thread and deterministic kernels, in the whole process: equal to the last bit.
        workers: Starts the processes that search, e.g. ``partial(RayWorkers, "local", count=4)``; None searches here.
        verbose: 1 prints the training's figures.
        command: The command that the checkpoint reports as its origin; ``qstar train …`` by default.
        progress: Called with a few words on the work, the amount done, and the total (None: not known).
        track: A tracker beside TensorBoard, ``"trackio"`` or ``"wandb"``; the run is named after ``folder``.

    Returns:
        The agent and its figures.

    Raises:
        ConfigurationError: ``folder`` has a checkpoint and ``resume`` is false, cannot be written, or another process
            trains there; or an argument is out of range.
        CheckpointError: There is nothing to resume, or the checkpoint is damaged or of another environment.
        UnknownNameError: There is no such task.
        TrainingDivergedError: The loss is no longer finite; the last checkpoint is intact.
        RewardError: The reward failed; a checkpoint was saved before.
    """
    spec = task if isinstance(task, Task) else load_task(task)
    # Before a model is loaded.
    own = {name: spec.training[name] for name in ("policy", "device") if name in spec.training}
    config = QStarConfig.of({name: value for name, value in spec.training.items() if name not in own} | {"seed": seed})
    if "device" in own:
        resolve_device(own["device"])
    check_keywords("AStarPlanner", spec.planner, inspect.signature(AStarPlanner).parameters)
    if given := sorted(spec.planner.keys() - PLANNER_SETTINGS):
        raise ConfigurationError(f"a task's planner has no argument {given[0]!r}; its Q is what is trained")
    total = spec.steps if steps is None else check_integer("steps", steps)
    check_integer("save_every", save_every)
    folder = Path("runs") / f"{spec.name}-{seed}" if folder is None else Path(folder)
    checkpoint = folder / "checkpoint"
    saved = find_checkpoint(checkpoint) is not None
    if resume and not saved:
        raise CheckpointError(
            f"nothing to resume: {checkpoint} does not exist; leave out resume (--resume) to start anew"
        )
    if saved and not resume:
        raise ConfigurationError(
            f"{checkpoint} exists; give resume=True (--resume) to go on with it, or another folder (--out)"
        )
    check_writable(checkpoint)
    origin = spec.name if isinstance(task, Task) else str(task)
    command = command or f"qstar train {origin} --steps {total} --seed {seed}"
    report: Progress = progress or (lambda *_: None)
    if track is not None:
        check_tracker(track)
    if deterministic:
        import torch

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder / ".lock", wait=False))
        tracking = []
        if track is not None:
            shown = {"task": spec.name, "command": command, "env": spec.env, **asdict(config)}
            tracking = [Tracking(track, name=folder.name, config=shown)]
            stack.callback(tracking[0].close)
        report("loading the language model", 0, None)
        saving = _Saving(checkpoint, save_every, command, partial(report, f"training, seed {seed}"), total)
        changes = {"reward": spec.training_reward} if spec.training_reward else {}
        env = gym.make("TokenDecoding-v0", prompts=spec.prompts.of("train"), **{**spec.env, **changes})
        pool = stack.enter_context(workers(partial(Searcher, partial(spec.mdp, **changes)))) if workers else None
        logs: dict[str, Any] = {"tensorboard_log": str(folder / "tensorboard"), "verbose": verbose}
        if resume:
            description = load_q_function(checkpoint).description
            check_objective(checkpoint, description, mdp_of(env), "Give another folder (--out)")
            agent = QStar.load(checkpoint, env, workers=pool, **logs)
            _check_settings(checkpoint, agent.config, config)
        else:
            agent = QStar(env=env, config=config, workers=pool, **logs, **own)
        _check_measurements(agent, spec)
        if agent.num_timesteps < total:
            _learn(agent, total, spec, folder, saving, tracking, fresh=not resume)
        minutes = round(saving.seconds / 60, 1)
        figures = held_out_figures(agent, spec, progress=progress)
        made = {"command": command, "seed": seed, "minutes": minutes, "time_steps": agent.num_timesteps}
        # Without the seconds, so that the files depend on the seed alone.
        kept = {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in figures.items()}
        agent.save(folder / "q", training_state=False, **made, held_out=kept)
    return TrainingResult(agent, folder, command, seed, minutes, agent.num_timesteps, figures)


def held_out_figures(agent: Any, task: Task, *, progress: Progress | None = None) -> Figures:
    """Return the means of an agent's Q on a task's test prompts, beside decoders that use no Q.

    Args:
        agent: With a Q-network and an environment, which all decoders search in unless Q learns from another reward.
        task: Its test prompts, planner settings and budgets are used.
        progress: See :func:`train_task`.

    Returns:
        By decoder, the means of :func:`~qstar_decoding.agents.evaluation.outcomes.mean_figures`.
    """
    mdp, prompts = _measured_in(agent.get_env(), task), task.prompts.of("test")
    heuristic, score = QHeuristic(agent), task.planner.get("score", "reward")
    decoders: list[tuple[str, Decoder, int | None]] = [
        ("random legal actions", SamplingDecoder(mdp, n=1, temperature=1e6), None),
        ("greedy LM", GreedyDecoder(mdp), None),
        ("arg max Q", GreedyDecoder(mdp, heuristic=heuristic, score=score), None),
    ]
    if score == "reward":
        decoders.append((f"A* on the bound, {max(task.budgets)}", AStarPlanner(mdp), max(task.budgets)))
    decoders += [
        (f"A* on Q, {budget}", AStarPlanner(mdp, heuristic=heuristic, **task.planner), budget)
        for budget in task.budgets
    ]
    figures: Figures = {}
    for done, (name, decoder, budget) in enumerate(decoders):
        if progress is not None:
            progress(f"held-out prompts: {name}", done, len(decoders))
        figures[name] = mean_figures([evaluate(decoder, prompts, budget)])
    return figures


def _learn(
    agent: QStar, total: int, task: Task, folder: Path, saving: _Saving, tracking: list[Tracking], *, fresh: bool
) -> None:
    tried = Diagnostics(
        task.prompts.of("dev"),
        folder,
        budgets=task.budgets,
        every=max(total // 5, 1),
        planner_kwargs=task.planner,
        mdp=_measured_in(agent.get_env(), task),
    )
    try:
        agent.learn(
            total - agent.num_timesteps,
            callback=[saving, tried, *tracking],
            reset_num_timesteps=fresh,
            tb_log_name="qstar",
            log_interval=4,
        )
    except (KeyboardInterrupt, RewardError):
        saving.save(agent)
        raise


def _check_settings(checkpoint: Path, saved: QStarConfig, asked: QStarConfig) -> None:
    """Check that a training would go on as it began: the settings of the checkpoint are used, whatever is asked for."""
    before, now = asdict(saved), asdict(asked)
    kept = before.pop("policy_kwargs") or {}
    pairs = {name: (before[name], value) for name, value in now.items() if name in before}
    pairs |= {name: (kept[name], value) for name, value in (now["policy_kwargs"] or {}).items() if name in kept}
    differences = [
        f"{name} {old!r} (saved) against {new!r} (here)"
        for name, (old, new) in pairs.items()
        if not callable(new) and _as_list(old) != _as_list(new)  # a file knows no pairs, and no schedules
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} was trained with other settings: {'; '.join(differences)}. Give those, or another folder "
            "(--out)"
        )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_measurements(agent: QStar, task: Task) -> None:
    """Say before the training what would end its measurements."""
    mdp = _measured_in(agent.get_env(), task)
    AStarPlanner(mdp, heuristic=QHeuristic(agent), **task.planner)
    for split, process in (("train", mdp_of(agent.get_env())), ("dev", mdp), ("test", mdp)):
        task.check_prompts(split, process)


def _measured_in(env: Any, task: Task) -> DecodingMDP:
    """Return the process with the task's own reward."""
    return task.mdp() if task.training_reward else mdp_of(env)


class _Saving(BaseCallback):
    """A callback that saves checkpoints between rounds, reports progress, and counts the seconds of all runs."""

    def __init__(
        self, checkpoint: Path, every: int, command: str, report: Callable[[int, int], object], total: int
    ) -> None:
        super().__init__()
        self.checkpoint, self.every, self.command, self.report, self.total = checkpoint, every, command, report, total
        before = find_checkpoint(checkpoint)
        seconds = load_q_function(before).description.get("seconds") if before else None
        self.before = seconds if isinstance(seconds, float) else 0.0
        self.started, self.rounds, self.last = time.perf_counter(), 0, 0

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def save(self, agent: QStar) -> None:
        objective = objective_of(mdp_of(agent.env))
        agent.save(self.checkpoint, command=self.command, seconds=self.seconds, objective=objective)
        self.last = agent.num_timesteps

    def _on_training_start(self) -> None:
        self.last = self.num_timesteps
        self.report(self.num_timesteps, self.total)

    def _on_step(self) -> bool:
        self.report(self.num_timesteps, self.total)
        return True

    def _on_rollout_start(self) -> None:
        # Once after the first round too: a short task may be killed long before the next checkpoint is due.
        if self.rounds == 1 or self.num_timesteps - self.last >= self.every:
            self.save(cast("QStar", self.model))
        self.rounds += 1

    def _on_training_end(self) -> None:
        self.save(cast("QStar", self.model))
