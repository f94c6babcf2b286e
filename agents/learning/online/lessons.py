"""Lessons: what a finished search teaches, free of its token tree, and their journal in a file."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import load, save

from ...search.loop import score_completions
from ...search.state import Search
from ..experience import Transitions, states_of
from ..q_function import QFunction

__all__ = ["JOURNAL", "Lesson", "append", "lessons_of", "read"]

JOURNAL = "lessons.bin"
_HEAD = struct.Struct("<QI")  # of an entry: the length and the checksum of what follows


class Lesson(NamedTuple):
    """What a finished search teaches; it can be stored and sent.

    Attributes:
        heuristic: The name of the heuristic that ordered the search.
        objective: J of its best text; NaN without one.
        lm_tokens: LM tokens that it used.
        seconds: Time that it took.
        states: Its states with targets; see :func:`extract_targets`.
    """

    heuristic: str
    objective: float
    lm_tokens: int
    seconds: float
    states: Transitions


def lessons_of(names: Mapping[Search, str], q: QFunction, bound_targets: bool = False) -> list[Lesson]:
    """Return the lessons of finished searches, whose prefixes are still in the token tree.

    Args:
        names: The name of each search's heuristic.
        q: The newest Q, whose estimates are the targets where a search broke off.
        bound_targets: See :func:`extract_targets`.
    """
    score_completions([search for search in names if search.score == "q"])
    lessons = []
    for search, name in names.items():
        states = states_of(search, q, bound_targets)
        objective = math.nan if search.best is None else search.best.objective
        lessons.append(Lesson(name, objective, search.lm_tokens, search.busy_seconds, states))
    return lessons


def append(path: Path, lessons: Sequence[Lesson]) -> None:
    """Add lessons at the end of a journal; a kill leaves whole entries, and perhaps a part of the last one."""
    entries = []
    for lesson in lessons:
        *figures, states = lesson
        body = save(states, metadata={"lesson": json.dumps(figures)})
        entries.append(_HEAD.pack(len(body), zlib.crc32(body)) + body)
    with path.open("ab") as file:
        file.write(b"".join(entries))


def read(path: Path) -> Iterator[Lesson]:
    """Yield the lessons of a journal, and cut off a part of an entry at its end; nothing where there is no file."""
    if not path.is_file():
        return
    content, place = path.read_bytes(), 0
    while place + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, place)
        body = content[place + _HEAD.size : place + _HEAD.size + length]
        if len(body) < length or zlib.crc32(body) != checksum:
            break
        place += _HEAD.size + length
        yield _lesson(body)
    if place < len(content):
        with path.open("rb+") as file:
            file.truncate(place)


def _lesson(body: bytes) -> Lesson:
    (length,) = struct.unpack_from("<Q", body)  # of the header of safetensors
    metadata = json.loads(body[8 : 8 + length])["__metadata__"]
    heuristic, objective, lm_tokens, seconds = json.loads(metadata["lesson"])
    return Lesson(heuristic, objective, lm_tokens, seconds, load(body))
