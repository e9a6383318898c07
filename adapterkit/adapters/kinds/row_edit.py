"""The edit of a stored tensor by functions of its own rows."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.adapters.kinds.rows import RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor
from adapterkit.core.plan import Loaded, RowEdit
from adapterkit.core.weights.reader import Reader


@dataclass(frozen=True, slots=True)
class ChangeRows(RowEdit):
    """w += Σ scale * function(w), of the same w."""

    functions: tuple[tuple[RowDelta, float], ...]
    size: int  # elements of the tensor

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for function, _ in self.functions for spec in function.tensors)

    @property
    def flops(self) -> int:
        return sum(2 * function.width * self.size for function, _ in self.functions)

    @property
    def memory(self) -> int:
        # a block of a rotation has twice its stored elements, in some copies in float64
        return 80 * sum(spec.nbytes for spec in self.reads)

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        dtype, stored = inputs.dtype, inputs.view(None)
        assert dtype is not None
        changes = [(one.change(stored, dtype), scale) for one, scale in self.functions]

        def apply(w: Tensor, first: int) -> None:
            here = slice(first, first + len(w))
            added = [change(w, here) for change, _ in changes]  # all of the same w
            for one, (_, scale) in zip(added, changes, strict=True):
                w.add_(one, alpha=scale)

        return Loaded(apply)
