"""Language models by name: known names, hub ids and local folders."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigurationError, UnknownNameError
from .embedded_model import EMBEDDED_MODELS, embedded_model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

from .transformers_lm import TransformersLM

__all__ = ["load_language_model"]

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
        loaded.recipe = _recipe(plain.model, name, prepack, {**model_kwargs, "hidden_layers": tuple(hidden_layers)})
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
    loaded.recipe = _recipe(model, name, prepack, model_kwargs)
    return loaded


def _recipe(model: PreTrainedModel, name: str, prepack: bool | str, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return how another process loads the same model, as ``__reduce__`` says it."""
    dtype = str(model.dtype).removeprefix("torch.")
    return partial(load_language_model, prepack=prepack, **options), (name, str(model.device), dtype)


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
