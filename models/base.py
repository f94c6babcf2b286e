"""The interface of a language model and of an engine, and the slow exact engine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


__all__ = ["Engine", "LanguageModel", "Outputs", "PrefixEngine"]

IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float32]


Message = Mapping[str, str]


# By language model. Kept beside the models, which are pickled and whose subclasses need not call ``__init__``.
_LOCKS: WeakKeyDictionary[LanguageModel, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Outputs(NamedTuple):
    """What a language model says about ``n`` prefixes.

    Attributes:
        hidden: float32 [n, d], the last layer's hidden state at the last token, and those of further layers where the
            model was asked for them.
        tokens: int64 [n, k], the k most likely next tokens, most likely first.
        logprobs: float32 [n, k], nats, of the full-vocabulary softmax.
    """

    hidden: FloatArray
    tokens: IntArray
    logprobs: FloatArray


class Engine(Protocol):
    """Computes a growing tree of prefixes, each once; prefixes are referred to by integer handles."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory held now."""

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """Start sequences and continue others, in one forward if memory allows; on an error nothing has changed.

        Args:
            prompts: Token ids of ``m`` new prompts.
            parents: int64 [n], handles of prefixes.
            tokens: int64 [n], what to append to each.
            allowed: bool [m + n, V], the tokens that the k likeliest after each are taken from; None for all. Where
                fewer than k are allowed, others fill up with a log-probability of -inf.

        Returns:
            Handles int64 [m + n], the prompts' first, and the outputs after each.
        """

    def evict(self, kept: IntArray) -> IntArray:
        """Give up all prefixes but ``kept`` and their ancestors; return the new handles of ``kept``, int64 [n]."""


class LanguageModel(ABC):
    """A causal language model: token ids in, next-token log-probabilities out.

    Subclasses set the attributes and implement :meth:`encode`, :meth:`decode` and :meth:`forward`.

    Attributes:
        name: Identifies the model in checkpoints and reports.
        vocab_size: Number of tokens V.
        hidden_size: Width d of the hidden state.
        context_length: Longest sequence the model takes, in tokens.
        eos_token_ids: The tokens that end a text.
        hidden_layers: The layers whose states follow the last one's in the hidden state.
        logprob_error: Largest absolute error of a log-probability, nats, beside its rounding to float32. Bounds over
            the full vocabulary allow for it. The default covers a float32 softmax of logits up to 64 over 2^18 tokens:
            rounding the normaliser (2^-18) and summing its terms in blocks (18 · 2^-24).
        kv_token_bytes: Bytes of keys and values per token over all layers; None where none are kept, or not yet known.
    """

    name: str
    hidden_layers: tuple[int, ...] = ()
    logprob_error: float = 1e-5
    kv_token_bytes: int | None = None
    vocab_size: int
    hidden_size: int
    context_length: int
    eos_token_ids: frozenset[int]

    @abstractmethod
    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the token ids of a plain string, or of chat messages put through the model's chat template."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``, special tokens left out."""

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

    def engine(self, top_k: int, kv_budget: int | None = None) -> Engine:
        """Return the fastest exact engine for this model; ``kv_budget`` in bytes, None for a sensible default."""
        del kv_budget  # nothing is cached
        return PrefixEngine(self, top_k)

    @property
    def lock(self) -> threading.RLock:
        """Lock of everything that grows, reads or evicts a token tree of this model; threads take turns with it."""
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(self, threading.RLock())

    # ``env.spec`` deep-copies the arguments of ``gym.make``: a model given as an object must not be copied with it.
    def __copy__(self) -> Self:
        """Return the model itself; models are shared, never copied."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the model itself; models are shared, never copied."""
        return self


class PrefixEngine:
    """The slow exact engine: every prefix is processed whole, with no shared state.

    For models whose attention cannot take a tree mask, for models that cost nothing, and as the reference in tests.
    """

    def __init__(self, model: LanguageModel, top_k: int) -> None:
        """Compute with ``model.forward`` and keep the ``top_k`` most likely tokens."""
        self._model, self._top_k = model, top_k
        self._sequences: list[tuple[int, ...]] = []

    @property
    def kv_bytes(self) -> int:
        """Always 0: nothing is cached."""
        return 0

    def compute(
        self,
        prompts: Sequence[Sequence[int]],
        parents: IntArray,
        tokens: IntArray,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[IntArray, Outputs]:
        """See :meth:`Engine.compute`."""
        sequences = [tuple(prompt) for prompt in prompts]
        sequences += [(*self._sequences[p], int(t)) for p, t in zip(parents, tokens, strict=True)]
        hidden, logprobs = self._model.forward(sequences)
        if allowed is not None:
            logprobs = np.where(allowed, logprobs, -np.inf)
        # A stable sort makes ties fall the same way in every batch.
        ranked = np.argsort(-logprobs, axis=1, kind="stable")[:, : self._top_k]
        handles = np.arange(len(self._sequences), len(self._sequences) + len(sequences))
        self._sequences.extend(sequences)
        return handles, Outputs(hidden, ranked, np.take_along_axis(logprobs, ranked, axis=1))

    def evict(self, kept: IntArray) -> IntArray:
        """See :meth:`Engine.evict`."""
        self._sequences = [self._sequences[handle] for handle in kept]
        return np.arange(len(kept))


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a CUDA device, or in main memory for any other and for None."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)
