"""Commands that decode: ``qstar decode`` and ``qstar demo``."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..agents.planning.registry import DECODERS, by_command
from ..errors import ConfigurationError, PromptError
from .console import err, follow, json_line, number_text, out, quiet, read_stdin, report_progress, say, say_json, status
from .options import (
    EngineOption,
    JsonOption,
    RayOption,
    TaskOption,
    ThreadsOption,
    TrustOption,
    WorkersOption,
    complete,
    known_models,
    known_rewards,
    prepare_file,
    workers_on,
)

if TYPE_CHECKING:
    from ..agents import Decoder, OnlineLearner, Plan
    from ..agents.distributed.jobs import Workers
    from ..envs import Completion, DecodingMDP, Prompt
    from ..tasks import Task

__all__ = ["FIGURES", "decode", "demo", "formatted"]

# Figures of a decoder: their names in JSON, their heads in tables, and their formats.
FIGURES = {
    "reward": ("reward", ".3f"),
    "logprob": ("log-prob", ".2f"),
    "objective": ("J", ".3f"),
    "lm_tokens": ("LM tokens", ".0f"),
    "seconds": ("seconds", ".1f"),
}


def formatted(figures: Mapping[str, float]) -> list[str]:
    """Return figures as the cells of a table."""
    return [f"{figures[name]:{form}}" for name, (_, form) in FIGURES.items()]


def decode(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; '-' reads standard input.")] = None,
    task: TaskOption = "review",
    decoder: Annotated[
        str,
        typer.Option(
            help=f"{', '.join([*DECODERS][:-1])} or {[*DECODERS][-1]}.", autocompletion=complete(lambda: DECODERS)
        ),
    ] = "astar",
    budget: Annotated[int, typer.Option(help="LM tokens that the search may process.")] = 200,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of the best texts to show.")] = 1,
    q: Annotated[
        str | None, typer.Option("--q", help="Folder of a trained Q, or 'none'; default: the one shipped for the task.")
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(help="Folder of a Q that learns from every search; made if there is none, else gone on with."),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help='Reward in place of the task\'s, e.g. "0.5 * sentiment".', autocompletion=complete(known_rewards)
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Known name, hub id or local folder of a causal LM.", autocompletion=complete(known_models)),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidate tokens per step.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The horizon, in tokens.")] = None,
    logprob_weight: Annotated[float | None, typer.Option(help="α, the weight of fluency.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="File of a grammar, Lark or GBNF, that the completion keeps to.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of decoders that draw.")] = 0,
    tree: Annotated[Path | None, typer.Option(help="HTML page to write the searched tree into.")] = None,
    as_json: JsonOption = False,
    source: Annotated[
        Path | None,
        typer.Option("--input", help="File of many prompts: .jsonl, or text with one a line; '-' reads JSONL."),
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
    engine: EngineOption = None,
    trust: TrustOption = False,
) -> None:
    """Continue a prompt and say how good the result is and how close to the optimum.

    Without --q, decoders that use Q take the Q-function shipped for the task. If there is none, or if --model or
    --top-k changed the task, they take the bound, which needs no training.

    With --input, every line of a file is a prompt; in .jsonl it is a string, or an object with the key "prompt". Every
    result is one line of JSON, in the order of the input.
    """
    from ..agents.planning.registry import decoder_options, make_decoder
    from ..agents.search.budget import Budget
    from ..envs import GrammarConstraint
    from ..envs.prompts import as_prompt
    from ..files import read_text
    from ..tasks import load_task

    chosen = by_command(decoder)
    if learn is not None and decoder != "astar":
        raise ConfigurationError(f"--learn is for --decoder astar, got {decoder}")
    if tree is not None:
        prepare_file(tree)
    if (prompt is None) == (source is None):
        raise ConfigurationError("give one prompt, or --input with a file of them")
    if source is None and (ray is not None or results is not None or keep_going):
        raise ConfigurationError("--ray, --out and --keep-going are for many prompts; give them with --input")
    if source is not None and tree is not None:
        raise ConfigurationError("--tree is for one prompt; give the prompt instead of --input")
    start_workers = workers_on(ray, workers, threads)
    lines, broken = ({}, {}) if source is None else _read_lines(source, keep_going)
    text = read_stdin().strip() if prompt == "-" else prompt
    limits, start = Budget.of(budget), None if text is None else as_prompt(text)
    spec = load_task(task, trust_remote_code=trust, engine=engine)
    constraint: dict[str, Any] = {} if grammar is None else {"constraint": GrammarConstraint(read_text(grammar))}
    changes = {
        "model": model,
        "reward": reward,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "logprob_weight": logprob_weight,
    }
    new_mdp = partial(spec.mdp, **{key: value for key, value in changes.items() if value is not None}, **constraint)
    learner = None
    with contextlib.ExitStack() as stack:
        if learn is None:
            mdp = _loaded(new_mdp)
        else:
            learner = stack.enter_context(_learner(learn, new_mdp, spec, seed))
            mdp = learner.mdp
        adapted = reward is not None and learner is None
        heuristic = _heuristic(mdp, spec, q, adapted=adapted) if chosen.uses == "q" else None
        options = decoder_options(decoder, spec.planner, heuristic, seed)
        learning = {} if learner is None else {"learn": learner}
        if source is not None:
            from ..agents.distributed.batch import BatchDecoder
            from ..agents.distributed.jobs import InProcess

            learned = getattr(heuristic, "q", None)
            settings = {
                "task": spec.model_dump(mode="json", include={"env", "planner"}),
                "changes": changes | {name: repr(value) for name, value in constraint.items()},
                "decoder": [decoder, budget, n, seed, learned and learned.fingerprint()],
                **({} if learn is None else {"learn": True}),
            }
            pool: Workers
            if start_workers is None:
                planner = make_decoder(decoder, mdp, **options, **learning)
                pool = InProcess(BatchDecoder(planner, decoder, limits, n))
            elif learner is not None:
                from ..agents.learning import LearningDecoder, LearningWorkers

                make = partial(LearningDecoder, new_mdp, options, limits, n)
                pool = LearningWorkers(stack.enter_context(start_workers(make)), learner)
            else:
                pool = stack.enter_context(
                    start_workers(partial(BatchDecoder.make, new_mdp, decoder, options, limits, n))
                )
            _decode_lines(lines, broken, pool, results, settings, keep_going)
            return
        planner = make_decoder(decoder, mdp, **options, **learning)
        with follow(limits.lm_tokens) as show:
            plan = planner.plan(start, limits, progress=show)
        if tree is not None:
            plan.tree.to_html(tree)
        if as_json:
            from ..agents.distributed.batch import plan_record

            say_json(plan_record(plan, n, decoder))
        else:
            _say_plan(plan, n, mdp, budget)
    raise typer.Exit(130 if plan.stop_reason == "interrupted" else 0)


def demo(
    task: TaskOption = "review",
    budget: Annotated[int, typer.Option(help="LM tokens a prompt, the same for every decoder.")] = 200,
    prompts: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 3,
    svg: Annotated[Path | None, typer.Option(help="Picture to write the output into.")] = None,
    as_json: JsonOption = False,
    engine: EngineOption = None,
    trust: TrustOption = False,
) -> None:
    """Decode held-out prompts with greedy, beam search, best-of-n and Q*, side by side at equal LM tokens."""
    from ..agents import AStarPlanner, BeamSearch, GreedyDecoder, SamplingDecoder, mean_figures
    from ..agents.distributed.batch import plan_record
    from ..agents.evaluation.outcomes import side_by_side
    from ..agents.search.budget import Budget
    from ..tasks import load_task

    limits, spec = Budget.of(budget), load_task(task, trust_remote_code=trust, engine=engine)
    if svg is not None:
        prepare_file(svg)
    with status("loading the language model (the first time it is converted: about 10 s)"):
        quiet()
        mdp = spec.mdp()
    heuristic = _heuristic(mdp, spec, None)
    makers: dict[str, Callable[[DecodingMDP], Decoder]] = {
        "greedy": GreedyDecoder,
        "beam": BeamSearch,
        "best-of-n": SamplingDecoder,
        "Q*": partial(AStarPlanner, heuristic=heuristic, **spec.planner),
    }
    with follow(limits.lm_tokens) as show:
        outcomes = side_by_side(makers, mdp, spec.prompts.of("test")[:prompts], limits, progress=show)
    if as_json:
        rows = {
            name: {"mean": mean_figures(found), "plans": [plan_record(one.plans[0], 1, name) for one in found]}
            for name, found in outcomes.items()
        }
        say_json({"task": spec.name, "budget": budget, "decoders": rows})
        return
    table = Table(title=f"{spec.name}: J = reward + {mdp.logprob_weight:g} · log-prob, at most {budget} LM tokens each")
    for column in ("decoder", "text"):
        table.add_column(column, overflow="fold", min_width=9)
    for column, _ in FIGURES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for each in zip(*outcomes.values(), strict=True):  # the outcomes of one prompt
        for name, found in zip(outcomes, each, strict=True):
            plan = found.plans[0]
            shown = Text.assemble((_one_line(plan.prompt), "dim"), _one_line(plan.text))
            table.add_row(name, shown, *formatted(mean_figures([found])))
        table.add_section()
    for name, all_found in outcomes.items():
        means = formatted(mean_figures(all_found))
        table.add_row(Text(name, "bold"), Text("mean", "bold"), *means, style="bold" if name == "Q*" else "")
    screen = Console(highlight=False, record=True, width=132) if svg else out
    screen.print(table)
    screen.print(Text("How close Q* came to the best text of its tree:", "bold"))
    for found in outcomes["Q*"]:
        screen.print(Text.assemble((f"{_one_line(found.plans[0].prompt)}: ", "dim"), _bounds(found.plans[0])))
    if svg:
        picture = screen.export_svg(title=f"qstar demo --task {spec.name} --budget {budget}")
        # Without rich's web font the picture fetches nothing, and shows in the reader's own monospace font.
        svg.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


@contextlib.contextmanager
def _learner(folder: Path, new_mdp: Callable[[], DecodingMDP], task: Task, seed: int) -> Iterator[OnlineLearner]:
    """Let a Q learn in a folder while the context lasts, and say at the end which heuristics were used.

    The language model is loaded after the folder was found to be free.
    """
    from ..agents import OnlineLearner, QStar
    from ..agents.learning import environment_like

    def agent(saved: Path | None) -> QStar:
        env = environment_like(_loaded(new_mdp), task.prompts.of("train"), **task.env)
        return QStar(env=env, **{**task.training, "seed": seed}) if saved is None else QStar.load(saved, env)

    with OnlineLearner.open(folder, agent, seed=seed) as learner:
        try:
            yield learner
        finally:
            uses = ", ".join(
                f"{name} {use.searches}" + (f" (J {use.objective:.3f})" if use.searches else "")
                for name, use in learner.uses().items()
            )
            err.print(f"heuristics used: {uses}; Q learned for {learner.seconds:.0f} s: {folder}", soft_wrap=True)


def _loaded(new_mdp: Callable[[], DecodingMDP]) -> DecodingMDP:
    with status("loading the language model"):
        quiet()
        return new_mdp()


def _heuristic(mdp: DecodingMDP, task: Task, q: str | None, *, adapted: bool = False) -> Any:
    """Return the Q-heuristic that was asked for, or the task's own where it fits, else the bound."""
    from ..agents import BoundHeuristic, QHeuristic, pretrained_names
    from ..agents.learning.q_heuristic import carried_weight, shipped_heuristic

    if q == "none":
        return BoundHeuristic()
    if q is not None:
        heuristic = QHeuristic(q)
        heuristic.q.check(mdp)
        if note := heuristic.describe_weights(mdp):
            err.print(f"note: {note}", soft_wrap=True)
        return heuristic
    if adapted and task.name in pretrained_names():
        weight = carried_weight(task.env.get("reward", "sentiment"), mdp.reward)
        if not weight:
            err.print(
                "note: the shipped Q knows the task's own reward only, and most of it is no part of this one; using "
                f"the bound instead (--q {task.name} takes it all the same, --learn FOLDER learns another)",
                soft_wrap=True,
            )
            return BoundHeuristic()
        err.print(
            f"note: the shipped Q was trained for the task's own reward, which counts {weight:g} times here; it orders "
            "the search, and J is this reward's (--q none goes without, --learn FOLDER learns another)",
            soft_wrap=True,
        )
    shipped, misfit = shipped_heuristic(task.name, mdp)
    if misfit:
        err.print(f"note: the shipped Q does not fit, using the bound instead ({misfit})", soft_wrap=True)
    return shipped


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
    from ..agents.distributed.batch import ResultsFile, decode_many, in_order

    file = None if results is None else ResultsFile(results, lines, settings)
    failed = dict(broken)
    left = {number: prompt for number, prompt in lines.items() if file is None or number not in file.done}
    before = len(lines) - len(left)

    def records() -> Iterator[dict[str, Any]]:
        with report_progress("prompts") as report:
            report("decoding", before, len(lines))
            for done, record in enumerate(decode_many(left, workers, keep_going=keep_going), start=before + 1):
                report("decoding", done, len(lines))
                if "error" in record:
                    failed[record["line"]] = f"line {record['line']}: {record['error']}"
                yield record

    try:
        for record in records() if file is not None else in_order(records(), lines):
            if file is not None:
                file.add(record)
            else:
                sys.stdout.write(json_line(record) + "\n")
                sys.stdout.flush()
    finally:
        if file is not None:
            file.close()
    for _, error in sorted(failed.items()):
        err.print(Text.assemble(("failed: ", "bold red"), error), soft_wrap=True)
    if results is not None:
        err.print(
            f"{len(left) + len(broken) - len(failed)} prompts decoded, {before} had been before, {len(failed)} failed: "
            f"{results}",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


def _say_plan(plan: Plan, n: int, mdp: DecodingMDP, budget: int) -> None:
    """Print the ``n`` best texts of a plan with their figures, then its bounds."""
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


def _bounds(plan: Plan) -> str:
    state = "certified optimal" if plan.certified else f"gap {number_text(plan.gap)}"
    return (
        f"LB {number_text(plan.lower_bound)}, UB {number_text(plan.upper_bound)} ({plan.scope}): {state}; "
        f"{plan.usage.lm_tokens} LM tokens, {plan.usage.reward_calls} texts scored, {plan.usage.seconds:.1f} s; "
        f"stopped: {plan.stop_reason}"
    )


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")
