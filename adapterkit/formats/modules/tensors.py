"""Tensors of an output as expressions over stored ones: what a conversion computes.

Renames cost nothing: an expression that is a `Stored` tensor is copied as bytes. The functions
simplify: a transpose of a transpose is the tensor itself, and rows of a joined tensor are its part.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.gguf.adapter import BlockSpec
from adapterkit.weights.reader import TensorReader

Rows = range | tuple[int, ...]  # indices along an axis; a tuple where they are not consecutive


@dataclass(frozen=True)
class Expression(ABC):
    """A tensor made from stored ones; subclasses are frozen, picklable dataclasses."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The dtype that it is written in unless another is asked for."""

    @property
    def inputs(self) -> tuple["Expression", ...]:
        """The expressions that it is made of."""
        return ()

    @abstractmethod
    def value(self, reader: TensorReader) -> Tensor:
        """The tensor in `dtype`, or in float64 where it is not rounded yet."""

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """The stored tensors that it reads, each once."""
        return tuple(dict.fromkeys(spec for part in self.inputs for spec in part.reads))

    @property
    def pieces(self) -> tuple["Expression", ...]:
        """What it is put together from, each piece of one source or computation."""
        return (self,)

    @property
    def known_early(self) -> bool:
        """Whether its value can be had while planning: it is no result of a computation."""
        return all(part.known_early for part in self.inputs)

    def __iter__(self) -> Iterator["Expression"]:
        """Itself and all that it is made of."""
        yield self
        for part in self.inputs:
            yield from part


@dataclass(frozen=True)
class StoredTensor(Expression):
    """A stored tensor as it is."""

    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def value(self, reader: TensorReader) -> Tensor:
        return reader.tensor(self.spec)


@dataclass(frozen=True)
class Decoded(Expression):
    """A tensor stored in blocks, in the dtype that holds it exactly."""

    spec: BlockSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.spec.stored,)

    def value(self, reader: TensorReader) -> Tensor:
        return self.spec.decode(reader.tensor(self.spec.stored))


@dataclass(frozen=True)
class Constant(Expression):
    """One number everywhere: an alpha, rows of zeros."""

    size: tuple[int, ...]
    number: float
    kind: str = "F32"  # its dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return self.kind

    def value(self, reader: TensorReader) -> Tensor:
        return torch.full(self.size, self.number, dtype=dtypes.torch_dtype(self.kind))


@dataclass(frozen=True)
class Numbers(Expression):
    """A few whole numbers: the shape of a weight."""

    numbers: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.numbers),)

    @property
    def dtype(self) -> str:
        return "I64"

    def value(self, reader: TensorReader) -> Tensor:
        return torch.tensor(self.numbers)


@dataclass(frozen=True)
class OfOne(Expression):
    """Base of expressions over one other."""

    source: Expression

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.source,)

    @property
    def pieces(self) -> tuple[Expression, ...]:
        own = self.source.pieces
        return own if len(own) > 1 else (self,)


@dataclass(frozen=True)
class Transposed(OfOne):
    """Two axes swapped; counted from the end."""

    axes: tuple[int, int] = (-2, -1)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes, (i, j) = list(self.source.shape), self.axes
        sizes[i], sizes[j] = sizes[j], sizes[i]
        return tuple(sizes)

    def value(self, reader: TensorReader) -> Tensor:
        return self.source.value(reader).transpose(*self.axes)


@dataclass(frozen=True)
class Reshaped(OfOne):
    """The same elements in another shape."""

    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def value(self, reader: TensorReader) -> Tensor:
        return self.source.value(reader).reshape(self.size)


@dataclass(frozen=True)
class Gathered(OfOne):
    """Entries along an axis, by their indices."""

    rows: Rows
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.source.shape)
        sizes[self.axis] = len(self.rows)
        return tuple(sizes)

    def value(self, reader: TensorReader) -> Tensor:
        value = self.source.value(reader)
        if isinstance(self.rows, range):
            return value.narrow(self.axis, self.rows.start, len(self.rows))
        return value.index_select(self.axis, torch.tensor(self.rows))


@dataclass(frozen=True)
class Scaled(OfOne):
    """factor · source, in float64 until it is written."""

    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def pieces(self) -> tuple[Expression, ...]:
        return (self,)

    def value(self, reader: TensorReader) -> Tensor:
        return self.source.value(reader).double() * self.factor


@dataclass(frozen=True)
class Padded(OfOne):
    """Zeros after the entries of an axis, up to this length."""

    length: int
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.source.shape)
        sizes[self.axis] = self.length
        return tuple(sizes)

    def value(self, reader: TensorReader) -> Tensor:
        value = self.source.value(reader)
        padded = value.new_zeros(self.shape)
        padded.narrow(self.axis, 0, value.shape[self.axis]).copy_(value)
        return padded


@dataclass(frozen=True)
class OfSeveral(Expression):
    """Base of expressions over several others, in the widest dtype of theirs."""

    parts: tuple[Expression, ...]

    @property
    def dtype(self) -> str:
        return widest([part.dtype for part in self.parts])

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return self.parts

    @property
    def pieces(self) -> tuple[Expression, ...]:
        return tuple(piece for part in self.parts for piece in part.pieces)

    def values(self, reader: TensorReader) -> list[Tensor]:
        """The parts in one dtype."""
        values = [part.value(reader) for part in self.parts]
        common = reduce(torch.promote_types, [value.dtype for value in values])
        return [value.to(common) for value in values]


