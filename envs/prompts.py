"""Where prompts come from: one string or many, chats, dicts with columns, text and JSONL files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PromptError
from ..rewards.checking import passable
from ..rewards.types import RESERVED_COLUMNS

__all__ = ["DEFAULT_PROMPTS", "Prompt", "as_prompt", "columns_of", "load_prompts", "read_lines"]

DEFAULT_PROMPTS = (
    "The movie was",
    "The food at the new restaurant",
    "My first week in the city",
    "The hotel room had",
    "After reading the book, I",
    "The concert last night",
    "Our trip to the mountains",
    "The phone I bought last month",
)

# By one of these a folder is known that the library datasets has saved a data set, or several splits of one, in.
_SAVED = ("dataset_info.json", "dataset_dict.json")

_SHAPES = "a string, a list of chat messages ({'role': …, 'content': …}), or a dict with the key 'prompt'"


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        content: What the model is given: a plain string, or chat messages for its chat template.
        columns: Further fields of the data set's row; a reward receives them as keyword arguments.
        token_ids: What the model is given instead of its own encoding of the content, where somebody else encoded it.
    """

    content: str | Sequence[Mapping[str, str]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """What a reward sees: the string itself, or the messages' contents, one a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(message["content"] for message in self.content)


def columns_of(prompts: Sequence[Prompt]) -> dict[str, Sequence[Any]]:
    """Return the columns of ``n`` prompts by name, as a reward takes them; None where a prompt lacks one.

    The messages of chats are the column ``messages``. A column with the name of a reward's argument is left out.
    """
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    chats = [None if isinstance(prompt.content, str) else prompt.content for prompt in prompts]
    if any(chats):
        return {**passable(columns, {*RESERVED_COLUMNS, "messages"}), "messages": chats}
    return passable(columns, RESERVED_COLUMNS)


def as_prompt(source: Any) -> Prompt:
    """Turn a string, chat messages or a dict with the key ``prompt`` into a :class:`Prompt`.

    Raises:
        PromptError: It is none of these, or empty.
    """
    if isinstance(source, Prompt):
        return source
    if isinstance(source, Mapping) and "prompt" in source:
        inner = as_prompt(source["prompt"])
        return Prompt(inner.content, {str(k): v for k, v in source.items() if k != "prompt"})
    if isinstance(source, str):
        if not source.strip():
            raise PromptError(f"a prompt is empty ({source!r}); give it some text to continue")
        return Prompt(source)
    if _is_chat(source):
        if not any(message["content"].strip() for message in source):
            raise PromptError("a chat prompt has no content in any of its messages")
        return Prompt([dict(message) for message in source])
    advice = ""
    if isinstance(source, Mapping) and source and "role" not in source:
        advice = (
            f"; of its keys {[*source]} name the one with the prompt 'prompt' "
            f"(of a data set: dataset.rename_column({next(iter(source))!r}, 'prompt'))"
        )
    raise PromptError(f"a prompt is {_SHAPES}; got {type(source).__name__}: {str(source)[:80]!r}{advice}")


def load_prompts(source: Any = None) -> list[Prompt]:
    """Return the prompts that ``source`` stands for, at least one.

    Args:
        source: None (a few review openings); one prompt (see :func:`as_prompt`); the path of a ``.txt`` file (one a
            line), of a ``.jsonl`` file (a string, or an object with the key ``prompt``, a line) or of a folder that
            ``Dataset.save_to_disk`` wrote; or many in an iterable, such as a ``datasets.Dataset``, whose column
            ``prompt`` is the prompts and whose others are their columns. It is read to its end: of an endless
            ``IterableDataset`` give ``dataset.take(n)``.

    Raises:
        PromptError: There is none, one is empty or has the wrong type (its place is named), or the file is missing.
    """
    if source is None:
        source = DEFAULT_PROMPTS
    if isinstance(source, (str, Path)) and _is_saved_dataset(str(source)):
        source = _load_dataset(Path(source))
    elif isinstance(source, Path) or (isinstance(source, str) and source.endswith((".txt", ".jsonl"))):
        return _read_file(Path(source))
    if isinstance(source, Mapping) and source and all(hasattr(part, "column_names") for part in source.values()):
        raise PromptError(f"this data set has several splits; choose one of {[*source]}: dataset[…], or its folder")
    if isinstance(source, (str, Mapping, Prompt)) or _is_chat(source):
        return [as_prompt(source)]
    if not isinstance(source, Iterable):
        raise PromptError(f"prompts are {_SHAPES}, a .txt or .jsonl path, or an iterable of these; got {source!r}")
    prompts = []
    for index, item in enumerate(source):
        try:
            prompts.append(as_prompt(item))
        except PromptError as error:
            raise PromptError(f"prompt {index}: {error}") from None
    if not prompts:
        raise PromptError("the list of prompts is empty; give at least one")
    return prompts


def _is_chat(source: Any) -> bool:
    return (
        isinstance(source, Sequence)
        and not isinstance(source, str)
        and len(source) > 0
        and all(isinstance(m, Mapping) and "role" in m and isinstance(m.get("content"), str) for m in source)
    )


def read_lines(path: Path, text: str | None = None) -> Iterator[tuple[int, Prompt | PromptError]]:
    """Yield the prompts of a ``.txt`` or ``.jsonl`` file with their line numbers; a broken line yields its error.

    Args:
        path: Of the file; any other ending than ``.jsonl`` is plain text, one prompt a line.
        text: Its content, where that was read already, as from standard input.

    Raises:
        PromptError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if text is None else text
    except OSError as error:
        raise PromptError(f"cannot read the prompts file {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompts file {str(path)!r} is not UTF-8: {error}; save it as UTF-8") from error
    # Not splitlines(), which also splits at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, as_prompt(json.loads(line) if path.suffix == ".jsonl" else line)
        except (json.JSONDecodeError, PromptError) as error:
            yield number, PromptError(f"{path}, line {number}: {error}")


def _is_saved_dataset(folder: str) -> bool:
    # Of os.path, not of Path: a text that is too long for a name, or has a null in it, is no folder either.
    return bool(folder.strip()) and any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED)


def _load_dataset(folder: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise PromptError(f"{folder} is a data set of the library datasets: run pip install datasets") from error
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # whatever the library raises, it is the folder's fault
        raise PromptError(f"the data set in {folder} cannot be read: {error}") from error


def _read_file(path: Path) -> list[Prompt]:
    prompts = []
    for _, prompt in read_lines(path):
        if isinstance(prompt, PromptError):
            raise prompt
        prompts.append(prompt)
    if not prompts:
        raise PromptError(f"the prompts file {str(path)!r} has no prompts in it")
    return prompts
