"""Batches of prompts decoded by workers, with one record each in a file that a second call continues.

Prompts that begin alike are decoded together by one worker, whose token tree then holds their beginning already.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from ...checks import check_writable, first_line
from ...envs import DecodingMDP, Prompt
from ...errors import ConfigurationError, PromptError, QStarError
from ...files import locked, to_jsonable, write_atomically
from ..planning.decoder import Decoder
from ..planning.registry import make_decoder
from ..search.budget import Budget
from ..search.plan import Plan
from .jobs import Job, Workers

__all__ = ["BatchDecoder", "ResultsFile", "decode_many", "in_order", "plan_record"]

_BATCH = 8  # prompts that are decoded in lock-step


class BatchDecoder:
    """A worker's object that decodes prompts."""

    def __init__(self, decoder: Decoder, name: str, budget: Budget, n: int = 1) -> None:
        """Decode with ``decoder``, called ``name``, and report the ``n`` best texts of each prompt."""
        self.decoder, self.name, self.budget, self.n = decoder, name, budget, n

    @classmethod
    def make(
        cls, mdp: Callable[[], DecodingMDP], name: str, options: Mapping[str, Any], budget: Budget, n: int = 1
    ) -> BatchDecoder:
        """Return one for a decoder of :data:`DECODERS`, with an MDP of its own."""
        return cls(make_decoder(name, mdp(), **options), name, budget, n)

    def decode(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return a record for each prompt; where one cannot be decoded, the reason is under ``"error"``.

        Raises:
            KeyboardInterrupt: At an interrupt; a search that was cut off is no result.
        """
        try:
            plans = self.decoder.plan_many(list(prompts), self.budget)
        except Exception as error:  # of the tokenizer, a template, a user's reward: any, and one prompt is to blame
            if len(prompts) == 1:
                return [{"prompt": prompts[0].text, "error": _reason(error)}]
            return [record for prompt in prompts for record in self.decode([prompt])]
        if any(plan.stop_reason == "interrupted" for plan in plans):
            raise KeyboardInterrupt
        return [plan_record(plan, self.n, self.name) for plan in plans]


def decode_many(lines: Mapping[int, Prompt], workers: Workers, *, keep_going: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt as soon as it is decoded, with the number of its line under ``"line"``.

    Args:
        lines: Prompts by number.
        workers: Each holds a :class:`BatchDecoder`.
        keep_going: Yield a record with an ``"error"`` for a prompt that cannot be decoded, instead of raising it.

    Raises:
        PromptError: A prompt cannot be decoded.
        WorkerError: Workers died over a prompt again and again.
    """
    numbers = {id(prompt): number for number, prompt in lines.items()}
    for job, result in workers.run(list(_jobs(lines)), keep_going=keep_going):
        (prompts,) = job.args
        if isinstance(result, Exception):
            result = [{"prompt": prompt.text, "error": _reason(result)} for prompt in prompts]
        for prompt, record in zip(prompts, result, strict=True):
            number = numbers[id(prompt)]
            if "error" in record and not keep_going:
                raise PromptError(f"line {number}: {record['error']}")
            yield {"line": number, **record}


def _jobs(lines: Mapping[int, Prompt]) -> Iterator[Job]:
    """Yield batches of prompts, sorted by their texts; a group of them shares at least half of each text."""
    ordered = sorted(lines.items(), key=lambda line: line[1].text)
    group, before = "", ""
    for start in range(0, len(ordered), _BATCH):
        batch = ordered[start : start + _BATCH]
        first = batch[0][1].text
        half = min(len(before), len(first)) // 2
        if not half or before[:half] != first[:half]:
            group = first
        before = batch[-1][1].text
        parts = tuple(Job("decode", ([prompt],), f"line {number}, {prompt.text!r}", group) for number, prompt in batch)
        yield Job("decode", ([prompt for _, prompt in batch],), f"{parts[0].name} and those like it", group, parts)


def in_order(records: Iterable[dict[str, Any]], lines: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield records by ascending line, each as soon as those before it have come."""
    waiting: dict[int, dict[str, Any]] = {}
    order = deque(sorted(lines))
    for record in records:
        waiting[record["line"]] = record
        while order and order[0] in waiting:
            yield waiting.pop(order.popleft())


class ResultsFile:
    """A JSON Lines file of records that a later call continues.

    Records are appended as they come. The next call drops the beginning of a record that a kill cut off. ``close`` puts
    the records into the order of their lines. Records with an ``"error"`` are tried again. One process at a time may
    write: the lock is a hidden file beside it.

    Attributes:
        done: The records by line.
    """

    def __init__(self, path: Path, lines: Mapping[int, Prompt], settings: Mapping[str, Any]) -> None:
        """Open the file and read its records.

        Args:
            path: The file; made if there is none.
            lines: The prompts by number.
            settings: All that the results depend on beside the prompts; results of other settings are refused.

        Raises:
            ConfigurationError: The file holds something else, or results of other prompts or settings; it cannot be
                written, or another process writes it.
        """
        self.path, self._lines = path.resolve(), lines
        if self.path.exists() and not self.path.is_file():
            raise ConfigurationError(f"{path} is not a file; give another path for the results")
        check_writable(self.path.parent)
        self.settings = hashlib.sha256(json.dumps(to_jsonable(settings), sort_keys=True).encode()).hexdigest()[:12]
        self.done: dict[int, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), wait=False))
            self._read()
            self._write_in_order()
            self._file = stack.enter_context(self.path.open("ab"))
            self._stack = stack.pop_all()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self.done[record["line"]] = {**record, "settings": self.settings}
        self._file.write(_as_line(self.done[record["line"]]))
        self._file.flush()

    def close(self) -> None:
        """Put the records in order and release the lock; closing twice does no harm."""
        if not self._file.closed:
            self._file.close()
            self._write_in_order()
            self._stack.close()

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """See :meth:`close`."""
        self.close()

    def _read(self) -> None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        *whole, rest = content.split(b"\n")
        if rest and not self._is_cut_off(rest):
            whole.append(rest)  # whole but for its end of line, or foreign
        for at, text in enumerate(whole, start=1):
            try:
                record = json.loads(text, parse_constant=_refuse)
                number, settled, prompt = record["line"], record["settings"], record["prompt"]
                if type(number) is not int or not isinstance(prompt, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ConfigurationError(
                    f"{self.path}, line {at} is no result of qstar decode; give another file"
                ) from None
            if settled != self.settings:
                raise ConfigurationError(
                    f"{self.path} has results of another task, decoder, budget, seed or Q; give another file, or "
                    "delete it"
                )
            if number not in self._lines or self._lines[number].text != prompt:
                raise ConfigurationError(
                    f"{self.path} has the result of another prompt for line {number} ({prompt[:60]!r}); prompts may be "
                    "added at the end of the input, nothing else may change"
                )
            if "error" not in record:
                self.done[number] = record

    def _is_cut_off(self, rest: bytes) -> bool:
        """Return whether a last line without an end is the beginning of a record that a kill has cut off."""
        try:
            json.loads(rest)
        except (ValueError, RecursionError):
            heads = (_as_line({"line": n, "prompt": prompt.text})[:-2] for n, prompt in self._lines.items())
            return any(head.startswith(rest) or rest.startswith(head) for head in heads)
        return False

    def _write_in_order(self) -> None:
        write_atomically(self.path, b"".join(_as_line(self.done[number]) for number in sorted(self.done)))


def plan_record(plan: Plan, n: int, decoder: str) -> dict[str, Any]:
    """Return a plan as plain values: its ``n`` best texts, and of its trace the points at which a bound moved."""
    before = [None, *plan.trace]
    moved = [p for p, q in zip(plan.trace, before, strict=False) if q is None or p[2:] != q[2:] or p is plan.trace[-1]]
    names = ("objective", "reward", "logprob", "stop")
    bounds = ("lower_bound", "upper_bound", "gap", "certified", "scope", "stop_reason")
    record = {
        "prompt": plan.prompt,
        "decoder": decoder,
        "text": plan.text,
        **{name: getattr(plan, name) for name in (*names, *bounds)},
        "usage": vars(plan.usage),
        "completions": [{name: getattr(c, name) for name in ("text", *names)} for c in plan.completions[:n]],
        "trace": [tuple(point) for point in moved],
    }
    return {name: to_jsonable(value) for name, value in record.items()}


def _as_line(record: Mapping[str, Any]) -> bytes:
    # A lone surrogate, which UTF-8 does not have, is written as JSON's own escape.
    return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    return str(error) if isinstance(error, QStarError) else f"{type(error).__name__}: {first_line(error)}"
