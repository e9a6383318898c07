"""The number formats of safetensors files: names, widths, and torch's names for them.

The code uses header names (`BF16`); people type the short ones (`bf16`)."""

import struct
from collections.abc import Sequence

from adapterkit.core.lazy import Tensor, torch

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# the dtypes of arithmetic; the rest is copied, or decoded by a codec
FLOATS = ("BF16", "F16", "F32", "F64")
SERIAL = (  # order of a file's tensors in safetensors' library; by name within a dtype
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
SHORT = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONFIG_NAME = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
HEADER_NAME = {word: name for name, word in CONFIG_NAME.items()}

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

CODES = {  # of `struct`, and numpy's
    "BOOL": "?", "U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i",
    "U64": "Q", "I64": "q", "F16": "e", "F32": "f", "F64": "d",
}  # fmt: skip
NUMBERS = (*CODES, "BF16")


def size(dtype: str, count: int) -> int:
    """Return the bytes of `count` elements, which must fill whole bytes."""
    return BITS[dtype] * count // 8


def parse(name: str) -> str:
    """Return the header name of a dtype option: bf16, fp16 or fp32."""
    return SHORT[name]


def name_of(dtype) -> str:
    """Return the header name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, word in _TORCH.items() if word == short)


def has_name(dtype) -> bool:
    """Return whether a torch dtype has a header name."""
    return str(dtype).removeprefix("torch.") in _TORCH.values()


def torch_dtype(dtype: str):
    """Return torch's dtype for a header name."""
    return getattr(torch, _TORCH[dtype])


def number_of(data: bytes, dtype: str) -> float:
    """Return the one number in stored bytes, of a dtype in NUMBERS."""
    if dtype == "BF16":
        data, dtype = b"\0\0" + data, "F32"
    return float(struct.unpack(f"<{CODES[dtype]}", data)[0])


def tensor_of(data: bytearray, dtype: str, shape: Sequence[int]) -> Tensor:
    """Return a tensor over stored bytes, which may be empty."""
    if not data:
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).view(shape)
