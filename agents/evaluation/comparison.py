"""Comparison of decoders at equal LM tokens: each decoder, budget and seed is a cell, kept on disk when finished.

A comparison can be stopped at any moment, and goes on where it was. Before it begins, every decoder with settings is
tuned on the dev prompts, each with as many trials as the others. The result is a table with one row per prompt and
cell, of which :mod:`~qstar_decoding.agents.evaluation.report` makes a page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ...checks import check_integer
from ...envs import DecodingMDP, load_prompts
from ...envs.prompts import columns_of
from ...errors import ConfigurationError, UnknownNameError
from ...files import read_json, to_jsonable, write_json
from ...rewards import Reward, as_reward
from ...tasks import Task
from ..distributed.jobs import InProcess, Job, Workers
from ..learning.q_heuristic import QHeuristic
from ..planning.astar import AStarPlanner
from ..planning.registry import CONTENDERS
from .calibration import Calibration, calibrate
from .outcomes import Outcomes, evaluate

__all__ = ["Cell", "Comparison"]

TUNING_PROMPTS = 20  # of the dev prompts: enough to tell settings of a grid apart, and most of the cost of a small run
_TIMED_PROMPTS = 2
_MOST_TOKENS = 10**9  # more cannot be drawn


class Cell(NamedTuple):
    """One decoder with one budget (None where it cannot use one) and one seed."""

    decoder: str
    budget: int | None
    seed: int

    @property
    def file(self) -> str:
        """The name of the file that its results are kept in."""
        name = re.sub(r"\W+", "-", self.decoder.replace("*", "star")).strip("-").lower()
        return f"{name}-{self.budget or 'any'}-{self.seed}.json"


class _Measurement(BaseModel):
    """The measurements of one prompt in a cell's file."""

    prompt: str
    text: str
    objective: float | None
    reward: float | None
    gold: float | None
    logprob: float
    tokens: int
    lm_tokens: int
    reward_calls: int
    lower_bound: float | None
    upper_bound: float | None
    gap: float | None
    certified: int
    stop: str


class _Timing(BaseModel):
    seconds: float
    kv_bytes: float


class _Setting(BaseModel):
    chosen: Annotated[int, Field(ge=0)] | None
    dev: dict[str, float | None]


_CELL = TypeAdapter(list[_Measurement])
_TIMINGS = TypeAdapter(dict[str, _Timing])
_SETTINGS = TypeAdapter(dict[str, _Setting])

T = TypeVar("T")


def _read_if_whole(kind: TypeAdapter[T], path: Path) -> T | None:
    """Return what a JSON file of a comparison holds; None where it is missing, cut off or edited out of shape."""
    try:
        return kind.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class CellRunner:
    """Runner of cells; each worker of a cluster has one."""

    def __init__(self, task: Task, qs: Sequence[Any]) -> None:
        """Load the Q-functions, the language model and the gold reward.

        Raises:
            CheckpointError: A Q-function belongs to another model than the task's.
        """
        self.task = task
        self.heuristics = [QHeuristic(q) for q in qs]
        self.mdp = task.mdp()
        for heuristic in self.heuristics:
            heuristic.q.check(self.mdp)
        self.gold: Reward | None = None if task.gold is None else as_reward(task.gold)

    def make(self, name: str, seed: int, mdp: DecodingMDP | None = None, **setting: Any) -> Any:
        """Return a decoder by its name in :data:`CONTENDERS`."""
        q = self.heuristics[seed % len(self.heuristics)] if self.heuristics else None
        return CONTENDERS[name].make(mdp or self.mdp, q, seed, self.task.planner, **setting)

    def try_setting(self, name: str, trial: int, budget: int) -> float:
        """Return the mean J on the dev prompts with one setting of a decoder's grid."""
        decoder = self.make(name, 0, **CONTENDERS[name].grid[trial])
        return float(np.nanmean(evaluate(decoder, self.task.prompts.of("dev")[:TUNING_PROMPTS], budget).objectives))

    def decode(self, cell: Cell, chosen: int | None) -> list[dict[str, Any]]:
        """Return the measurements of a cell, with the setting at this place in the decoder's grid."""
        decoder = self.make(cell.decoder, cell.seed, **setting_at(cell.decoder, chosen))
        prompts = self.task.prompts.of("test")
        return measurements(evaluate(decoder, prompts, cell.budget), prompts, self.gold)


