"""How the command speaks: to a terminal, to a pipe, to the shell that completes its words."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

from ..errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

    from ..agents import Search

__all__ = [
    "complete",
    "err",
    "fail",
    "follow",
    "known_contenders",
    "known_decoders",
    "known_models",
    "known_rewards",
    "known_tasks",
    "number_text",
    "out",
    "progress_bars",
    "quiet",
    "read_stdin",
    "say",
    "say_json",
    "status",
]

# A pipe has no width of its own; tables want more than the 80 columns that would be assumed.
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
err = Console(stderr=True, highlight=False)


def fail(message: str) -> NoReturn:
    """Say what was wrong, in one line, and leave with exit code 2."""
    err.print(Text.assemble(("error: ", "bold red"), message.replace("\n", " ")), soft_wrap=True)
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
    """Print text, folded for a terminal only: whatever reads a pipe wants the lines as they are."""
    out.print(content, soft_wrap=not out.is_terminal)


def say_json(content: Any) -> None:
    """Print one JSON object; what is not finite is null, as JSON has no infinity."""
    from ..files import to_jsonable

    out.print_json(
        json.dumps(to_jsonable(content), ensure_ascii=False, allow_nan=False), indent=2 if out.is_terminal else None
    )


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show that something goes on, where somebody can see it."""
    if not err.is_terminal:
        yield
        return
    with err.status(message):
        yield


def progress_bars(unit: str) -> Progress:
    """Return progress bars, on standard error, which show where somebody can see them and vanish in the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    label = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=label),
        BarColumn(20),
        MofNCompleteColumn(" of "),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        expand=True,
        disable=not err.is_terminal,
    )


@contextmanager
def follow(budget: int | None, label: str = "searching") -> Iterator[Callable[[Search], None] | None]:
    """Follow a search, where somebody can see it: its bounds, and how much of the budget is spent."""
    if not err.is_terminal:
        yield None
        return
    with progress_bars("LM tokens") as bars:
        bar = bars.add_task(label, total=budget)

        def show(search: Search) -> None:
            bounds = f"LB {number_text(search.lower_bound)}  UB {number_text(search.upper_bound)}"
            bars.update(bar, completed=search.lm_tokens, description=f"{bounds}   {label}")

        yield show


def quiet() -> None:
    """Keep transformers' loading bars out of the way of ours, and all others out of files."""
    if not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from transformers.utils import logging

    disable: Callable[[], None] = logging.disable_progress_bar
    disable()


def number_text(value: float) -> str:
    """Return a bound as it is shown."""
    return f"{value:.3f}" if math.isfinite(value) else "none"


# -- completion in the shell: of what is known without loading a model ------------------------------------------------


def complete(names: Callable[[], Iterable[str]], *, listed: bool = False) -> Callable[[str], list[str]]:
    """Return a completion of names; of the last one where several are ``listed`` with commas."""

    def names_starting(incomplete: str) -> list[str]:
        before, comma, word = incomplete.rpartition(",") if listed else ("", "", incomplete)
        return [f"{before}{comma}{name}" for name in names() if name.startswith(word)]

    return names_starting


def known_tasks() -> Iterable[str]:
    """Return the names of tasks."""
    from ..tasks import task_names

    return task_names()


def known_decoders() -> Iterable[str]:
    """Return the names of decoders on the command line."""
    from ..agents.planning.registry import DECODERS

    return DECODERS


def known_contenders() -> Iterable[str]:
    """Return the names of decoders in a comparison."""
    from ..agents.planning.registry import CONTENDERS

    return CONTENDERS


def known_rewards() -> Iterable[str]:
    """Return the names of rewards."""
    from ..rewards import reward_names

    return reward_names()


def known_models() -> Iterable[str]:
    """Return the names of language models."""
    from ..models.embedded_model import EMBEDDED_MODELS

    return EMBEDDED_MODELS
