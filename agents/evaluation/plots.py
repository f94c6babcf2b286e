"""Pictures: learning curves, J and gap by budget, calibration, the bounds of one search.

Each function takes numbers and returns a matplotlib figure, and :func:`save` writes it. Sizes suit the columns of a
paper. Colours are those of Okabe & Ito (2008), which colour-blind readers tell apart. No two lines differ by colour
alone. matplotlib (the extra ``plots``) is imported when something is drawn.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from ...errors import ConfigurationError, UnknownNameError
from ..search.budget import TracePoint
from ..search.state import Values
from .calibration import Calibration
from .curves import Curves, find_files, group_runs, pick_quantities, read_traces
from .lines import CERTIFYING, HIGHLIGHTED, Line, result_lines, run_lines, standing_out, trace_lines
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "available",
    "check_path",
    "draw",
    "plot_calibration",
    "plot_curves",
    "plot_diagnostics",
    "plot_results",
    "plot_traces",
    "result_lines",
    "run_lines",
    "save",
    "standing_out",
    "trace_lines",
]

# Okabe & Ito without yellow, which is too light for a line on white.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MARKERS = "os^DvPX"

_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 1)), (0, (2, 1)), (0, (1, 1)))

_SUFFIXES = (".svg", ".pdf", ".png")

_RC = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "font.size": 8,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: what publishers ask for
    "savefig.dpi": 200,
    "svg.hashsalt": "qstar",  # the same numbers give the same file
}

_PANEL = 3.4, 2.6  # inches: one column of a page with two

_TRAINING = "LM tokens of training"


P = ParamSpec("P")


def available() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_path(path: Path) -> None:
    """Check, before any work, that a picture could be written there.

    Raises:
        ConfigurationError: The ending is not known, there is no such folder, or matplotlib is not installed.
    """
    if not available():
        raise ConfigurationError('plots need matplotlib: pip install "qstar-decoding[plots]"')
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigurationError(f"a picture's name ends in {', '.join(_SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {str(path.parent)!r} to write {path.name} into; make it first")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, as what the ending of ``path`` says, and return ``path``. The same figure gives the same bytes.

    Raises:
        ConfigurationError: See :func:`check_path`.
    """
    from matplotlib import style

    check_path(path)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with style.context(["default", _RC]):
        figure.savefig(path, metadata=undated)
    return path


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in the project's style, whatever the user's own settings are."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        from matplotlib import style

        with style.context(["default", _RC]):
            return draw(*args, **kwargs)

    return styled


def draw(
    kind: str, sources: Sequence[str], *, quantities: Sequence[str] = (), names: Sequence[str] = ()
) -> tuple[Figure, Any]:
    """Draw a picture from files.

    Args:
        kind: ``"learning"`` or ``"errors"`` of trainings, ``"objective"``, ``"gap"`` or ``"calibration"`` of
            evaluations, or ``"trace"`` of plans.
        sources: Folders of trainings (see :func:`group_runs`), folders of evaluations, or files of plans.
        quantities: Logged quantities of trainings; by default those that the picture is about.
        names: Decoders that stand out.

    Returns:
        The figure, and the numbers that are drawn.

    Raises:
        ConfigurationError: A source is missing or broken, there is nothing to draw, or an argument is for other kinds.
        UnknownNameError: There is no such quantity, or no such decoder in any source.
    """
    if quantities and kind not in ("learning", "errors"):
        raise ConfigurationError(f"quantities (--curve) are those of learning and errors; leave them out for {kind}")
    if names and kind not in ("objective", "gap"):
        raise ConfigurationError(f"decoders stand out (--highlight) in objective and gap; leave them out for {kind}")
    if kind == "trace":
        traces = read_traces(sources)
        return plot_traces(traces), trace_lines(traces)
    if kind in ("learning", "errors"):
        groups = group_runs(sources)
        prefixes = ("calibration/",) if kind == "errors" else ("held_out/", "rollout/")
        chosen = pick_quantities(groups, quantities, prefixes)
        return plot_curves(groups, chosen), {name: run_lines(groups, name) for name in chosen}
    if kind == "calibration":
        compared = {found.parent.name: Calibration.read(found) for found in find_files("calibration.npz", sources)}
        return plot_calibration(compared), {name: one.summary() for name, one in compared.items()}
    results = [Results.read(found) for found in find_files("results.csv", sources)]
    measured = dict.fromkeys(name for one in results for name in one.names)
    for name in names:
        if name not in measured:
            raise UnknownNameError("decoder", name, measured)
    names = names or standing_out(kind)
    return plot_results(results, kind, names), {one.task: result_lines(one, kind, names) for one in results}


