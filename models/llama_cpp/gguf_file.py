"""One tensor of a GGUF file, read and dequantised by llama.cpp's own library of tensors."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

from ..base import FloatArray
from .library import GGUFParameters, tensor_library

__all__ = ["read_tensor"]

# Types that are not quantised have functions of other names.
_CONVERSIONS = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}


def read_tensor(path: str | Path, name: str) -> FloatArray | None:
    """Return a tensor of two dimensions, float32, dequantised; None where the file has none of this name.

    Raises:
        ValueError: The file is not a GGUF file of a version that the library knows, or is damaged.
    """
    library = tensor_library()
    file = library.gguf_init_from_file(os.fsencode(path), GGUFParameters(no_alloc=True))
    if not file:
        raise ValueError(f"{path} is not a GGUF file, or is damaged")
    try:
        if (index := library.gguf_find_tensor(file, name.encode())) < 0:
            return None
        columns, rows = library.gguf_get_tensor_ne(file, index)[:2]
        kind = library.ggml_type_name(library.gguf_get_tensor_type(file, index)).decode()
        start = library.gguf_get_data_offset(file) + library.gguf_get_tensor_offset(file, index)
        size = library.gguf_get_tensor_size(file, index)
    finally:
        library.gguf_free(file)
    if Path(path).stat().st_size < start + size:
        raise ValueError(f"{path} is damaged: it ends before its tensor {name!r} does")
    content = np.memmap(path, np.uint8, "r", start, size)
    if kind == "f32":
        return np.array(content.view(np.float32).reshape(rows, columns))
    dequantize = getattr(library, _CONVERSIONS.get(kind, f"dequantize_row_{kind}"))
    dequantize.argtypes, dequantize.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    values = np.empty((rows, columns), dtype=np.float32)
    dequantize(content.ctypes.data, values.ctypes.data, values.size)
    return values
