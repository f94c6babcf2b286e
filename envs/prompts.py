"""Prompts: strings, chats, dicts with columns, tables, and files of these."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, PromptError
from ..rewards.checking import passable, plain
from ..rewards.types import RESERVED_COLUMNS

__all__ = ["DEFAULT_PROMPTS", "Prompt", "as_prompt", "columns_of", "load_prompts", "prompt_of_options", "read_lines"]

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

# Files by which a folder is known as a data set of the library datasets, or as several splits of one.
_SAVED = ("dataset_info.json", "dataset_dict.json")

_TEMPLATE = "chat_template_kwargs"
_SHAPES = "a string, a list of chat messages ({'role': …, 'content': …}), or a dict with the key 'prompt'"


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        content: A plain string, or chat messages for the model's chat template. If the last message is the assistant's,
            the model continues it.
        columns: Further fields of the data set's row; a reward receives them as keyword arguments.
        token_ids: Token ids to use instead of the model's own encoding of the content; None for that.
        template: Arguments of the chat template, such as ``enable_thinking``. In a dict they are the value of the key
            ``chat_template_kwargs``.
    """

    content: str | Sequence[Mapping[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What a reward sees: the string itself, or the messages' contents, one a line."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(message["content"]) for message in self.content)


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
    source = plain(source)
    if isinstance(source, Mapping) and "prompt" in source:
        inner = as_prompt(source["prompt"])
        columns = {str(key): value for key, value in source.items() if key not in ("prompt", _TEMPLATE)}
        return Prompt(inner.content, columns, template=_template_arguments(source.get(_TEMPLATE)))
    if isinstance(source, str):
        if not source.strip():
            raise PromptError(f"a prompt is empty ({source!r}); give it some text to continue")
        return _encodable(Prompt(source))
    if _is_chat(source):
        return _encodable(Prompt(_messages(source)))
    advice = ""
    if isinstance(source, Mapping) and source and "role" not in source:
        advice = (
            f"; of its keys {[*source]} name the one with the prompt 'prompt' "
            f"(of a data set: dataset.rename_column({next(iter(source))!r}, 'prompt'))"
        )
    raise PromptError(f"a prompt is {_SHAPES}; got {type(source).__name__}: {str(source)[:80]!r}{advice}")


def prompt_of_options(options: Any) -> Prompt | None:
    """Return the prompt in the options of a ``reset``; None where they hold none.

    Raises:
        ConfigurationError: They are no dict, or hold other keys.
        PromptError: It is not a prompt.
    """
    if not isinstance(options or {}, Mapping):
        raise ConfigurationError(f"reset's options are a dict, such as {{'prompt': …}}; got {options!r:.100}")
    if unknown := {*(options or {})} - {"prompt"}:
        raise ConfigurationError(f"reset's options may hold 'prompt', not {sorted(unknown, key=str)}")
    return as_prompt(options["prompt"]) if options else None


def _encodable(prompt: Prompt) -> Prompt:
    try:
        prompt.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = prompt.text[error.start : error.start + 1]
        raise PromptError(
            f"a prompt has half of a character ({half!r}, a lone surrogate) after "
            f"{prompt.text[: error.start][-40:]!r}; "
            "it was decoded wrongly: read it as UTF-8, or replace it"
        ) from None
    return prompt


def load_prompts(source: Any = None) -> list[Prompt]:
    """Return the prompts of ``source``, at least one.

    Args:
        source: One of these.

            - None: a few review openings.
            - One prompt; see :func:`as_prompt`.
            - The path of a ``.txt`` file (one prompt a line), of a ``.jsonl`` file (a string, or an object with the key
              ``prompt``, a line), or of a folder that ``Dataset.save_to_disk`` wrote. A string counts as a path if the
              file exists, or if it ends in ``.txt`` or ``.jsonl`` and has no white space.
            - An iterable of prompts, or a table: a ``datasets.Dataset``, or a DataFrame of pandas or polars. The column
              ``prompt`` is the prompts, and the others are their columns. It is read to its end: of an endless
              ``IterableDataset`` give ``dataset.take(n)``.

    Raises:
        PromptError: There is no prompt, one is empty or has the wrong type (its place is named), or a file is missing.
    """
    if source is None:
        source = DEFAULT_PROMPTS
    if isinstance(source, (str, Path)) and _is_saved_dataset(str(source)):
        source = _load_dataset(Path(source))
    elif isinstance(source, Path) or (isinstance(source, str) and _is_file_name(source)):
        return _read_file(Path(source))
    if isinstance(source, Mapping) and source and all(hasattr(part, "column_names") for part in source.values()):
        raise PromptError(f"this data set has several splits; choose one of {[*source]}: dataset[…], or its folder")
    if isinstance(source, (str, Mapping, Prompt)) or _is_chat(source):
        return [as_prompt(source)]
    source = _rows(source)
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


def _is_file_name(text: str) -> bool:
    """Tell whether a string is meant as a path: a sentence may end in "notes.txt" too."""
    return text.endswith((".txt", ".jsonl")) and (os.path.isfile(text) or not any(map(str.isspace, text)))


def _rows(table: Any) -> Any:
    """Return the rows of a DataFrame of pandas or polars as dicts; anything else as it is."""
    if not hasattr(table, "columns"):
        return table
    if hasattr(table, "to_dicts"):  # polars
        return table.to_dicts()
    return table.to_dict("records") if hasattr(table, "to_dict") else table


def _is_chat(source: Any) -> bool:
    return (
        isinstance(source, Sequence)
        and not isinstance(source, str)
        and len(source) > 0
        and all(
            isinstance(m, Mapping) and "role" in m and isinstance(plain(m.get("content")), (str, list)) for m in source
        )
    )


def _messages(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a copy of chat messages, with the text parts of each content joined by line breaks.

    Raises:
        PromptError: A part is not text, or no message has any content.
    """
    messages = [{**message, "content": _content(message["content"], i)} for i, message in enumerate(chat)]
    if not any(message["content"].strip() for message in messages):
        raise PromptError("a chat prompt has no content in any of its messages")
    return messages


def _content(content: Any, place: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in plain(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise PromptError(
                f"message {place}: content is a string or a list of {{'type': 'text', 'text': …}}, got {part!r}"[:300]
            )
        texts.append(text)
    return "\n".join(texts)


def _template_arguments(given: Any) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise PromptError(f"{_TEMPLATE} is a dict of arguments of the chat template, got {given!r}")
    return {name: value for name, value in given.items() if value is not None}  # data sets fill gaps with None


def read_lines(path: Path, text: str | None = None) -> Iterator[tuple[int, Prompt | PromptError]]:
    """Yield the prompts of a ``.txt`` or ``.jsonl`` file with their line numbers; a broken line yields its error.

    Args:
        path: Of the file; any ending but ``.jsonl`` is plain text, one prompt a line.
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
    # os.path takes texts that are too long for a name, or have a null in it; Path raises.
    return bool(folder.strip()) and any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED)


def _load_dataset(folder: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise PromptError(f"{folder} is a data set of the library datasets: run pip install datasets") from error
    try:
        return load_from_disk(str(folder))
    except Exception as error:  # any error of the library is about the folder
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
