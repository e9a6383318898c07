"""fp8-cast: floats of image models that were cast to FP8, without scales, as ComfyUI saves and
loads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp8
from adapterkit.kernels.quant.grid import Grid
from adapterkit.kernels.quant.stochastic import Draws

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("scale", "scales", "scale_weight", "qscale_weight")  # names next to `weight`


@dataclass(frozen=True, kw_only=True)
class Fp8Cast(QuantizedWeight):
    """W = code, of any shape; larger values saturate. Only for models without a config or with
    diffusers', and if no tensor is named like a scale: otherwise codes alone are ambiguous."""

    name = "fp8-cast"
    methods = ()

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        config = scan.base.config
        if scan.method or (config and "_class_name" not in config):
            return
        for key, spec in list(scan.tensors.items()):
            if spec.dtype in CODES and spec.shape and not _scales(scan, key):
                yield cls.of((spec,), key=key, dtype=scan.compute_dtype, shape=spec.shape)

    def decode(self, stored: Parts) -> Tensor:
        (codes,) = self.values(stored)
        value = fp8.decode_fp8(codes.view(self.matrix_shape), _one(codes), self.matrix_shape)
        return value.view(self.shape)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; larger values saturate."""
        matrix, one = weight.reshape(self.matrix_shape), _one(weight)
        encoded = fp8.encode_fp8(matrix, self.matrix_shape, one, draws=draws, dtype=self.code_dtype)
        return self.as_parts(encoded.codes)

    def grid(self, stored: Parts) -> Grid:
        one = _one(self.values(stored)[0])
        (grid,) = fp8.grids(one, self.matrix_shape, self.matrix_shape, dtype=self.code_dtype)
        return grid

    @property
    def rows_per_block(self) -> int | None:
        return 1 if len(self.shape) == 2 else None

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return {0: (0, 1, 1)}


def _scales(scan: CheckpointScan, key: str) -> list[TensorSpec]:
    """Candidate scales of a tensor."""
    module, _, leaf = key.rpartition(".")
    next_to = scan.present(f"{module}.", SCALES) if leaf == "weight" else []
    return next_to + scan.present(key, ("_scale", "_scale_inv"))


def _one(next_to: Tensor) -> Tensor:
    return torch.ones(1, device=next_to.device)
