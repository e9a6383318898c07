"""Assemble parameters of the loaded model from slots, which map them to stored tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.rows import row_ranges

Positions = range | np.ndarray


def taken(tensor: Tensor, positions: Positions | tuple[int, ...], axis: int) -> Tensor:
    """The entries at these positions of an axis; a view if they are consecutive."""
    if isinstance(positions, range) and positions.step == 1:
        return tensor.narrow(axis, positions.start, len(positions))
    index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
    return tensor.index_select(axis, index.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a slot: parameter positions [at, at + len(of)) are positions `of` on axis `axis`
    of the stored tensor.

    `axis` None: the stored tensor has no such axis (it was stacked), and `of` has length 1.
    """

    at: int
    axis: int | None
    of: Positions

    @property
    def stop(self) -> int:
        return self.at + len(self.of)


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of a parameter as it is stored: parameter[axes.at] == stored[axes.of], with the axes
    permuted by `axes`."""

    key: str
    # the stored tensor's shape for the slot's axes (a convolution may be a matrix)
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]  # one per axis of the parameter

    @property
    def is_full_tensor(self) -> bool:
        """True if the slot is the complete stored tensor, in its order, from the parameter's start.
        Without other slots it is then the complete parameter."""
        return len(self.shape) == len(self.axes) and all(
            a.axis == i and a.at == 0 and isinstance(a.of, range) and a.of == range(n)
            for i, (a, n) in enumerate(zip(self.axes, self.shape, strict=True))
        )


@dataclass(frozen=True)
class SlottedCheckpoint(Checkpoint):
    """A checkpoint with its own slots, for parameters that transformers' loader does not make."""

    slots: Mapping[str, tuple[Slot, ...]] = field(default_factory=dict)


def known_slots(checkpoint: Checkpoint) -> Mapping[str, tuple[Slot, ...]]:
    """The slots that the checkpoint itself knows."""
    return checkpoint.slots if isinstance(checkpoint, SlottedCheckpoint) else {}


def extent(slots: tuple[Slot, ...]) -> tuple[int, ...]:
    """The shape of the parameter that consists of these slots."""
    return tuple(
        max(axis.stop for axis in axes) for axes in zip(*(s.axes for s in slots), strict=True)
    )


def identity_slot(key: str, shape: tuple[int, ...]) -> Slot:
    """The slot of a parameter that is stored as it is."""
    return Slot(key, tuple(shape), tuple(Axis(0, i, range(n)) for i, n in enumerate(shape)))


