"""fp8: transformers' own FP8, as DeepSeek and Qwen store it, with a scale for each block of 128 x
128."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import (
    Parts,
    PlainWeight,
    QuantizedModules,
    QuantizedWeight,
    blocks_in,
    pair_in,
)
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp8
from adapterkit.kernels.quant.grid import Grid
from adapterkit.kernels.quant.stochastic import Draws

CODES = ("F8_E4M3", "F8_E5M2")
SCALE = "_scale_inv"
POWERS = ("F8_E8M0", "U8")  # dtypes of scales that are powers of 2
PAIRS = ("I8", "U8")  # dtypes of codes that hold two FP4 values, which `fp8_fp4` reads
# names of scales next to `X.weight`: DeepSeek-V4's, Mistral's
OTHER_SCALES = ("scale", "qscale_weight")
INPUT_SCALES = ("activation_scale", "input_scale")  # names of the scale of a layer's inputs
BLOCK, MX_BLOCK = (128, 128), (1, 32)


@dataclass(frozen=True, kw_only=True)
class Fp8(QuantizedWeight):
    """W = code * scale_inv, a scale for each block of the last two axes; codes E4M3 (E5M2 is read
    only)."""

    name = "fp8"
    tier = "core"
    methods = ("fp8", "mxfp8")
    targets = ("fp8",)

    block: tuple[int, int]
    power: bool  # scales are powers of 2

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> Fp8 | None:
        out, width = weight.shape
        if out % BLOCK[0] or width % BLOCK[1] or weight.transposed:
            return None  # transformers leaves it as it is
        codes = weight.part("", "F8_E4M3", weight.shape)
        scale = weight.part(SCALE, "F32", (out // BLOCK[0], width // BLOCK[1]))
        return cls.encoding(weight, (codes, scale), block=BLOCK, power=False)

    @classmethod
    def replaces(cls, name: str, module: torch.nn.Module) -> bool:
        """transformers' `replace_with_fp8_linear`: stacks of experts, and block-diagonal linear
        layers."""
        stacks = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        return (name.endswith(".experts") and stacks) or "GroupedLinear" in type(module).__name__

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        return {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": modules.skipped,
            "quant_method": "fp8",
            "weight_block_size": list(BLOCK),
        }

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        for key, spec in list(scan.tensors.items()):
            scale = scale_of(scan, key) if spec.dtype in CODES else None
            if scale is None:
                if spec.dtype in CODES and scan.method in cls.methods:
                    scan.siblings(key, SCALE)
                continue
            block = _block(scan, spec, scale)
            if block is None:
                continue
            scan.check_finite(scale)
            start = key.removesuffix("weight") if key.endswith(".weight") else key + "_"
            yield cls.of(
                (spec, scale, *scan.present(start, INPUT_SCALES)),
                key=key,
                dtype=scan.compute_dtype,
                shape=spec.shape,
                block=block,
                power=scale.dtype in POWERS or scan.settings.get("scale_fmt") == "ue8m0",
            )

    def decode(self, stored: Parts) -> Tensor:
        codes, scale, *_ = self.values(stored)
        return fp8.decode_fp8(codes, scale, self.block)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        dtype = self.parts[1].dtype
        new = dtypes.torch_dtype("F8_E8M0" if dtype == "U8" else dtype)
        old, how = self.stored_scale(stored), self._rule
        result = fp8.requantize_fp8(weight, self.block, old, draws, how, new_dtype=new)
        return self.as_parts(result.codes, result.scale.view(dtypes.torch_dtype(dtype)))

    def grid(self, stored: Parts) -> Grid:
        (grid,) = fp8.grids(self.values(stored)[1], self.shape, self.block, self._rule)
        return grid

    @property
    def _rule(self) -> fp8.Fp8Rule:
        return "power" if self.power else "multiply"

    @property
    def rows_per_block(self) -> int | None:
        return None if math.prod(self.parts[1].shape) == 1 else self.block[0]

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return {0: (0, 1, 1), 1: (0, 1, self.block[0])}

    @property
    def read_only(self) -> str | None:
        codes, scale = self.parts[:2]
        if codes.dtype == "F8_E5M2":
            return "FP8 E5M2"
        one_of_many = math.prod(scale.shape) == 1 and math.prod(codes.shape[:-2]) > 1
        return "one FP8 scale for a stack of experts" if one_of_many else None


def scale_of(scan: CheckpointScan, key: str) -> TensorSpec | None:
    """The scales of a tensor of codes, by one of the names that transformers reads."""
    scale = scan.tensors.get(key + SCALE)
    if scale is None and key.endswith(".weight") and scan.method in Fp8.methods:
        scale = next(iter(scan.present(key.removesuffix("weight"), OTHER_SCALES)), None)
    return scale


def _block(scan: CheckpointScan, spec: TensorSpec, scale: TensorSpec) -> tuple[int, int] | None:
    """The rows and columns with one scale; None, with an error, if the shapes do not fit."""
    one, usual = math.prod(scale.shape) == 1, MX_BLOCK if scan.method == "mxfp8" else BLOCK
    stated = scan.settings.get("weight_block_size") or (spec.shape[-2:] if one else usual)
    block = pair_in(stated) if len(spec.shape) >= 2 else None
    fits = scale.dtype in (*dtypes.FLOATS, *POWERS)
    if block is not None and not one:
        fits = fits and scale.shape == (*spec.shape[:-2], *blocks_in(spec.shape[-2:], block))
    problem = f"{spec.dtype} {spec.shape}, scales {scale.dtype} {scale.shape}, blocks {stated}"
    fits = scan.check(spec.key, fits and block is not None, problem, "a scale for each block")
    return block if fits else None