@dataclass(frozen=True)
class Joined(OfSeveral):
    """Tensors one after the other along an axis."""

    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(sizes)

    def value(self, reader: TensorReader) -> Tensor:
        return torch.cat(self.values(reader), self.axis)


@dataclass(frozen=True)
class BlockDiagonal(OfSeveral):
    """b of fused modules: part i in rows[i] of all `out` rows and in its own columns, zeros
    elsewhere."""

    rows: tuple[Rows, ...]
    out: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (self.out, sum(part.shape[1] for part in self.parts), *first[2:])

    def value(self, reader: TensorReader) -> Tensor:
        values = self.values(reader)
        fused = values[0].new_zeros(self.shape)
        at = 0
        for value, rows in zip(values, self.rows, strict=True):
            columns = slice(at, at + value.shape[1])
            fused[index_of(rows), columns] = value
            at += value.shape[1]
        return fused


@dataclass(frozen=True)
class Contracted(OfSeveral):
    """a of a plain convolution from a core and its a: Σ_n mid[m, n, kernel] a[n, i], in float64
    until it is written."""

    @property
    def shape(self) -> tuple[int, ...]:
        mid, a = self.parts
        return (mid.shape[0], a.shape[1], *mid.shape[2:])

    @property
    def pieces(self) -> tuple[Expression, ...]:
        return (self,)

    def value(self, reader: TensorReader) -> Tensor:
        mid, a = (value.double() for value in self.values(reader))
        return torch.einsum("mn...,ni->mi...", mid, a.flatten(1))


def from_spec(spec: TensorSpec) -> Expression:
    """A stored tensor's values."""
    return Decoded(spec) if isinstance(spec, BlockSpec) else StoredTensor(spec)


def widest(names: Sequence[str]) -> str:
    """The dtype that holds every value of all of them."""
    common = reduce(torch.promote_types, map(dtypes.torch_dtype, names))
    return dtypes.name_of(common)


def transposed(source: Expression, axes: tuple[int, int] = (-2, -1)) -> Expression:
    """Two axes swapped."""
    if isinstance(source, Transposed) and source.axes == axes:
        return source.source
    return Transposed(source, axes)


def reshaped(source: Expression, shape: tuple[int, ...]) -> Expression:
    """The same elements in this shape."""
    if isinstance(source, Reshaped):
        source = source.source
    if source.shape == shape:
        return source
    assert math.prod(source.shape) == math.prod(shape)
    return Reshaped(source, shape)


def flat(source: Expression) -> Expression:
    """A vector that lies along one of several axes, as a vector; others as they are."""
    size = math.prod(source.shape)
    return reshaped(source, (size,)) if size in source.shape else source


def scaled(source: Expression, factor: float) -> Expression:
    """factor · source."""
    if isinstance(source, Scaled):
        source, factor = source.source, source.factor * factor
    return source if factor == 1 else Scaled(source, factor)


def padded(source: Expression, length: int, axis: int = 0) -> Expression:
    """Zeros after the entries of an axis, up to this length."""
    return source if source.shape[axis] == length else Padded(source, length, axis)


def gathered(source: Expression, rows: Rows, axis: int = 0) -> Expression:
    """Entries along an axis."""
    if isinstance(source, Gathered) and source.axis == axis:
        source, rows = source.source, compact([source.rows[i] for i in rows])
    if rows == range(source.shape[axis]):
        return source
    inner = source.source if isinstance(source, Reshaped) else None
    if isinstance(inner, StoredTensor) and axis == 0 and isinstance(rows, range):
        return _stored_rows(inner.spec, source.shape, rows)  # of a stack: they lie together
    if isinstance(source, Joined) and source.axis == axis and isinstance(rows, range):
        at = 0
        for part in source.parts:
            if rows == range(at, at + part.shape[axis]):
                return part
            at += part.shape[axis]
    return Gathered(source, rows, axis)


def _stored_rows(spec: TensorSpec, shape: tuple[int, ...], rows: range) -> StoredTensor:
    """Consecutive rows of a stored tensor that is seen in this shape."""
    width = spec.nbytes // shape[0]
    start, stop = spec.start + rows.start * width, spec.start + rows.stop * width
    return StoredTensor(replace(spec, shape=(len(rows), *shape[1:]), start=start, stop=stop))


def joined(parts: Sequence[Expression], axis: int = 0) -> Expression:
    """Tensors one after the other along an axis."""
    first = parts[0]
    if len(parts) == 1:
        return first
    pieces = [part for part in parts if isinstance(part, Gathered) and part.axis == axis]
    if len(pieces) == len(parts) and all(one.source == pieces[0].source for one in pieces):
        rows = [row for piece in pieces for row in piece.rows]
        return gathered(pieces[0].source, compact(rows), axis)
    return Joined(tuple(parts), axis)


def index_of(rows: Rows) -> slice | list[int]:
    """What selects these entries of a tensor; a view where they are consecutive."""
    return slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)


def compact(rows: Sequence[int]) -> Rows:
    """Indices as a range where they are consecutive."""
    if isinstance(rows, range) and rows.step == 1:
        return rows
    if len(rows) and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return range(rows[0], rows[0] + len(rows))
    return tuple(rows)


def are_equal(parts: Sequence[Expression], reader: TensorReader) -> bool:
    """Whether tensors have the same values; read while planning, as the shape depends on it."""
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        return False
    others = [part for part in parts if part != first]
    if not others:
        return True
    if not all(part.known_early for part in parts):
        return False
    value = first.value(reader)
    return all(torch.equal(value, part.value(reader)) for part in others)
