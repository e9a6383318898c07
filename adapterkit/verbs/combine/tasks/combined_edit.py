"""Add a method's combination of several adapters to one stored tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import PIECE_BYTES, Effort, Loaded, RowEdit
from adapterkit.core.tasks.edits import Band, Block, PlacedFactors
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels import elementwise
from adapterkit.kernels import rows as kernel
from adapterkit.kernels.block_sizes import GPU
from adapterkit.kernels.lowrank.algebra import Product, stack_products
from adapterkit.kernels.sums import squared_norm
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.combine.tasks.combine import Delta, combined_delta, module_seeds

if TYPE_CHECKING:
    from adapterkit.adapters.formats.modules.deltas import ModuleDelta


@dataclass(frozen=True, slots=True)
class WeightedDelta:
    """One adapter's delta of a parameter: its factors, which add up, or a delta of another kind."""

    weight: float
    factors: tuple[PlacedFactors, ...] = ()
    other: ModuleDelta | None = None

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        own = (spec for each in self.factors for spec in each.reads)
        return (*own, *(self.other.reads if self.other else ()))

    def deltas(self, inputs: Reader) -> list[Delta]:
        """The delta of each block: factors in float64, or dense in float32."""
        if self.other is not None:
            value = self.other.value(inputs.view(None))
            return [value if isinstance(value, Product) else value.float()]
        pieces = [
            [Product(b, a) for _, b, a in each.pairs(inputs.view(torch.float64))]
            for each in self.factors
        ]
        return [stack_products(each, [1.0] * len(each)) for each in zip(*pieces, strict=True)]


@dataclass(frozen=True, slots=True)
class AddCombined(RowEdit):
    """w += method(w₁Δ₁, w₂Δ₂, ...): as factors in float64 if the method keeps them, else dense in
    float32."""

    name: str  # of the module, for random numbers
    parts: tuple[WeightedDelta, ...]
    blocks: tuple[Block, ...]
    flip: bool  # the rows of the grid are the module's inputs
    shape: tuple[int, int]  # (out, in) of each delta
    method: Method
    seed: int

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(dict.fromkeys(spec for part in self.parts for spec in part.reads))

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        factors = (each for part in self.parts for each in part.factors)
        return tuple(each.factors.b for each in factors if each.shared)

    @property
    def is_dense(self) -> bool:
        others = (part.other for part in self.parts if part.other is not None)
        return self.method.acts_on == "elements" or any(other.is_dense for other in others)

    @property
    def flops(self) -> int:
        return sum(each.flops for part in self.parts for each in part.factors)

    @property
    def effort(self) -> Effort:
        elements = len(self.parts) * len(self.blocks) * math.prod(self.shape) * self.is_dense
        return Effort(elected=elements, drawn=elements if self.method.draws else 0)

    @property
    def memory(self) -> int:
        factors = 16 * sum(spec.nbytes for spec in self.reads)
        others = sum(part.other.memory for part in self.parts if part.other is not None)
        return factors + others + 8 * len(self.blocks) * math.prod(self.shape) * self.is_dense

    @property
    def gpu_memory(self) -> int:
        """As in `CombinedFactors`: blocks of all deltas, and elements that are selected."""
        size, each = math.prod(self.shape) * self.is_dense, 8 * len(self.parts) + PIECE_BYTES
        return each * min(GPU, size) + 16 * min(elementwise.AT_ONCE, size)

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        by_block = zip(*(part.deltas(inputs) for part in self.parts), strict=True)
        weights, whole = [part.weight for part in self.parts], slice(0, grid[1])
        added: list[tuple[Band, slice, Product | Tensor]] = []
        for block, deltas in zip(self.blocks, by_block, strict=True):
            seeds = module_seeds(self.seed, f"{self.name}/{block.expert or 0}")
            delta, _ = combined_delta(self.method, deltas, weights, seeds, wide=True)
            columns = slice(block.columns.start, block.columns.stop)
            added.append((block.rows, columns, self._placed(delta, block, inputs.dtype)))

        def apply(w: Tensor, first: int) -> None:
            for rows, columns, delta in added:
                for part, here in rows.overlap(w, first):
                    part = part if columns == whole else part[:, columns]
                    if isinstance(delta, Product):
                        kernel.add_low_rank(part, delta.left[here], delta.right)
                    else:
                        part += delta[here]

        return Loaded(apply, math.hypot(*(_norm(delta) for *_, delta in added)))

    def _placed(self, delta: Delta, block: Block, dtype: torch.dtype | None) -> Delta:
        """The delta in the layout of the grid; factors have the dtype of the arithmetic."""
        rows, columns = block.rows, block.columns
        if not isinstance(delta, Product):
            dense = delta.T if self.flip else delta
            return columns.placed(rows.placed(dense, 0), 1)
        left, right = (delta.right.T, delta.left.T) if self.flip else delta
        left, right = rows.placed(left, 0).to(dtype), columns.placed(right, 1).to(dtype)
        return Product(left.contiguous(), right.contiguous())


def _norm(delta: Delta) -> float:
    if isinstance(delta, Product):
        return kernel.low_rank_norm(delta.left, delta.right)
    return squared_norm(delta) ** 0.5
