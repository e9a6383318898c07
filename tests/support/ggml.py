"""ggml's own quantizers, of the library in the wheel xllamacpp, and gguf-py's decoders."""

import ctypes
import functools
import importlib
import importlib.util
import platform
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapterkit.kernels.quant.ggml import TYPES

HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"


def _module(name: str) -> ModuleType:
    """A package of the extra `test`, which other systems may lack."""
    return importlib.import_module(name) if HAS_WHEELS else pytest.importorskip(name)


@functools.cache
def _library() -> Any:
    _module("xllamacpp")
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(spec.origin)
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *sizes,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(name: str, w: Tensor, importance: Tensor | None = None) -> Tensor:
    """(rows, bytes) uint8 of ggml_quantize_chunk."""
    kind, (rows, columns) = TYPES[name], w.shape
    w, out = w.contiguous(), torch.empty(rows, columns // kind.values * kind.nbytes).byte()
    weights = None if importance is None else importance.data_ptr()
    chunk = _library().ggml_quantize_chunk
    count = chunk(kind.kind, w.data_ptr(), out.data_ptr(), 0, rows, columns, weights)
    assert count == out.numel()
    return out


def dequantize(name: str, blocks: Tensor) -> Tensor:
    """gguf-py's."""
    gguf = _module("gguf")
    with np.errstate(all="ignore"):
        values = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values)


def sizes(name: str) -> tuple[int, int, int]:
    """ggml's number, values and bytes of a type, by gguf-py."""
    gguf = _module("gguf")
    kind = gguf.GGMLQuantizationType[name]
    return (kind.value, *gguf.GGML_QUANT_SIZES[kind])
