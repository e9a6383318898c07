"""Deltas each row of which depends on one row of the weight."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from adapterkit.adapters.kinds.common import WeightDelta, map_rows, no_errors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

RowChange = Callable[[Tensor, slice], Tensor]  # rows, their slice of all -> rows of the delta


class RowDelta(WeightDelta):
    """Base of deltas whose rows depend on the same rows of the weight, for merges by rows.

    The rows are those of W (out, in), or if `turned` those of Wᵀ (in, out)."""

    name: ClassVar[str]
    shared = ()
    check = staticmethod(no_errors)

    @property
    def is_linear(self) -> bool:
        """True if a multiple of it, and its sum with others, have a meaning too."""
        return False

    @property
    def scales_bias(self) -> bool:
        """True if the same function changes the layer's bias."""
        return False

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The adapter's tensors."""
        return tuple(value for value in vars(self).values() if isinstance(value, TensorSpec))

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.tensors, *self.weight.reads)

    @property
    def turned(self) -> bool:
        """True if the rows are those of Wᵀ."""
        return False

    @abstractmethod
    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        """Return what computes rows of the delta from rows of the weight, both of that dtype."""

    def value(self, reader: TensorReader) -> Product | Tensor:
        weight, change = self.weight.matrix(reader), self.change(reader, torch.float64)
        return map_rows(weight.T, change).T if self.turned else map_rows(weight, change)
