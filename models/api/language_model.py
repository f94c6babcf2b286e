"""Language models behind an API of completions, such as the servers of llama.cpp, vLLM, SGLang and `qstar serve`."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ...checks import check_integer, check_keywords, check_number, first_line
from ...errors import ConfigurationError, LanguageModelError, PromptError, ServerError, UnknownNameError
from ..base import BoolArray, Engine, FloatArray, LanguageModel, Message
from ..transformers_lm import TransformersLM, end_tokens, load_transformers
from .client import Answer, APIUsage, CompletionsClient
from .engine import ReaderStates, ServerEngine

__all__ = ["OpenAICompatibleLM", "load_openai_compatible"]

KEY_VARIABLE = "QSTAR_API_KEY"

_PROBES = (
    "The weather in Zürich on 27 May was",
    "def area(radius):\n    return 3.14159 *",
    "“Où est-il?”, she asked; 第一 x² ≤ 10.",
)
_PROBE_TOP_K = 3  # some servers show few
_PROBE_TOKENS = 8
_TRIES = 3  # for a sampled token that the server states something about
_SAME_LOGPROB = 0.1  # nats between two answers to one question; servers round otherwise in other batches
_RENORMALISED = 1e-6
_OTHER_TOKENIZER = "give the server's tokenizer as `tokenizer`"


class OpenAICompatibleLM(LanguageModel):
    """A language model on a server that returns log-probabilities of completions.

    The server says which tokens are likeliest, at temperature 1 and over its full vocabulary. Prompts are sent as token
    ids, so that no text is tokenised twice. Features for Q come from a small local model, the *reader*, which reads the
    same text. A Q-function of the reader fits this model too.

    The constructor asks a few questions that tell whether the server's tokens are those of the local tokenizer, and
    whether its log-probabilities are those of the full softmax. A server that fails is refused with the reason.

    Errors of connections, and the statuses 408, 429, 500 and 502 to 504, are tried again with growing pauses. If the
    server stays away, the call fails with :class:`~qstar_decoding.errors.ServerError`, and the token tree stays as it
    was. A plan from the same environment goes on from there.

    A pickle holds no key: where it is loaded, the key comes from the environment variable ``QSTAR_API_KEY``.

    Attributes:
        usage: Tokens and requests that the server has charged for (:class:`APIUsage`).
    """

    # Servers sum the softmax in float32, in orders of their own.
    logprob_error = 1e-3

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        reader: LanguageModel | str | None = "smollm2-135m-instruct",
        tokenizer: Any = None,
        context_length: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_connections: int = 16,
        hidden_layers: Sequence[int] = (),
        prices: tuple[float, float] = (0.0, 0.0),
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Connect to the server and check its answers.

        Args:
            base_url: The address of the API, such as ``http://127.0.0.1:8080/v1``.
            model: The model's name there; None where the server has one only.
            api_key: The key; None for the one in the environment variable ``QSTAR_API_KEY``, if it is set.
            reader: The local model that gives the hidden states: a language model, or the name of a model of
                transformers. None for none, in which case hidden states are 0 and Q has nothing to go by.
            tokenizer: The tokenizer of the server's model: a tokenizer of transformers, its hub id or its folder. None
                for the reader's. With a tokenizer of another kind the reader reads the text, special tokens left out.
            context_length: Longest sequence, in tokens; None for what the server states, else the reader's.
            eos_token_ids: The tokens that end a text; None for the tokenizer's.
            timeout: Seconds to wait for an answer, for each try.
            retries: Tries after the first one.
            max_connections: Requests at the same time.
            hidden_layers: Further layers of a reader that is given by name (see :class:`TransformersLM`).
            prices: Price of a million tokens of prompts, and of a million generated tokens.
            device: Place of the reader (see :func:`~qstar_decoding.models.load_language_model`).
            dtype: Precision of the reader.

        Raises:
            ConfigurationError: An argument cannot work, or neither ``reader`` nor ``tokenizer`` is given.
            ServerError: The server does not answer, or refuses.
            LanguageModelError: The server's tokens or log-probabilities are not what they should be.
            UnknownNameError: The reader or the tokenizer cannot be loaded.
        """
        check_number("timeout", timeout, low=0, open_low=True)
        check_integer("retries", retries, low=0)
        self._threads = ThreadPoolExecutor(check_integer("max_connections", max_connections))
        self._prices = [check_number("prices", price, low=0) for price in prices]
        if isinstance(reader, str):
            reader = load_transformers(reader, device, dtype, hidden_layers=hidden_layers)
        if reader is None and tokenizer is None:
            raise ConfigurationError("a model behind an API needs a reader or a tokenizer; give one of them")
        self._reader = reader
        self._texts = reader if reader is not None and tokenizer is None else _Tokenizer(tokenizer)
        self._client = CompletionsClient(
            base_url,
            api_key=api_key or os.environ.get(KEY_VARIABLE),
            key_hint=f"set {KEY_VARIABLE}, or give api_key",
            timeout=timeout,
            retries=retries,
            max_connections=max_connections,
            token_id=self._token_of,
        )
        self.usage: APIUsage = self._client.usage
        described = self._find(model)
        self.name = str(described["id"])
        meta = described["meta"] if isinstance(described.get("meta"), dict) else {}
        # llama.cpp states the context of a slot and the vocabulary; vLLM the longest sequence.
        stated = [meta.get("n_ctx"), described.get("max_model_len"), described.get("context_length")]
        self.context_length = context_length or next(
            (n for n in stated if isinstance(n, int) and n > 0), self._texts.context_length
        )
        size = meta.get("n_vocab")
        self.vocab_size = size if isinstance(size, int) and size > 0 else self._texts.vocab_size
        ends = self._texts.eos_token_ids if eos_token_ids is None else eos_token_ids
        self.eos_token_ids = frozenset(int(token) for token in ends)
        self.special_tokens = dict(self._texts.special_tokens)
        self.hidden_size = 1 if reader is None else reader.hidden_size
        self.hidden_layers = () if reader is None else reader.hidden_layers
        if reader is not None:
            self.lock = reader.lock  # one lock, so that no two threads wait for each other
        self._embeddings: FloatArray | None = None
        self._ids: dict[str, int | None] | None = None
        # Servers state nothing about a sampled token that is part of a character (llama.cpp) or the end (qstar serve).
        self._whole_token: int | None = None
        given = {"model": model, "reader": reader, "tokenizer": tokenizer, "context_length": context_length}
        given |= {"eos_token_ids": eos_token_ids, "timeout": timeout, "retries": retries, "prices": prices}
        self._recipe = partial(type(self), base_url, **given, max_connections=max_connections)
        self.check()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, the key left out."""
        return self._recipe, ()

    def __repr__(self) -> str:
        """Name the model and its server."""
        return f"{type(self).__name__}({self._client.url!r}, {self.name!r})"

    @property
    def cost(self) -> float:
        """The price of the tokens so far; cached tokens count as others."""
        paid = zip(self._prices, (self.usage.prompt_tokens, self.usage.completion_tokens), strict=True)
        return sum(price * tokens for price, tokens in paid) / 1e6

    @property
    def reader(self) -> LanguageModel:
        """See :attr:`LanguageModel.reader`."""
        return self if self._reader is None else self._reader

    @property
    def kv_token_bytes(self) -> int | None:  # type: ignore[override]
        """Bytes of the reader's keys and values per token."""
        return None if self._reader is None else self._reader.kv_token_bytes

    # -- texts --------------------------------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[Message], **template: Any) -> list[int]:
        """See :meth:`LanguageModel.encode`."""
        return self._texts.encode(prompt, **template)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`; ids that the tokenizer does not have, have no text."""
        return self._texts.decode([token for token in token_ids if token < self._texts.vocab_size])

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode_continuation`."""
        return self._texts.decode_continuation([token for token in token_ids if token < self._texts.vocab_size])

    def token_bytes(self, token: int) -> bytes:
        """See :meth:`LanguageModel.token_bytes`."""
        return self._texts.token_bytes(token) if token < self._texts.vocab_size else b""

    def token_embeddings(self) -> FloatArray:
        """Return float32 [V, e]: for each token the mean of the reader's embeddings of its text."""
        if self._reader is None:
            return super().token_embeddings()
        if self._embeddings is None:
            known = self._reader.token_embeddings()
            vectors = np.zeros((self.vocab_size, known.shape[1]), dtype=np.float32) + known.mean(axis=0)
            if self._texts is self._reader:
                count = min(len(known), self.vocab_size)
                vectors[:count] = known[:count]
            else:
                for token in range(min(self.vocab_size, self._texts.vocab_size)):
                    if ids := self._as_read(self.decode_continuation([token])):
                        vectors[token] = known[ids].mean(axis=0)
            self._embeddings = vectors
        return self._embeddings

    def _as_read(self, text: str) -> list[int]:
        """Return the reader's tokens of a text, without those that it puts before every text."""
        assert self._reader is not None
        before, ids = self._reader.encode(""), self._reader.encode(text)
        return ids[len(before) :] if ids[: len(before)] == before else ids

    def _token_of(self, text: str) -> int | None:
        """Return the one token with this text; None for none or several."""
        if self._ids is None:
            self._ids = {}
            for token in range(self._texts.vocab_size):
                name = self._texts.decode_continuation([token])
                self._ids[name] = None if name in self._ids or not name or "\ufffd" in name else token
        return self._ids.get(text)

    # -- the server ---------------------------------------------------------------------------------------------------

    def _find(self, model: str | None) -> dict[str, Any]:
        listed = self._client.models()
        names = [str(one.get("id")) for one in listed]
        if model is None:
            if len(listed) != 1:
                raise ConfigurationError(f"the server has {len(listed)} models; give one as `model`: {names[:20]}")
            return listed[0]
        if listed and model not in names:
            raise UnknownNameError("model of the server", model, names)
        return next((one for one in listed if one.get("id") == model), {"id": model})

    def ask(self, prompt: str | Sequence[int], top_k: int) -> Answer:
        """Ask the server for the ``top_k`` likeliest tokens after a prompt.

        Raises:
            ServerError: The server does not answer, refuses, or answers with something else.
            LanguageModelError: It shows fewer tokens, unknown ones, or has read another number of tokens.
        """
        answer = self._client.complete(self.name, prompt, top_k)
        for _ in range(_TRIES):
            if answer.ranked:
                break
            answer = self._client.complete(self.name, prompt, top_k, sampled=self._whole_token)
        if unknown := [token for token, _ in answer.ranked if token >= self.vocab_size]:
            raise self._broken(f"names the token {unknown[0]}, and the vocabulary has {self.vocab_size} tokens")
        if len(answer.ranked) < top_k:
            raise self._broken(
                f"shows {len(answer.ranked)} log-probabilities where {top_k} were asked for; use a smaller top_k, or "
                "start the server with a higher limit (vLLM: --max-logprobs)"
            )
        if not isinstance(prompt, str) and answer.prompt_tokens not in (None, len(prompt)):
            raise self._broken(
                f"read {answer.prompt_tokens} tokens of a prompt of {len(prompt)}; prompts of token ids have to be "
                "taken as they are, and none may be cut off"
            )
        return answer._replace(ranked=answer.ranked[:top_k])

    def check(self) -> None:
        """Check that the server's tokens are those of the tokenizer, and its log-probabilities of the full softmax.

        Raises:
            ServerError: The server does not answer, or refuses.
            LanguageModelError: They are not; the message tells the difference.
        """
        masses, written, top_k = [], [], min(_PROBE_TOP_K, self.vocab_size)
        for text, ids in self._probes():
            answer, read = self.ask(ids, top_k), self.ask(text, top_k)
            masses.append(float(np.exp([logprob for _, logprob in answer.ranked]).sum()))
            if read.prompt_tokens not in (None, len(ids)) or not _agree(read, answer):
                raise self._broken(
                    f"reads the text {text!r} as other tokens than the local tokenizer's {ids}; {_OTHER_TOKENIZER}"
                )
            continued = self._client.complete(self.name, ids, top_k, max_tokens=_PROBE_TOKENS)
            ours = self.decode_continuation([t for t in continued.tokens if t < self.vocab_size])
            written.append((continued.tokens, continued.text.strip(" \ufffd"), ours.strip(" \ufffd")))
        # Servers may leave out a token that is part of a character, so one text of three is enough.
        if not any(theirs.startswith(ours) or ours.startswith(theirs) for _, theirs, ours in written):
            tokens, theirs, ours = written[0]
            raise self._broken(f"writes the tokens {tokens} as {theirs!r}, not as {ours!r}; {_OTHER_TOKENIZER}")
        if not _agree(self.ask(ids, 1), answer):
            raise self._broken("states other log-probabilities when fewer are asked for: not those of the full softmax")
        if min(masses) > 1 - _RENORMALISED and self.vocab_size > top_k:
            raise self._broken(
                f"states probabilities of {top_k} tokens that sum to 1: not those of the full softmax; start it to "
                "report log-probabilities before sampling (vLLM: --logprobs-mode raw_logprobs)"
            )
        self._whole_token = self._find_whole_token(ids, top_k, answer)

    def _find_whole_token(self, ids: list[int], top_k: int, expected: Answer) -> int | None:
        """Return a token of whole characters that sampling can be told to prefer without a change of log-probabilities.

        None where there is no such token, or where the server does not allow it.
        """
        lead = next((t for t in range(self.vocab_size) if self._is_word(t) and t != expected.ranked[0][0]), None)
        if lead is None:
            return None
        try:
            answer = self._client.complete(self.name, ids, top_k, sampled=lead)
        except ServerError:
            return None
        return lead if answer.ranked and _agree(answer, expected) else None

    def _is_word(self, token: int) -> bool:
        text = "" if token in self.eos_token_ids else self.decode([token])
        return text.isascii() and text.isalnum()

    def _probes(self) -> list[tuple[str, list[int]]]:
        """Return texts with their tokens: those that this vocabulary can write, or one of its own tokens."""
        found = []
        for text in _PROBES:
            with contextlib.suppress(PromptError):
                found.append((text, self.encode(text)))
        if not found:
            text = self.decode([t for t in range(self.vocab_size) if t not in self.eos_token_ids][:4])
            found = [(text, self.encode(text))]
        return found

    def _broken(self, what: str) -> LanguageModelError:
        return LanguageModelError(f"the server of {self.name!r} {what}")

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`; for servers that show the whole vocabulary, as llama.cpp's does."""
        logprobs = np.empty((len(sequences), self.vocab_size), dtype=np.float32)
        everything = [self.vocab_size] * len(sequences)
        for row, ranked in zip(logprobs, self._threads.map(self.ranked, sequences, everything), strict=True):
            row[ranked[0]] = ranked[1]
        if self._reader is None:
            return np.zeros((len(sequences), 1), dtype=np.float32), logprobs
        return self._reader.forward(self.read(sequences))[0], logprobs

    def new_engine(self, *, kv_budget: int | None = None) -> Engine:
        """Return an engine that sends the prefixes of a step at the same time; the server caches what they share."""
        states = None if self._reader is None else ReaderStates(self._reader.engine(kv_budget=kv_budget), self.read)
        return ServerEngine(self, self.ranked, self._threads, states)

    def ranked(
        self, prefix: Sequence[int], top_k: int, allowed: BoolArray | None = None
    ) -> tuple[list[int], list[float]]:
        """Return the ``top_k`` likeliest of the ``allowed`` [V] next tokens, and their log-probabilities, nats.

        Where fewer are allowed, others fill up with -inf.

        Raises:
            ServerError: The server does not answer, refuses, or answers with something else.
            LanguageModelError: It does not show enough tokens.
        """
        asked = top_k
        while True:
            ranked = self.ask(prefix, asked).ranked
            if allowed is None:
                break
            chosen = [entry for entry in ranked if allowed[entry[0]]]
            if len(chosen) >= top_k or asked == self.vocab_size:
                others = ((token, -np.inf) for token, _ in ranked if not allowed[token])
                ranked = [*chosen, *others][:top_k]
                break
            asked = min(8 * asked, self.vocab_size)
        return [token for token, _ in ranked], [logprob for _, logprob in ranked]

    def read(self, sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Return the reader's tokens of the same texts."""
        assert self._reader is not None
        if self._texts is self._reader:
            return [tuple(t for t in sequence if t < self._reader.vocab_size) for sequence in sequences]
        texts = [self.decode(sequence).rstrip("\ufffd") for sequence in sequences]
        # A text of special tokens alone is read as an end of the text before.
        blank = sorted(self._reader.eos_token_ids)[:1] or [0]
        return [tuple(self._reader.encode(text) or blank) for text in texts]


class _Tokenizer(TransformersLM):
    """The texts of a model of transformers without the model: encoding, decoding, templates, ends."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers, or load it by its hub id or folder.

        Raises:
            UnknownNameError: It cannot be loaded.
            ConfigurationError: It is no tokenizer.
        """
        from transformers import AutoTokenizer, GenerationConfig

        configs: list[Any] = []
        if isinstance(tokenizer, str):
            name = tokenizer
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise UnknownNameError("tokenizer", name, [], f"It cannot be loaded: {first_line(error)}") from error
            with contextlib.suppress(OSError, ValueError):  # a tokenizer without a model's settings
                configs.append(GenerationConfig.from_pretrained(name))
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ConfigurationError(f"tokenizer is one of transformers, or its name, got {type(tokenizer).__name__}")
        self.tokenizer, self.name = tokenizer, str(tokenizer.name_or_path)
        self.vocab_size, self.context_length = len(tokenizer), min(int(tokenizer.model_max_length), 1_000_000)
        self.eos_token_ids = end_tokens(configs, tokenizer, self.vocab_size)


def _agree(one: Answer, other: Answer) -> bool:
    """Tell whether two answers to one question have the same likeliest token, or two of nearly the same probability."""
    (token, logprob), (theirs, expected) = one.ranked[0], other.ranked[0]
    return abs(logprob - expected) < _SAME_LOGPROB and (token == theirs or theirs in dict(one.ranked))


_OPTIONS = inspect.signature(OpenAICompatibleLM).parameters.keys() - {"base_url", "device", "dtype"}
_LOADED: dict[str, OpenAICompatibleLM] = {}


def load_openai_compatible(name: str, device: str = "auto", dtype: str = "auto", **options: Any) -> OpenAICompatibleLM:
    """Connect to a server, once per process; see :class:`OpenAICompatibleLM` for the options.

    Args:
        name: The address of the API.
        device: Place of the reader.
        dtype: Precision of the reader.
        options: Further arguments of :class:`OpenAICompatibleLM`.
    """
    check_keywords("a model behind an API", options, _OPTIONS)
    key = repr((name, device, dtype, sorted(options.items())))
    if key not in _LOADED:
        _LOADED[key] = OpenAICompatibleLM(name, device=device, dtype=dtype, **options)
    return _LOADED[key]
