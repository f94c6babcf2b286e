"""Console: prints texts, JSON, progress and errors, on terminals of any encoding and into pipes."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

from ..errors import PromptError

if TYPE_CHECKING:
    from ..agents import Search

__all__ = [
    "err",
    "fail",
    "follow",
    "json_line",
    "number_text",
    "out",
    "quiet",
    "read_stdin",
    "replace_unprintable",
    "report_progress",
    "say",
    "say_json",
    "status",
]

_EVERY = 5.0  # seconds between two lines of progress where there is no terminal

# A pipe has no width. Tables need more than the 80 columns that would be assumed.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
# Texts, names and paths may hold brackets and colons, which rich would take for markup and emoji.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
out = Console(width=_WIDTH, **_PLAIN)
err = Console(stderr=True, **_PLAIN)

# Called with what is being done, how much of it is done, and how much there is in all (None: not known).
Report = Callable[[str, int, "int | None"], None]


def replace_unprintable() -> None:
    """Print a question mark for what the terminal's encoding lacks: no result is lost to an error of encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def fail(message: str) -> NoReturn:
    """Print what was wrong, in one line, and leave with exit code 2."""
    err.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)
    sys.exit(2)


def read_stdin() -> str:
    """Return all of standard input.

    Raises:
        PromptError: It is not text.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not {sys.stdin.encoding}: {error}") from error


def say(content: Text | str) -> None:
    """Print text, folded on a terminal only: readers of a pipe need whole lines."""
    out.print(content, soft_wrap=not out.is_terminal)


def json_line(content: Any) -> str:
    """Return a value as one line of JSON that standard output can encode. Numbers that are not finite become null."""
    from ..files import to_jsonable

    content = to_jsonable(content)
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(out.encoding)
    except UnicodeEncodeError:
        line = json.dumps(content, allow_nan=False)
    return line


def say_json(content: Any) -> None:
    """Print one JSON object."""
    line = json_line(content)
    if out.is_terminal:
        out.print_json(line, ensure_ascii=line.isascii())
    else:
        out.file.write(line + "\n")


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal that something goes on."""
    if not err.is_terminal:
        yield
        return
    with err.status(message):
        yield


@contextmanager
def report_progress(unit: str) -> Iterator[Report]:
    """Give a function that shows progress on standard error: a bar on a terminal, elsewhere a line now and then."""
    if not err.is_terminal:
        printed = -math.inf

        def line(label: str, done: int, total: int | None) -> None:
            nonlocal printed
            if time.monotonic() - printed >= _EVERY:
                printed = time.monotonic()
                count = "" if total is None else f" ({done:,} of {total:,} {unit})"
                err.print(Text(label + count), soft_wrap=True)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    bars = Progress(
        TextColumn("{task.description}", markup=False, table_column=column),
        BarColumn(20),
        MofNCompleteColumn(" of "),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        expand=True,
    )
    with bars:
        bar = bars.add_task("", total=None)
        yield lambda label, done, total: bars.update(bar, description=label, completed=done, total=total)


@contextmanager
def follow(budget: int | None) -> Iterator[Callable[..., None] | None]:
    """Give a function that shows a search on a terminal: its bounds, and the spent part of the budget."""
    if not err.is_terminal:
        yield None
        return
    with report_progress("LM tokens") as report:

        def show(search: Search, label: str = "searching") -> None:
            bounds = f"LB {number_text(search.lower_bound)}  UB {number_text(search.upper_bound)}"
            report(f"{bounds}   {label}", search.lm_tokens, budget)

        yield show


def quiet() -> None:
    """Turn off the loading bars of transformers, and off a terminal all other bars."""
    if not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # likewise, of transformers, which is slow to import
    if (logging := sys.modules.get("transformers.utils.logging")) is not None:
        logging.disable_progress_bar()


def number_text(value: float) -> str:
    """Return a bound as it is shown."""
    return f"{value:.3f}" if math.isfinite(value) else "none"
