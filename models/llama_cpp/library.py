"""The binding to llama.cpp: a loaded model, and contexts that decode batches of tokens."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any, Protocol
from weakref import finalize

import numpy as np

from ...errors import ConfigurationError, LanguageModelError
from ..base import FloatArray, IntArray

__all__ = ["INSTALL", "Context", "GGUFParameters", "Model", "library", "tensor_library"]

logger = logging.getLogger(__name__)

INSTALL = 'run "make llama-cpp" or pip install "qstar-decoding[llama-cpp]" (it compiles, some ten minutes)'
_BATCH = 256  # tokens of a decode, unless the library takes fewer sequences
_ERROR = 4  # among ggml's log levels
_errors: deque[str] = deque(maxlen=2)  # the library's latest messages of that level, the cause first


@functools.cache
def library() -> Any:
    """Return llama-cpp-python's module of C functions; its log goes to this module's logger.

    Raises:
        ConfigurationError: It is not installed, or its library cannot be loaded.
    """
    try:
        api: Any = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigurationError(f"llama-cpp-python cannot be imported ({error}); {INSTALL}") from error

    def log(level: int, text: bytes, _data: Any) -> None:
        # Its warnings are remarks on speed; what fails also returns a code.
        message = text.decode(errors="replace").strip()
        if level == _ERROR:
            _errors.append(message)
        logger.debug("%s", message)

    api.qstar_log = api.llama_log_callback(log)  # kept: the library calls it as long as the process lives
    api.llama_log_set(api.qstar_log, None)
    api.llama_backend_init()
    return api


class GGUFParameters(ctypes.Structure):
    """``gguf_init_params``: whether to read the data of no tensor, and a context to make tensors in."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@functools.cache
def tensor_library() -> Any:
    """Return llama.cpp's library of tensor functions, ggml, which llama-cpp-python brings along."""
    api = library()
    loader: Any = importlib.import_module("llama_cpp._ctypes_extensions")
    ggml = loader.load_shared_library("ggml-base", Path(api.__file__).parent / "lib")
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, (text, GGUFParameters)),
        ("gguf_free", None, (pointer,)),
        ("gguf_find_tensor", integer, (pointer, text)),
        ("gguf_get_data_offset", ctypes.c_size_t, (pointer,)),
        ("gguf_get_tensor_ne", ctypes.POINTER(integer), (pointer, integer)),
        ("gguf_get_tensor_offset", ctypes.c_size_t, (pointer, integer)),
        ("gguf_get_tensor_size", ctypes.c_size_t, (pointer, integer)),
        ("gguf_get_tensor_type", ctypes.c_int, (pointer, integer)),
        ("ggml_type_name", text, (ctypes.c_int,)),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml


class Model:
    """A model that llama.cpp has loaded; freed with the last reference.

    Attributes:
        api: The library.
        pointer: The model, for its functions.
        vocabulary: The model's vocabulary, for the library's functions.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int) -> None:
        """Load a file; weights on the CPU are mapped into memory, not copied.

        Args:
            path: The GGUF file, or the first of several.
            n_gpu_layers: Layers in the memory of a GPU; negative for all.

        Raises:
            ConfigurationError: llama.cpp is missing, or it cannot load the file.
        """
        self.api = api = library()
        _errors.clear()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        self.pointer = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.pointer:
            raise ConfigurationError(
                f"llama.cpp cannot load {str(path)!r} ({'; '.join(_errors) or 'no reason given'}); give a whole GGUF "
                "file of an architecture that this version of llama-cpp-python knows"
            )
        finalize(self, api.llama_model_free, self.pointer)
        self.vocabulary = api.llama_model_get_vocab(self.pointer)

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's metadata, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = self.api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if needed < size:
                return None if needed < 0 else buffer.value.decode(errors="replace")
            size = needed + 1

    def number(self, key: str) -> int | None:
        """Return a number of the architecture's metadata, such as ``context_length``, or None."""
        value = self.metadata(f"{self.metadata('general.architecture')}.{key}")
        return int(value) if value and value.isdecimal() else None


class Settings(Protocol):
    """What contexts of one language model have in common."""

    llama: Model
    threads: int
    flash_attention: bool
    vocab_size: int
    hidden_size: int


