"""BOFT: rotations of the inputs of a weight in the stages of a butterfly (arXiv:2311.06243)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels import rotations


@dataclass(frozen=True)
class Boft(RowDelta):
    """delta = diag(s) W Bᵀ - W, B = Bₘ ... B₁, a stage Bᵢ = Pᵢ Rᵢ Pᵢᵀ.

    Rᵢ is block-diagonal; a block is the Cayley transform (I - Q) (I + Q)⁻¹ of Q = (R - Rᵀ) / 2. Pᵢ
    brings inputs together that are a multiple of half a block apart; with one stage it is I. Biases
    stay. PEFT reads several stages only with its CUDA kernel.
    """

    rotations: TensorSpec  # (stages, blocks, size, size)
    scales: TensorSpec  # s: (out, 1), of a kernel (1, out)
    weight: StoredParameter

    name = "boft"
    keys = ("boft_R", "boft_s")
    settings: ClassVar = {}
    unused_settings = frozenset(
        {"boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor"}
    )
    needs_base = "it rotates the base's weights"
    merges_rows = True

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Boft":
        assert adapted.weight is not None
        out, *inputs = adapted.weight.weight_shape
        turns, scales = adapted.require(*Boft.keys)
        width = math.prod(inputs)
        fits = len(turns.shape) == 4 and turns.shape[2] == turns.shape[3]
        if fits:
            stages, blocks, size, _ = turns.shape
            fits = stages > 0 and blocks * size == width
            fits = fits and (stages == 1 or (size % 2 == 0 and blocks % 2 ** (stages - 1) == 0))
        fits = fits and scales.shape == ((out, 1) if len(inputs) == 1 else (1, out))
        adapted.check(fits, f"blocks that tile {width} inputs, and {out} scales")
        return Boft(turns, scales, adapted.weight)

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        stored = reader.tensor(self.rotations).double()
        turns = [rotations.less_identity((r - r.mT) / 2, None).mT.to(dtype) for r in stored]
        scale = reader.tensor(self.scales).flatten().to(dtype)
        blocks, size = self.rotations.shape[1:3]
        orders = [
            rotations.butterfly_order(blocks * size, blocks // 2**stage, size // 2, stored.device)
            if len(turns) > 1
            else None
            for stage in range(len(turns))
        ]

        def change(rows: Tensor, here: slice) -> Tensor:
            now = rows
            for turn, order in zip(turns, orders, strict=True):
                if order is None:
                    now = now + rotations.rotated(now, turn)
                else:
                    apart = torch.empty_like(now).index_copy_(1, order, now)
                    now = now + rotations.rotated(apart, turn).index_select(1, order)
            return (now * scale[here, None]).sub_(rows)

        return change
