"""The tokens of a GGUF model, by llama.cpp's own tokenizer, and its chat template."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ...checks import first_line
from ...errors import ConfigurationError, PromptError
from ..base import Message
from .library import Model

__all__ = ["Vocabulary"]

_UNKNOWN, _CONTROL = 1, 8  # attributes of tokens that have no text, in llama.h


class Vocabulary:
    """Texts to token ids and back.

    Attributes:
        size: Number of tokens V.
        ends: The tokens that end a text.
    """

    def __init__(self, name: str, model: Model) -> None:
        """Read the vocabulary of a loaded model; ``name`` is for messages."""
        api = self._api = model.api
        self._name, self._vocabulary = name, model.vocabulary
        self.size = int(api.llama_vocab_n_tokens(model.vocabulary))
        is_end, vocabulary = api.llama_vocab_is_eog, model.vocabulary
        # The library counts the marks between files and repositories as ends, which training texts go on after.
        marks = {int(mark(vocabulary)) for mark in (api.llama_vocab_fim_rep, api.llama_vocab_fim_sep)}
        self.ends = frozenset(token for token in range(self.size) if is_end(vocabulary, token) and token not in marks)
        self._begin = int(api.llama_vocab_bos(vocabulary)) if api.llama_vocab_get_add_bos(vocabulary) else None
        template = api.llama_model_chat_template(model.pointer, None)
        self._template = template.decode(errors="replace") if template else None
        # Vocabularies of SentencePiece put a space before a text, which is no part of it.
        self._adds_space = (
            api.llama_vocab_type(vocabulary) == api.LLAMA_VOCAB_TYPE_SPM
            and model.metadata("tokenizer.ggml.add_space_prefix") != "false"
        )
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, after the token that begins texts, where the model has one."""
        ids = self._tokenize(text)
        if self._begin is None or ids[:1] == [self._begin]:  # a text from a chat template begins with that token
            return ids
        return [self._begin, *ids]

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """Return the ids of messages put through the chat template; see :meth:`LanguageModel.encode`.

        Raises:
            PromptError: There is no chat template, or it refuses the chat.
        """
        if not self._template:
            raise PromptError(f"model {self._name!r} has no chat template; give the prompt as a plain string")
        copies = [dict(message) for message in messages]
        continues = copies[-1].get("role") == "assistant"
        options = {"add_generation_prompt": not continues, **template}
        api, vocabulary = self._api, self._vocabulary
        marks = {
            "bos_token": self._text_of(int(api.llama_vocab_bos(vocabulary))),
            "eos_token": self._text_of(int(api.llama_vocab_eos(vocabulary))),
        }
        try:
            text = _compiled(self._template).render(
                messages=copies, **{"tools": None, "documents": None, **marks}, **options
            )
        except Exception as error:  # templates are programs, which raise errors of any kind
            roles = ", ".join(str(message.get("role")) for message in copies)
            raise PromptError(
                f"the chat template of {self._name!r} refuses a chat of the roles {roles}: {first_line(error)}"
            ) from error
        if continues:
            last = str(copies[-1].get("content", "")).strip()
            if last not in text:
                raise PromptError(f"the chat template of {self._name!r} changes the assistant's message {last[:60]!r}")
            text = text[: text.rindex(last) + len(last)]
        return self._tokenize(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out.

        Raises:
            ConfigurationError: An id is not the model's.
        """
        text = self.decode_continuation(token_ids)
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Return the text that ids add to a text before them."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """By text, the tokens that :meth:`decode` leaves out."""
        attribute, vocabulary = self._api.llama_vocab_get_attr, self._vocabulary
        special = [token for token in range(self.size) if attribute(vocabulary, token) & (_UNKNOWN | _CONTROL)]
        return {self._text_of(token): token for token in special}

    def _text_of(self, token: int) -> str:
        if not 0 <= token < self.size:
            return ""
        return str(self._api.llama_vocab_get_text(self._vocabulary, token).decode(errors="replace"))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; none for special tokens."""
        token = int(token)
        if token not in self._pieces:
            if not 0 <= token < self.size:
                raise ConfigurationError(f"token ids of {self._name!r} are from 0 to {self.size - 1}, got {token}")
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                length = self._api.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, False)
                if length >= 0:
                    break
                size = -length
            self._pieces[token] = buffer.raw[:length]
        return self._pieces[token]

    def _tokenize(self, text: str) -> list[int]:
        content = text.encode(errors="replace")
        size = len(content) + 8
        while True:
            ids = (ctypes.c_int32 * size)()
            # Special tokens that stand in the text are tokens, as they are for the tokenizers of transformers.
            count = self._api.llama_tokenize(self._vocabulary, content, len(content), ids, size, False, True)
            if count >= 0:
                return list(ids[:count])
            size = -count


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """Compile a chat template in a sandbox, with the helpers that transformers gives to templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
