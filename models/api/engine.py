"""Engine of a model on a server: the prefixes of a step go out together, while a local model reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import numpy as np

from ..base import BoolArray, Engine, FloatArray, IntArray, LanguageModel, Outputs, PrefixEngine

__all__ = ["ReaderStates", "ServerEngine"]

Prefix = tuple[int, ...]
Ranked = tuple[list[int], list[float]]

_NONE = np.empty(0, dtype=np.int64)


class ReaderStates:
    """Hidden states of the local model that reads along, each computed once for as long as it is kept."""

    def __init__(self, engine: Engine, read: Callable[[Sequence[Prefix]], list[Prefix]]) -> None:
        """Compute with an engine of the reader.

        Args:
            engine: The engine.
            read: Returns the reader's tokens for each of some prefixes of the server's tokens.
        """
        self._engine, self._read = engine, read
        self._handles: dict[Prefix, int] = {}
        engine.register(self)

    @property
    def handle(self) -> IntArray:
        """The engine's handles of the prefixes that are kept, int64 [n]."""
        return np.array(list(self._handles.values()), dtype=np.int64)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the reader's keys and values."""
        return self._engine.kv_bytes

    def hidden(self, prefixes: Sequence[Prefix]) -> FloatArray:
        """Return the reader's hidden states after ``n`` prefixes, float32 [n, d]."""
        handles, outputs = self._engine.compute(self._read(prefixes), _NONE, _NONE, 1)
        self._handles.update(zip(prefixes, handles.tolist(), strict=True))
        return outputs.hidden

    def keep(self, prefixes: Sequence[Prefix]) -> None:
        """Release the states of all other prefixes."""
        kept = set(prefixes)
        self._handles = {prefix: handle for prefix, handle in self._handles.items() if prefix in kept}
        self._engine.release_unused()


class ServerEngine(PrefixEngine):
    """The engine of a model on a server: every prefix is one request, and those of a step run at the same time."""

    def __init__(
        self,
        model: LanguageModel,
        fetch: Callable[[Prefix, int, BoolArray | None], Ranked],
        executor: Executor,
        states: ReaderStates | None,
    ) -> None:
        """Compute with a server.

        Args:
            model: The model.
            fetch: Returns the k likeliest of the allowed tokens after a prefix, with their log-probabilities.
            executor: Runs the requests.
            states: The hidden states; None for none, which are 0.
        """
        super().__init__(model)
        self._fetch, self._executor, self._states = fetch, executor, states
        self._answered: dict[tuple[Prefix, int], Ranked] = {}  # in a step that failed, so that nothing is paid twice

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value memory of the reader."""
        return self._states.kv_bytes if self._states else 0

    def release_unused(self) -> None:
        """See :meth:`Engine.release_unused`."""
        super().release_unused()
        if self._states:
            self._states.keep(list(self._sequences.values()))

    def _outputs(
        self,
        prefixes: Sequence[Prefix],
        rows: Sequence[int],
        top_k: int,
        allowed: Sequence[BoolArray | None] | None,
    ) -> Outputs:
        masks = allowed or [None] * len(rows)
        # Trees that ask for the same, ask once.
        questions = {(row, id(mask)): (prefixes[row], mask) for row, mask in zip(rows, masks, strict=True)}
        futures: dict[tuple[int, int], Future[Ranked]] = {}
        answers: dict[tuple[int, int], Ranked] = {}
        try:
            for key, (prefix, mask) in questions.items():
                if mask is None and (prefix, top_k) in self._answered:
                    answers[key] = self._answered[prefix, top_k]
                else:
                    futures[key] = self._executor.submit(self._fetch, prefix, top_k, mask)
            hidden = self._states.hidden(prefixes) if self._states else np.zeros((len(prefixes), 1), dtype=np.float32)
            answers.update({key: future.result() for key, future in futures.items()})
        except BaseException:
            for future in futures.values():
                future.cancel()
            for key, future in futures.items():
                prefix, mask = questions[key]
                if mask is None and future.done() and not future.cancelled() and not future.exception():
                    self._answered[prefix, top_k] = future.result()
            raise
        self._answered.clear()
        ranked = [answers[row, id(mask)] for row, mask in zip(rows, masks, strict=True)]
        return Outputs(
            hidden[list(rows)],
            np.array([tokens for tokens, _ in ranked], dtype=np.int64).reshape(len(rows), top_k),
            np.array([logprobs for _, logprobs in ranked], dtype=np.float32).reshape(len(rows), top_k),
        )
