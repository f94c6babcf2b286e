"""Language models: one small interface, the Hugging Face implementation, and the embedded default.

A :class:`LanguageModel` maps token sequences to next-token log-probabilities. How a *tree* of sequences is computed
without repeating work is the business of an :class:`Engine`, which each model brings along.
"""

from __future__ import annotations

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, PromptError, UnknownNameError
from .embedded_model import EMBEDDED_MODELS, embedded_model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .prepacking import PackedWeights

__all__ = ["Engine", "LanguageModel", "Outputs", "PrefixEngine", "TransformersLM", "load_language_model"]

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Message = Mapping[str, str]


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

    def forget(self, kept: IntArray) -> IntArray:
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
        kv_token_bytes: Bytes of keys and values per token over all layers; None where none are kept, or not yet known.
    """

    name: str
    hidden_layers: tuple[int, ...] = ()
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

    def forget(self, kept: IntArray) -> IntArray:
        """See :meth:`Engine.forget`."""
        self._sequences = [self._sequences[handle] for handle in kept]
        return np.arange(len(kept))


class TransformersLM(LanguageModel):
    """Any causal LM of Hugging Face transformers.

    Attributes:
        model: The untouched ``PreTrainedModel``, in evaluation mode.
        tokenizer: The untouched tokenizer.
        packed_weights: See ``prepack``; None without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        prepack: bool | str = "auto",
        hidden_layers: Sequence[int] = (),
    ) -> None:
        """Wrap a loaded model and its tokenizer; neither is changed.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            name: Identifies the model in checkpoints; by default what it was loaded by.
            prepack: Whether copies of the weights in layouts for steps of 16, 32 and 64 tokens may be kept, made as
                they are needed. They make such steps some 10 to 20 % faster on x86 CPUs in float32 and do nothing
                elsewhere. ``"auto"``: as far as they take at most an eighth of the memory that is free now.
            hidden_layers: Decoder layers, from 0, whose outputs are to follow the last hidden state. What a model knows
                of its input often stands clearer in its middle (Azaria & Mitchell 2023); its end knows the next token.

        Raises:
            ConfigurationError: The model has no such layer.
        """
        model.train(False)
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        self.name = name or str(config.name_or_path)
        self._head: torch.nn.Module = cast("Any", model).get_output_embeddings()
        # The head's own width: in some architectures (OPT) it differs from the layers'.
        self.vocab_size, self.hidden_size = (int(n) for n in cast("Any", self._head).weight.shape)
        self._tapped = _decoder_layers(model, hidden_layers)
        self.hidden_layers = tuple(hidden_layers)
        self.hidden_size += len(hidden_layers) * int(config.hidden_size)
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1_000_000)
        self.eos_token_ids = _end_tokens(model, tokenizer)
        self.packed_weights = _packed_weights(model, prepack)
        self._tree_mask_is_exact: bool | None = None
        self._model_kwargs: dict[str, Any] = {}  # what load_language_model was given, for pickling

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: the other process loads its own copy of the weights."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return partial(load_language_model, **self._model_kwargs), (self.name, str(self.model.device), dtype)

    @property
    def device(self) -> torch.device:
        """Where the model's input is expected."""
        return self.model.device

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """See :meth:`LanguageModel.encode`.

        Raises:
            PromptError: The prompt is a chat and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return [int(t) for t in self.tokenizer(prompt)["input_ids"]]
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(f"model {self.name!r} has no chat template; give the prompt as a plain string")
        messages = [dict(message) for message in prompt]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return [int(t) for t in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`."""
        # Clean-up would make the text of a prefix differ from the beginning of the text of its continuation.
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`. One sequence at a time: no padding, whatever the architecture."""
        import torch

        hidden, logprobs = [], []
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.tensor([list(sequence)], device=self.device)
                last = torch.tensor([len(sequence) - 1], device=self.device)
                state, logits = self.hidden_and_logits(last, input_ids=ids, use_cache=False)
                hidden.append(state[0].float())
                logprobs.append(logits[0].float().log_softmax(-1))
            return torch.stack(hidden).cpu().numpy(), torch.stack(logprobs).cpu().numpy()

    def hidden_and_logits(self, positions: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on one packed sequence and return what its output layer saw and said at ``positions`` [n].

        The output layer, the largest product of a small model, runs only there.

        Returns:
            Hidden states [n, d] and logits [n, V], in the model's dtype. The states of further layers have been scaled
            to the root mean square of the last one's: their own scales differ by orders of magnitude.
        """
        import torch

        seen: list[torch.Tensor] = []
        tapped: list[torch.Tensor] = []

        def tap(_module: Any, _args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            tapped.append(states.reshape(-1, states.shape[-1])[positions])

        # Hooks give the hidden states of every architecture alike, without keeping all layers' outputs.
        hooks = [layer.register_forward_hook(tap) for layer in self._tapped]
        hooks.append(cast("Any", self._head).register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        try:
            logits = self.model(**inputs, logits_to_keep=positions).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        hidden = seen[0][0]
        if len(hidden) != len(positions):  # an architecture that ignores logits_to_keep
            hidden, logits = hidden[positions], logits[positions]
        if tapped:
            norm = _root_mean_square(hidden)
            hidden = torch.cat([hidden, *(state * (norm / _root_mean_square(state)) for state in tapped)], dim=-1)
        return hidden, logits

    def token_embeddings(self) -> FloatArray:
        """Return the input embeddings, float32 [V, d]."""
        weight = cast("Any", self.model).get_input_embeddings().weight.detach()[: self.vocab_size]
        return np.asarray(weight.float().cpu().numpy(), dtype=np.float32)

    def engine(self, top_k: int, kv_budget: int | None = None) -> Engine:
        """Return a :class:`~qstar_decoding.envs.kv_pool.TreeEngine` where it is exact, else a :class:`PrefixEngine`.

        Whether it is exact is measured once per model, on a small random tree, rather than read off a list of names.
        """
        from .kv_pool import TreeEngine, tree_mask_error

        if self._tree_mask_is_exact is None:
            problem = tree_mask_error(self)
            self._tree_mask_is_exact = problem is None
            if problem is not None:
                logger.warning("%s: %s; whole prefixes are recomputed instead (exact, slower)", self.name, problem)
        return TreeEngine(self, top_k, kv_budget) if self._tree_mask_is_exact else PrefixEngine(self, top_k)


def _root_mean_square(states: torch.Tensor) -> torch.Tensor:
    return states.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6).to(states.dtype)


def _decoder_layers(model: PreTrainedModel, which: Sequence[int]) -> list[torch.nn.Module]:
    """Return the layers ``which``, in the order in which the model runs them, wherever the architecture keeps them.

    Raises:
        ConfigurationError: The model has no such layer, or they do not ascend.
    """
    if not which:
        return []
    import torch

    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    ascending = all(isinstance(i, int) for i in which) and list(which) == sorted(set(which))
    if not ascending or not 0 <= which[0] <= which[-1] < count or not lists:
        raise ConfigurationError(f"hidden_layers are ascending integers from 0 to {count - 1}, got {list(which)!r}")
    return [lists[0][i] for i in which]


def _packed_weights(model: PreTrainedModel, prepack: bool | str) -> PackedWeights | None:
    from .prepacking import PackedWeights

    if prepack not in (True, False, "auto"):
        raise ConfigurationError(f"prepack is True, False or 'auto', got {prepack!r}")
    if not prepack:
        return None
    return PackedWeights(model, free_memory() / 8 if prepack == "auto" else float("inf"))


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that are free on a CUDA device, or in main memory for any other and for None."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect every token that ends a text, as the model's configuration and its tokenizer tell them."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    # Chat models name their turn's end as EOS; the pre-training end-of-text token still ends a plain text.
    ids.update(i for t, i in tokenizer.get_added_vocab().items() if t in ("<|endoftext|>", "<|end_of_text|>", "</s>"))
    return frozenset(int(i) for i in ids)


_LOADED: dict[tuple[str, ...], TransformersLM] = {}


def load_language_model(
    name: str = "smollm2-135m-instruct",
    device: str = "auto",
    dtype: str = "auto",
    *,
    prepack: bool | str = "auto",
    hidden_layers: Sequence[int] = (),
    **model_kwargs: Any,
) -> TransformersLM:
    """Load a causal language model, once per process however often it is asked for.

    Args:
        name: ``"smollm2-135m-instruct"`` (the embedded default), a local folder, or a hub id.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        dtype: ``"auto"`` (bfloat16 where the hardware computes it natively, else float32), ``"float32"``, …
        prepack: See :class:`TransformersLM`.
        hidden_layers: See :class:`TransformersLM`; models that differ in nothing else share their weights.
        model_kwargs: Handed to ``AutoModelForCausalLM.from_pretrained`` (``revision``, ``device_map``,
            ``quantization_config``, …).

    Returns:
        The model, shared by everybody in this process who asked with the same arguments.

    Raises:
        UnknownNameError: The name is neither known, nor a folder, nor a model that the hub (or its cache) has.
        ConfigurationError: The device does not exist or the dtype is not one.
        CacheError: The cache folder cannot be written.
    """
    if not name:
        raise ConfigurationError("a model name is empty; give a known name, a hub id or a local folder")
    torch_device = _resolve_device(device)
    torch_dtype = _resolve_dtype(dtype, torch_device)
    key = (name, str(torch_device), str(torch_dtype), str(prepack), repr(sorted(model_kwargs.items())))
    if key not in _LOADED:
        _LOADED[key] = _load(name, torch_device, torch_dtype, prepack, model_kwargs)
    if not hidden_layers:
        return _LOADED[key]
    tapping = *key, repr(tuple(hidden_layers))
    if tapping not in _LOADED:
        plain = _LOADED[key]
        loaded = TransformersLM(plain.model, plain.tokenizer, name=name, prepack=False, hidden_layers=hidden_layers)
        loaded.packed_weights = plain.packed_weights
        loaded._model_kwargs = {**plain._model_kwargs, "hidden_layers": tuple(hidden_layers)}
        _LOADED[tapping] = loaded
    return _LOADED[tapping]


def _load(
    name: str, device: torch.device, dtype: torch.dtype, prepack: bool | str, model_kwargs: dict[str, Any]
) -> TransformersLM:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_typo = "/" not in name and difflib.get_close_matches(name.lower(), EMBEDDED_MODELS)
    if name not in EMBEDDED_MODELS and is_typo and not Path(name).exists():
        # Said at once: the hub would be asked for it for a minute where there is no network.
        raise UnknownNameError("model", name, EMBEDDED_MODELS, "A local folder or a hub id works too.")
    source = str(embedded_model_folder(name) or EMBEDDED_MODELS[name].hub_id) if name in EMBEDDED_MODELS else name
    tokenizer_kwargs = {k: v for k, v in model_kwargs.items() if k in ("revision", "token", "trust_remote_code")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": dtype, **model_kwargs})
    except (OSError, ValueError) as error:
        hint = f"A local folder or a hub id works too, but {source!r} could not be loaded: {str(error).splitlines()[0]}"
        raise UnknownNameError("model", name, EMBEDDED_MODELS, hint) from error
    if "device_map" not in model_kwargs and "quantization_config" not in model_kwargs:
        model = cast("Any", model).to(device)
    loaded = TransformersLM(model, tokenizer, name=name, prepack=prepack)
    loaded._model_kwargs = {"prepack": prepack, **model_kwargs}
    return loaded


def _resolve_device(device: str) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device {device!r} is not one: use 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {device!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    try:
        # A tensor's device has the number that the model will tell: who unpickles the model asks for it by that.
        return torch.empty(0, device=resolved).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device!r} asked for, but torch cannot use it: {error}") from error


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    import torch

    if dtype == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Emulated bfloat16 is several times slower than float32, so ask the CPU, not torch.
            native = device.type == "cpu" and bool(
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
        return torch.bfloat16 if native else torch.float32
    resolved = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ConfigurationError(f"dtype {dtype!r} is not a floating-point one: use 'auto', 'float32', 'bfloat16'")
    return resolved
