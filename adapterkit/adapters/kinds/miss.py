"""MiSS: one small matrix that is repeated along the inputs of a weight (arXiv:2409.15371)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import POSITIVE_INT, one_of
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.block_sizes import padded
from adapterkit.kernels.lowrank.algebra import Product


@dataclass(frozen=True)
class Miss(RowDelta):
    """delta[o, i] = block[i mod r, o], of rank r; with "mini" block[i mod r, o mod mini_r].

    With "bat" a block (r, r) of W changes by W_jk B_j + B_j, where j is the block of its outputs.
    """

    block: TensorSpec  # (r, out), of mini (r, mini_r), of bat (out / r, r, r)
    weight: StoredParameter
    variant: bool | str

    name = "miss"
    keys = ("miss_block",)
    settings: ClassVar = {
        "r": POSITIVE_INT, "mini_r": POSITIVE_INT,
        "init_weights": one_of(True, False, "bat", "mini"),
    }  # fmt: skip
    unused_settings = frozenset({"miss_dropout"})
    needs_base = "its file does not say how many inputs a module has"
    merges_rows = True

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Miss":
        assert adapted.weight is not None
        config, shape = adapted.adapter.config, adapted.weight.weight_shape
        rank, mini, variant = config["r"], config["mini_r"], config["init_weights"]
        (block,) = adapted.require(*Miss.keys)
        out, inputs = shape[0], math.prod(shape[1:])
        expected = {"bat": (out // rank, rank, rank), "mini": (rank, mini)}.get(
            variant, (rank, out)
        )
        fits = block.shape == expected and rank <= inputs
        fits = fits and (variant != "bat" or out % rank == inputs % rank == 0)
        fits = fits and (variant != "mini" or out % mini == 0)
        adapted.check(fits, f"{expected}, as r, mini_r, init_weights and the base's {shape} say")
        return Miss(block, adapted.weight, variant)

    @property
    def is_linear(self) -> bool:
        return self.variant != "bat"

    @property
    def rank(self) -> int:
        return min(self.block.shape[0], *self.shape) if self.is_linear else min(self.shape)

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        block = reader.tensor(self.block).to(dtype)
        if self.is_linear:
            left = self._left(block)
            times = -(-self.shape[1] // left.shape[1])
            return lambda rows, here: left[here].repeat(1, times)[:, : rows.shape[1]]
        rank = block.shape[1]

        def change(rows: Tensor, here: slice) -> Tensor:
            first, last = here.start // rank, -(-(here.start + len(rows)) // rank)
            own, before = block[first:last], here.start - first * rank
            after = (last - first) * rank - before - len(rows)
            pieces = padded(rows, (0, 0, before, after)).view(len(own), rank, -1, rank)
            added = torch.matmul(pieces, own[:, None]).add_(own[:, :, None])
            return added.view(-1, rows.shape[1])[before : before + len(rows)]

        return change

    def value(self, reader: TensorReader) -> Product | Tensor:
        if not self.is_linear:
            return super().value(reader)
        left = self._left(reader.tensor(self.block).double())
        places = torch.arange(self.shape[1], device=left.device) % left.shape[1]
        return Product(left, torch.eye(left.shape[1]).to(left)[:, places])

    def _left(self, block: Tensor) -> Tensor:
        """The stored block as (out, r)."""
        return block.T.repeat(self.shape[0] // block.shape[1], 1)
