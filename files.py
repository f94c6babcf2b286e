"""Files that are whole or absent, locks between processes, and values that JSON knows."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import ConfigurationError

__all__ = ["locked", "read_json", "read_text", "to_jsonable", "write_atomically", "write_json"]


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        ConfigurationError: It is not UTF-8.
        OSError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConfigurationError: It is not JSON, or not UTF-8.
        OSError: It cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or absent, wherever the process is killed; an older one is replaced.

    Args:
        path: The file; its folder exists.
        content: Text, written as UTF-8, or bytes.
    """
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or absent; see :func:`write_atomically`."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock between processes while the context lasts.

    Args:
        path: The lock's file, ``.lock`` in the folder that it locks or ``.NAME.lock`` beside it; made if there is none.
        wait: Whether to wait for another process that holds it.

    Raises:
        ConfigurationError: Another process holds it, and ``wait`` is false.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        place = path.parent / path.name.removeprefix(".").removesuffix("lock").removesuffix(".")
        raise ConfigurationError(
            f"another process is writing into {place}; wait until it ends, or give another name"
        ) from error
    try:
        yield
    finally:
        lock.release()


def to_jsonable(value: Any) -> Any:
    """Return a value as JSON knows it: arrays and tuples become lists, numbers that are not finite become None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
