"""Curves of trainings and traces of searches, read from the files that ``qstar train`` and ``qstar decode`` wrote."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ...checks import describe_invalid
from ...errors import ConfigurationError, PromptError, UnknownNameError
from ...files import read_text
from ..search.budget import TracePoint

__all__ = ["Curves", "find_files", "group_runs", "pick_quantities", "read_curves", "read_points", "read_traces"]

# Of each quantity that was logged, the steps and the values.
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]

_POINT: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])


class _TracedPlan(BaseModel):
    """The part of a plan's JSON that is drawn."""

    prompt: str = ""
    decoder: str = ""
    trace: Annotated[list[tuple[int, float, float | None, float | None]], Field(min_length=1)]


def read_points(path: Path, *, resumed: bool = False) -> list[dict[str, float]]:
    """Return the lines of a diagnostics.jsonl: quantities by name, ``time_steps`` among them.

    Args:
        path: The file.
        resumed: Whether a training goes on with the file. A last line without its end, which a kill leaves, is then
            left out, since it is measured again.

    Raises:
        ConfigurationError: A line is something else.
    """
    points, lines = [], read_text(path).splitlines(keepends=True)
    if resumed and lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            point = _POINT.validate_json(line)
        except ValidationError as error:
            raise ConfigurationError(
                f"{path}, line {number} is not JSON with numbers by name: {describe_invalid(error)}"
            ) from error
        if not math.isfinite(point.get("time_steps", math.nan)):
            raise ConfigurationError(f"{path}, line {number} has no time_steps; delete the line")
        points.append(point)
    return points


def read_curves(folder: Path) -> Curves:
    """Return what a training has logged into a folder: diagnostics.jsonl, and the scalars of TensorBoard's files below.

    Returns:
        Of each quantity its steps and values, the steps ascending. Where a run was resumed, the later value counts.

    Raises:
        ConfigurationError: Nothing was logged there, or a file is broken.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    curves: dict[str, dict[float, float]] = {}
    for events in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        try:
            log = EventAccumulator(str(events), size_guidance={SCALARS: 0}).Reload()
        except Exception as error:  # TensorBoard raises what its parsers raise
            raise ConfigurationError(f"{events} is not a log of TensorBoard: {error}; delete it") from error
        for name in log.Tags()[SCALARS]:
            curves.setdefault(name, {}).update((event.step, event.value) for event in log.Scalars(name))
    if (path := folder / "diagnostics.jsonl").is_file():
        points = read_points(path)
        for name in {name for point in points for name in point if name != "time_steps"}:
            curves[name] = {point["time_steps"]: point[name] for point in points if name in point}
    if not curves:
        raise ConfigurationError(
            f"{folder} has no diagnostics.jsonl and no TensorBoard log; give what qstar train wrote"
        )
    return {name: (sorted(found), [found[step] for step in sorted(found)]) for name, found in sorted(curves.items())}


def group_runs(sources: Iterable[str]) -> dict[str, list[Curves]]:
    """Read the curves of runs, and group those that differ in their seed only.

    Args:
        sources: Folders of trainings, or ``LABEL=FOLDER``. Without a label a run is called as its folder, a number at
            the end left out.

    Raises:
        ConfigurationError: There is no such folder, or nothing was logged there.
    """
    groups: dict[str, list[Curves]] = {}
    for source in sources:
        label, _, rest = source.rpartition("=")
        folder = Path(source if Path(source).exists() or not label else rest)
        if not folder.is_dir():
            raise ConfigurationError(f"there is no folder {str(folder)!r}; give what qstar train wrote")
        name = folder.resolve().name
        groups.setdefault(label or re.sub(r"[-_]\d+$", "", name) or name, []).append(read_curves(folder))
    return groups


def pick_quantities(groups: Mapping[str, Sequence[Curves]], asked: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """Return the quantities to draw: those asked for, else all that begin with the first prefix that any begins with.

    Raises:
        UnknownNameError: No run has a quantity that was asked for.
        ConfigurationError: None was asked for, and none begins with a prefix.
    """
    known = sorted({name for runs in groups.values() for run in runs for name in run}, key=_by_number)
    for name in asked:
        if name not in known:
            raise UnknownNameError("quantity", name, known)
    if asked:
        return list(asked)
    for prefix in prefixes:
        if names := [name for name in known if name.startswith(prefix)]:
            return names
    raise ConfigurationError(f"nothing to draw by default; choose with --curve from {', '.join(known)}")


def _by_number(name: str) -> tuple[str, int]:
    """Order objective_50 before objective_200."""
    digits = len(name) - len(name.rstrip("0123456789"))
    return name[: len(name) - digits], int(name[len(name) - digits :] or 0)


def find_files(name: str, folders: Iterable[str]) -> list[Path]:
    """Return the files of that name in folders of ``qstar evaluate``, or one step below them.

    Raises:
        ConfigurationError: A folder has none.
    """
    found = []
    for folder in map(Path, folders):
        here = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
        if not here:
            raise ConfigurationError(
                f"there is no {name} in {str(folder)!r} nor one step below; give what qstar evaluate wrote"
            )
        found += here
    return found


def read_traces(sources: Iterable[str]) -> dict[str, list[TracePoint]]:
    """Read the traces of plans that ``qstar decode --json`` printed, one JSON object a line.

    Args:
        sources: Paths of files; ``"-"`` is standard input.

    Returns:
        A trace by label. Labels name the decoder and the prompt, as far as the plans differ in them.

    Raises:
        ConfigurationError: There is no plan, or a line is something else.
        PromptError: Standard input is not text.
    """
    plans: list[_TracedPlan] = []
    for source in sources:
        text, where = (_read_stdin(), "standard input") if source == "-" else (read_text(Path(source)), source)
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                plans.append(_TracedPlan.model_validate_json(line))
            except ValidationError as error:
                raise ConfigurationError(
                    f"{where}, line {number} is not a plan of qstar decode --json: {describe_invalid(error)}"
                ) from error
    keys = [key for key in ("decoder", "prompt") if len({getattr(plan, key) for plan in plans}) > 1]
    traces: dict[str, list[TracePoint]] = {}
    for number, plan in enumerate(plans, start=1):
        label = ": ".join(getattr(plan, key) for key in keys) or plan.decoder
        traces[f"{label} ({number})" if label in traces else label] = [
            TracePoint(tokens, seconds, *(math.nan if bound is None else bound for bound in bounds))
            for tokens, seconds, *bounds in plan.trace
        ]
    if not traces:
        raise ConfigurationError("there is no plan to draw the trace of; give files of qstar decode --json")
    return traces


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not {sys.stdin.encoding}: {error}") from error
