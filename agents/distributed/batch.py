"""Many prompts decoded, by whichever workers: a record each, in a file that a second call goes on with.

Prompts that begin alike are decoded together and by the same worker, whose token tree then has their beginning already.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...envs import DecodingMDP, Prompt
from ...errors import ConfigurationError, PromptError, QStarError
from ...files import to_jsonable
from ..planning.registry import make_decoder
from .jobs import Job, Workers

if TYPE_CHECKING:
    from ..planning.decoder import Decoder
    from ..search.budget import Budget
    from ..search.plan import Plan

__all__ = ["BatchDecoder", "ResultsFile", "decode_many", "in_order", "plan_record"]

_BATCH = 8  # prompts that are decoded in lock-step


class BatchDecoder:
    """What a worker holds that decodes prompts."""

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
        """Return a record for each prompt; where one cannot be decoded, it says why under ``"error"``.

        Raises:
            KeyboardInterrupt: At an interrupt; a search that was cut off is no result.
        """
        try:
            plans = self.decoder.plan_many(list(prompts), self.budget)
        except QStarError as error:
            if len(prompts) == 1:
                return [{"prompt": prompts[0].text, "error": str(error)}]
            return [record for prompt in prompts for record in self.decode([prompt])]  # one of them is to blame
        if any(plan.stop_reason == "interrupted" for plan in plans):
            raise KeyboardInterrupt
        return [plan_record(plan, self.n, self.name) for plan in plans]


def decode_many(lines: Mapping[int, Prompt], workers: Workers, *, keep_going: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a record for each prompt as soon as it is decoded, the number of its line under ``"line"``.

    Args:
        lines: Prompts by number.
        workers: Each holds a :class:`BatchDecoder`.
        keep_going: Yield a record with an ``"error"`` for what cannot be decoded, instead of raising it.

    Raises:
        PromptError: A prompt cannot be decoded.
        WorkerError: Workers died over a prompt again and again.
    """
    numbers = {id(prompt): number for number, prompt in lines.items()}
    for job, result in workers.run(list(_jobs(lines)), keep_going=keep_going):
        (prompts,) = job.args
        if isinstance(result, Exception):
            result = [{"prompt": prompt.text, "error": str(result)} for prompt in prompts]
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
    """A JSON Lines file of records that a later call goes on with.

    Records are appended as they come, each whole: what a kill leaves of a line is dropped by the next call. ``close``
    puts them into the order of their lines. Records with an ``"error"`` are not done: they are tried again.
    """

    def __init__(self, path: Path, lines: Mapping[int, Prompt], settings: Mapping[str, Any]) -> None:
        """Open the file and read what is done.

        Args:
            path: Where it is, or will be.
            lines: The prompts by number.
            settings: What the results depend on beside the prompts; results of other settings are refused.

        Raises:
            ConfigurationError: The file holds something else, or results of other prompts or settings.
        """
        self.path = path
        self.settings = hashlib.sha256(json.dumps(to_jsonable(settings), sort_keys=True).encode()).hexdigest()[:12]
        self.done: dict[int, dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        for at, text in enumerate(content.decode("utf-8", "replace").split("\n")[:-1], start=1):
            try:
                record = json.loads(text)
                number, settled, prompt = record["line"], record["settings"], record["prompt"]
            except (ValueError, KeyError, TypeError):
                raise ConfigurationError(f"{path}, line {at} is no result of qstar decode; give another file") from None
            if settled != self.settings:
                raise ConfigurationError(
                    f"{path} has results of another task, decoder, budget, seed or Q; give another file, or delete it"
                )
            if number not in lines or lines[number].text != prompt:
                raise ConfigurationError(
                    f"{path} has the result of another prompt for line {number} ({prompt[:60]!r}); prompts may be "
                    "added at the end of the input, nothing else may change"
                )
            if "error" not in record:
                self.done[number] = record
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write_in_order()
        self._file = path.open("a", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        self.done[record["line"]] = {**record, "settings": self.settings}
        self._file.write(_as_line(self.done[record["line"]]))
        self._file.flush()

    def close(self) -> None:
        """Put the records in order."""
        self._file.close()
        self._write_in_order()

    def _write_in_order(self) -> None:
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text("".join(_as_line(self.done[number]) for number in sorted(self.done)), encoding="utf-8")
        os.replace(new, self.path)


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


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
