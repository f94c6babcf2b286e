"""One tensor of a GGUF file, found without reading the rest: the ``gguf`` package's reader takes many seconds."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..base import FloatArray

__all__ = ["read_tensor"]

# Bytes of the numbers among the types of metadata, by their id; 8 is a string and 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


def read_tensor(path: str | Path, name: str) -> FloatArray | None:
    """Return a tensor of two dimensions, float32, dequantised; None where the file has none of this name.

    Raises:
        ValueError: The file is not a GGUF file of version 2 or 3, or is damaged.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reader = _Reader(content)
        magic, version, tensors, pairs = reader.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        alignment = 32
        for _ in range(pairs):
            key, (kind,) = reader.string(), reader.take("<I")
            if key == _ALIGNMENT.encode():
                (alignment,) = reader.take("<I")
            else:
                reader.skip(kind)
        found = None
        for _ in range(tensors):
            key, (dimensions,) = reader.string(), reader.take("<I")
            shape = reader.take(f"<{dimensions}Q")
            kind, offset = reader.take("<IQ")
            if key == name.encode():
                found = shape[::-1], GGMLQuantizationType(kind), offset
        if found is None:
            return None
        shape, quantization, offset = found
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        row_bytes = shape[-1] // block * block_bytes
        start = -(-reader.place // alignment) * alignment + offset
        size = math.prod(shape[:-1]) * row_bytes
        data = np.frombuffer(content[start : start + size], dtype=np.uint8).reshape(*shape[:-1], row_bytes)
    if quantization in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return data.view(np.float32 if quantization is GGMLQuantizationType.F32 else np.float16).astype(np.float32)
    return np.asarray(dequantize(data, quantization), dtype=np.float32)


class _Reader:
    """Reads the head of a GGUF file from the beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.place = content, 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._content, self.place)
        self.place += struct.calcsize(form)
        return values

    def string(self) -> bytes:
        (length,) = self.take("<Q")
        self.place += length
        return self._content[self.place - length : self.place]

    def skip(self, kind: int) -> None:
        """Skip a value of metadata."""
        if kind == _ARRAY:
            of, count = self.take("<IQ")
            if of in _SIZES:
                self.place += count * _SIZES[of]
            elif of == _STRING:
                read, content, place = struct.Struct("<Q").unpack_from, self._content, self.place
                for _ in range(count):
                    place += 8 + read(content, place)[0]
                self.place = place
            else:
                for _ in range(count):
                    self.skip(of)
        elif kind == _STRING:
            self.string()
        elif kind in _SIZES:
            self.place += _SIZES[kind]
        else:
            raise ValueError(f"GGUF files have no metadata of type {kind}")