@_styled
def plot_results(results: Sequence[Results], what: str = "objective", names: Sequence[str] = ()) -> Figure:
    """Draw a mean by budget, one panel per comparison.

    Args:
        results: The comparisons.
        what: ``"objective"`` or ``"gap"``; the gap is drawn of ``names`` only.
        names: The decoders that stand out, with their intervals; the others are thin and grey. By default see
            :func:`standing_out`.

    Raises:
        ConfigurationError: There is nothing to draw.
    """
    names = names or standing_out(what)
    label = "mean gap, UB - LB (units of J)" if what == "gap" else "mean J (units of the reward)"
    # The same decoder looks the same in both pictures.
    looks = {name: _look(i) for i, name in enumerate(dict.fromkeys((*HIGHLIGHTED, *CERTIFYING, *names)))}
    colors = {name: looks[name]["color"] for name in names}
    figure, panels = _panels(len(results), (4.4, 2.8) if what == "gap" else (6.2, 4.2), columns=2)
    drawn = [result_lines(result, what, names) for result in results]
    for axes, result, lines in zip(panels, results, drawn, strict=True):
        for line in lines:
            if line.label in names:
                _draw(axes, line, looks[line.label])
            else:
                style = "-" if result.budgeted(line.label) else ":"
                axes.plot(line.x, line.y, color="0.65", linewidth=0.7, linestyle=style, zorder=1)
        axes.set(xscale="log", xlabel="LM tokens a prompt", ylabel=label)
        axes.set_title(f"{result.task}, {result.prompts} prompts; bands are 95 % intervals")
        axes.set_xticks(result.budgets, [f"{budget:,}" for budget in result.budgets])
        axes.minorticks_off()
        axes.margins(x=0.02)
    figure.draw_without_rendering()  # settles the heights that the labels are spread over
    for axes, lines in zip(panels, drawn, strict=True):
        _label_ends(axes, lines, colors)
    return figure


@_styled
def plot_curves(groups: Mapping[str, Sequence[Curves]], names: Sequence[str]) -> Figure:
    """Draw quantities over the training, one panel each, one line per group of runs.

    Args:
        groups: See :func:`run_lines`.
        names: Names of quantities.
    """
    figure, panels = _panels(len(names), _PANEL, columns=3)
    for axes, name in zip(panels, names, strict=True):
        for i, line in enumerate(run_lines(groups, name)):
            _draw(axes, line, _look(i))
        axes.set(xlabel=_TRAINING, ylabel=_axis_label(name))
        _thousands(axes)
    counts = {label: len(runs) for label, runs in groups.items()}
    if len(counts) > 1 or max(counts.values()) > 1:
        labels = [f"{label}, mean and range of {n} runs" if n > 1 else label for label, n in counts.items()]
        handles = [_handle(_look(i), label) for i, label in enumerate(labels)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(labels), 3))
    return figure


@_styled
def plot_diagnostics(history: Sequence[Mapping[str, float]], compared: Calibration) -> Figure:
    """Draw what :class:`~qstar_decoding.agents.Diagnostics` measured: J by budget, calibration, errors.

    Args:
        history: What was measured, in order.
        compared: The calibration in the end.
    """
    figure, (over_time, scatter, errors) = _panels(3, _PANEL, columns=3)
    run = {name: ([p["time_steps"] for p in history], [p.get(name, math.nan) for p in history]) for name in history[-1]}
    for i, name in enumerate(name for name in run if name.startswith("held_out/")):
        [line] = run_lines({name.rsplit("_", 1)[1]: [run]}, name)
        _draw(over_time, line, _look(i))
    over_time.legend(title="LM tokens a prompt", title_fontsize=7)
    over_time.set(title="A* on held-out prompts", xlabel=_TRAINING, ylabel="mean J (units of the reward)")
    _calibration(scatter, compared)
    for i, name in enumerate(("bias", "mean_violation", "mean_overestimation")):
        [line] = run_lines({name.replace("_", " "): [run]}, f"calibration/{name}")
        _draw(errors, line, _look(i))
    errors.axhline(0, color="black", linewidth=0.8)
    errors.legend()
    errors.set(title=f"errors of Q; {compared.summary()['violations']:.0%} of edges too low", xlabel=_TRAINING)
    errors.set(ylabel="units of J")
    for axes in (over_time, errors):
        _thousands(axes)
    return figure


@_styled
def plot_calibration(compared: Mapping[str, Calibration]) -> Figure:
    """Draw estimates against what was found, one panel per name: on the diagonal Q is right, above it too low."""
    figure, panels = _panels(len(compared), (3.8, 3.2), columns=3)
    for axes, (name, one) in zip(panels, compared.items(), strict=True):
        _calibration(axes, one, name)
    return figure


