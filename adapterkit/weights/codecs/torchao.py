"""torchao: tensor subclasses, flattened into safetensors with what they are in the header's metadata; read only."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import shown
from adapterkit.kernels.fp8 import decode_fp8
from adapterkit.kernels.integers import decode_int8, decode_torchao_int4
from adapterkit.weights.codec import CheckpointScan, QuantizedWeight

NAMES = ("qdata", "scale", "zero_point")
BESIDE = ("act_quant_scale", "act_quant_zero_point")
KINDS = {  # dtype of codes; those that may have zeros, those that must
    "Float8Tensor": ("F8_E4M3", False, False),
    "Int8Tensor": ("I8", True, False),
    "IntxUnpackedToInt8Tensor": ("I8", True, True),
    "Int4Tensor": ("U8", True, True),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class Torchao(QuantizedWeight):
    """W = (code - zero) * scale, a scale for a block of W; Int4Tensor: code * scale + zero."""

    name = "torchao"
    methods = ("torchao",)

    kind: str
    block: tuple[int, int]
    zeroed: bool

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        if found.method not in cls.methods:
            return
        metadata: dict[str, str] = {}
        for header in found.base.shards.values():
            metadata |= header.metadata
        for key, text in metadata.items():
            said = _parsed(text) if "." in key else None
            kind = str(said.get("_type")) if said else "Tensor"
            if said is None or kind == "Tensor":
                continue
            if kind not in KINDS:
                found.refuse(f"{shown(key)}: torchao's {shown(kind)}", ", ".join(KINDS))
                continue
            record = _record(cls, found, key, kind, said)
            if record is not None:
                yield record

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        codes, scale, *rest = (stored[part.key] for part in self.parts)
        if self.kind == "Int4Tensor":
            return decode_torchao_int4(codes, scale, rest[0])
        if self.kind == "Float8Tensor":
            grid = [math.ceil(n / size) for n, size in zip(self.shape, self.block, strict=True)]
            return decode_fp8(codes, scale.view(grid), self.block)
        return decode_int8(codes, scale, rest[0] if self.zeroed else None)

    @property
    def read_only(self) -> str | None:
        return "torchao's files are written by its own tensors"


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "_type" in value else None


def _record(
    cls: type[Torchao], found: CheckpointScan, key: str, kind: str, said: dict[str, Any]
) -> Torchao | None:
    start, _, leaf = key.rpartition(".")
    prefix = f"{start}._{leaf}_"
    dtype, optional, required = KINDS[kind]
    zeroed = required or (optional and prefix + "zero_point" in found.tensors)
    siblings = found.siblings(prefix, *NAMES[: 3 if zeroed else 2])
    if siblings is None:
        return None
    if prefix + "act_pre_scale" in found.tensors:
        found.refuse(
            f"{shown(prefix)}act_pre_scale: a weight scaled for its inputs",
            "weights as the model has them",
        )
        return None
    codes, scale, *zeros = siblings
    data = said.get("_data")
    data = data if isinstance(data, dict) else {}
    block = data.get("block_size")
    good = (
        len(codes.shape) == 2
        and 0 not in codes.shape
        and codes.dtype == dtype
        and scale.dtype in DTYPES.values()
    )
    shape = (codes.shape[0], codes.shape[1] * (2 if kind == "Int4Tensor" else 1)) if good else ()
    text = f"{kind} {codes.dtype} {codes.shape}, scales {scale.dtype} {scale.shape}, block_size {shown(block)}"
    sizes = (
        block
        if isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
        else None
    )
    good = good and sizes is not None and _fits(kind, shape, sizes, scale, zeros)
    finite = zeros if kind == "Int4Tensor" else []
    if not found.check(key, good, text, f"{dtype}, and a scale for each block"):
        return None
    found.check_finite(scale, *finite)
    assert sizes is not None
    beside = [found.tensors[prefix + name] for name in BESIDE if prefix + name in found.tensors]
    whole = data.get("dtype")
    named = DTYPES.get(str(whole.get("_data"))) if isinstance(whole, dict) else scale.dtype
    about = {
        "kind": kind,
        "block": (sizes[0], sizes[1]),
        "zeroed": zeroed,
        "dtype": named or found.compute_dtype,
    }
    place = {"file": codes.file, "start": codes.start, "stop": codes.stop, "folder": codes.folder}
    return cls(key=key, shape=shape, parts=(codes, scale, *zeros, *beside), **about, **place)


def _fits(
    kind: str, shape: tuple[int, ...], block: list[int], scale: TensorSpec, zeros: list[TensorSpec]
) -> bool:
    """Whether there is a scale for each block, and where there are zeros, as many."""
    if any(n % size for n, size in zip(shape, block, strict=True)):
        return False
    rows, columns = shape[0] // block[0], shape[1] // block[1]
    if kind == "Int4Tensor":
        good = rows == shape[0] and scale.shape == (columns, rows)
        return good and all(
            zero.shape == scale.shape and zero.dtype == scale.dtype for zero in zeros
        )
    if kind != "Float8Tensor" and not (rows == shape[0] or rows == columns == 1):
        return False
    shapes = [
        (rows, columns),
        *([(), (1,)] if rows == columns == 1 else [(rows,)] if columns == 1 else []),
    ]
    return scale.shape in shapes and all(
        zero.dtype == "I8" and zero.shape == scale.shape for zero in zeros
    )
