"""What every benchmark has in common: where it prints, and the rows that it writes with `--json FILE`."""

import json
import sys
from pathlib import Path

from rich.console import Console

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
