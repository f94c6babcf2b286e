"""The interface of a language model and of an engine, and the slow exact engine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import numpy.typing as npt

from ..checks import check_kv_budget
from ..errors import LanguageModelError
from ..locks import FairLock

if TYPE_CHECKING:
    import torch
    from torch import Tensor


__all__ = ["Engine", "HandleHolder", "LanguageModel", "Outputs", "PrefixEngine"]

IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float32]


BoolArray = npt.NDArray[np.bool_]


_REMEMBERED = 1 << 14  # sequences


Message = Mapping[str, Any]


class Outputs(NamedTuple):
    """The outputs of a language model after ``n`` prefixes.

    Attributes:
        hidden: float32 [n, d], the last layer's hidden state at the last token, and those of further layers where the
            model was asked for them.
        tokens: int64 [n, k], the k most likely next tokens, most likely first.
        logprobs: float32 [n, k], nats, of the full-vocabulary softmax.
    """

    hidden: FloatArray
    tokens: IntArray
    logprobs: FloatArray


class HandleHolder(Protocol):
    """An object that keeps handles of an engine from one call to the next, such as a token tree."""

    @property
    def handle(self) -> IntArray:
        """The handles that it keeps, int64 [nodes]."""


class Engine(Protocol):
    """Computes a growing tree of prefixes, each once; prefixes are referred to by integer handles.

    Several holders may share an engine. A handle is valid as long as a registered holder keeps it.
    """

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory allocated now."""

    def register(self, holder: HandleHolder) -> None:
        """Keep the prefixes in ``holder.handle``, and all that lead to them, for as long as the holder lives."""

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """Start sequences and continue others, in one forward if memory allows; on an error nothing has changed.

        Args:
            prompts: Token ids of ``m`` new prompts.
            parents: int64 [n], handles of prefixes.
            tokens: int64 [n], the token to append to each.
            top_k: Number k of next tokens to return.
            allowed: [m + n] bool [V] each, the tokens that the k likeliest after each are taken from; None for all.
                Where fewer than k are allowed, others fill up with a log-probability of -inf.

        Returns:
            Handles int64 [m + n], the prompts' first, and the outputs after each.
        """

    def release_unused(self) -> None:
        """Give back the memory of all prefixes that no holder keeps and that lead to none that is kept."""