class Unsupported(Refused):
    """A conversion that does more than move elements along axes."""

    code = "AK406"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the loaded model: its shape, where it is stored, and its other names."""

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    tied: tuple[str, ...] = ()  # the model's other names of this parameter
    is_alias: bool = False  # the file has it under a tied name only

    @property
    def is_full_tensor(self) -> bool:
        """True if the parameter is one complete stored tensor, in its order."""
        return len(self.slots) == 1 and self.slots[0].is_full_tensor


@dataclass(frozen=True)
class StoredParameter:
    """A parameter, or a piece of one, with the stored tensors of its slots by key."""

    parameter: Parameter = field(hash=False)
    tensors: dict[str, TensorSpec] = field(hash=False)
    transposed: bool = False  # a layer's weight that the model stores (in, out)

    @classmethod
    def of(
        cls, parameter: Parameter, tensors: Mapping[str, TensorSpec], transposed: bool = False
    ) -> StoredParameter:
        """A parameter among a checkpoint's tensors."""
        keys = (slot.key for slot in parameter.slots)
        return cls(parameter, {key: tensors[key] for key in keys}, transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return self.parameter.shape

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, *kernel)."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def dtypes(self) -> set[str]:
        return {spec.dtype for spec in self.tensors.values()}

    @property
    def specs(self) -> list[TensorSpec]:
        """The stored tensor of each slot."""
        return [self.tensors[slot.key] for slot in self.parameter.slots]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """Each stored tensor once."""
        return tuple(self.tensors.values())

    @property
    def is_one_tensor(self) -> bool:
        """True if it is one stored tensor, in its own order and shape."""
        return self.parameter.is_full_tensor and self.specs[0].shape == self.shape

    @property
    def widest(self) -> torch.dtype:
        """The dtype that represents every value of its stored dtypes."""
        return reduce(torch.promote_types, map(dtypes.torch_dtype, sorted(self.dtypes)))

    def native(self, read: Callable[[TensorSpec], Tensor]) -> Tensor:
        """The value as in the model, in `widest`; `read` returns stored tensors."""
        return self._joined(lambda spec: read(spec).to(self.widest))

    def read(self, reader: TensorReader) -> Tensor:
        """The value as in the model."""
        return self._joined(reader.tensor)

    def _joined(self, read: Callable[[TensorSpec], Tensor]) -> Tensor:
        parameter = self.parameter
        if parameter.is_full_tensor:
            return read(self.specs[0]).reshape(parameter.shape)
        value: Tensor | None = None
        for slot in parameter.slots:
            part = _in_place(read(self.tensors[slot.key]).reshape(slot.shape), slot)
            value = part.new_empty(parameter.shape) if value is None else value
            value[tuple(slice(axis.at, axis.stop) for axis in slot.axes)] = part
        assert value is not None
        return value

    def matrix(self, reader: TensorReader) -> Tensor:
        """The value of a layer's weight as (out, in), a kernel's axes flattened."""
        value = self.read(reader)
        value = value.reshape(value.shape[0], -1)
        return value.T if self.transposed else value

    def rows(self, first: int, last: int) -> StoredParameter:
        """Rows [first, last) of the first axis.

        Stored tensors are narrowed to these rows where they are contiguous there.
        """
        slots, tensors = [], {}
        for number, slot in enumerate(self.parameter.slots):
            axis = slot.axes[0]
            low, high = max(axis.at, first), min(axis.stop, last)
            if low >= high:
                continue
            spec, shape = self.tensors[slot.key], slot.shape
            of = axis.of[low - axis.at : high - axis.at]
            if axis.axis == 0 and _is_plain(spec) and isinstance(of, range) and of.step == 1:
                spec = spec.narrowed(shape, of.start, of.stop)
                shape, of = spec.shape, range(len(of))
            key = f"{slot.key} {number}"  # two slots may be different rows of one stored tensor
            tensors[key] = spec
            slots.append(Slot(key, shape, (Axis(low - first, axis.axis, of), *slot.axes[1:])))
        shape = (last - first, *self.shape[1:])
        parameter = replace(self.parameter, shape=shape, slots=tuple(slots))
        return replace(self, parameter=parameter, tensors=tensors)

    def expert(self, index: int) -> StoredParameter:
        """One matrix of a stack."""
        row = self.rows(index, index + 1)
        slots = tuple(_without_first_axis(slot) for slot in row.parameter.slots)
        parameter = replace(row.parameter, shape=row.shape[1:], slots=slots)
        return replace(row, parameter=parameter)

    def row_ranges(self, elements: int) -> list[tuple[int, int]]:
        """Ranges of rows of about that many elements; one range if rows cannot be read alone."""
        count = self.shape[0]
        if not all(map(_is_plain, self.specs)) or not all(map(_has_rows, self.parameter.slots)):
            return [(0, count)]
        return row_ranges(count, math.prod(self.shape[1:]), elements)

    def same_storage(self, other: StoredParameter) -> bool:
        """Return whether equal stored bytes mean equal values."""
        slots, others = self.parameter.slots, other.parameter.slots
        if not all(map(_is_plain, self.specs + other.specs)) or len(slots) != len(others):
            return False
        if [spec.dtype for spec in self.specs] != [spec.dtype for spec in other.specs]:
            return False
        return all(
            a.shape == b.shape and all(map(_same_axis, a.axes, b.axes))
            for a, b in zip(slots, others, strict=True)
        )


def _in_place(stored: Tensor, slot: Slot) -> Tensor:
    """The slot's elements of its stored tensor, axes in the parameter's order."""
    for axis in slot.axes:
        if axis.axis is not None:
            stored = taken(stored, axis.of, axis.axis)
    order = [axis.axis for axis in slot.axes if axis.axis is not None]
    # a stored axis that the parameter lacks has one position left
    stored = stored.permute(order + [i for i in range(stored.dim()) if i not in order])
    return stored.reshape(tuple(len(axis.of) for axis in slot.axes))


def _is_plain(spec: TensorSpec) -> bool:
    """Return whether the bytes are the elements, because the tensor is not quantized."""
    return type(spec) is TensorSpec


def _has_rows(slot: Slot) -> bool:
    """Return whether the parameter's rows are rows of the stored tensor, or items of its stack."""
    axis = slot.axes[0]
    return axis.axis is None or (
        axis.axis == 0 and isinstance(axis.of, range) and axis.of.step == 1
    )


def _same_axis(one: Axis, other: Axis) -> bool:
    return (one.at, one.axis) == (other.at, other.axis) and np.array_equal(
        np.asarray(one.of), np.asarray(other.of)
    )


def _without_first_axis(slot: Slot) -> Slot:
    """A slot of a single position of the parameter's first axis, without that axis."""
    axis, rest = slot.axes[0], slot.axes[1:]
    if axis.axis != 0 or slot.shape[0] != 1:
        return replace(slot, axes=rest)
    lowered = tuple(replace(a, axis=None if a.axis is None else a.axis - 1) for a in rest)
    return Slot(slot.key, slot.shape[1:], lowered)
