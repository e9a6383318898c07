"""Parts of a parameter, read without the rest: some of its rows, one expert of a stack."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.weights.names import Parameter
from adapterkit.weights.reading import Reads, read_parameter
from adapterkit.weights.slots import Axis, Slot


@dataclass(frozen=True)
class Held:
    """A parameter, or a part of one, and what is stored of it, by its slots' keys."""

    parameter: Parameter = field(hash=False)
    tensors: dict[str, TensorSpec] = field(hash=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def dtypes(self) -> set[str]:
        return {spec.dtype for spec in self.tensors.values()}

    @property
    def specs(self) -> list[TensorSpec]:
        """One for each slot."""
        return [self.tensors[slot.key] for slot in self.parameter.slots]

    def read(self, inputs: Reads) -> Tensor:
        return read_parameter(self.parameter, self.tensors, inputs)

    def rows(self, first: int, last: int) -> "Held":
        """Rows [first, last) of the first axis. Of a stored tensor whose rows they are, only those are read."""
        slots, tensors = [], {}
        for number, slot in enumerate(self.parameter.slots):
            axis = slot.axes[0]
            low, high = max(axis.at, first), min(axis.stop, last)
            if low >= high:
                continue
            spec, shape, of = (
                self.tensors[slot.key],
                slot.shape,
                axis.of[low - axis.at : high - axis.at],
            )
            if axis.axis == 0 and _plain(spec) and isinstance(of, range) and of.step == 1:
                width = spec.nbytes // shape[0]
                shape, start = (len(of), *shape[1:]), spec.start + of.start * width
                spec = replace(spec, shape=shape, start=start, stop=start + len(of) * width)
                of = range(len(of))
            key = f"{slot.key} {number}"  # two slots may be different rows of one stored tensor
            tensors[key] = spec
            slots.append(Slot(key, shape, (Axis(low - first, axis.axis, of), *slot.axes[1:])))
        shape = (last - first, *self.shape[1:])
        return Held(replace(self.parameter, shape=shape, slots=tuple(slots)), tensors)

    def expert(self, index: int) -> "Held":
        """One matrix of a stack."""
        one = self.rows(index, index + 1)
        slots = tuple(_without_first(slot) for slot in one.parameter.slots)
        return Held(replace(one.parameter, shape=one.shape[1:], slots=slots), one.tensors)

    def blocks(self, elements: int) -> list[tuple[int, int]]:
        """Ranges of rows of about that many elements each; all at once where some rows cannot be read alone."""
        count = self.shape[0]
        if not all(map(_plain, self.specs)) or not all(map(_has_rows, self.parameter.slots)):
            return [(0, count)]
        step = max(1, elements // max(math.prod(self.shape[1:]), 1))
        return [(at, min(at + step, count)) for at in range(0, count, step)]

    def lies_like(self, other: "Held") -> bool:
        """Whether equal bytes stored mean equal values."""
        mine, theirs = self.parameter.slots, other.parameter.slots
        if not all(map(_plain, self.specs + other.specs)):
            return False
        if len(mine) != len(theirs) or [s.dtype for s in self.specs] != [
            s.dtype for s in other.specs
        ]:
            return False
        return all(
            a.shape == b.shape and all(map(_same, a.axes, b.axes))
            for a, b in zip(mine, theirs, strict=True)
        )


def _plain(spec: TensorSpec) -> bool:
    """Whether it is stored as it is: not packed."""
    return type(spec) is TensorSpec


def _has_rows(slot: Slot) -> bool:
    axis = slot.axes[0]
    return axis.axis is None or (
        axis.axis == 0 and isinstance(axis.of, range) and axis.of.step == 1
    )


def _same(one: Axis, other: Axis) -> bool:
    return (one.at, one.axis) == (other.at, other.axis) and np.array_equal(
        np.asarray(one.of), np.asarray(other.of)
    )


def _without_first(slot: Slot) -> Slot:
    """A slot of a single position of the parameter's first axis, seen without that axis."""
    axis, rest = slot.axes[0], slot.axes[1:]
    if axis.axis != 0 or slot.shape[0] != 1:
        return replace(slot, axes=rest)
    down = tuple(replace(a, axis=None if a.axis is None else a.axis - 1) for a in rest)
    return Slot(slot.key, slot.shape[1:], down)
