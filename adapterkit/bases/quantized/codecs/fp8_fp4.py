"""fp4: DeepSeek-V4's experts in pairs of FP4 values, next to weights of `fp8`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.bases.quantized.codecs.fp8 import PAIRS, POWERS, scale_of
from adapterkit.core import dtypes
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp4
from adapterkit.kernels.quant.grid import MX_GROUP, Grid
from adapterkit.kernels.quant.stochastic import Draws


@dataclass(frozen=True, kw_only=True)
class Fp8Fp4(QuantizedWeight):
    """W[..., out, in] = code * 2^(scale - 127), stored (..., out, in / 2) with a scale for each 32
    inputs of a row, as transformers' `expert_dtype: fp4` reads it."""

    name = "fp4"
    methods = ("fp8",)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        for key, spec in list(scan.tensors.items()) if scan.method == "fp8" else ():
            scale = scale_of(scan, key) if spec.dtype in PAIRS else None
            if scale is None:
                continue
            *rows, half = spec.shape
            fits = scale.dtype in POWERS and scale.shape == (*rows, 2 * half / MX_GROUP)
            problem = f"{spec.dtype} {spec.shape}, scales {scale.dtype} {scale.shape}"
            if scan.check(key, bool(rows) and fits, problem, "a power of 2 for each 32 values"):
                scan.check_finite(scale)
                shape = (*rows, 2 * half)
                yield cls.of((spec, scale), key=key, dtype=scan.compute_dtype, shape=shape)

    def decode(self, stored: Parts) -> Tensor:
        codes, scale = self._bytes(stored)
        blocks = codes.unflatten(-1, (-1, MX_GROUP // 2))
        return fp4.decode_mxfp4(blocks, scale).view(self.shape)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode with the least power of 2 that lets nothing saturate, as DeepSeek's kernels do."""
        old = self._bytes(stored)[1] if stored else None
        codes, scale = fp4.requantize_mxfp4(weight, old, "up", draws)
        types = [dtypes.torch_dtype(part.dtype) for part in self.parts]
        return self.as_parts(codes.flatten(-2).view(types[0]), scale.view(types[1]))

    def grid(self, stored: Parts) -> Grid:
        return fp4.mxfp4_grid(self._bytes(stored)[1])

    @property
    def rows_per_block(self) -> int:
        return 1

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return dict.fromkeys((0, 1), (0, 1, 1))

    def _bytes(self, stored: Parts) -> list[Tensor]:
        return [value.view(torch.uint8) for value in self.values(stored)]
