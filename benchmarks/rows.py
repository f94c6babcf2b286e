"""What benchmarks have in common: where they print, the rows of `--json FILE`, and results that are kept."""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from qstar_decoding.files import read_json, write_json

out = Console() if sys.stdout.isatty() else Console(width=130)


def row(name, value, unit, target=None, *, higher_is_better=True):
    """Return one figure; ``target`` is what was wanted of it, None where nothing was."""
    return {
        "name": name,
        "value": float(value),
        "unit": unit,
        "target": None if target is None else float(target),
        "higher_is_better": higher_is_better,
    }


def add_json_option(parser):
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")


def write(rows, path):
    """Write the rows, if there is a path."""
    if path:
        Path(path).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_or_measure(path, measure):
    """Return the result in a file of JSON; measure and write it first if there is none, so that a call goes on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measure())
    return read_json(path)


def with_the_worst(objectives):
    """Return J of each prompt, float64 [n]; an unfinished text, NaN, counts as the worst one."""
    values = np.array(objectives, dtype=float)
    return np.where(np.isnan(values), np.nanmin(values), values)
