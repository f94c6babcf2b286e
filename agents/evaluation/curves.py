"""Curves that a training has logged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigurationError

if TYPE_CHECKING:
    pass

__all__ = ["Curves"]


def read_curves(folder: Path) -> Curves:
    """Return what a training has logged into a folder: diagnostics.jsonl, and the scalars of TensorBoard's files below.

    Returns:
        Of each quantity its steps and values, the steps ascending. Where a run was resumed, the later value counts.

    Raises:
        ConfigurationError: Nothing was logged there.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    curves: dict[str, dict[float, float]] = {}
    for events in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        log = EventAccumulator(str(events), size_guidance={SCALARS: 0}).Reload()
        for name in log.Tags()[SCALARS]:
            curves.setdefault(name, {}).update((event.step, event.value) for event in log.Scalars(name))
    if (path := folder / "diagnostics.jsonl").is_file():
        points = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                points.append(json.loads(line))
            except ValueError as error:
                raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
        for name in {name for point in points for name in point if name != "time_steps"}:
            curves[name] = {point["time_steps"]: point[name] for point in points if name in point}
    if not curves:
        raise ConfigurationError(
            f"{folder} has no diagnostics.jsonl and no TensorBoard log; give what qstar train wrote"
        )
    return {name: (sorted(found), [found[step] for step in sorted(found)]) for name, found in sorted(curves.items())}


# Of each quantity that was logged, the steps and the values.
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