class LanguageModel(ABC):
    """A causal language model: token ids in, next-token log-probabilities out.

    Subclasses set the attributes and implement :meth:`encode`, :meth:`decode` and :meth:`forward`.

    Attributes:
        name: Identifies the model in checkpoints and reports.
        vocab_size: Number of tokens V.
        hidden_size: Width d of the hidden state.
        context_length: Longest sequence the model takes, in tokens.
        eos_token_ids: The tokens that end a text; ids that are not below ``vocab_size`` are ignored.
        hidden_layers: The layers whose states follow the last one's in the hidden state.
        logprob_error: Largest absolute error of a log-probability, nats, beside its rounding to float32. Bounds over
            the full vocabulary allow for it. The default covers a float32 softmax of logits up to 64 over 2^18 tokens:
            rounding the normaliser (2^-18) and summing its terms in blocks (18 · 2^-24).
        kv_token_bytes: Bytes of keys and values per token over all layers; None where none are kept, or not yet known.
        special_tokens: By text, the tokens that :meth:`decode` leaves out.
        lock: Held by everything that grows, reads or evicts a token tree of this model; threads take turns with it.
    """

    # In slots, so that they are no part of a subclass's state, which may be pickled.
    __slots__ = ("__weakref__", "_engines", "_lead", "lock")

    lock: AbstractContextManager[Any]
    _engines: WeakValueDictionary[tuple[int | None, int], Engine]
    _lead: tuple[list[int], str]

    name: str
    hidden_layers: tuple[int, ...] = ()
    logprob_error: float = 1e-5
    kv_token_bytes: int | None = None
    special_tokens: Mapping[str, int] = MappingProxyType({})
    vocab_size: int
    hidden_size: int
    context_length: int
    eos_token_ids: frozenset[int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the lock and the list of engines, so that subclasses need not call ``super().__init__``."""
        del args, kwargs
        model = super().__new__(cls)
        model.lock, model._engines = FairLock(), WeakValueDictionary()
        return model

    @property
    def reader(self) -> LanguageModel:
        """The model that the hidden states and token embeddings come from: itself, unless another one reads along."""
        return self

    @abstractmethod
    def encode(self, prompt: str | Sequence[Message], **template: Any) -> list[int]:
        """Return the token ids of a plain string, or of chat messages put through the model's chat template.

        Args:
            prompt: A string, or messages. The model continues the last message if it is the assistant's.
            template: Arguments of the chat template, such as ``enable_thinking``.
        """

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``, special tokens left out."""

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Return the text that ``token_ids`` add to a text before them.

        Tokenizers such as Llama 2's mark the beginnings of words and drop the first space of a text. Within a text that
        space counts, so the tokens are decoded after a word here.
        """
        if not hasattr(self, "_lead"):
            self._lead = _find_lead(self)
        lead, text = self._lead
        whole = self.decode([*lead, *token_ids])
        return whole[len(text) :] if whole.startswith(text) else self.decode(token_ids)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; none where they are a part of a character and not known."""
        text = self.decode_continuation([token])
        return self._piece_bytes(token) if "\ufffd" in text else text.encode()

    def _piece_bytes(self, token: int) -> bytes:
        """Return the bytes of a token whose text is not whole; none where they are not known."""
        del token
        return b""

    @abstractmethod
    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """Process whole sequences with no cache: the slow, obvious reference.

        Returns:
            Hidden states float32 [n, d] and full-vocabulary log-probabilities float32 [n, V] (nats) after the last
            token of each sequence.
        """

    def token_embeddings(self) -> FloatArray:
        """Return float32 [V, e], one vector per token; random unit Gaussians unless the model has its own."""
        return np.random.default_rng(0).standard_normal((self.vocab_size, 16)).astype(np.float32)

    def engine(self, *, kv_budget: int | None = None) -> Engine:
        """Return the engine that everybody who asks for this ``kv_budget`` shares, for as long as somebody keeps it.

        Args:
            kv_budget: Bytes of key-value memory; None for a sensible default.

        Raises:
            ConfigurationError: ``kv_budget`` is not positive. Models that keep no keys and values do not use it.
        """
        key = check_kv_budget(kv_budget), self.weights_version()
        engine = self._engines.get(key)
        if engine is None:
            with self.lock:  # only now, so that nobody waits for a forward to get an engine that is there
                engine = self._engines.get(key)
                if engine is None:
                    engine = self._engines[key] = self.new_engine(kv_budget=kv_budget)
        return engine

    def weights_version(self) -> int:
        """Return a number that changes when the weights do, so that engines of old weights are not shared."""
        return 0

    def new_engine(self, *, kv_budget: int | None = None) -> Engine:
        """Return a new engine with an empty memory, the fastest exact one for this model.

        Args:
            kv_budget: Bytes of key-value memory; None for a sensible default.
        """
        del kv_budget  # nothing is cached
        return PrefixEngine(self)

    def __getstate__(self) -> Any:
        """Pickle the attributes; locks and engines belong to a process."""
        return self.__dict__

    # ``env.spec`` deep-copies the arguments of ``gym.make``: a model given as an object must not be copied with it.
    def __copy__(self) -> Self:
        """Return the model itself; models are shared, never copied."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the model itself; models are shared, never copied."""
        return self


def bytes_of_piece(piece: str) -> bytes:
    """Return the bytes of an entry of a vocabulary of byte fallback, such as ``<0xE2>``, or of byte-level BPE.

    Byte-level BPE writes a byte as the character of its number if that is printable; the others follow from 256 on.
    """
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    by_character = {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
    return bytes(by_character[character] for character in piece if character in by_character)


def _find_lead(model: LanguageModel) -> tuple[list[int], str]:
    """Return a token whose text stays as it is when others follow, and that text; without any, no token."""
    found: tuple[list[int], str] = ([], "")
    for token in range(model.vocab_size):
        text = "" if token in model.eos_token_ids else model.decode([token])
        # Letters and digits are not joined to what follows. Tokens of single bytes may be, so longer ones are better.
        if text.isascii() and text.isalnum() and model.decode([token, token]).startswith(text):
            if len(text) > 1:
                return [token], text
            found = found if found[0] else ([token], text)
    return found


class PrefixEngine:
    """The slow exact engine: every prefix is processed whole, with no shared state.

    For models whose attention cannot take a tree mask, for models that cost nothing, and as the reference in tests.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Compute with ``model.forward``."""
        self._model = model
        self._sequences: dict[int, tuple[int, ...]] = {}
        self._next = 0
        self._holders: WeakSet[HandleHolder] = WeakSet()
        self._room = _REMEMBERED  # sequences, before those that nobody needs are looked for

    @property
    def kv_bytes(self) -> int:
        """Always 0: nothing is cached."""
        return 0

    def register(self, holder: HandleHolder) -> None:
        """See :meth:`Engine.register`."""
        self._holders.add(holder)

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        top_k: int,
        allowed: Sequence[BoolArray | None] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """See :meth:`Engine.compute`."""
        asked = [tuple(prompt) for prompt in prompts]
        asked += [(*self._sequences[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        # Trees that ask for the same prefix share its row.
        row = {sequence: i for i, sequence in enumerate(dict.fromkeys(asked))}
        rows = [row[sequence] for sequence in asked]
        outputs = self._outputs(list(row), rows, top_k, allowed)
        if len(self._sequences) + len(row) > self._room:
            self.release_unused()
            self._room = max(2 * len(self._sequences), _REMEMBERED)
        self._sequences.update(zip(range(self._next, self._next + len(row)), row, strict=True))
        handles = self._next + np.array(rows, dtype=np.int64)
        self._next += len(row)
        return handles, outputs

    def _outputs(
        self,
        prefixes: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        """Return the outputs after ``prefixes[row]`` for each of the ``rows``."""
        hidden, logprobs = check_outputs(self._model, self._model.forward(prefixes), len(prefixes))
        hidden, logprobs = hidden[list(rows)], logprobs[list(rows)]
        if allowed is not None:
            logprobs = np.stack(
                [p if mask is None else np.where(mask, p, -np.inf) for p, mask in zip(logprobs, allowed, strict=True)]
            )
        # A stable sort makes ties fall the same way in every batch, and for every k.
        ranked = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
        return Outputs(hidden, ranked, np.take_along_axis(logprobs, ranked, axis=1))

    def release_unused(self) -> None:
        """See :meth:`Engine.release_unused`."""
        kept = {handle for holder in self._holders for handle in holder.handle.tolist()}
        self._sequences = {handle: self._sequences[handle] for handle in sorted(kept)}


def check_outputs(model: LanguageModel, outputs: Any, count: int) -> tuple[FloatArray, FloatArray]:
    """Return the outputs of ``model.forward`` for ``count`` sequences as float32 arrays.

    Raises:
        LanguageModelError: They are no hidden states [count, d] and log-probabilities [count, V].
    """

    def broken(law: str) -> LanguageModelError:
        return LanguageModelError(f"language model {model.name!r}: {law}")

    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise broken(f"forward returns a tuple of hidden states and log-probabilities, got {type(outputs).__name__}")
    hidden, logprobs = (np.asarray(values, dtype=np.float32) for values in outputs)
    for what, values, width in (
        ("hidden states [n, hidden_size]", hidden, model.hidden_size),
        ("log-probabilities [n, vocab_size]", logprobs, model.vocab_size),
    ):
        if values.shape != (count, width):
            raise broken(f"forward returned {what} of shape {values.shape}, expected {(count, width)}")
        if np.isnan(values).any():
            raise broken(f"forward returned NaN among the {what}")
    with np.errstate(over="ignore"):
        total = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    worst = total[np.abs(total - 1).argmax()] if count else 1.0
    if not abs(worst - 1) < 0.01:
        raise broken(
            f"the probabilities of the next token sum to {worst:.4g}, not to 1; return natural log-probabilities of "
            "the whole vocabulary (log_softmax), not logits"
        )
    return hidden, logprobs


def top_logprobs(logits: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest log-probabilities [n, k] of the full softmax of ``logits`` [n, V], and their tokens.

    They are the largest of those ``allowed`` [n, V], if that is given. ``logits`` is overwritten.
    """
    import torch

    if allowed is None:
        top, tokens = _top(logits, k)
        largest = top[:, :1]
    else:
        top, tokens = _top(logits.masked_fill(~allowed, -torch.inf), k)
        largest = logits.amax(-1, keepdim=True)
    # Only k of the V log-probabilities are needed: no second [n, V] array.
    return top - largest - logits.sub_(largest).exp_().sum(-1, keepdim=True).log_(), tokens


def _top(values: Tensor, k: int, width: int = 128) -> tuple[Tensor, Tensor]:
    """Return the values and indices of ``values.topk(k)``.

    On a CPU it is five times faster for the vocabulary of a language model. The k largest lie in the k blocks of
    columns with the largest maxima, or in the columns that fill no block.
    """
    import torch

    n, blocks = len(values), values.shape[1] // width
    if values.device.type != "cpu" or blocks <= 2 * k:
        return values.topk(k, dim=-1)
    best = values[:, : blocks * width].view(n, blocks, width).amax(-1).topk(k, dim=-1).indices
    columns = (best.unsqueeze(-1) * width + torch.arange(width)).view(n, k * width)
    columns = torch.cat((columns, torch.arange(blocks * width, values.shape[1]).expand(n, -1)), dim=-1)
    top, place = values.gather(1, columns).topk(k, dim=-1)
    return top, columns.gather(1, place)


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a CUDA device, or in main memory for any other and for None.

    The limit of a container (a control group of Linux) counts too.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min([int(psutil.virtual_memory().available), *_free_in_container()])


# A process in a container sees its own control group there: version 2, then version 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _free_in_container() -> list[int]:
    """Return the bytes that the control groups of this process leave; none where there is no limit."""
    free = []
    for folder, limit, usage, reclaimable in _CONTROL_GROUPS:
        try:
            most, used = (Path(folder, name).read_text().strip() for name in (limit, usage))
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            # Pages of files that were read a while ago are given back before memory runs out.
            free.append(max(0, int(most) - int(used) + int(statistics.get(reclaimable, 0))))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return free
