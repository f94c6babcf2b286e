"""Report of a comparison: a table of all rows, a Markdown page and plots."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigurationError
from ..planning.registry import CONTENDERS
from . import plots
from .comparison import Comparison
from .results import OURS, Results

__all__ = ["write_report"]

_SHOWN = 3  # prompts whose texts are shown


def write_report(comparison: Comparison, command: str, training: Sequence[dict[str, Any]] = ()) -> Path:
    """Write results.csv, report.md and, where matplotlib is installed, plots into the comparison's folder.

    Args:
        comparison: A comparison; cells that are not finished are left out.
        command: The command that made it, printed at the top.
        training: Descriptions in the Q-functions' checkpoints.

    Returns:
        The path of report.md.
    """
    results, folder = Results(comparison.rows(), comparison.budgets), comparison.folder
    results.write(folder / "results.csv")
    drawn: list[Path] = []
    if plots.available():
        for what in ("objective", "gap") if comparison.score == "reward" else ("objective",):
            try:
                figure = plots.plot_results([results], what)
            except ConfigurationError:  # nothing to draw: no text was finished, or no decoder has a gap
                continue
            drawn.append(plots.save(figure, folder / f"{what}.svg"))
        if compared := comparison.calibration():
            drawn.append(plots.save(plots.plot_calibration({results.task: compared}), folder / "calibration.svg"))
    page = [
        *_heading(comparison, command),
        *_excluded(comparison, results),
        *_main_table(comparison, results),
        *[f"![]({path.name})\n" for path in drawn],
    ]
    if OURS in results.names:
        page += [*_differences(results), *_pay_back(results, training)]
    page += [*_certificates(comparison, results), *_costs(comparison, results)]
    page += [*_texts(results), *_settings(comparison, results)]
    path = folder / "report.md"
    path.write_text("\n".join(page) + "\n", encoding="utf-8")
    return path


# -- the page ---------------------------------------------------------------------------------------------------------


def _heading(comparison: Comparison, command: str) -> Iterable[str]:
    task, mdp = comparison.task, comparison.mdp
    count = len(task.prompts.of("test"))
    yield f"## {task.name}\n"
    weights = getattr(mdp.model, "model", None)  # of transformers; a tabular model has none
    computed = "" if weights is None else f", in {str(weights.dtype).removeprefix('torch.')} on {weights.device.type}"
    yield f"{task.description} Made by `{command}`{computed} ({platform.machine()}, {platform.system()}).\n"
    seen = (
        "The reward scores finished texts during the search."
        if comparison.score == "reward"
        else "No decoder sees the reward: Q alone ranks finished texts."
    )
    yield (
        f"{count} held-out prompts; reward `{mdp.reward.name}`"
        + (f", gold `{task.gold}`" if task.gold else "")
        + f"; α = {mdp.logprob_weight:g}, k = {mdp.top_k}, at most {mdp.max_new_tokens} tokens. {seen}\n"
    )


def _excluded(comparison: Comparison, results: Results) -> Iterable[str]:
    """Say of each decoder that is not in the tables why it is not."""
    reasons: dict[str, list[str]] = {}
    for name in CONTENDERS:
        if name in results.names:
            continue
        if name in comparison.excluded:
            why = comparison.excluded[name]
        else:
            why = "no cell is finished" if name in comparison.names else "not among the decoders asked for"
        reasons.setdefault(why, []).append(name)
    if not reasons:
        return
    missing = f" There is no {OURS} row, so nothing is compared with it." if OURS not in results.names else ""
    yield f"Not in this comparison:{missing}\n"
    for why, names in reasons.items():
        yield f"- {', '.join(names)}: {why}."
    yield ""


def _texts(results: Results) -> Iterable[str]:
    """Show the texts of the first prompts, of the largest budget and the first seed."""
    most = results.budgets[-1]
    yield f"Texts of the first {min(results.prompts, _SHOWN)} prompts, with {most} LM tokens and seed 0:\n"
    for index in range(min(results.prompts, _SHOWN)):
        shown = [
            (name, row) for name in results.names for row in results.rows_at(name, most, prompt_index=index, seed=0)
        ]
        if not shown:
            continue
        yield f"{_code(shown[0][1]['prompt'])}\n"
        yield _row(["decoder", "J", "text"])
        yield _row(["---", "---:", "---"])
        for name, row in shown:
            objective = "" if row["objective"] is None else f"{row['objective']:.3f}"
            unfinished = " (unfinished)" if row["stop"] == "partial" else ""
            yield _row([name, objective, _code(row["text"]) + unfinished])
        yield ""


def _code(text: str) -> str:
    """Return a text as code in one cell of a table, whatever characters it has."""
    text = text.replace("\n", "⏎").replace("\r", "␍").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def _main_table(comparison: Comparison, results: Results) -> Iterable[str]:
    budgets = results.budgets
    most = budgets[-1]
    gold = comparison.gold is not None
    yield f"J by budget of LM tokens a prompt; the columns after it are of the largest budget, {most}.\n"
    columns = [*map(str, budgets), "reward", *(["gold"] if gold else []), "perplexity", "distinct-2", "tokens"]
    columns += ["LM tokens (least to most)", "reward calls"]
    yield _row(["decoder", *columns])
    yield _row(["---", *["---:"] * len(columns)])
    for name in results.names:
        bold = "**" if name == OURS else ""
        cells = [
            f"{results.mean(name, b, 'objective'):.3f}{_mark(results, name, b)}" if results.has(name, b) else ""
            for b in budgets
        ]
        if not CONTENDERS[name].budgeted:
            cells = [cells[0], *[""] * (len(budgets) - 1)]
        if results.has(name, most):
            cells.append(f"{results.mean(name, most, 'reward'):.3f}")
            cells += [f"{results.mean(name, most, 'gold'):.3f}"] if gold else []
            distinct = results.distinct(name, most)
            cells += [f"{results.perplexity(name, most):.2f}", "" if math.isnan(distinct) else f"{distinct:.2f}"]
            cells.append(f"{results.mean(name, most, 'tokens'):.0f}")
            cells.append("{:.0f} ({:.0f} to {:.0f})".format(*results.spent(name, most)))
            cells.append(f"{results.mean(name, most, 'reward_calls'):.0f}")
        yield _row([f"{bold}{name}{bold}", *(f"{bold}{cell}{bold}" if cell else "" for cell in cells)])
    yield ""
    if any(_mark(results, name, b) for name in results.names for b in budgets if results.has(name, b)):
        yield (
            "† The budget did not suffice to finish more than a tenth of the texts. Those are scored as they stand. "
            "Such a J is no completion's and can exceed that of every completion; the plot leaves it out.\n"
        )


def _mark(results: Results, name: str, budget: int) -> str:
    """Return the mark of a mean J that is not one of completions."""
    return "" if results.finishes(name, budget) else "†"


def _differences(results: Results) -> Iterable[str]:
    budgets = results.budgets
    yield "Q* minus each, paired by prompt, with 95 % intervals (bold where they exclude 0):\n"
    yield _row(["decoder", *map(str, budgets)])
    yield _row(["---", *["---:"] * len(budgets)])
    for name in results.names:
        if name == OURS:
            continue
        cells = []
        for budget in budgets:
            if not (results.has(name, budget) and results.has(OURS, budget)):
                cells.append("")
                continue
            mean, low, high = results.ahead(name, budget)
            bold = "**" if low > 0 or high < 0 else ""
            cells.append(f"{bold}{mean:+.3f}{bold} [{low:+.3f}, {high:+.3f}]{_mark(results, name, budget)}")
        yield _row([name, *cells])
    yield ""


def _pay_back(results: Results, training: Sequence[dict[str, Any]]) -> Iterable[str]:
    spent = [int(d["time_steps"]) for d in training if "time_steps" in d]
    without = [name for name in results.names if CONTENDERS[name].uses == "reward" and CONTENDERS[name].budgeted]
    if not spent or not without:
        return
    yield f"Training Q took {np.mean(spent):,.0f} LM tokens. Set against the best decoder without Q:\n"
    yield _row(["Q* at", "its J", "LM tokens of the best without Q for that J", "pays back after"])
    yield _row(["---:", "---:", "---:", "---:"])
    for budget in results.budgets:
        if not results.has(OURS, budget):
            continue
        objective, used = results.mean(OURS, budget, "objective"), results.mean(OURS, budget, "lm_tokens")
        other = min(results.tokens_for(name, objective) for name in without)
        # Where no budget was enough, at least the difference to the largest was saved.
        saved = (results.budgets[-1] if math.isinf(other) else other) - used
        needed = f"not with {results.budgets[-1]}" if math.isinf(other) else f"{other:.0f}"
        prompts = f"{np.mean(spent) / saved:,.0f} prompts" if saved > 0 else ""
        after = f"at most {prompts}" if prompts and math.isinf(other) else prompts
        yield _row([str(budget), f"{objective:.3f}", needed, after])
    yield ""


def _certificates(comparison: Comparison, results: Results) -> Iterable[str]:
    if comparison.score != "reward":
        return
    names = [name for name in ("A* without Q", OURS) if name in results.names]
    if not names:
        return
    yield "Certified optimal (of the top-k tree), share of the prompts, and mean gap:\n"
    yield _row(["decoder", *map(str, results.budgets)])
    yield _row(["---", *["---:"] * len(results.budgets)])
    for name in names:
        cells = [
            f"{results.mean(name, b, 'certified'):.0%}, {results.mean(name, b, 'gap'):.3f}"
            for b in results.budgets
            if results.has(name, b)
        ]
        yield _row([name, *cells])
    yield ""


def _costs(comparison: Comparison, results: Results) -> Iterable[str]:
    timings = comparison.timings()
    if not timings:
        return
    yield f"Alone, prompt after prompt, on an empty tree, with {results.budgets[-1]} LM tokens:\n"
    yield _row(["decoder", "seconds a prompt", "keys and values, MB"])
    yield _row(["---", "---:", "---:"])
    for name in results.names:
        if name in timings:
            yield _row([name, f"{timings[name]['seconds']:.2f}", f"{timings[name]['kv_bytes'] / 1e6:.1f}"])
    yield ""


def _settings(comparison: Comparison, results: Results) -> Iterable[str]:
    chosen = {name: comparison.setting(name) for name in results.names}
    yield "Sources, and the settings chosen on the dev prompts:\n"
    for name in results.names:
        setting = ", ".join(f"{key} = {value}" for key, value in chosen[name].items())
        yield f"- {name}: {CONTENDERS[name].source}" + (f"; {setting}" if setting else "")
    yield ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
