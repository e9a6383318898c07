"""fp8-cast: floats of image models that were cast to FP8, without scales, as ComfyUI saves and
loads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.kernels.quant import fp8
from adapterkit.kernels.quant.grid import RoundColumn
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.lazy import Tensor, torch
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.scan import CheckpointScan

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("scale", "scales", "scale_weight", "qscale_weight")  # names beside `weight`


@dataclass(frozen=True, kw_only=True)
class Fp8Cast(QuantizedWeight):
    """W = code, of any shape; beyond the largest code that one. Only of models without a config or
    with diffusers', and where nothing is called a scale: elsewhere codes alone mean nothing."""

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

    @property
    def _matrix(self) -> tuple[int, int]:
        """Its shape with the last axes as one."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def _codes(self) -> torch.dtype:
        return dtypes.torch_dtype(self.parts[0].dtype)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        (codes,) = self.values(stored)
        value = fp8.decode_fp8(codes.view(self._matrix), _one(codes), self._matrix)
        return value.view(self.shape)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """To nearest; beyond the largest code that one."""
        return self._encode(weight, None)

    def encode_sampled(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        return self._encode(weight, draws)

    def _encode(self, weight: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        matrix, one = weight.reshape(self._matrix), _one(weight)
        encoded = fp8.encode_fp8(matrix, self._matrix, one, draws=draws, dtype=self._codes)
        return self.as_parts(encoded.codes)

    def column_rounder(self, stored: dict[str, Tensor]) -> RoundColumn:
        one = _one(self.values(stored)[0])
        (grid,) = fp8.grids(one, self._matrix, self._matrix, dtype=self._codes)
        return grid.round_column

    @property
    def rows_per_block(self) -> int | None:
        return 1 if len(self.shape) == 2 else None

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        return {self.parts[0].key: self.values(stored)[0][first:last]}


def _scales(scan: CheckpointScan, key: str) -> list[TensorSpec]:
    """What may be the scales of a tensor."""
    module, _, leaf = key.rpartition(".")
    beside = scan.present(f"{module}.", SCALES) if leaf == "weight" else []
    return beside + scan.present(key, ("_scale", "_scale_inv"))


def _one(beside: Tensor) -> Tensor:
    return torch.ones(1, device=beside.device)
