"""What a comparison found, as a table, a Markdown page and plots.

Means are over the prompts; where a decoder ran with several seeds, each prompt's value is first averaged over them, and
intervals resample the prompts (paired bootstrap, 95 %).
"""

from __future__ import annotations

import csv
import importlib.util
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import Comparison
from .contenders import CONTENDERS
from .diagnostics import Calibration, draw_calibration
from .evaluation import paired_bootstrap
from .search import Values

__all__ = ["Results", "write_report"]

_OURS = "Q*"


class Results:
    """The measurements of one comparison, averaged over seeds.

    Attributes:
        comparison: Where they come from.
        names: The decoders, in the order of :data:`~qstar_decoding.agents.contenders.CONTENDERS`.
    """

    def __init__(self, comparison: Comparison) -> None:
        """Read what is finished."""
        self.comparison = comparison
        self.rows = comparison.rows()
        self.names = [name for name in CONTENDERS if any(row["decoder"] == name for row in self.rows)]
        self._cells: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for row in self.rows:
            self._cells.setdefault((row["decoder"], row["budget"]), []).append(row)

    def has(self, name: str, budget: int) -> bool:
        """Tell whether a decoder's cells of this budget are there."""
        return (name, self._budget(name, budget)) in self._cells

    def per_prompt(self, name: str, budget: int, what: str) -> Values:
        """Return a quantity of each prompt, mean over the seeds, float64 [prompts], NaN where it is not known."""
        rows = self._cells[name, self._budget(name, budget)]
        count = 1 + max(row["prompt_index"] for row in rows)
        total, seen = np.zeros(count), np.zeros(count)
        for row in rows:
            if (value := row[what]) is not None:
                total[row["prompt_index"]] += value
                seen[row["prompt_index"]] += 1
        with np.errstate(invalid="ignore"):
            result: Values = total / seen
        return result

    def mean(self, name: str, budget: int, what: str) -> float:
        """Return the mean over the prompts; NaN where nothing is known."""
        values = self.per_prompt(name, budget, what)
        return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan

    def interval(self, name: str, budget: int, what: str = "objective") -> tuple[float, float]:
        """Return the 95 % interval of the mean."""
        return paired_bootstrap(self.per_prompt(name, budget, what))

    def ahead(self, name: str, budget: int, what: str = "objective") -> tuple[float, float, float]:
        """Return Q* minus a decoder, paired by prompt: mean and 95 % interval."""
        difference = self.per_prompt(_OURS, budget, what) - self.per_prompt(name, budget, what)
        return float(difference.mean()), *paired_bootstrap(difference)

    def perplexity(self, name: str, budget: int) -> float:
        """Return exp of minus the mean log-probability per token of the texts, pooled over the prompts."""
        rows = self._cells[name, self._budget(name, budget)]
        tokens = sum(row["tokens"] for row in rows)
        return math.exp(-sum(row["logprob"] for row in rows) / tokens) if tokens else math.nan

    def distinct(self, name: str, budget: int, n: int = 2) -> float:
        """Return the share of different n-grams of words among all of the texts' (Li et al. 2016), mean over seeds."""
        by_seed: dict[int, list[tuple[str, ...]]] = {}
        for row in self._cells[name, self._budget(name, budget)]:
            words = row["text"].lower().split()
            by_seed.setdefault(row["seed"], []).extend(zip(*(words[i:] for i in range(n)), strict=False))
        shares = [len(set(grams)) / len(grams) for grams in by_seed.values() if grams]
        return float(np.mean(shares)) if shares else math.nan

    def spent(self, name: str, budget: int) -> tuple[float, float, float]:
        """Return the LM tokens that were used: mean, least and most over prompts and seeds."""
        tokens = [row["lm_tokens"] for row in self._cells[name, self._budget(name, budget)]]
        return float(np.mean(tokens)), min(tokens), max(tokens)

    def tokens_for(self, name: str, objective: float) -> float:
        """Return the LM tokens at which a decoder reaches a mean J, between its budgets; infinite if it never does."""
        points = sorted(
            (self.mean(name, budget, "lm_tokens"), self.mean(name, budget, "objective"))
            for budget in self.comparison.budgets
            if self.has(name, budget)
        )
        before: tuple[float, float] | None = None
        for tokens, value in points:
            if value >= objective:
                if before is None or value == before[1]:
                    return tokens
                return before[0] + (objective - before[1]) / (value - before[1]) * (tokens - before[0])
            before = tokens, value
        return math.inf

    def _budget(self, name: str, budget: int) -> int | None:
        return budget if CONTENDERS[name].budgeted else None