@dataclass
class Comparison:
    """A comparison of decoders on one task, which a folder belongs to.

    Attributes:
        task: The task; its test prompts are decoded, its dev prompts serve for tuning.
        decoders: Names of :data:`CONTENDERS`; empty for all that can take part.
        budgets: LM tokens a prompt.
        seeds: Number of seeds; where there are fewer Q-functions, they are taken in turn.
        qs: Q-functions, one per training seed, as :class:`QHeuristic` takes them. Empty for none.
        folder: Folder of everything that is kept.
        tune: Whether settings are tuned; otherwise every decoder has its defaults.
    """

    task: Task
    folder: Path
    decoders: Sequence[str] = ()
    budgets: Sequence[int] = (50, 100, 200, 400)
    seeds: int = 1
    qs: Sequence[str] = ()
    tune: bool = True

    def __post_init__(self) -> None:
        """Check everything that can be checked before any work.

        Raises:
            ConfigurationError: A number is out of range, a decoder cannot take part, or the folder holds another
                comparison.
            UnknownNameError: There is no such decoder.
        """
        self.score = self.task.planner.get("score", "reward")
        self.budgets = check_request(self.decoders, self.budgets, self.seeds)
        self.runner = CellRunner(self.task, self.qs)
        self.heuristics, self.mdp, self.gold = self.runner.heuristics, self.runner.mdp, self.runner.gold
        self.excluded = {name: why for name in CONTENDERS if (why := self._why_excluded(name))}
        for name in self.decoders:
            if name in self.excluded:
                raise ConfigurationError(f"{name!r} cannot take part in {self.task.name!r}: {self.excluded[name]}")
        self.names = list(self.decoders) or [name for name in CONTENDERS if name not in self.excluded]
        for name in self.names:
            self.runner.make(name, 0)  # says what is wrong with the task's planner
        for split in ("dev", "test") if self.tune else ("test",):
            self.task.check_prompts(split, self.mdp)
        self._claim()

    def cells(self) -> Iterator[Cell]:
        """Yield all cells, the cheap budgets first; a decoder that neither draws nor uses Q needs one seed."""
        for budget in (None, *self.budgets):
            for name in self.names:
                spec = CONTENDERS[name]
                if spec.budgeted == (budget is None):
                    continue
                count = self.seeds if spec.random else 1
                if spec.uses == "q":
                    count = max(count, len(self.heuristics))
                yield from (Cell(name, budget, seed) for seed in range(count))

    def run(
        self,
        progress: Callable[[str, int, int], None] = lambda text, done, total: None,
        workers: Workers | None = None,
        *,
        texts_only: bool = False,
    ) -> None:
        """Tune what is not tuned, decode what is not decoded, and time what is not timed.

        Args:
            progress: Told what is being done, how much is done, and of how much.
            workers: Workers that tune and decode, each with the object that ``maker`` makes; None for this process. A
                cell is done as a whole, so the results are the same. This process times the decoders in any case.
            texts_only: Neither time the decoders nor calibrate Q.

        Raises:
            KeyboardInterrupt: At an interrupt; what was finished is kept.
        """
        workers = workers or InProcess(self.runner)
        cells = [cell for cell in self.cells() if self._measured(cell) is None]
        further = 0 if texts_only else len(self.names) + len(self.heuristics[:1])
        total, done = len(self.names) + len(cells) + further, 0

        def started(job: Job) -> None:
            progress(job.name, done, total)

        for _ in self._tune(self.names, workers, started):
            done += 1
        # Largest budgets first with several workers, so that no worker ends with a long job alone.
        settings = self._settings()
        jobs = [
            Job(
                "decode",
                (cell, settings[cell.decoder]["chosen"]),
                f"{cell.decoder}, {cell.budget or 'any'} LM tokens, seed {cell.seed}",
            )
            for cell in (cells if isinstance(workers, InProcess) else reversed(cells))
        ]
        for job, found in workers.run(jobs, started=started):
            write_json(self._path(job.args[0]), found)
            done += 1
        if texts_only:
            return
        for name in self.names:
            progress(f"timing {name}", done, total)
            self._time(name)
            done += 1
        if self.heuristics:
            progress("calibration of Q", done, total)
            self.calibration()

    def maker(self) -> Callable[[], CellRunner]:
        """Return a function that makes a worker's :class:`CellRunner`, and needs no files of this machine."""
        return partial(CellRunner, self.task, [heuristic.q for heuristic in self.heuristics])

    def rows(self) -> list[dict[str, Any]]:
        """Return the measurements: one dict per prompt and finished cell."""
        return [
            {"task": self.task.name, **cell._asdict(), "prompt_index": i, **row}
            for cell in self.cells()
            for i, row in enumerate(self._measured(cell) or ())
        ]

    def setting(self, name: str) -> dict[str, Any]:
        """Return the setting of a decoder's grid that did best on the dev prompts, tried at the middle budget."""
        if name not in self._settings():
            list(self._tune([name], InProcess(self.runner)))
        return setting_at(name, self._settings()[name]["chosen"])

    def timings(self) -> dict[str, dict[str, float]]:
        """Return seconds and bytes of keys and values a prompt of each decoder at the largest budget."""
        known = _read_if_whole(_TIMINGS, self.folder / "timings.json") or {}
        return {name: times.model_dump() for name, times in known.items()}

    def calibration(self) -> Calibration | None:
        """Return Q beside the best J found, of the first seed, on the test prompts at the largest budget."""
        if not self.heuristics:
            return None
        path = self.folder / "calibration.npz"
        try:
            return Calibration.read(path)
        except ConfigurationError:  # there is none yet, or it is damaged
            planner = AStarPlanner(self.mdp, heuristic=self.heuristics[0], **self.task.planner)
            compared = calibrate(planner, self.task.prompts.of("test"), self.budgets[-1])
            new = path.with_name(f".new-{path.name}")
            np.savez_compressed(new, **compared._asdict())
            new.replace(path)
        return Calibration.read(path)

    # -----------------------------------------------------------------------------------------------------------------

    def _why_excluded(self, name: str) -> str:
        """Return why a decoder cannot take part, or nothing."""
        uses = CONTENDERS[name].uses
        if uses == "q" and not self.heuristics:
            return "it needs a Q-function; none was given (--q), and the package ships none for the task"
        if uses in ("reward", "potential") and self.score == "q":
            return "it looks at the reward, which this task keeps from the decoders"
        if uses == "potential" and not self.mdp.reward.has_potential:
            return "it scores unfinished texts, and the task's reward has no potential to score them with"
        return ""

    def _settings(self) -> dict[str, Any]:
        known = _read_if_whole(_SETTINGS, self.folder / "settings.json") or {}
        return {
            name: setting.model_dump()
            for name, setting in known.items()
            # Those of a table with another grid are tuned again.
            if name in CONTENDERS and (setting.chosen is None or len(setting.dev) == len(CONTENDERS[name].grid))
        }

    def _tune(
        self, names: Sequence[str], workers: Workers, started: Callable[[Job], None] | None = None
    ) -> Iterator[str]:
        """Try the settings of decoders on the dev prompts; yield each name when its best one is written down."""
        known, budget = self._settings(), self.budgets[len(self.budgets) // 2]
        trials = {name: len(CONTENDERS[name].grid) if self.tune else 0 for name in names}
        means: dict[str, dict[int, float]] = {name: {} for name in names}
        jobs = [
            Job("try_setting", (name, trial, budget), f"tuning {name}")
            for name in names
            if name not in known
            for trial in range(trials[name])
        ]
        waiting = {name for name, *_ in (job.args for job in jobs)}
        for name in names:
            if name not in waiting:
                known.setdefault(name, {"chosen": None, "dev": {}})
                yield name
        write_json(self.folder / "settings.json", known)
        for job, mean in workers.run(jobs, started=started):
            name, trial, _ = job.args
            means[name][trial] = mean
            if len(means[name]) == trials[name]:
                ordered = [means[name][trial] for trial in range(trials[name])]
                dev = {repr(CONTENDERS[name].grid[trial]): mean for trial, mean in enumerate(ordered)}
                # By its place in the grid: a setting may hold what JSON cannot.
                known[name] = {"chosen": int(np.argmax(ordered)), "dev": dev}
                write_json(self.folder / "settings.json", known)
                yield name

    def _time(self, name: str) -> None:
        """Time a decoder alone, on a tree that no other has filled, with the prompts one after the other."""
        path, known = self.folder / "timings.json", self.timings()
        if name in known:
            return
        seconds, size = [], []
        for prompt in self.task.prompts.of("test")[:_TIMED_PROMPTS]:
            decoder = self.runner.make(name, 0, self.mdp.with_empty_tree(), **self.setting(name))
            usage = evaluate(decoder, [prompt], self.budgets[-1]).plans[0].usage
            seconds.append(usage.seconds)
            size.append(usage.kv_bytes)
        write_json(path, {**known, name: {"seconds": float(np.mean(seconds)), "kv_bytes": float(np.mean(size))}})

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.file

    def _measured(self, cell: Cell) -> list[dict[str, Any]] | None:
        """Return the rows of a cell; None where its file is missing or incomplete, and the cell is to be decoded."""
        rows = _read_if_whole(_CELL, self._path(cell))
        prompts = [prompt.text for prompt in load_prompts(self.task.prompts.of("test"))]
        if rows is None or [row.prompt for row in rows] != prompts:
            return None
        return [row.model_dump() for row in rows]

    def _claim(self) -> None:
        """Write down which comparison the folder holds, or check that it holds this one."""
        mine = {
            "task": self.task.model_dump(mode="json", exclude={"steps", "training", "budgets"}),
            "qs": [heuristic.q.fingerprint() for heuristic in self.heuristics],
            "tune": self.tune,
            "tuned_at": self.budgets[len(self.budgets) // 2],
        }
        path = self.folder / "comparison.json"
        if path.is_file():
            theirs = read_json(path)
            if not isinstance(theirs, dict):
                raise ConfigurationError(f"{path} does not describe a comparison; give another folder, or delete it")
            if differing := [key for key in mine if mine[key] != theirs.get(key)]:
                raise ConfigurationError(
                    f"{self.folder} holds another comparison: it differs in {', '.join(differing)}; give another "
                    "folder, or delete that one"
                )
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        write_json(path, mine)


def check_request(decoders: Sequence[str], budgets: Sequence[int], seeds: int) -> list[int]:
    """Check the arguments of a comparison that can be checked without a language model.

    Returns:
        The budgets, ascending.

    Raises:
        ConfigurationError: A number is out of range, or there is no budget.
        UnknownNameError: There is no such decoder.
    """
    check_integer("seeds", seeds)
    for name in decoders:
        if name not in CONTENDERS:
            raise UnknownNameError("decoder", name, CONTENDERS)
    if not budgets:
        raise ConfigurationError("at least one budget is needed")
    checked = sorted({check_integer("a budget", budget) for budget in budgets})
    if checked[-1] > _MOST_TOKENS:
        raise ConfigurationError(f"a budget is at most {_MOST_TOKENS:,} LM tokens, got {checked[-1]}")
    return checked


def setting_at(name: str, chosen: int | None) -> dict[str, Any]:
    """Return a setting by its place in a decoder's grid, or the defaults for None."""
    return {} if chosen is None else dict(CONTENDERS[name].grid[chosen])


def measurements(outcomes: Outcomes, prompts: Sequence[Any], gold: Reward | None) -> list[dict[str, Any]]:
    """Return one dict of plain numbers per prompt; numbers that are not finite are None."""
    texts, ids = zip(*((plan.text, plan.token_ids) for plan in outcomes.plans), strict=True)
    golds = [math.nan] * len(texts)
    if gold is not None:
        loaded = load_prompts(prompts)
        golds = gold([prompt.text for prompt in loaded], list(texts), list(ids), **columns_of(loaded)).tolist()
    rows = []
    for plan, reward, objective, gold_reward in zip(
        outcomes.plans, outcomes.rewards.tolist(), outcomes.objectives.tolist(), golds, strict=True
    ):
        values = {
            "objective": objective,
            "reward": reward,
            "gold": gold_reward,
            "logprob": plan.logprob,
            "tokens": len(plan.token_ids),
            "lm_tokens": plan.usage.lm_tokens,
            "reward_calls": plan.usage.reward_calls,
            "lower_bound": plan.lower_bound,
            "upper_bound": plan.upper_bound,
            "gap": plan.gap,
        }
        rows.append(
            {
                "prompt": plan.prompt,
                "text": plan.text,
                **to_jsonable(values),
                "certified": int(plan.certified),
                "stop": plan.stop,
            }
        )
    return rows
