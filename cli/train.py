"""Commands that learn: ``qstar train`` and ``qstar train-reward``."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..checks import check_writable
from .console import err, out, quiet, report_progress, say_json
from .decode import FIGURES, formatted
from .options import (
    EngineOption,
    JsonOption,
    RayOption,
    TaskArgument,
    ThreadsOption,
    TrustOption,
    WorkersOption,
    complete,
    workers_on,
)

__all__ = ["train", "train_reward"]

_TRACKERS = "trackio wandb"


def train(
    task: TaskArgument,
    steps: Annotated[int | None, typer.Option(min=1, help="LM tokens to train for; default: the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of network, prompts and exploration.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write; default: runs/TASK-SEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="LM tokens between checkpoints.")] = 20_000,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="One thread, deterministic kernels: equal to the last bit."),
    ] = False,
    track: Annotated[
        str | None,
        typer.Option(
            help="Tracker beside TensorBoard: trackio or wandb.", autocompletion=complete(lambda: ("trackio", "wandb"))
        ),
    ] = None,
    as_json: JsonOption = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    engine: EngineOption = None,
    trust: TrustOption = False,
) -> None:
    """Train a Q-function for a task by searching its training prompts, then try it on its held-out prompts.

    The folder --out gets checkpoints (safetensors and JSON), TensorBoard logs and diagnostics. Diagnostics are J on the
    dev prompts and the calibration of Q, as numbers and as one picture. However the training ends, Ctrl-C and kill
    included, --resume goes on from the last checkpoint. The task 'review' takes about 10 minutes on 2 cores.

    With --ray, workers search, and this process learns from what they find. The result does not depend on their number.
    """
    from ..agents.learning.checkpoints import find_checkpoint
    from ..agents.training import train_task
    from ..errors import RewardError, TrainingDivergedError
    from ..tasks import load_task

    spec = load_task(task, trust_remote_code=trust, engine=engine)
    folder = folder or Path("runs") / f"{spec.name}-{seed}"
    start_workers = workers_on(ray, workers, threads)
    quiet()
    total = steps or spec.steps
    options = [*(["--deterministic"] if deterministic else []), *(["--engine", engine] if engine else [])]
    options += [*(["--trust-remote-code"] if trust else []), *(["--ray", ray] if ray else [])]
    command = shlex.join(["qstar", "train", task, "--steps", str(total), "--seed", str(seed), *options])
    told = not resume
    with report_progress("LM tokens") as report:

        def progress(label: str, done: int, of: int | None) -> None:
            nonlocal told
            if not told and of is not None:
                told = True
                err.print(f"resuming at {done:,} of {total:,} LM tokens")
            report(label, done, of)

        try:
            result = train_task(
                spec,
                folder,
                resume=resume,
                steps=steps,
                seed=seed,
                save_every=save_every,
                deterministic=deterministic,
                workers=start_workers,
                verbose=int(not (as_json or err.is_terminal)),  # lines of figures, where nobody watches a bar
                command=command,
                progress=progress,
                track=track,
            )
        except TrainingDivergedError:
            err.print(f"stopped; the last good checkpoint is in {folder / 'checkpoint'}", soft_wrap=True)
            raise
        except (KeyboardInterrupt, RewardError):
            if find_checkpoint(folder / "checkpoint") is not None:
                again = shlex.join(["--out", str(folder), "--resume"])
                err.print(f"stopped; go on with: {command} {again}", soft_wrap=True)
            raise
    if as_json:
        names = ("command", "seed", "minutes", "time_steps", "held_out")
        say_json({"task": spec.name, "folder": str(folder), **{name: getattr(result, name) for name in names}})
        return
    out.print(
        f"{result.time_steps:,} LM tokens in {result.minutes:.1f} min; checkpoint in {folder / 'checkpoint'}",
        soft_wrap=True,
    )
    table = Table("decoder", title=f"{len(spec.prompts.of('test'))} held-out prompts, means")
    for column, _ in FIGURES.values():
        table.add_column(column, justify="right")
    for name, row in result.held_out.items():
        table.add_row(name, *formatted(row))
    out.print(table)
    out.print(f"use it: qstar decode PROMPT --task {task} --q {folder}", soft_wrap=True)


def train_reward(
    pairs: Annotated[
        Path,
        typer.Argument(
            help='JSONL, one pair a line: {"prompt": …, "chosen": …, "rejected": …}. "-" reads standard input.'
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write the reward into.")] = Path("runs/reward"),
    model: Annotated[str, typer.Option(help="Known name, hub id or local folder of a causal LM.")] = (
        "smollm2-135m-instruct"
    ),
    seed: Annotated[int, typer.Option(help="Seed that draws the held-out pairs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn a reward from preferences: a Bradley-Terry head on a frozen language model's hidden states."""
    from ..rewards.library.language import read_pairs, train_preference

    read = read_pairs(pairs)
    check_writable(folder)
    quiet()
    with report_progress("texts") as report:
        found = train_preference(
            read,
            folder,
            model=model,
            seed=seed,
            command=shlex.join(["qstar", *sys.argv[1:]]),
            progress=partial(report, "reading"),
        )
    if as_json:
        say_json(found)
        return
    out.print(
        f"{found['pairs']} pairs; right about {found['held_out_accuracy']:.0%} of {found['held_out_pairs']} held-out "
        f"ones ({found['held_out_log_likelihood']:.3f} nats a pair, chance has -0.693)"
    )
    out.print(f'use it: qstar decode PROMPT --reward "preference({str(folder)!r})"', soft_wrap=True)
