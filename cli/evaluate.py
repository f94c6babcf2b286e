"""Commands that measure: ``qstar evaluate`` and ``qstar plot``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..agents.planning.registry import CONTENDERS, TRIALS
from ..errors import ConfigurationError, UnknownNameError
from .console import out, quiet, report_progress, say_json
from .options import (
    EngineOption,
    JsonOption,
    RayOption,
    ThreadsOption,
    TrustOption,
    WorkersOption,
    complete,
    known_tasks,
    prepare_file,
    workers_on,
)

__all__ = ["evaluate", "plot"]

PICTURES = ("learning", "errors", "objective", "gap", "calibration", "trace")


def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(help="Names of tasks, or paths of YAML files.", autocompletion=complete(known_tasks)),
    ],
    decoders: Annotated[
        str,
        typer.Option(
            help=f"Names, separated by commas; default: all of the {len(CONTENDERS)} that can take part.",
            autocompletion=complete(lambda: CONTENDERS, listed=True),
        ),
    ] = "",
    budgets: Annotated[str, typer.Option(help="LM tokens a prompt, separated by commas.")] = "50,100,200,400,800",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of the decoders that draw.")] = 3,
    q: Annotated[
        list[str] | None,
        typer.Option("--q", help="Folder of a trained Q, one option per training seed; default: the shipped one."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder to write; what is finished there is not run again.")
    ] = Path("runs/evaluation"),
    tune: Annotated[bool, typer.Option(help=f"Tune the decoders on the dev prompts, {TRIALS} trials each.")] = True,
    as_json: JsonOption = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    engine: EngineOption = None,
    trust: TrustOption = False,
) -> None:
    """Compare decoders at equal LM tokens on a task's held-out prompts, and write a report with plots.

    Every decoder that can take part is tuned on the dev prompts with the same number of trials. All share one token
    tree. Each task gets a folder in --out with results.csv, report.md and plots; --out/RESULTS.md has all reports. The
    command can be stopped at any moment; what is finished stays.
    """
    from ..agents.evaluation.suite import evaluate_tasks
    from ..tasks import load_task

    try:
        limits = [int(part) for part in budgets.split(",")]
    except ValueError:
        raise ConfigurationError(f"--budgets is a list such as 50,100,200, got {budgets!r}") from None
    names = [name.strip() for name in decoders.split(",") if name.strip()]
    start_workers = workers_on(ray, workers, threads)
    quiet()
    with report_progress("steps") as report:
        found = evaluate_tasks(
            [load_task(task, trust_remote_code=trust, engine=engine) for task in tasks],
            folder,
            decoders=names,
            budgets=limits,
            seeds=seeds,
            qs=q,
            tune=tune,
            command=shlex.join(["qstar", *sys.argv[1:]]),
            workers=start_workers,
            progress=report,
        )
    if as_json:
        say_json({"report": str(found.page), "tasks": {name: one.table() for name, one in found.results.items()}})
        return
    for name, report_page in found.reports.items():
        out.print(f"{name}: {report_page}", soft_wrap=True)
    out.print(f"all: {found.page}", soft_wrap=True)


def plot(
    kind: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}.", autocompletion=complete(lambda: PICTURES)
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders of qstar train or evaluate; of a trace, files of qstar decode --json, or '-'."),
    ],
    path: Annotated[Path | None, typer.Option("--out", help="An .svg, .pdf or .png; default: KIND.svg.")] = None,
    curves: Annotated[
        list[str] | None, typer.Option("--curve", help="Any quantity that the training logged; can be repeated.")
    ] = None,
    highlight: Annotated[
        list[str] | None,
        typer.Option(
            "--highlight",
            help="A decoder that is to stand out; can be repeated.",
            autocompletion=complete(lambda: CONTENDERS),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print what is drawn, as one JSON object.")] = False,
) -> None:
    """Draw what was measured, good enough for a paper: vector graphics, and lines that everybody can tell apart.

    learning and errors draw trainings: J on the dev prompts, and how far Q was off. Folders whose names differ only in
    a number at the end (runs/toy-0, runs/toy-1) are seeds of one setting: their mean is drawn, and range. A source
    LABEL=FOLDER is called LABEL. objective, gap and calibration draw evaluations, one panel per task. trace draws how
    the LB and UB of searches closed in on each other.
    """
    from ..agents.evaluation import plots

    if kind not in PICTURES:
        raise UnknownNameError("picture", kind, PICTURES)
    path = path or Path(f"{kind}.svg")
    plots.check_path(path)
    prepare_file(path)
    figure, drawn = plots.draw(kind, sources, quantities=curves or (), names=highlight or ())
    plots.save(figure, path)
    if as_json:
        say_json({"file": str(path), "kind": kind, "drawn": drawn})
    else:
        out.print(str(path), soft_wrap=True)
