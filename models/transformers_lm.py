"""Any causal language model of Hugging Face transformers."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..checks import first_line
from ..errors import ConfigurationError, PromptError, QStarError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .flat.packed_weights import PackedWeights
from .base import Engine, FloatArray, LanguageModel, Message, PrefixEngine, bytes_of_piece, free_memory
from .devices import one_compute_thread, resolve_device, resolve_dtype
from .embedded_model import EMBEDDED_MODELS, converted_folder, embedded_model_folder, is_intact

# The model of transformers as it is; its numbers in a flat forward; numbers of half precision in a flat forward.
WEIGHTS = ("model", "flat", "float16")

__all__ = ["TransformersLM", "end_tokens", "load_transformers", "resolve_device", "resolve_dtype"]

logger = logging.getLogger(__name__)

_PRIVATE = ("_head", "_tapped", "_prepack", "_tree_mask_is_exact", "_recipe", "_recipe_holds_for")
# Attributes of a tokenizer that change what it returns and are not in its backend.
_TOKENIZER_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "model_input_names",
    "split_special_tokens",
)


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
                elsewhere. ``"auto"``: after a thousand steps of a size, as far as they take at most an eighth of the
                memory that is free now.
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
        self.vocab_size, self.hidden_size = (int(n) for n in _shape(self._head))
        self._tapped = _decoder_layers(model, hidden_layers)
        self.hidden_layers = tuple(hidden_layers)
        self.hidden_size += len(hidden_layers) * int(config.hidden_size)
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1_000_000)
        self.eos_token_ids = end_tokens((model.generation_config, config), tokenizer, self.vocab_size)
        self._prepack = prepack
        self.packed_weights = _packed_weights(model, prepack)
        # A flat model calls the tree's attention itself, and says what it takes; others are tried.
        self.kv_token_bytes = getattr(model, "kv_token_bytes", None)
        self._tree_mask_is_exact: bool | None = None if self.kv_token_bytes is None else True
        self._recipe: tuple[Any, ...] | None = None
        self._recipe_holds_for: object = None

    def set_recipe(self, load: Callable[..., TransformersLM], *arguments: Any) -> None:
        """Let another process make this model by ``load(*arguments)``, as long as nobody changes it in memory."""
        self._recipe, self._recipe_holds_for = (load, arguments), self._state()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the name that an unchanged model was loaded by, so that other processes load their own copies.

        A model that was not loaded by name is pickled by value. So is one whose weights, configuration, tokenizer or
        attributes have been changed since.
        """
        if self._recipe and self._state() == self._recipe_holds_for:
            return self._recipe
        make = partial(type(self), name=self.name, prepack=self._prepack, hidden_layers=self.hidden_layers)
        return make, (self.model, self.tokenizer), self._attributes()

    def _attributes(self) -> dict[str, Any]:
        """Return what was set on this object and follows neither from the constructor's arguments nor from a trial."""
        derived = {"model", "tokenizer", "packed_weights", "kv_token_bytes", *_PRIVATE}
        return {name: value for name, value in vars(self).items() if name not in derived}

    def _state(self) -> tuple[object, ...]:
        """Return a value that changes when somebody changes weights, configuration, tokenizer or attributes."""
        tokenizer = self.tokenizer
        settings = [getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS]
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer.to_str()
            backend = backend[backend.index('"added_tokens"') :]  # what precedes changes with every call that pads
        else:
            backend = repr(tokenizer.get_vocab())
        texts = (backend, repr(settings), repr(tokenizer.special_tokens_map), repr(tokenizer.chat_template))
        config = (self.model.config.to_json_string(), repr(self.model.generation_config))
        attributes = repr(sorted(self._attributes().items()))
        return self.weights_version(), config, zlib.crc32("".join(texts).encode()), attributes

    def weights_version(self) -> int:
        """See :meth:`LanguageModel.weights_version`."""
        weights = self.model.state_dict(keep_vars=True)
        return hash(tuple((n, w.data_ptr(), 0 if w.is_inference() else w._version) for n, w in weights.items()))

    @property
    def device(self) -> torch.device:
        """Where the model's input is expected."""
        return self.model.device

    def encode(self, prompt: str | Sequence[Message], **template: Any) -> list[int]:
        """See :meth:`LanguageModel.encode`.

        Raises:
            PromptError: The tokenizer has no chat template, the template refuses the chat, or a part of it is no
                token.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(f"model {self.name!r} has no chat template; give the prompt as a plain string")
        messages = [dict(message) for message in prompt]
        continues = messages[-1].get("role") == "assistant"
        options = {"add_generation_prompt": not continues, "continue_final_message": continues, **template}
        try:
            text = self.tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
        except Exception as error:  # templates are programs, which raise errors of any kind
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise PromptError(
                f"the chat template of {self.name!r} refuses a chat of the roles {roles}: {first_line(error)}"
            ) from error
        return self._token_ids(str(text), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`. Ids of the model without a token of the tokenizer have no text.

        Raises:
            ConfigurationError: An id is neither the model's nor the tokenizer's.
        """
        ids = [int(token) for token in token_ids]
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            size = max(self.vocab_size, len(self.tokenizer))
            if min(ids) < 0 or max(ids) >= size:
                raise ConfigurationError(f"token ids of {self.name!r} are from 0 to {size - 1}, got {ids[:20]}")
        if not self.tokenizer.is_fast:  # such a tokenizer fails on ids without a token
            ids = [i for i in ids if self.tokenizer.convert_ids_to_tokens(i) is not None]
        # Clean-up would make the text of a prefix differ from the beginning of the text of its continuation.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _piece_bytes(self, token: int) -> bytes:
        """Return the bytes of a part of a character, of byte-level BPE or byte fallback; none of another kind."""
        # A tokenizer of another kind may use the characters of byte-level BPE for themselves.
        known = bytes_of_piece(str(self.tokenizer.convert_ids_to_tokens(token)))
        return known if known.decode(errors="replace") == self.decode_continuation([token]) else b""

    @property
    def special_tokens(self) -> dict[str, int]:  # type: ignore[override]
        """By text, the tokens that :meth:`decode` leaves out."""
        tokens = {str(t.content): int(i) for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        tokens.update(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        return {text: token for text, token in tokens.items() if 0 <= token < self.vocab_size}

    def _encode_text(self, text: str) -> list[int]:
        """Return the ids of a plain text, with the special tokens that the tokenizer puts before it, none after it."""
        ids, plain = self._token_ids(text), self._token_ids(text, add_special_tokens=False)
        if not ids or not text:
            letter = self._token_ids("a", add_special_tokens=False) if ids else []
            return self._encode_text("a")[: -len(letter)] if letter else ids
        if plain and plain[0] == self.tokenizer.bos_token_id:
            return plain  # a text from a chat template begins with that token
        # An end-of-sequence token after the text would end what is to be continued.
        starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, len(ids)) + len(plain)]

    def _token_ids(self, text: str, **options: Any) -> list[int]:
        ids = list(self.tokenizer(text, **options)["input_ids"])
        if any(token is None for token in ids):
            raise PromptError(f"the tokenizer of {self.name!r} has no tokens for all of the prompt {text[:60]!r}")
        return [int(token) for token in ids]

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`. One sequence at a time: no padding, whatever the architecture."""
        import torch

        hidden, logprobs = [], []
        with self.lock, torch.inference_mode():
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

    def new_engine(self, *, kv_budget: int | None = None) -> Engine:
        """Return a :class:`TreeEngine` where it is exact, else a :class:`PrefixEngine`.

        Whether it is exact is measured once per model, on a small random tree, rather than read off a list of names.
        """
        from .testing import tree_mask_error
        from .tree_engine import TreeEngine

        with self.lock:
            if self._tree_mask_is_exact is None:
                problem = tree_mask_error(self)
                self._tree_mask_is_exact = problem is None
                if problem is not None:
                    logger.warning("%s: %s; whole prefixes are recomputed instead (exact, slower)", self.name, problem)
        return TreeEngine(self, kv_budget=kv_budget) if self._tree_mask_is_exact else PrefixEngine(self)


def _shape(layer: Any) -> tuple[int, int]:
    """Return the sizes of a linear layer's output and input; those of packed weights are known without unpacking."""
    return tuple(getattr(layer, "shape", None) or layer.weight.shape)


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


def _check_prepack(prepack: Any) -> None:
    if prepack not in (True, False, "auto"):
        raise ConfigurationError(f"prepack is True, False or 'auto', got {prepack!r}")


def _packed_weights(model: PreTrainedModel, prepack: bool | str) -> PackedWeights | None:
    from .flat.packed_weights import WORTHWHILE, PackedWeights

    _check_prepack(prepack)
    if not prepack:
        return None
    return PackedWeights(model, free_memory() / 8, worthwhile=WORTHWHILE) if prepack == "auto" else PackedWeights(model)


def end_tokens(configs: Sequence[Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> frozenset[int]:
    """Collect every token that ends a text, by a model's configurations and its tokenizer.

    Ids outside of the model's vocabulary, such as -1 for none, are ignored: the model cannot write them.
    """
    ids: set[int] = set()
    for source in (*configs, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    # Chat models name their turn's end as EOS; the pre-training end-of-text token still ends a plain text.
    ids.update(i for t, i in tokenizer.get_added_vocab().items() if t in ("<|endoftext|>", "<|end_of_text|>", "</s>"))
    return frozenset(int(i) for i in ids if 0 <= int(i) < vocab_size)


_LOADED: dict[tuple[str, ...], TransformersLM] = {}


def load_transformers(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    prepack: bool | str = "auto",
    hidden_layers: Sequence[int] = (),
    weights: str = "model",
    **model_kwargs: Any,
) -> TransformersLM:
    """Load a model of transformers, once per process; see :func:`~qstar_decoding.models.load_language_model`.

    Args:
        name: A key of :data:`EMBEDDED_MODELS`, a local folder, or a hub id.
        device: A device of torch, or ``"auto"``.
        dtype: A dtype of torch, or ``"auto"``.
        prepack: See :class:`TransformersLM`.
        hidden_layers: See :class:`TransformersLM`; models that differ in nothing else share their weights.
        weights: ``"model"``: transformers' own model. ``"flat"``: the same numbers in a forward of fewer operations,
            for models of the Llama family (Llama, Mistral, Qwen 2 and 3); ``lm.model`` has no ``generate`` then.
            ``"float16"``: as flat, with matrices rounded to half precision and arithmetic in float32, on x86 CPUs. The
            embedded model's log-probabilities change by .002 nats on average, .013 at most (2026-11-27, the 8 likeliest
            tokens at 50 places).
        model_kwargs: Handed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UnknownNameError: The model cannot be loaded.
        ConfigurationError: The device does not exist, the dtype is not one, or the model or machine cannot do with
            these ``weights``.
        CacheError: The cache folder cannot be written.
    """
    if weights not in WEIGHTS:
        raise ConfigurationError(f"weights is one of {', '.join(map(repr, WEIGHTS))}; got {weights!r}")
    _check_prepack(prepack)
    is_new = name in EMBEDDED_MODELS and not any(key[0] == name for key in _LOADED)
    with ThreadPoolExecutor(1) as pool:  # reading half a gigabyte takes as long as the import of torch, beside it
        intact = pool.submit(is_intact, converted_folder(name)) if is_new else None
        torch_device = resolve_device(device)
        torch_dtype = resolve_dtype("float32" if weights == "float16" and dtype == "auto" else dtype, torch_device)
    options = {**model_kwargs, **({} if weights == "model" else {"weights": weights})}
    key = (name, str(torch_device), str(torch_dtype), str(prepack), repr(sorted(options.items())))
    if key not in _LOADED:
        _LOADED[key] = _load(name, torch_device, torch_dtype, prepack, options, intact.result() if intact else None)
    if not hidden_layers:
        return _LOADED[key]
    tapping = *key, repr(tuple(hidden_layers))
    if tapping not in _LOADED:
        plain = _LOADED[key]
        loaded = TransformersLM(plain.model, plain.tokenizer, name=name, prepack=False, hidden_layers=hidden_layers)
        loaded.packed_weights, loaded.lock = plain.packed_weights, plain.lock
        _set_recipe(loaded, name, prepack, {**options, "hidden_layers": tuple(hidden_layers)})
        _LOADED[tapping] = loaded
    return _LOADED[tapping]


@one_compute_thread()
def _load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    prepack: bool | str,
    options: dict[str, Any],
    intact: bool | None,
) -> TransformersLM:
    known = EMBEDDED_MODELS.get(name)
    source = str(embedded_model_folder(name, intact) or known.hub_id) if known else name
    try:
        if "weights" in options:
            from .flat.loading import load_flat

            model, tokenizer = cast("Any", load_flat(source, device, dtype, **options))
        else:
            model, tokenizer = _from_transformers(source, device, dtype, options)
    except QStarError:
        raise  # says what is wrong by itself
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        hint = (
            _missing_from(source)
            or f"A local folder or a hub id works too, but {source!r} could not be loaded: {problem}"
        )
        raise UnknownNameError("model", name, EMBEDDED_MODELS, hint) from error
    loaded = TransformersLM(model, tokenizer, name=name, prepack=prepack)
    _set_recipe(loaded, name, prepack, options)
    return loaded


def _from_transformers(source: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer_kwargs = {k: v for k, v in options.items() if k in ("revision", "token", "trust_remote_code")}
    tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
    model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": dtype, **options})
    if "device_map" not in options and "quantization_config" not in options:
        model = cast("Any", model).to(device)
    return model, tokenizer


def _missing_from(source: str) -> str | None:
    """Return advice on a local folder that has a model but no tokenizer; None for anything else."""
    names = os.listdir(source) if os.path.isdir(source) else []
    has_tokenizer = any("token" in name or name.startswith(("vocab", "spiece", "merges")) for name in names)
    if has_tokenizer or "config.json" not in names:
        return None
    return f"The folder {source!r} has no tokenizer; write it there with tokenizer.save_pretrained(folder)."


def _set_recipe(loaded: TransformersLM, name: str, prepack: bool | str, options: dict[str, Any]) -> None:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    loaded.set_recipe(partial(load_transformers, prepack=prepack, **options), name, str(loaded.model.device), dtype)
