"""Options that several commands share, and the names that a shell completes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import check_writable
from ..errors import ConfigurationError
from .console import status

if TYPE_CHECKING:
    from ..agents.distributed.ray_workers import RayWorkers

__all__ = [
    "EngineOption",
    "JsonOption",
    "RayOption",
    "TaskArgument",
    "TaskOption",
    "ThreadsOption",
    "TrustOption",
    "WorkersOption",
    "complete",
    "known_models",
    "known_rewards",
    "known_tasks",
    "prepare_file",
    "workers_on",
]


def prepare_file(path: Path) -> None:
    """Check, before long work, that its result can be written into a file, and make the file's folder.

    Raises:
        ConfigurationError: It cannot.
    """
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; give the name of a file")
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


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


def known_rewards() -> Iterable[str]:
    """Return the names of rewards."""
    from ..rewards import reward_names

    return reward_names()


def known_models() -> Iterable[str]:
    """Return the names of language models."""
    from ..models.embedded_model import EMBEDDED_MODELS

    return EMBEDDED_MODELS


_TASK: dict[str, Any] = {
    "help": "A task's name, or the path of a YAML file.",
    "autocompletion": complete(known_tasks),
}
TaskOption = Annotated[str, typer.Option("--task", **_TASK)]
TaskArgument = Annotated[str, typer.Argument(**_TASK)]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let the language model run code of its author, if it brings any."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="'torch', or 'llama.cpp' for the GGUF file of the model.",
        autocompletion=complete(lambda: ("torch", "llama.cpp")),
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Address of a Ray cluster that does the work: 'local', 'auto', host:6379 or ray://host:10001."
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="With --ray: number of workers. Default: as many as the cluster has room."),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="With --ray: threads of each worker.")]


def workers_on(
    address: str | None, count: int | None, threads: int
) -> Callable[[Callable[[], Any]], AbstractContextManager[RayWorkers]] | None:
    """Find out before any long work whether a Ray cluster answers, and return a function that starts workers on it.

    Returns:
        A function from what makes a worker's object to a context with the workers; None where no cluster is asked for.

    Raises:
        ConfigurationError: The cluster does not answer, or its options were given without it.
    """
    from ..agents.distributed.ray_workers import RayWorkers, check_address

    if address is None:
        if count is not None or threads != 1:
            raise ConfigurationError("--workers and --threads are those of a Ray cluster; give --ray too")
        return None
    check_address(address)

    @contextmanager
    def start(make: Callable[[], Any]) -> Iterator[RayWorkers]:
        with status(f"connecting to Ray at {address}"):
            workers = RayWorkers(address, make, count=count, threads=threads)
        with workers:
            yield workers

    return start
