"""The command ``qstar``: decode a prompt, train a Q-function, see the decoders side by side."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import sys
import time
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..checks import check_writable
from ..errors import ConfigurationError, PromptError, QStarError, UnknownNameError
from .console import (
    complete,
    err,
    fail,
    follow,
    known_contenders,
    known_decoders,
    known_models,
    known_rewards,
    known_tasks,
    number_text,
    out,
    progress_bars,
    quiet,
    read_stdin,
    say,
    say_json,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ..agents import Decoder, Outcomes, Plan, QStar
    from ..agents.distributed.jobs import Workers
    from ..agents.distributed.ray_workers import RayWorkers
    from ..agents.evaluation.curves import Curves
    from ..agents.search.budget import TracePoint
    from ..envs import Completion, DecodingMDP, Prompt
    from ..tasks import Task

__all__ = ["app", "main"]

app = typer.Typer(
    name="qstar",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""
[bold]Q* = Q-learning + A*, for language-model decoding.[/bold]

A frozen language model proposes tokens, a reward says how good a finished text is, a learned Q estimates where each
token leads, and A* searches with it for the text y that maximises

    J(y) = α · log π(y) + r(y)      fluency (nats, weighted) plus reward.

Every search reports two bounds: LB, the best J found, and UB, which no text in the searched tree can exceed. When they
meet, the text is certified to be the best.

[bold]Examples[/bold]

  qstar demo                                        decoders side by side on held-out prompts

  qstar decode "The movie was"                      search with the shipped Q, 200 LM tokens

  qstar decode "The movie was" --decoder beam       the same budget for a beam search

  qstar decode "The movie was" --n 3 --json         the three best texts, for a script

  qstar train sentiment --seed 0 --out runs/my-q    train a Q (about 11 minutes on 2 cores)

  qstar decode "The movie was" --q runs/my-q        search with it

  qstar decode --input prompts.jsonl --out results.jsonl --ray local

  qstar evaluate toy && qstar plot objective runs/evaluation/toy

[bold]For scripts[/bold]

With --json, standard output is one JSON object and nothing else; whatever is said beside it goes to standard error.
'-' in place of a prompt or a file reads standard input. Exit codes: 0 all went well; 1 doctor found something broken,
or some lines of an input failed; 2 a mistake in the call, told in one line; 130 interrupted.
""",
)


