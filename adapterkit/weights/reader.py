"""How computations read their inputs, whatever engine runs them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapterkit.checkpoint.header import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Cut = Callable[[Tensor], Tensor]
    Blocks = Iterator[tuple[int, Tensor]]


class TensorReader(Protocol):
    """What reads whole tensors: all that putting parameters and factors together takes."""

    def tensor(self, spec: TensorSpec) -> "Tensor": ...


class Reader(Protocol):
    """The inputs of steps and tasks: the same tensors for every engine, order and thread.

    `Failed` if a file cannot be read, `Unrecoverable` if it has changed since it was planned.
    """

    @property
    def device(self) -> "torch.device": ...

    @property
    def dtype(self) -> "torch.dtype":
        """What the arithmetic runs in: float32 or float64."""
        ...

    def tensor(self, spec: TensorSpec) -> "Tensor":
        """The whole tensor, decoded if it is quantized, in `dtype`, on `device`; the caller's own.

        `Unrecoverable` if it is not finite."""
        ...

    def stored(self, spec: TensorSpec) -> "Tensor":
        """The whole tensor in its own dtype, on `device`; not of a quantized weight, only its
        parts.

        `Unrecoverable` if it is of floats that are not finite."""
        ...

    def bytes(self, spec: TensorSpec) -> bytearray:
        """The stored bytes, whatever they are; not of a quantized weight."""
        ...

    def rows(self, spec: TensorSpec, grid: tuple[int, int], first: int, last: int) -> "Tensor":
        """Rows [first, last) of a tensor as a grid (rows, columns), in `dtype`, on `device`, finite
        or not; not of a quantized weight."""
        ...

    def blocks(self, spec: TensorSpec, grid: tuple[int, int]) -> "Blocks":
        """(first row, rows) over the whole grid in order: what `rows` gives, some at a time."""
        ...

    def shared(self, spec: TensorSpec, cut: "Cut") -> "Tensor":
        """cut(stored(spec)), computed once for all who ask soon after each other; not to be
        changed.

        `cut` must be the same function of the tensor for all who ask for one `spec`."""
        ...

    def handoff(self, key: str) -> "Tensor":
        """A tensor that a task of an earlier output file handed on, in its own dtype, on
        `device`."""
        ...


@dataclass(frozen=True)
class ReaderView:
    """A reader in another dtype, in which one tensor, decoded elsewhere, is read by blocks.

    What an edit of a quantized weight loads through: the weight is `blocks`, all else the reader's.
    """

    reader: Reader
    dtype: "torch.dtype"
    decoded: "Callable[[], Blocks]"

    @property
    def device(self) -> "torch.device":
        return self.reader.device

    def tensor(self, spec: TensorSpec) -> "Tensor":
        return self.reader.tensor(spec).to(self.dtype)

    def stored(self, spec: TensorSpec) -> "Tensor":
        return self.reader.stored(spec)

    def bytes(self, spec: TensorSpec) -> bytearray:
        return self.reader.bytes(spec)

    def rows(self, spec: TensorSpec, grid: tuple[int, int], first: int, last: int) -> "Tensor":
        return self.reader.rows(spec, grid, first, last).to(self.dtype)

    def blocks(self, spec: TensorSpec, grid: tuple[int, int]) -> "Blocks":
        return self.decoded()

    def shared(self, spec: TensorSpec, cut: "Cut") -> "Tensor":
        return self.reader.shared(spec, cut)

    def handoff(self, key: str) -> "Tensor":
        return self.reader.handoff(key)
