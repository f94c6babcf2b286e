"""Loading of flat models: from a folder or the hub, without transformers' modelling code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigurationError
from .model import FlatModel

__all__ = ["load_flat"]


def load_flat(
    source: str, device: torch.device, dtype: torch.dtype, *, weights: str, **options: Any
) -> tuple[FlatModel, Any]:
    """Return a model and its tokenizer.

    Args:
        source: A local folder or a hub id.
        device: The place of the weights.
        dtype: Their dtype; float32 for half-precision weights.
        weights: ``"flat"`` or ``"float16"``.
        options: ``revision`` and ``token`` of the hub.

    Raises:
        ConfigurationError: The machine or the model cannot do with these weights, or there is another option.
        OSError: A file is missing or broken.
    """
    half = weights == "float16"
    if half and (device.type, dtype) != ("cpu", torch.float32):
        raise ConfigurationError(
            f"weights='float16' computes in float32 on a CPU; for device {str(device)!r} and {dtype} use weights='flat'"
        )
    if unknown := set(options) - {"revision", "token"}:
        raise ConfigurationError(f"weights={weights!r} takes no {', '.join(sorted(unknown))}; leave it out")
    folder = Path(source) if os.path.isdir(source) else _download(source, options)
    tokenizer = _tokenizer_in(folder)
    return FlatModel.from_folder(folder, dtype=dtype, half=half).to(device), tokenizer


def _download(repository: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.safetensors", "*.model"]
    return Path(snapshot_download(repository, allow_patterns=patterns, **options))


def _tokenizer_in(folder: Path) -> Any:
    """Return the tokenizer in a folder; a plain one of the tokenizers library is read without modelling code."""
    import transformers

    settings = folder / "tokenizer_config.json"
    entries = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    is_plain = entries.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    name = "PreTrainedTokenizerFast" if is_plain else "AutoTokenizer"
    return getattr(transformers, name).from_pretrained(str(folder))
