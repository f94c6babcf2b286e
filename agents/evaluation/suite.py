"""Comparison of decoders on several tasks, with a report for each and one page for all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checks import check_writable
from ...errors import ConfigurationError
from ...tasks import Task, load_task
from ..distributed.jobs import Workers
from ..learning.checkpoints import pretrained_names
from .comparison import CellRunner, Comparison, check_request
from .report import write_report
from .results import Results

__all__ = ["Evaluation", "evaluate_tasks"]


@dataclass(frozen=True)
class Evaluation:
    """Finished comparisons.

    Attributes:
        page: The Markdown page with all reports.
        reports: The report's path by task.
        results: The measurements by task.
    """

    page: Path
    reports: dict[str, Path]
    results: dict[str, Results]


def evaluate_tasks(
    tasks: Iterable[Task | str | Path],
    folder: str | Path = "runs/evaluation",
    *,
    decoders: Sequence[str] = (),
    budgets: Sequence[int] = (50, 100, 200, 400, 800),
    seeds: int = 3,
    qs: Sequence[str] | None = None,
    tune: bool = True,
    command: str = "evaluate_tasks",
    workers: Callable[[Callable[[], CellRunner]], contextlib.AbstractContextManager[Workers]] | None = None,
    progress: Callable[[str, int, int | None], None] = lambda text, done, total: None,
) -> Evaluation:
    """Compare decoders on tasks, each in its folder below ``folder``, and write the reports.

    What is finished in the folders is not done again. An interrupted call can be repeated.

    Args:
        tasks: Tasks, their names, or paths of YAML files.
        folder: Folder to write.
        decoders: Names of :data:`CONTENDERS`; empty for all that can take part.
        budgets: LM tokens a prompt.
        seeds: Number of seeds of the decoders that draw.
        qs: Q-functions, one per training seed; by default the one that the package ships for the task.
        tune: Whether settings are tuned on the dev prompts.
        command: The command, for the head of the reports.
        workers: Function that starts processes that decode, e.g. ``partial(RayWorkers, "local")``; None decodes here.
        progress: Called with what is being done, how much is done, and of how much.

    Raises:
        ConfigurationError: A number is out of range, a decoder cannot take part, or a folder holds another comparison
            or cannot be written.
        UnknownNameError: There is no such task or decoder.
        KeyboardInterrupt: At an interrupt; what was finished is kept.
    """
    specs = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    folder = Path(folder)
    check_writable(folder)
    budgets = check_request(decoders, budgets, seeds)
    for one, other in itertools.combinations(specs, 2):
        if one.name == other.name and one != other:  # each has the folder of its name
            raise ConfigurationError(f"two tasks are named {one.name!r}; give one another name, or a folder of its own")
    found = Evaluation(folder / "RESULTS.md", {}, {})
    for spec in specs:
        progress(f"{spec.name}: loading the language model", 0, None)
        shipped = [spec.name] if spec.name in pretrained_names() else []
        comparison = Comparison(
            spec,
            folder / spec.name,
            decoders=decoders,
            budgets=budgets,
            seeds=seeds,
            qs=shipped if qs is None else qs,
            tune=tune,
        )

        def report(text: str, done: int, total: int, name: str = spec.name) -> None:
            progress(f"{name}: {text}", done, total)

        with contextlib.nullcontext() if workers is None else workers(comparison.maker()) as pool:
            comparison.run(report, pool)
        descriptions = [heuristic.q.description for heuristic in comparison.heuristics]
        found.reports[spec.name] = write_report(comparison, command, descriptions)
        found.results[spec.name] = Results(comparison.rows(), comparison.budgets)
        # The plots lie beside each report, one step below the page.
        pages = [
            path.read_text(encoding="utf-8").replace("![](", f"![]({name}/") for name, path in found.reports.items()
        ]
        found.page.write_text("# Results\n\n" + "\n".join(pages), encoding="utf-8")
    return found