class Context:
    """A context of llama.cpp: a memory of cells, shared by sequences, and batches that are decoded in it.

    Attributes:
        cells: Tokens that the memory holds.
        batch: The largest number of tokens of a decode.
    """

    def __init__(self, settings: Settings, cells: int) -> None:
        """Allocate a memory.

        Args:
            settings: The language model.
            cells: Tokens to hold; llama.cpp rounds up.

        Raises:
            RuntimeError: There is no memory for it.
        """
        self._settings = settings
        self._llama = settings.llama  # freed after this
        api = self._llama.api
        parameters = api.llama_context_default_params()
        self.batch = min(_BATCH, int(api.llama_max_parallel_sequences()))
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = parameters.n_outputs_max = self.batch
        parameters.n_seq_max = self.batch
        parameters.kv_unified = parameters.swa_full = parameters.embeddings = parameters.no_perf = True
        parameters.pooling_type = api.LLAMA_POOLING_TYPE_NONE
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        # Without flash attention a row's outputs do not depend on the rows beside it; with it they do, by .1 nats.
        parameters.flash_attn_type = int(settings.flash_attention)
        self._pointer = api.llama_init_from_model(self._llama.pointer, parameters)
        if not self._pointer:
            raise RuntimeError(f"llama.cpp cannot allocate memory of {cells:,} tokens")
        finalize(self, api.llama_free, self._pointer)
        self.cells = int(api.llama_n_ctx(self._pointer))
        self._memory = api.llama_get_memory(self._pointer)

    def decode(
        self, tokens: IntArray, positions: IntArray, counts: IntArray, sequences: IntArray, *, outputs: bool
    ) -> tuple[FloatArray, FloatArray]:
        """Process tokens, all in one batch.

        Args:
            tokens: int64 [n].
            positions: int64 [n], ascending within a sequence.
            counts: int64 [n], the number of sequences that each token belongs to.
            sequences: int64 [sum of ``counts``], these sequences, token by token.
            outputs: Whether the outputs at the tokens are wanted.

        Returns:
            Logits float32 [n, V] and hidden states float32 [n, d], both valid until the next decode; [0, …] without
            outputs.

        Raises:
            LanguageModelError: llama.cpp failed.
            RuntimeError: Memory ran out.
        """
        api, count = self._llama.api, len(tokens)
        joined = np.ascontiguousarray(sequences, dtype=np.int32)
        starts = joined.ctypes.data + joined.itemsize * (np.cumsum(counts) - counts)
        columns: dict[str, tuple[Any, Any]] = {
            "token": (np.ascontiguousarray(tokens, dtype=np.int32), ctypes.c_int32),
            "pos": (np.ascontiguousarray(positions, dtype=np.int32), ctypes.c_int32),
            "n_seq_id": (np.ascontiguousarray(counts, dtype=np.int32), ctypes.c_int32),
            "seq_id": (starts.astype(np.uint64), ctypes.POINTER(ctypes.c_int32)),
            "logits": (np.full(count, outputs, dtype=np.int8), ctypes.c_int8),
        }
        batch = api.llama_batch()
        batch.n_tokens = count
        for name, (array, kind) in columns.items():
            setattr(batch, name, ctypes.cast(array.ctypes.data, ctypes.POINTER(kind)))
        # With embeddings on, every token has outputs: the output layer of a small model is a fifth of its work.
        api.llama_set_embeddings(self._pointer, outputs)
        code = api.llama_decode(self._pointer, batch)
        if code == -2:
            raise RuntimeError(f"llama.cpp cannot allocate memory to process {count} tokens")
        if code:
            raise LanguageModelError(f"llama.cpp's decode of {count} tokens failed: {'; '.join(_errors) or code}")
        vocab_size, hidden_size = self._settings.vocab_size, self._settings.hidden_size
        if not outputs:
            return np.empty((0, vocab_size), dtype=np.float32), np.empty((0, hidden_size), dtype=np.float32)
        logits = np.ctypeslib.as_array(api.llama_get_logits(self._pointer), (count, vocab_size))
        hidden = np.ctypeslib.as_array(api.llama_get_embeddings(self._pointer), (count, hidden_size))
        return logits, hidden

    def extend(self, tokens: IntArray, start: int, end: int, *, outputs: bool) -> tuple[FloatArray, FloatArray]:
        """Process ``tokens[start:end]`` of one text, in the first sequence, which holds those before; see above."""
        one = np.ones(end - start, dtype=np.int64)
        return self.decode(tokens[start:end], np.arange(start, end), one, 0 * one, outputs=outputs)

    def copy(self, source: int, target: int, start: int = -1, end: int = -1) -> None:
        """Let the sequence ``target`` share the cells of ``source`` at positions from ``start`` to before ``end``."""
        self._llama.api.llama_memory_seq_cp(self._memory, source, target, start, end)

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> None:
        """Take cells from a sequence; those without any sequence are free."""
        self._llama.api.llama_memory_seq_rm(self._memory, sequence, start, end)

    def clear(self) -> None:
        """Free all cells."""
        self._llama.api.llama_memory_clear(self._memory, False)

    def state_bytes(self) -> int:
        """Return the bytes of all cells in use, and of what is written beside them."""
        return int(self._llama.api.llama_state_get_size(self._pointer))

    def take_over(self, other: Context) -> None:
        """Take the cells and the sequences of a smaller context."""
        size = other.state_bytes()
        buffer = np.empty(size, dtype=np.uint8)
        pointer = ctypes.cast(buffer.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        api = self._llama.api
        written = api.llama_state_get_data(other._pointer, pointer, size)
        if not written or api.llama_state_set_data(self._pointer, pointer, written) != written:
            raise LanguageModelError("llama.cpp could not copy its memory into a larger one")