def write_report(comparison: Comparison, command: str, training: Sequence[dict[str, Any]] = ()) -> Path:
    """Write results.csv, report.md and, where matplotlib is installed, plots into the comparison's folder.

    Args:
        comparison: A finished one, or what there is of it.
        command: What made it, printed at the top.
        training: What the Q-functions' checkpoints say of themselves.

    Returns:
        The path of report.md.
    """
    results, folder = Results(comparison), comparison.folder
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(results.rows[0]))
        writer.writeheader()
        writer.writerows(results.rows)
    plots: list[str] = []
    if importlib.util.find_spec("matplotlib"):
        plots.append(_plot(results, folder / "objective.svg", "objective", "mean J"))
        if comparison.score == "reward":
            plots.append(_plot(results, folder / "gap.svg", "gap", "mean gap, UB - LB"))
        if compared := comparison.calibration():
            plots.append(_plot_calibration(compared, folder / "calibration.svg"))
    page = [*_heading(results, command), *_main_table(results), *[f"![]({plot})\n" for plot in plots]]
    if _OURS in results.names:
        page += [*_differences(results), *_pay_back(results, training)]
    page += [*_certificates(results), *_costs(results), *_settings(results)]
    path = folder / "report.md"
    path.write_text("\n".join(page) + "\n", encoding="utf-8")
    return path


# -- the page ---------------------------------------------------------------------------------------------------------


def _heading(results: Results, command: str) -> Iterable[str]:
    task, mdp = results.comparison.task, results.comparison.mdp
    count = len(task.prompts.of("test"))
    yield f"## {task.name}\n"
    yield f"{task.description} Made by `{command}` on {platform.machine()}, {platform.system()}.\n"
    seen = (
        "The reward scores finished texts during the search."
        if results.comparison.score == "reward"
        else "No decoder sees the reward: Q alone ranks finished texts."
    )
    yield (
        f"{count} held-out prompts; reward `{mdp.reward.name}`"
        + (f", gold `{task.gold}`" if task.gold else "")
        + f"; α = {mdp.logprob_weight:g}, k = {mdp.top_k}, at most {mdp.max_new_tokens} tokens. {seen}\n"
    )


def _main_table(results: Results) -> Iterable[str]:
    budgets = results.comparison.budgets
    most = budgets[-1]
    gold = results.comparison.gold is not None
    yield f"J by budget of LM tokens a prompt; the columns after it are of the largest budget, {most}.\n"
    columns = [*map(str, budgets), "reward", *(["gold"] if gold else []), "perplexity", "distinct-2", "tokens"]
    columns += ["LM tokens (least to most)", "reward calls"]
    yield _row(["decoder", *columns])
    yield _row(["---", *["---:"] * len(columns)])
    for name in results.names:
        bold = "**" if name == _OURS else ""
        cells = [f"{results.mean(name, b, 'objective'):.3f}" if results.has(name, b) else "" for b in budgets]
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