@_styled
def plot_traces(traces: Mapping[str, Sequence[TracePoint]]) -> Figure:
    """Draw how LB and UB closed in on each other, search by search, in one panel.

    Args:
        traces: Of each search the points of its trace, by what it is called; one alone may be called ``""``.
    """
    figure, [axes] = _panels(1, (4.8, 3.0), columns=1)
    lines = trace_lines(traces)
    for i, (lower, upper) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        look = {"color": _look(i)["color"], "marker": _look(i)["marker"], "markevery": [len(lower.x) - 1]}
        axes.step(lower.x, lower.y, where="post", label=lower.label, **look)
        axes.step(upper.x, upper.y, where="post", label=upper.label, linestyle="--", **look)
        if len(traces) == 1:
            axes.fill_between(lower.x, lower.y, upper.y, step="post", color=look["color"], alpha=0.08, linewidth=0)
    axes.set(xlabel="LM tokens", ylabel="J (units of the reward)")
    figure.legend(loc="outside lower center", ncols=min(len(traces), 3))
    return figure


def _panels(count: int, size: tuple[float, float], columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels of that size (inches), in rows of at most ``columns``."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _look(i: int) -> dict[str, Any]:
    """Return colour, marker and line style of the i-th line: each of them alone tells it from its neighbours."""
    i %= len(_COLORS)
    return {"color": _COLORS[i], "marker": _MARKERS[i], "linestyle": _STYLES[i]}


def _draw(axes: Axes, line: Line, look: Mapping[str, Any]) -> None:
    every = max(1, len(line.x) // 12)  # markers that touch each other say nothing
    axes.plot(line.x, line.y, label=line.label, markevery=every, zorder=3, **look)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0, zorder=2)


def _handle(look: Mapping[str, Any], label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def _calibration(axes: Axes, compared: Calibration, name: str = "calibration") -> None:
    estimate, found = compared.estimate, compared.found
    low, high = np.percentile(np.concatenate((estimate, found)), [0.5, 99.5])
    axes.set_aspect("equal")
    square = low, high, low, high
    cells = axes.hexbin(
        estimate, found, gridsize=30, extent=square, bins="log", cmap="cividis", mincnt=1, linewidths=0.1
    )
    axes.figure.colorbar(cells, ax=axes, label="edges", shrink=0.8)
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    tenths = np.array_split(np.argsort(estimate, kind="stable"), min(10, len(estimate)))
    x, y = (np.array([values[tenth].mean() for tenth in tenths]) for values in (estimate, found))
    quarters = np.array([np.percentile(found[tenth], [25, 75]) for tenth in tenths]).T
    axes.vlines(x, *quarters, color=_COLORS[0], linewidth=1)
    axes.plot(
        x, y, "o", color=_COLORS[0], markeredgecolor="white", markeredgewidth=0.5, label="tenths: mean and quartiles"
    )
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    axes.set(
        title=f"{name}: {len(estimate):,} edges, r = {compared.summary()['correlation']:.2f}",
        xlabel="estimate g + Q (units of J)",
        ylabel="best J found beyond the edge",
        xlim=(low, high),
        ylim=(low, high),
    )


def _label_ends(axes: Axes, lines: Sequence[Line], colors: Mapping[str, str]) -> None:
    """Write each line's label beside its last point, moved up or down so that no two overlap."""
    size = 6.5
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(line.x[-1], line.y[-1]) for line in lines]))[
        :, 1
    ]
    order = np.argsort(ends, kind="stable")
    figure = axes.get_figure(root=True)
    assert figure is not None
    spacing = 1.15 * size / 72 * figure.dpi / axes.get_window_extent().height
    for index, height in zip(order, spread(ends[order], spacing), strict=True):
        line, color = lines[index], colors.get(lines[index].label)
        axes.annotate(
            line.label,
            (line.x[-1], line.y[-1]),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            fontsize=size,
            color=color or "0.35",
            weight="bold" if color else "normal",
            arrowprops={"arrowstyle": "-", "color": color or "0.8", "linewidth": 0.4, "shrinkB": 2, "relpos": (0, 0.5)},
        )


def spread(heights: Values, spacing: float) -> Values:
    """Return ascending ``heights``, moved as little as possible (least squares) to be ``spacing`` apart.

    With i · spacing taken off, this is isotonic regression: neighbours in the wrong order are pooled.
    """
    pools: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        mean, count = float(height) - i * spacing, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    moved: Values = np.repeat([mean for mean, _ in pools], [n for _, n in pools]) + spacing * np.arange(len(heights))
    return moved


def _axis_label(name: str) -> str:
    """Return what stands at the axis of a logged quantity."""
    if match := re.fullmatch(r"held_out/objective_(\d+)", name):
        return f"held-out J at {match[1]} LM tokens"
    if name.startswith("calibration/"):
        quantity = name.removeprefix("calibration/").replace("_", " ")
        unit = {"correlation": "r", "violations": "share of edges"}.get(quantity, "units of J")
        return f"{quantity} of Q ({unit})"
    return name


def _thousands(axes: Axes) -> None:
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