def main() -> None:
    """Run the command; what the user can mend is told in one line on standard error, with exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:  # an unknown option, a missing argument, a number out of range
        context = getattr(error, "ctx", None)
        fail(f"{error.format_message().rstrip('.')}. See {context.command_path if context else 'qstar'} --help.")
    except QStarError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted")
        sys.exit(130)


@app.callback()
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        out.print(f"qstar-decoding {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


TaskOption = Annotated[
    str,
    typer.Option("--task", help="A task's name, or the path of a YAML file.", autocompletion=complete(known_tasks)),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Let a Ray cluster do it: 'local' for this machine, 'auto', host:6379, ray://host:10001."
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="With --ray: how many; default: what the cluster has room for.")
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="With --ray: of each worker.")]


@app.command()
def decode(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; '-' reads standard input.")] = None,
    task: TaskOption = "sentiment",
    decoder: Annotated[
        str,
        typer.Option(
            help="args, astar, beam, blockwise, diverse-beam, greedy, ilql, levin, majority, mcts, rebase or sample.",
            autocompletion=complete(known_decoders),
        ),
    ] = "astar",
    budget: Annotated[int, typer.Option(help="LM tokens that the search may process.")] = 200,
    n: Annotated[int, typer.Option("--n", min=1, help="How many of the best texts to show.")] = 1,
    q: Annotated[
        str | None, typer.Option("--q", help="Folder of a trained Q, or 'none'; default: the one shipped for the task.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help='Replaces the task\'s reward, e.g. "0.5 * sentiment".', autocompletion=complete(known_rewards)
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Known name, hub id or local folder of a causal LM.", autocompletion=complete(known_models)),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidate tokens per step.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The horizon, in tokens.")] = None,
    logprob_weight: Annotated[float | None, typer.Option(help="α, the weight of fluency.")] = None,
    seed: Annotated[int, typer.Option(help="Of the decoders that draw.")] = 0,
    tree: Annotated[Path | None, typer.Option(help="Also write the searched tree there, as one HTML page.")] = None,
    as_json: JsonOption = False,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="Many prompts instead: .jsonl, or text with one a line; '-' reads JSONL."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--out", help="With --input: the JSONL to write; what is done there is not done again."),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="With --input: go on after a broken line; exit code 1 at the end.")
    ] = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Continue a prompt and say how good the result is and how close to the optimum.

    Without --q, A* and the others that use Q take the Q-function shipped for the task; where there is none, or the task
    was changed by --model or --top-k, the bound, which needs no training.

    With --input, every line of a file is a prompt (in .jsonl a string, or an object with the key "prompt"), and every
    result one line of JSON, in the order of the input.
    """
    from ..agents.planning.registry import DECODERS, Q_GUIDED, decoder_options, make_decoder
    from ..agents.search.budget import Budget
    from ..envs.prompts import as_prompt
    from ..tasks import load_task

    if decoder not in DECODERS:
        raise UnknownNameError("decoder", decoder, DECODERS)
    if tree is not None:
        check_writable(tree.parent)
    if (prompt is None) == (source is None):
        raise ConfigurationError("give one prompt, or --input with a file of them")
    if source is None and (ray is not None or results is not None or keep_going):
        raise ConfigurationError("--ray, --out and --keep-going are for many prompts; give them with --input")
    if source is not None and tree is not None:
        raise ConfigurationError("--tree is for one prompt; give the prompt instead of --input")
    _check_ray(ray, workers, threads)
    lines, broken = ({}, {}) if source is None else _read_lines(source, keep_going)
    text = read_stdin().strip() if prompt == "-" else prompt
    limits, start = Budget.of(budget), None if text is None else as_prompt(text)
    spec = load_task(task)
    changes = {
        "model": model,
        "reward": reward,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "logprob_weight": logprob_weight,
    }
    new_mdp = partial(spec.mdp, **{key: value for key, value in changes.items() if value is not None})
    with status("loading the language model"):
        quiet()
        mdp = new_mdp()
    heuristic = _heuristic(mdp, spec, q, adapted=reward is not None) if decoder in Q_GUIDED else None
    options = decoder_options(decoder, spec.planner, heuristic, seed)
    planner = make_decoder(decoder, mdp, **options)
    if source is not None:
        from ..agents.distributed.batch import BatchDecoder
        from ..agents.distributed.jobs import InProcess

        learned = getattr(heuristic, "q", None)
        settings = {
            "task": spec.model_dump(mode="json", include={"env", "planner"}),
            "changes": changes,
            "decoder": [decoder, budget, n, seed, learned and learned.fingerprint()],
        }
        make = partial(BatchDecoder.make, new_mdp, decoder, options, limits, n)
        with _ray_workers(ray, make, workers, threads) as pool:
            done = pool or InProcess(BatchDecoder(planner, decoder, limits, n))
            _decode_lines(lines, broken, done, results, settings, keep_going)
        return
    with follow(limits.lm_tokens) as show:
        plan = planner.plan(start, limits, progress=show)
    if tree is not None:
        plan.tree.to_html(tree)
    if as_json:
        from ..agents.distributed.batch import plan_record

        say_json(plan_record(plan, n, decoder))
        raise typer.Exit(130 if plan.stop_reason == "interrupted" else 0)
    shown: list[Completion | Plan] = [*plan.completions[:n]] or [plan]
    for rank, completion in enumerate(shown, start=1):
        say(Text.assemble(f"{rank}. " if n > 1 else "", (plan.prompt, "dim"), (completion.text, "bold")))
        if completion.stop == "partial":
            needed = mdp.max_new_tokens - 1
            out.print(f"   unfinished: {budget} LM tokens did not pay for a text; --budget {needed} surely does")
            continue
        if math.isnan(completion.reward):
            out.print(
                f"   J {completion.objective:.3f} as Q estimates it; the reward was not asked   ({completion.stop})"
            )
            continue
        out.print(
            f"   J {completion.objective:.3f} = reward {completion.reward:.3f} "
            f"+ {mdp.logprob_weight:g} · log-prob {completion.logprob:.2f} nats   ({completion.stop})"
        )
        parts = mdp.reward.components([plan.prompt], [completion.text], [completion.token_ids])
        if len(parts) > 1:
            out.print("   " + ", ".join(f"{name} {values[0]:.3f}" for name, values in parts.items()))
    say(_bounds(plan))
    if plan.stop_reason == "interrupted":
        sys.exit(130)