def _differences(results: Results) -> Iterable[str]:
    budgets = results.comparison.budgets
    yield "Q* minus each, paired by prompt, with 95 % intervals (bold where they exclude 0):\n"
    yield _row(["decoder", *map(str, budgets)])
    yield _row(["---", *["---:"] * len(budgets)])
    for name in results.names:
        if name == _OURS:
            continue
        cells = []
        for budget in budgets:
            if not (results.has(name, budget) and results.has(_OURS, budget)):
                cells.append("")
                continue
            mean, low, high = results.ahead(name, budget)
            bold = "**" if low > 0 or high < 0 else ""
            cells.append(f"{bold}{mean:+.3f}{bold} [{low:+.3f}, {high:+.3f}]")
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
    for budget in results.comparison.budgets:
        if not results.has(_OURS, budget):
            continue
        objective, used = results.mean(_OURS, budget, "objective"), results.mean(_OURS, budget, "lm_tokens")
        other = min(results.tokens_for(name, objective) for name in without)
        # Where no budget was enough, at least the difference to the largest was saved.
        saved = (results.comparison.budgets[-1] if math.isinf(other) else other) - used
        needed = f"not with {results.comparison.budgets[-1]}" if math.isinf(other) else f"{other:.0f}"
        prompts = f"{np.mean(spent) / saved:,.0f} prompts" if saved > 0 else ""
        after = f"at most {prompts}" if prompts and math.isinf(other) else prompts
        yield _row([str(budget), f"{objective:.3f}", needed, after])
    yield ""


def _certificates(results: Results) -> Iterable[str]:
    if results.comparison.score != "reward":
        return
    names = [name for name in ("A* without Q", _OURS) if name in results.names]
    if not names:
        return
    yield "Certified optimal (of the top-k tree), share of the prompts, and mean gap:\n"
    yield _row(["decoder", *map(str, results.comparison.budgets)])
    yield _row(["---", *["---:"] * len(results.comparison.budgets)])
    for name in names:
        cells = [
            f"{results.mean(name, b, 'certified'):.0%}, {results.mean(name, b, 'gap'):.3f}"
            for b in results.comparison.budgets
            if results.has(name, b)
        ]
        yield _row([name, *cells])
    yield ""


def _costs(results: Results) -> Iterable[str]:
    timings = results.comparison.timings()
    if not timings:
        return
    yield f"Alone, prompt after prompt, on an empty tree, with {results.comparison.budgets[-1]} LM tokens:\n"
    yield _row(["decoder", "seconds a prompt", "keys and values, MB"])
    yield _row(["---", "---:", "---:"])
    for name in results.names:
        if name in timings:
            yield _row([name, f"{timings[name]['seconds']:.2f}", f"{timings[name]['kv_bytes'] / 1e6:.1f}"])
    yield ""


def _settings(results: Results) -> Iterable[str]:
    chosen = {name: results.comparison.setting(name) for name in results.names}
    yield "Sources, and the settings chosen on the dev prompts:\n"
    for name in results.names:
        setting = ", ".join(f"{key} = {value}" for key, value in chosen[name].items())
        yield f"- {name}: {CONTENDERS[name].source}" + (f"; {setting}" if setting else "")
    yield ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plot_calibration(compared: Calibration, path: Path) -> str:
    """Draw Q against what was found; return the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    draw_calibration(figure.subplots(), compared)
    figure.savefig(path)
    return path.name


def _plot(results: Results, path: Path, what: str, label: str) -> str:
    """Draw a quantity against the budget with its intervals; return the file's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    budgets = results.comparison.budgets
    for i, name in enumerate(results.names):
        if what == "gap" and name not in ("A* without Q", _OURS, "best-first h=bound"):
            continue
        have = [budget for budget in budgets if results.has(name, budget)]
        values = [results.mean(name, budget, what) for budget in have]
        if not CONTENDERS[name].budgeted:
            axes.axhline(values[0], color="0.6", linewidth=0.8, linestyle=":")
            axes.annotate(name, (have[-1], values[0]), fontsize="x-small", color="0.4", ha="right", va="bottom")
            continue
        color, width = ("black", 2.2) if name == _OURS else (f"C{i}", 1.0)
        axes.plot(have, values, marker="osv^D"[i % 5], markersize=4, label=name, color=color, linewidth=width)
        if name == _OURS or what == "gap":
            low, high = zip(*(results.interval(name, budget, what) for budget in have), strict=True)
            axes.fill_between(have, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel="LM tokens a prompt", ylabel=label, title=results.comparison.task.name)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path)
    return path.name
