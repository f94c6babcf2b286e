"""A tiny exact language model, given by a table: for tests, examples, and answers known by enumeration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, PromptError
from .base import FloatArray, LanguageModel

__all__ = ["TOY", "TabularLM", "load_toy", "toy_language_model"]

TOY = "toy"  # the name of ``load_toy``'s model for ``gym.make(…, model=…)`` and task files


class TabularLM(LanguageModel):
    """An order-m Markov model over a small vocabulary.

    The next token's probabilities depend on the last ``m`` tokens only, and stand in a table. A prompt shorter than m
    is padded with token 0 on its left. Token ``V - 1`` ends a text unless told otherwise.
    """

    logprob_error = 1e-12  # computed in float64

    def __init__(
        self,
        table: npt.ArrayLike,
        *,
        vocabulary: Sequence[str] | None = None,
        eos_token_ids: Sequence[int] | None = None,
        context_length: int = 1024,
        name: str = "tabular",
    ) -> None:
        """Build the model from its table.

        Args:
            table: float [V, …, V] with m + 1 axes: ``table[a, b, c]`` is the probability (it need not be normalised) of
                c after a, b. Every row needs a positive sum and no negative entry.
            vocabulary: V strings, joined without a separator; letters by default, the last one being empty.
            eos_token_ids: Tokens that end a text, by default the last one; may be empty.
            context_length: Longest sequence, in tokens.
            name: The model's name in checkpoints and reports.

        Raises:
            ConfigurationError: The table or the vocabulary has the wrong shape or impossible values.
        """
        weights = np.asarray(table, dtype=np.float64)
        if weights.ndim < 1 or len(set(weights.shape)) != 1:
            raise ConfigurationError(f"a table has m + 1 axes, all of the vocabulary's size; got {weights.shape}")
        total = weights.sum(axis=-1, keepdims=True)
        if not np.isfinite(weights).all() or (weights < 0).any() or (total <= 0).any():
            raise ConfigurationError("a table holds finite values >= 0, and every row needs a positive sum")
        self.vocab_size, self.order = weights.shape[-1], weights.ndim - 1
        self.vocabulary = list(vocabulary) if vocabulary is not None else _letters(self.vocab_size)
        if len(self.vocabulary) != self.vocab_size:
            raise ConfigurationError(f"{self.vocab_size} strings expected in vocabulary, got {len(self.vocabulary)}")
        self.eos_token_ids = frozenset([self.vocab_size - 1] if eos_token_ids is None else eos_token_ids)
        self.name, self.context_length = name, context_length
        with np.errstate(divide="ignore"):
            self._logprobs = np.log(weights / total).reshape(-1, self.vocab_size)
        # The state is its own best description: one-hot over the contexts while that is small, random features beyond.
        contexts = len(self._logprobs)
        self._hidden = (
            np.eye(contexts, dtype=np.float32)
            if contexts <= 64
            else np.random.default_rng(0).standard_normal((contexts, 64)).astype(np.float32)
        )
        self.hidden_size = self._hidden.shape[1]

    @classmethod
    def random(
        cls, vocab_size: int = 4, order: int = 2, *, seed: int = 0, concentration: float = 1.0, **kwargs: Any
    ) -> TabularLM:
        """Return a model with Dirichlet-distributed rows; a low ``concentration`` makes them peaked."""
        rng = np.random.default_rng(seed)
        rows = rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size**order)
        return cls(np.maximum(rows, 1e-9).reshape((vocab_size,) * (order + 1)), **kwargs)

    def encode(self, prompt: Any, **template: Any) -> list[int]:
        """Split a string into vocabulary entries, longest first.

        Raises:
            PromptError: The prompt is a chat, or has something in it that the vocabulary lacks.
        """
        if not isinstance(prompt, str):
            raise PromptError("a TabularLM has no chat template; give the prompt as a plain string")
        entries = sorted(((t, i) for i, t in enumerate(self.vocabulary) if t), key=lambda entry: -len(entry[0]))
        ids, rest = [], prompt
        while rest:
            match = next(((t, i) for t, i in entries if rest.startswith(t)), None)
            if match is None:
                raise PromptError(f"{rest[0]!r} in prompt {prompt!r} is not in the vocabulary {self.vocabulary}")
            ids.append(match[1])
            rest = rest[len(match[0]) :]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`."""
        return "".join(self.vocabulary[t] for t in token_ids if t not in self.eos_token_ids)

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode_continuation`; entries of the vocabulary are joined as they are."""
        return self.decode(token_ids)

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`."""
        rows = []
        for sequence in sequences:
            context = ([0] * self.order + list(sequence))[len(sequence) :]
            rows.append(sum(t * self.vocab_size**p for p, t in enumerate(reversed(context))))
        return self._hidden[rows], self._logprobs[rows].astype(np.float32)


def load_toy(name: str = TOY, device: str = "auto", dtype: str = "auto", **options: Any) -> TabularLM:
    """Return the model of the task ``toy``: seven letters and an end, each depending on the two before it.

    Raises:
        ConfigurationError: There are options; the model has none.
    """
    del device, dtype  # a table needs none
    if options:
        raise ConfigurationError(f"the model {name!r} has no options, got {', '.join(sorted(options))}")
    return toy_language_model()


@functools.cache
def toy_language_model() -> TabularLM:
    """Return the model of :func:`load_toy`."""
    return TabularLM.random(8, 2, seed=0, concentration=0.3, name=TOY)


def _letters(count: int) -> list[str]:
    if count > 27:
        raise ConfigurationError("a vocabulary of more than 27 tokens has no default strings; give `vocabulary`")
    return [chr(ord("a") + i) for i in range(count - 1)] + [""]