@app.command()
def train(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(help="A task's name, or the path of a YAML file.", autocompletion=complete(known_tasks)),
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="LM tokens to train for; default: the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Of network, prompts and exploration.")] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Where to write; default: runs/TASK-SEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="LM tokens between checkpoints.")] = 20_000,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="One thread, deterministic kernels: equal to the last bit."),
    ] = False,
    as_json: JsonOption = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Train a Q-function for a task by searching its training prompts, then try it on its held-out prompts.

    Writes checkpoints (safetensors and JSON), TensorBoard logs and diagnostics (what Q is worth on the dev prompts, and
    how well it is calibrated, as numbers and as one picture) into --out. However it ends, Ctrl-C and kill included,
    --resume goes on from the last checkpoint. Training for the task 'sentiment' takes about 11 minutes on 2 cores.

    With --ray, workers do the searches, and this process learns from what they find; what is learnt does not depend on
    how many there are.
    """
    import gymnasium as gym

    import qstar_decoding  # noqa: F401  registers the environment

    from ..agents import Diagnostics, QStar
    from ..agents.learning.checkpoints import find_checkpoint
    from ..agents.learning.qstar import Searcher
    from ..errors import CheckpointError, RewardError, TrainingDivergedError
    from ..tasks import load_task

    spec = load_task(task)
    if deterministic:
        import torch

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    folder = folder or Path("runs") / f"{spec.name}-{seed}"
    checkpoint, total = folder / "checkpoint", steps or spec.steps
    if resume and find_checkpoint(checkpoint) is None:
        raise CheckpointError(f"nothing to resume: {checkpoint} does not exist; leave out --resume to start anew")
    if not resume and find_checkpoint(checkpoint) is not None:
        raise ConfigurationError(f"{checkpoint} exists; give --resume to go on with it, or another --out")
    _check_ray(ray, workers, threads)
    check_writable(checkpoint)
    with status("loading the language model"):
        quiet()
        env = gym.make("TokenDecoding-v0", prompts=spec.prompts.of("train"), **spec.env)
    logs = str(folder / "tensorboard")
    log_lines = int(not (as_json or err.is_terminal))  # which go to standard output, where nobody watches a bar
    pool = context.with_resource(_ray_workers(ray, partial(Searcher, spec.mdp), workers, threads))
    if resume:
        agent = QStar.load(checkpoint, env, workers=pool, tensorboard_log=logs, verbose=log_lines)
        err.print(f"resuming at {agent.num_timesteps:,} of {total:,} LM tokens")
    else:
        agent = QStar(env=env, seed=seed, workers=pool, tensorboard_log=logs, verbose=log_lines, **spec.training)
    command = f"qstar train {task} --steps {total} --seed {seed}" + (f" --ray {ray}" if ray else "")
    tried = Diagnostics(
        spec.prompts.of("dev"), folder, budgets=spec.budgets, every=max(total // 5, 1), planner_kwargs=spec.planner
    )
    go_on = f"{command} --out {folder} --resume"
    bars = progress_bars("LM tokens")
    bar = bars.add_task(f"training, seed {seed}", total=total, completed=agent.num_timesteps)
    watch = _watch(checkpoint, save_every, command, lambda done: bars.update(bar, completed=done))
    try:
        if agent.num_timesteps < total:
            with bars:
                agent.learn(
                    total - agent.num_timesteps,
                    callback=[watch, tried],
                    reset_num_timesteps=not resume,
                    tb_log_name="qstar",
                    log_interval=4,
                )
    except TrainingDivergedError:
        err.print(f"stopped; the last good checkpoint is in {checkpoint}", soft_wrap=True)
        raise
    except (KeyboardInterrupt, RewardError):
        watch.save(agent)
        err.print(f"stopped; go on with: {go_on}", soft_wrap=True)
        raise
    watch.save(agent)
    minutes = round(watch.seconds / 60, 1)
    figures = _held_out(agent, spec)
    made = {"command": command, "seed": seed, "minutes": minutes, "time_steps": agent.num_timesteps}
    # Without the seconds: what is saved depends on the seed alone.
    kept = {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in figures.items()}
    agent.save(folder / "q", training_state=False, **made, held_out=kept)
    if as_json:
        say_json({"task": spec.name, "folder": str(folder), **made, "held_out": figures})
        return
    out.print(f"{agent.num_timesteps:,} LM tokens in {minutes:.1f} min; checkpoint in {checkpoint}", soft_wrap=True)
    table = Table("decoder", title=f"{len(spec.prompts.of('test'))} held-out prompts, means")
    for column in _FIGURES.values():
        table.add_column(column, justify="right")
    for name, row in figures.items():
        table.add_row(name, *_formatted(row))
    out.print(table)
    out.print(f"use it: qstar decode PROMPT --task {task} --q {folder}", soft_wrap=True)


@app.command("train-reward")
def train_reward(
    pairs: Annotated[
        Path,
        typer.Argument(
            help='JSONL, one pair a line: {"prompt": …, "chosen": …, "rejected": …}. "-" reads standard input.'
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Where to write the reward.")] = Path("runs/reward"),
    model: Annotated[str, typer.Option(help="Known name, hub id or local folder of a causal LM.")] = (
        "smollm2-135m-instruct"
    ),
    seed: Annotated[int, typer.Option(help="Of the drawing of the held-out pairs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn a reward from preferences: a Bradley-Terry head on a frozen language model's hidden states."""
    from ..rewards.library.language import read_pairs, train_preference

    read = read_pairs(pairs)
    check_writable(folder)
    quiet()
    with progress_bars("texts") as bars:
        bar = bars.add_task("reading", total=None)
        found = train_preference(
            read,
            folder,
            model=model,
            seed=seed,
            command=shlex.join(["qstar", *sys.argv[1:]]),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    if as_json:
        say_json(found)
        return
    out.print(
        f"{found['pairs']} pairs; right about {found['held_out_accuracy']:.0%} of {found['held_out_pairs']} held-out "
        f"ones ({found['held_out_log_likelihood']:.3f} nats a pair, chance has -0.693)"
    )
    out.print(f'use it: qstar decode PROMPT --reward "preference({str(folder)!r})"', soft_wrap=True)


@app.command()
def demo(
    task: TaskOption = "sentiment",
    budget: Annotated[int, typer.Option(help="LM tokens a prompt, the same for every decoder.")] = 200,
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 3,
    svg: Annotated[Path | None, typer.Option(help="Also write what is printed as a picture.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode held-out prompts with greedy, beam search, best-of-n and Q*, side by side at equal LM tokens."""
    from ..agents import AStarPlanner, BeamSearch, GreedyDecoder, SamplingDecoder, evaluate
    from ..agents.distributed.batch import plan_record
    from ..agents.search.budget import Budget
    from ..envs.prompts import as_prompt
    from ..tasks import load_task

    limits, spec = Budget.of(budget), load_task(task)
    if svg is not None:
        check_writable(svg.parent)
    with status("loading the language model (the first time it is converted: about 10 s)"):
        quiet()
        mdp = spec.mdp()
    heuristic = _heuristic(mdp, spec, None)
    decoders: dict[str, Callable[[DecodingMDP], Decoder]] = {
        "greedy": GreedyDecoder,
        "beam": BeamSearch,
        "best-of-n": SamplingDecoder,
        "Q*": lambda fresh: AStarPlanner(fresh, heuristic=heuristic, **spec.planner),
    }
    outcomes: dict[str, list[Outcomes]] = {name: [] for name in decoders}
    test = spec.prompts.of("test")[:prompts]
    for prompt, name in itertools.product(test, decoders):
        with follow(limits.lm_tokens, f"{name}: {as_prompt(prompt).text}") as show:
            # An empty tree for each: no decoder's seconds profit from what another has computed.
            outcomes[name].append(evaluate(decoders[name](mdp.with_empty_tree()), [prompt], limits, progress=show))
    if as_json:
        rows = {
            name: {
                "mean": _figures(all_found),
                "plans": [plan_record(found.plans[0], 1, name) for found in all_found],
            }
            for name, all_found in outcomes.items()
        }
        say_json({"task": spec.name, "budget": budget, "decoders": rows})
        return
    table = Table(title=f"{spec.name}: J = reward + {mdp.logprob_weight:g} · log-prob, at most {budget} LM tokens each")
    for column in ("decoder", "text"):
        table.add_column(column, overflow="fold", min_width=9)
    for column in _FIGURES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for i in range(len(test)):
        for name, all_found in outcomes.items():
            plan = all_found[i].plans[0]
            shown = Text.assemble((_one_line(plan.prompt), "dim"), _one_line(plan.text))
            table.add_row(name, shown, *_formatted(_figures(all_found[i : i + 1])))
        table.add_section()
    for name, all_found in outcomes.items():
        means = _formatted(_figures(all_found))
        table.add_row(f"[bold]{name}", "[bold]mean", *means, style="bold" if name == "Q*" else "")
    screen = Console(highlight=False, record=True, width=132) if svg else out
    screen.print(table)
    screen.print(Text("How close Q* came to the best text of its tree:", "bold"))
    for found in outcomes["Q*"]:
        screen.print(Text.assemble((f"{_one_line(found.plans[0].prompt)}: ", "dim"), _bounds(found.plans[0])))
    if svg:
        picture = screen.export_svg(title=f"qstar demo --task {spec.name} --budget {budget}")
        # A picture that fetches nothing: without rich's web font, the reader's own monospace font is used.
        svg.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


@app.command()
def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(help="Names of tasks, or paths of YAML files.", autocompletion=complete(known_tasks)),
    ],
    decoders: Annotated[
        str,
        typer.Option(
            help="Names, separated by commas; default: all that can take part.",
            autocompletion=complete(known_contenders, listed=True),
        ),
    ] = "",
    budgets: Annotated[str, typer.Option(help="LM tokens a prompt, separated by commas.")] = "50,100,200,400,800",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the decoders that draw.")] = 3,
    q: Annotated[
        list[str] | None,
        typer.Option("--q", help="Folder of a trained Q, one option per training seed; default: the shipped one."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Where to write; what is finished there is not run again.")
    ] = Path("runs/evaluation"),
    tune: Annotated[bool, typer.Option(help="Tune the decoders on the dev prompts, with 4 trials each.")] = True,
    as_json: JsonOption = False,
    ray: RayOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Compare decoders at equal LM tokens on a task's held-out prompts, and write a report with plots.

    Every decoder that can take part is tuned on the dev prompts with the same number of trials; all share one token
    tree. Each task gets a folder in --out with results.csv, report.md and plots; --out/RESULTS.md has all reports. It
    can be stopped at any moment: what is finished stays.
    """
    from ..agents import pretrained_names
    from ..agents.evaluation.comparison import Comparison
    from ..agents.evaluation.report import write_report
    from ..agents.evaluation.results import Results
    from ..tasks import load_task

    try:
        limits = [int(part) for part in budgets.split(",")]
    except ValueError:
        raise ConfigurationError(f"--budgets is a list such as 50,100,200, got {budgets!r}") from None
    names = [name.strip() for name in decoders.split(",") if name.strip()]
    _check_ray(ray, workers, threads)
    specs = [load_task(task) for task in tasks]
    check_writable(folder)
    quiet()
    reports: dict[str, Path] = {}
    means: dict[str, list[dict[str, Any]]] = {}
    command = shlex.join(["qstar", *sys.argv[1:]])
    for spec in specs:
        qs = q or ([spec.name] if spec.name in pretrained_names() else [])
        with status(f"{spec.name}: loading the language model"):
            comparison = Comparison(
                spec, folder / spec.name, decoders=names, budgets=limits, seeds=seeds, qs=qs, tune=tune
            )
        with _ray_workers(ray, comparison.maker(), workers, threads) as pool, progress_bars("steps") as bars:
            bar = bars.add_task(spec.name, total=None)
            comparison.run(
                lambda text, done, total, bars=bars, bar=bar, name=spec.name: bars.update(  # type: ignore[misc]
                    bar, description=f"{name}: {text}", completed=done, total=total
                ),
                pool,
            )
        reports[spec.name] = write_report(comparison, command, [h.q.description for h in comparison.heuristics])
        if as_json:
            means[spec.name] = Results(comparison.rows(), comparison.budgets).table()
        else:
            out.print(f"{spec.name}: {reports[spec.name]}", soft_wrap=True)
    # The plots lie beside each report; from the folder above they are one step down.
    pages = [path.read_text(encoding="utf-8").replace("![](", f"![]({name}/") for name, path in reports.items()]
    together = folder / "RESULTS.md"
    together.write_text("# Results\n\n" + "\n".join(pages), encoding="utf-8")
    if as_json:
        say_json({"report": str(together), "tasks": means})
    else:
        out.print(f"all: {together}", soft_wrap=True)


PICTURES = ("learning", "errors", "objective", "gap", "calibration", "trace")


@app.command()
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
            autocompletion=complete(known_contenders),
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print what is drawn, as one JSON object.")] = False,
) -> None:
    """Draw what was measured, good enough for a paper: vector graphics, and lines that everybody can tell apart.

    learning and errors draw trainings: J on the dev prompts, and how far Q was off. Folders whose names differ only in
    a number at the end (runs/toy-0, runs/toy-1) are seeds of one setting: their mean is drawn, and range. A source
    LABEL=FOLDER is called LABEL. objective, gap and calibration draw evaluations, one panel per task; trace draws how
    the LB and UB of searches closed in on each other.
    """
    from ..agents.evaluation import plots
    from ..agents.evaluation.calibration import Calibration
    from ..agents.evaluation.curves import read_curves
    from ..agents.evaluation.results import Results

    if kind not in PICTURES:
        raise UnknownNameError("picture", kind, PICTURES)
    path = path or Path(f"{kind}.svg")
    plots.check_path(path)
    check_writable(path.parent)
    drawn: Any
    if kind == "trace":
        traces = _traces(sources)
        figure, drawn = plots.plot_traces(traces), plots.trace_lines(traces)
    elif kind in ("learning", "errors"):
        groups: dict[str, list[Curves]] = {}
        for label, folder in map(_labelled, sources):
            groups.setdefault(label, []).append(read_curves(folder))
        names = _curves(kind, groups, curves or [])
        figure, drawn = plots.plot_curves(groups, names), {name: plots.run_lines(groups, name) for name in names}
    elif kind == "calibration":
        compared = {found.parent.name: Calibration.read(found) for found in _find("calibration.npz", sources)}
        figure = plots.plot_calibration(compared)
        drawn = {name: one.summary() for name, one in compared.items()}
    else:
        results = [Results.read(found) for found in _find("results.csv", sources)]
        chosen = highlight or plots.standing_out(kind)
        figure = plots.plot_results(results, kind, chosen)
        drawn = {result.task: plots.result_lines(result, kind, chosen) for result in results}
    plots.save(figure, path)
    if as_json:
        say_json({"file": str(path), "kind": kind, "drawn": drawn})
    else:
        out.print(str(path), soft_wrap=True)


@app.command()
def explore(
    host: Annotated[
        str, typer.Option(help="Where to listen; other than loopback lets others decode here.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8321,
) -> None:
    """Serve a page to watch searches with your own eyes, compare decoders, look into trees, and go on from nodes."""
    try:
        from ..explorer.server import serve
    except ImportError as error:
        raise ConfigurationError(
            f"the explorer needs FastAPI and uvicorn ({error}): run pip install fastapi uvicorn"
        ) from error
    quiet()
    serve(host, port)


@app.command()
def tasks(as_json: JsonOption = False) -> None:
    """List the tasks that come along."""
    from ..agents import pretrained_names
    from ..tasks import load_task, task_names

    rows: list[dict[str, Any]] = []
    for name in task_names():
        try:
            task = load_task(name)
        except QStarError as error:  # of a generator whose library is not installed
            rows.append({"name": name, "error": str(error)})
            continue
        counts = {split: len(task.prompts.of(split)) for split in ("train", "dev", "test")}
        shipped = name in pretrained_names()
        rows.append({"name": name, "description": task.description, "prompts": counts, "shipped_q": shipped})
    if as_json:
        say_json({"tasks": rows})
        return
    table = Table("task", "what", "train / dev / test", "Q shipped")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], Text(row["error"], style="dim"), "", "")
        else:
            prompts = " / ".join(map(str, row["prompts"].values()))
            table.add_row(row["name"], row["description"], prompts, "yes" if row["shipped_q"] else "")
    out.print(table)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the language models known by name, and the Q-functions that come along; hub ids and folders work too."""
    from ..agents import pretrained_names
    from ..agents.learning.q_function import QFunction
    from ..models.embedded_model import EMBEDDED_MODELS, cache_folder, gguf_path, is_intact

    known = []
    for name, model in EMBEDDED_MODELS.items():
        folder = cache_folder() / "models" / name
        state = "ready" if is_intact(folder) else "in its wheel" if gguf_path(model) else "on the hub"
        known.append({"name": name, "hub_id": model.hub_id, "state": state, "folder": str(folder)})
    learned = []
    for name in pretrained_names():
        q = QFunction.from_pretrained(name)
        made_for = {"model": q.spec.model, "top_k": q.spec.top_k} if q.spec else {}
        learned.append({"name": name, **made_for, **q.description})
    if as_json:
        say_json({"language_models": known, "q_functions": learned})
        return
    table = Table("language model", "hub id", "state")
    for row in known:
        table.add_row(row["name"], row["hub_id"], row["state"])
    out.print(table)
    table = Table("Q-function", "of the model", "k", "made by")
    for row in learned:
        table.add_row(row["name"], row["model"], str(row["top_k"]), row.get("command", ""))
    out.print(table)


@app.command()
def doctor(
    self_test: Annotated[bool, typer.Option(help="Also decode, some ten seconds.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, whether it works, and what to do where it does not; exit code 1 if something is broken."""
    from .doctor import examine

    quiet()
    findings = []
    style = {"good": "green", "note": "yellow", "bad": "bold red"}
    for finding in examine(self_test):
        findings.append(finding._asdict())
        if not as_json:
            line = Text.assemble((f"{finding.status:<5}", style[finding.status]), f"{finding.check}: {finding.detail}")
            out.print(line, soft_wrap=True)
            if finding.remedy:
                out.print(Text(f"      → {finding.remedy}"), soft_wrap=True)
    broken = any(finding["status"] == "bad" for finding in findings)
    if as_json:
        say_json({"healthy": not broken, "findings": findings})
    raise typer.Exit(int(broken))


# ---------------------------------------------------------------------------------------------------------------------


def _heuristic(mdp: DecodingMDP, task: Task, q: str | None, *, adapted: bool = False) -> Any:
    """Return the Q-heuristic that was asked for, or the task's own where it fits, else the bound."""
    from ..agents import BoundHeuristic, QHeuristic, pretrained_names
    from ..agents.learning.q_heuristic import shipped_heuristic

    if q == "none":
        return BoundHeuristic()
    if q is not None:
        heuristic = QHeuristic(q)
        heuristic.q.check(mdp)
        return heuristic
    if adapted and task.name in pretrained_names():
        err.print(
            f"note: the shipped Q knows the task's own reward only; using the bound instead (--q {task.name} takes it "
            "all the same)",
            soft_wrap=True,
        )
        return BoundHeuristic()
    shipped, misfit = shipped_heuristic(task.name, mdp)
    if misfit:
        err.print(f"note: the shipped Q does not fit, using the bound instead ({misfit})", soft_wrap=True)
    return shipped


def _labelled(source: str) -> tuple[str, Path]:
    """Return what a run is called, and its folder: LABEL=FOLDER, or the folder's name without a seed at its end."""
    label, _, rest = source.rpartition("=")
    folder = Path(source if Path(source).exists() or not label else rest)
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {str(folder)!r}; give what qstar train wrote")
    name = folder.resolve().name
    return label or re.sub(r"[-_]\d+$", "", name) or name, folder


def _curves(kind: str, groups: Mapping[str, Sequence[Curves]], asked: Sequence[str]) -> list[str]:
    """Return which quantities are drawn: those that were asked for, or what the picture is about."""
    known = sorted({name for runs in groups.values() for run in runs for name in run}, key=_by_number)
    for name in asked:
        if name not in known:
            raise UnknownNameError("quantity", name, known)
    if asked:
        return list(asked)
    for beginning in ("calibration/",) if kind == "errors" else ("held_out/", "rollout/"):
        if names := [name for name in known if name.startswith(beginning)]:
            return names
    raise ConfigurationError(f"nothing to draw by default; choose with --curve from {', '.join(known)}")


def _by_number(name: str) -> tuple[str, int]:
    """Order objective_50 before objective_200."""
    word, number = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    return word, int(number or 0)


def _find(name: str, folders: Iterable[str]) -> list[Path]:
    """Return the files of that name in the folders of ``qstar evaluate``, or one step below them."""
    found = []
    for folder in map(Path, folders):
        here = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
        if not here:
            raise ConfigurationError(
                f"there is no {name} in {str(folder)!r} nor one step below; give what qstar evaluate wrote"
            )
        found += here
    return found


def _traces(sources: Iterable[str]) -> dict[str, list[TracePoint]]:
    """Read the traces of plans that ``qstar decode --json`` has printed, one JSON object a line."""
    from ..agents.search.budget import TracePoint

    plans = []
    for source in sources:
        text = read_stdin() if source == "-" else Path(source).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                plan = json.loads(line)
                trace = [
                    TracePoint(tokens, seconds, *(math.nan if bound is None else bound for bound in bounds))
                    for tokens, seconds, *bounds in plan["trace"]
                ]
            except (ValueError, KeyError, TypeError) as error:
                where = "standard input" if source == "-" else source
                raise ConfigurationError(
                    f"{where}, line {number} is not a plan of qstar decode --json: {error!r}"
                ) from error
            plans.append((plan, trace))
    # Told apart by what they differ in.
    keys = [key for key in ("decoder", "prompt") if len({plan.get(key) for plan, _ in plans}) > 1]
    traces: dict[str, list[TracePoint]] = {}
    for number, (plan, trace) in enumerate(plans, start=1):
        label = ": ".join(str(plan.get(key)) for key in keys) or plan.get("decoder", "")
        traces[f"{label} ({number})" if label in traces else label] = trace
    if not traces:
        raise ConfigurationError("there is no plan to draw the trace of; give files of qstar decode --json")
    return traces


def _read_lines(source: Path, keep_going: bool) -> tuple[dict[int, Prompt], dict[int, str]]:
    """Return a file's prompts and its broken lines, by line number."""
    from ..envs.prompts import Prompt, read_lines

    found = read_lines(Path("standard input.jsonl"), read_stdin()) if str(source) == "-" else read_lines(source)
    lines: dict[int, Prompt] = {}
    broken: dict[int, str] = {}
    for number, prompt in found:
        if isinstance(prompt, Prompt):
            lines[number] = prompt
        elif keep_going:
            broken[number] = str(prompt)
        else:
            raise prompt
    if not lines:
        raise PromptError(f"there is no prompt in {source}" + "".join(f"; {error}" for error in broken.values()))
    return lines, broken


def _decode_lines(
    lines: Mapping[int, Prompt],
    broken: Mapping[int, str],
    workers: Workers,
    results: Path | None,
    settings: Mapping[str, Any],
    keep_going: bool,
) -> None:
    """Decode the prompts of a file, and leave with exit code 1 if any could not be."""
    from ..agents.distributed.batch import ResultsFile, decode_many

    file = None if results is None else ResultsFile(results, lines, settings)
    failed, waiting, order = dict(broken), {}, deque(sorted(lines))
    left = {number: prompt for number, prompt in lines.items() if file is None or number not in file.done}
    try:
        with progress_bars("prompts") as bars:
            bar = bars.add_task("decoding", total=len(lines), completed=len(lines) - len(left))
            for record in decode_many(left, workers, keep_going=keep_going):
                bars.advance(bar)
                if "error" in record:
                    failed[record["line"]] = f"line {record['line']}: {record['error']}"
                if file is not None:
                    file.add(record)
                    continue
                waiting[record["line"]] = record
                while order and order[0] in waiting:
                    sys.stdout.write(json.dumps(waiting.pop(order.popleft()), ensure_ascii=False) + "\n")
                    sys.stdout.flush()
    finally:
        if file is not None:
            file.close()
    for _, error in sorted(failed.items()):
        err.print(Text.assemble(("failed: ", "bold red"), error), soft_wrap=True)
    if results is not None:
        before = len(lines) - len(left)
        err.print(
            f"{len(left) + len(broken) - len(failed)} prompts decoded, {before} had been before, {len(failed)} failed: "
            f"{results}",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


def _check_ray(address: str | None, count: int | None, threads: int) -> None:
    """Find out before any long work whether there is a cluster."""
    from ..agents.distributed.ray_workers import check_address

    if address is not None:
        check_address(address)
    elif count is not None or threads != 1:
        raise ConfigurationError("--workers and --threads are those of a Ray cluster; give --ray too")


@contextmanager
def _ray_workers(
    address: str | None, make: Callable[[], Any], count: int | None, threads: int
) -> Iterator[RayWorkers | None]:
    """Give workers on a Ray cluster, if one is asked for."""
    from ..agents.distributed.ray_workers import RayWorkers

    if address is None:
        yield None
        return
    with status(f"connecting to Ray at {address}"):
        workers = RayWorkers(address, make, count=count, threads=threads)
    with workers:
        yield workers


def _watch(checkpoint: Path, every: int, command: str, progress: Callable[[int], None]) -> Any:
    """Return a callback that saves checkpoints between rounds, tells ``progress``, and counts all runs' seconds."""
    from stable_baselines3.common.callbacks import BaseCallback

    from ..agents.learning.checkpoints import find_checkpoint, load_q_function

    class Watch(BaseCallback):
        model: QStar

        def __init__(self) -> None:
            super().__init__()
            before = find_checkpoint(checkpoint)
            self.before: float = load_q_function(before).description.get("seconds", 0.0) if before else 0.0
            self.started, self.last = time.perf_counter(), -1

        @property
        def seconds(self) -> float:
            return self.before + time.perf_counter() - self.started

        def save(self, agent: QStar) -> None:
            agent.save(checkpoint, command=command, seconds=self.seconds)

        def _on_step(self) -> bool:
            progress(self.num_timesteps)
            return True

        def _on_rollout_start(self) -> None:
            if self.last < 0:
                self.last = self.num_timesteps
            elif self.num_timesteps - self.last >= every:
                self.last = self.num_timesteps
                self.save(self.model)

    return Watch()


# What is said of a decoder, by name in JSON and as the head of a column, and how its numbers are written.
_FIGURES = {
    "reward": "reward",
    "logprob": "log-prob",
    "objective": "J",
    "lm_tokens": "LM tokens",
    "seconds": "seconds",
}
_FORMATS = (".3f", ".2f", ".3f", ".0f", ".1f")


def _held_out(agent: QStar, task: Task) -> dict[str, dict[str, float]]:
    """Return what Q is worth on the task's test prompts, beside decoders that have none."""
    from ..agents import AStarPlanner, GreedyDecoder, QHeuristic, SamplingDecoder, evaluate
    from ..envs.mdp import mdp_of

    mdp, prompts = mdp_of(agent.get_env()), task.prompts.of("test")
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
    figures = {}
    for name, decoder, budget in decoders:
        with status(f"held-out prompts: {name}"):
            figures[name] = _figures([evaluate(decoder, prompts, budget)])
    return figures


def _figures(outcomes: list[Outcomes]) -> dict[str, float]:
    """Return the means of what :data:`_FIGURES` names."""
    import numpy as np

    plans = [plan for found in outcomes for plan in found.plans]
    means = (
        np.nanmean(np.concatenate([found.rewards for found in outcomes])),
        np.mean([plan.logprob for plan in plans]),
        np.nanmean(np.concatenate([found.objectives for found in outcomes])),
        np.mean([plan.usage.lm_tokens for plan in plans]),
        np.mean([plan.usage.seconds for plan in plans]),
    )
    return {name: round(float(value), 4) for name, value in zip(_FIGURES, means, strict=True)}


def _formatted(figures: Mapping[str, float]) -> list[str]:
    return [f"{value:{form}}" for value, form in zip(figures.values(), _FORMATS, strict=True)]


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _bounds(plan: Plan) -> str:
    state = "certified optimal" if plan.certified else f"gap {number_text(plan.gap)}"
    return (
        f"LB {number_text(plan.lower_bound)}, UB {number_text(plan.upper_bound)} ({plan.scope}): {state}; "
        f"{plan.usage.lm_tokens} LM tokens, {plan.usage.reward_calls} texts scored, {plan.usage.seconds:.1f} s; "
        f"stopped: {plan.stop_reason}"
    )
