"""compressed: integers, FP8 and FP4 in compressed-tensors' files, as llm-compressor writes and vLLM
reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.bases.quantized.codecs.compressed_layout import (
    INDEX,
    SHAPE,
    TYPES,
    ZERO,
    StoredModule,
    schemes,
)
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import (
    Parts,
    PlainWeight,
    QuantizedModules,
    QuantizedWeight,
    check_block_size,
)
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp4, fp8, integers
from adapterkit.kernels.quant.grid import MX_GROUP, Grid
from adapterkit.kernels.quant.stochastic import Draws

PACKED, SCALE, GLOBAL_SCALE = "weight_packed", "weight_scale", "weight_global_scale"
CODES = (f".{PACKED}", ".weight")
CODE_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
SIZES = (128, 64, 32)  # of groups that inference kernels know


@dataclass(frozen=True, kw_only=True)
class Compressed(QuantizedWeight):
    """W = (code - zero) * scale of int4 and int8 (any bits), FP8, NVFP4 and MXFP4, one scale for a
    block of W."""

    name = "compressed-tensors"
    tier = "core"
    methods = ("compressed-tensors",)
    targets = ("w4a16", "w8a16", "mxfp4")
    modules = ("Linear",)
    allows_plain_experts = False

    kind: str  # of codes, a key of TYPES
    bits: int
    block: tuple[int, int]  # of the weight, with one scale
    symmetric: bool
    indexed: bool  # there is a weight_g_idx that may say which group a column is in

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> Compressed | None:
        out, width = weight.shape
        if not weight.has_weight_name:
            return None
        if target == "mxfp4":
            if width % MX_GROUP:
                return None
            kind, bits, size = "mxfp4", 4, MX_GROUP
            parts = (
                weight.sibling(PACKED, "U8", (out, width // 2)),
                weight.sibling(SCALE, "U8", (out, width // size)),
            )
        else:
            kind, bits, size = "words", 8, width
            if target == "w4a16":
                bits, size = 4, _group_size(width, options.get("block_size"))
            parts = (
                weight.sibling(PACKED, "I32", (out, math.ceil(width * bits / 32))),
                weight.sibling(SCALE, weight.dtype, (out, width // size)),
                weight.sibling(SHAPE, "I64", (2,)),
            )
        layout = {"kind": kind, "bits": bits, "block": (1, size)}
        return cls.encoding(weight, parts, **layout, symmetric=True, indexed=False)

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        """A config group for each scheme, which names its modules if there are several schemes."""
        groups: dict[tuple, list[str]] = {}
        for module, weight in modules.packed.items():
            assert isinstance(weight, Compressed)
            # MXFP4 is never of whole rows
            by_row = weight.kind == "words" and weight.block[1] == weight.shape[1]
            size = None if by_row else weight.block[1]
            groups.setdefault((weight.kind, weight.bits, size), []).append(module)
        layout = "mxfp4-pack-quantized" if next(iter(groups))[0] == "mxfp4" else "pack-quantized"
        config_groups = {}
        for number, ((kind, bits, size), names) in enumerate(sorted(groups.items(), key=str)):
            scheme = {
                "num_bits": bits,
                "type": TYPES[kind],
                "symmetric": True,
                "dynamic": False,
                "group_size": size,
                "strategy": "channel" if size is None else "group",
            }
            scheme |= {"scale_dtype": "torch.uint8"} if kind == "mxfp4" else {}
            targets = ["Linear"] if len(groups) == 1 else names
            group = {"targets": targets, "weights": scheme, "format": layout}
            config_groups[f"group_{number}"] = group
        return {
            "config_groups": config_groups,
            "format": layout,
            "ignore": modules.others,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        if scan.method not in cls.methods or not scan.with_ending(".weight_scale"):
            return
        scheme_of = schemes(scan)
        if scheme_of is None:
            return
        scan.fetch(spec for leaf in (SHAPE, INDEX) for _, spec in scan.with_ending(f".{leaf}"))
        for module, spec in [one for leaf in CODES for one in scan.with_ending(leaf)]:
            is_float = spec.key.endswith(".weight") and spec.dtype not in CODE_DTYPES
            if is_float and f"{module}.weight_scale" not in scan.tensors:
                continue
            siblings = scan.siblings(module, ".weight_scale")
            scheme = scheme_of(module) if siblings else None
            if siblings and scheme:
                fields = StoredModule(scan, module, spec, siblings[0], scheme).layout()
                if fields is not None:
                    yield cls.of(key=f"{module}.weight", dtype=scan.compute_dtype, **fields)

    @property
    def read_only(self) -> str | None:
        return "mxfp8-quantized" if self.kind == "mxfp8" else None

    @property
    def _is_integer(self) -> bool:
        return TYPES[self.kind] == "int"

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        key = shown(self.parts[0].key)
        shape = self._sibling(stored, SHAPE)
        if shape is not None and tuple(shape.tolist()) != self.shape:
            return f"{key}: {SHAPE} {shape.tolist()}", f"{list(self.shape)}"
        zero = self._sibling(stored, ZERO)
        if self.symmetric and zero is not None and bool(zero.float().any()):
            return f"{key}: symmetric, with a {ZERO}", "zeros, or symmetric: false"
        index = self._sibling(stored, INDEX) if self.indexed else None
        groups = self.shape[1] // self.block[1]
        if (
            index is None
            or _is_unused(index)
            or (self.block[0] == 1 and integers.are_groups(index, groups))
        ):
            return None
        return f"{key}: {INDEX} out of range", f"0 to {groups - 1}"

    def decode(self, stored: Parts) -> Tensor:
        codes, scale, *_ = self.values(stored)
        if self._is_integer:
            zero, group = self._zero(stored), self._group(stored)
            if self.kind == "words":
                return integers.decode_packed(codes, scale, self.bits, self.shape[1], zero, group)
            return integers.decode_int8(codes, scale, zero, group)
        if self.kind == "nvfp4":
            return fp4.decode_nvfp4(codes, scale, self._divisor(stored))
        if self.kind == "mxfp4":
            return fp4.decode_mxfp4(codes, scale)
        return fp8.decode_fp8(codes, scale, self.block)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """New scales as compressed-tensors computes them, from the largest values.

        Integers keep a group's old scale if it is nearer to W than a new one, so that codes stay
        stable. NVFP4 keeps the weight's global scale, which fused layers share, while the largest
        value fits."""
        if self._is_integer:
            return self._encode_integers(weight, stored, draws)
        old, dtype = self.stored_scale(stored), dtypes.torch_dtype(self.parts[1].dtype)
        if self.kind == "nvfp4":
            both = (stored[self.parts[1].key], self._divisor(stored)) if stored else None
            result = fp4.renew_nvfp4(weight, both, draws, divides=True)
            divisor = {self.key.removesuffix("weight") + GLOBAL_SCALE: result.tensor_scale.value}
            return self.as_parts(result.codes, result.scale) | divisor
        if self.kind == "mxfp4":
            result = fp4.requantize_mxfp4(weight, old, "even", draws)
            return self.as_parts(result.codes, result.scale.view(dtype))
        return self.as_parts(*fp8.requantize_fp8(weight, self.block, old, draws, new_dtype=dtype))

    def _encode_integers(self, weight: Tensor, stored: Parts | None, draws: Draws | None) -> Parts:
        lines, dtype = weight.reshape(self._lines), dtypes.torch_dtype(self.parts[1].dtype)
        groups = lines.shape[1] // math.prod(self.block)

        def new_scale(w: Tensor) -> tuple[Tensor, Tensor | None]:
            return integers.minmax_scale(w, self.bits, w.shape[1] // groups, self.symmetric, dtype)

        old, zero, group, tensors = None, None, None, {}
        if stored:
            old = self.values(stored)[1].reshape(len(lines), -1)
            zero, group = self._zero(stored), self._group(stored)
        else:
            assert not self.indexed
            shape = self._sibling_part(SHAPE)
            tensors = {} if shape is None else {shape.key: torch.tensor(self.shape)}
        result = integers.requantize_integers(lines, self.bits, old, zero, group, new_scale, draws)
        codes = result.codes.reshape(self.shape)
        codes = integers.pack(codes, self.bits) if self.kind == "words" else codes
        tensors |= self.as_parts(codes, result.scale.to(dtype))
        spec = self._sibling_part(ZERO)
        if spec is not None and result.zero is not None:
            zeros = result.zero
            packed = integers.pack_zeros(zeros, self.bits) if spec.dtype == "I32" else None
            tensors[spec.key] = zeros.view(spec.shape) if packed is None else packed
        return tensors

    def grid(self, stored: Parts) -> Grid:
        scale = self.values(stored)[1]
        if self._is_integer:
            zero, group, (out, width) = self._zero(stored), self._group(stored), self.shape
            return integers.grid_of(scale, zero, (out, width), group, self.bits)
        if self.kind == "nvfp4":
            return fp4.nvfp4_grid(scale, self._divisor(stored))
        if self.kind == "mxfp4":
            return fp4.mxfp4_grid(scale)
        (grid,) = fp8.grids(scale, self.shape, self.block)
        return grid

    @property
    def rows_per_block(self) -> int | None:
        if self.kind == "nvfp4" or self._lines[0] != self.shape[0]:
            return None
        zero = self._zero_part
        if zero is not None and zero.dtype == "I32":  # words along the rows
            return 32 // math.gcd(32, self.bits)
        return self.block[0]

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        axes, zero = {0: (0, 1, 1), 1: (0, 1, self.block[0])}, self._zero_part
        if zero is not None:
            words = zero.dtype == "I32"
            axes[self.parts.index(zero)] = (0, self.bits, 32) if words else (0, 1, 1)
        return axes

    @property
    def _lines(self) -> tuple[int, int]:
        """The weight with consecutive groups in each row; a single row if there is one scale."""
        if self.block == self.shape and self.shape[0] > 1:
            return 1, math.prod(self.shape)
        return self.shape[0], self.shape[1]

    def _divisor(self, stored: Parts) -> fp4.TensorScale:
        divisor = stored[self.key.removesuffix("weight") + GLOBAL_SCALE]
        return fp4.TensorScale(divisor, divides=True)

    def _sibling(self, stored: Parts, leaf: str) -> Tensor | None:
        return stored.get(self.key.removesuffix("weight") + leaf)

    def _sibling_part(self, leaf: str) -> TensorSpec | None:
        key = self.key.removesuffix("weight") + leaf
        return next((part for part in self.parts if part.key == key), None)

    @property
    def _zero_part(self) -> TensorSpec | None:
        return None if self.symmetric else self._sibling_part(ZERO)

    def _zero(self, stored: Parts) -> Tensor | None:  # (rows, groups) int8
        zero = None if self.symmetric else self._sibling(stored, ZERO)
        if zero is None:
            return None
        if zero.dtype == torch.int32:
            zero = integers.unpack_zeros(zero, self.bits, self.shape[0])
        return zero.reshape(self._lines[0], -1)

    def _group(self, stored: Parts) -> Tensor | None:  # (in,)
        index = self._sibling(stored, INDEX) if self.indexed else None
        return None if index is None or _is_unused(index) else index


def _is_unused(index: Tensor) -> bool:
    """Return whether an index assigns no column to a group."""
    return bool((index == -1).all())


def _group_size(width: int, stated: int | None) -> int:
    """Columns with one scale: as stated, or the largest of SIZES, if they divide the width; else
    all."""
    if stated is not None:
        check_block_size(stated, SIZES)
    limit = stated or SIZES[0]
    return next((size for size in SIZES if size <= limit and width % size == 0), width)
