"""Tensors of an output as expressions over stored tensors.

Renames cost nothing: a `StoredTensor` is copied as bytes. The functions simplify: for example, a
transpose of a transpose is the tensor itself, and rows of a joined tensor are its part.

`weights.symbols.Symbol` supports some of the same operations for another question: which positions
of which stored tensors a parameter has, axis by axis, for callers that read some of its rows. Its
slots cannot express an axis that was cut and joined with another, zeros, or arithmetic, which
formats need; an expression cannot give the bytes of a few rows. Both take entries by `taken`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, cast

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.parameters import taken
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.sums import all_finite

if TYPE_CHECKING:
    from adapterkit.adapters.formats.peft.eight_bits import EightBits
    from adapterkit.bases.gguf.adapter import BlockSpec

Rows = range | tuple[int, ...]  # indices along an axis; a tuple unless they are consecutive


@dataclass(frozen=True, kw_only=True)
class Expression(ABC):
    """A tensor made from stored ones; subclasses are frozen, picklable dataclasses."""

    shape: tuple[int, ...]
    dtype: str  # that it is written in unless another is asked for
    inputs: tuple["Expression", ...] = ()  # what it is made of

    @abstractmethod
    def value(self, reader: TensorReader) -> Tensor:
        """The tensor in `dtype`, or in float64 if it is not rounded yet."""

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """The stored tensors that it reads, each once."""
        return tuple(dict.fromkeys(spec for part in self.inputs for spec in part.reads))

    @property
    def joined_parts(self) -> tuple["Expression", ...]:
        """The joined pieces, each of one source or computation."""
        return (self,)

    @property
    def known_early(self) -> bool:
        """True if its value is available while planning: it is not the result of a computation."""
        return all(part.known_early for part in self.inputs)

    def __iter__(self) -> Iterator["Expression"]:
        """Yield itself and its inputs, recursively."""
        yield self
        for part in self.inputs:
            yield from part


@dataclass(frozen=True, kw_only=True)
class StoredTensor(Expression):
    """A stored tensor, unchanged."""

    spec: TensorSpec

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def value(self, reader: TensorReader) -> Tensor:
        return reader.tensor(self.spec)


@dataclass(frozen=True, kw_only=True)
class DecodedTensor(Expression):
    """A stored tensor in 8 bits, decoded to floats."""

    spec: "BlockSpec | EightBits"

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.spec.parts

    def value(self, reader: TensorReader) -> Tensor:
        value = self.spec.decode(*map(reader.tensor, self.spec.parts))
        if not all_finite(value):
            raise Unrecoverable(
                f"{shown(self.spec.key)} is not finite",
                expected="finite values",
                where=self.spec.file,
                hint="the training went wrong: take an earlier checkpoint",
                code="AK208",
            )
        return value


@dataclass(frozen=True, kw_only=True)
class Constant(Expression):
    """Numbers that no file stores: an alpha, rows of zeros, the shape of a weight."""

    number: float | tuple[int, ...]

    def value(self, reader: TensorReader) -> Tensor:
        dtype = dtypes.torch_dtype(self.dtype)
        return torch.tensor(self.number, dtype=dtype).expand(self.shape)


@dataclass(frozen=True, kw_only=True)
class Operation(Expression):
    """The result of one of OPERATIONS on its inputs, converted to one dtype."""

    name: str
    arguments: tuple = ()

    @property
    def joined_parts(self) -> tuple[Expression, ...]:
        own = [piece for part in self.inputs for piece in part.joined_parts]
        return (self,) if self.name in ARITHMETIC or len(own) == 1 else tuple(own)

    def value(self, reader: TensorReader) -> Tensor:
        values = [part.value(reader) for part in self.inputs]
        common = reduce(torch.promote_types, [value.dtype for value in values])
        return OPERATIONS[self.name](*(value.to(common) for value in values), *self.arguments)


def _cat(*parts_and_axis) -> Tensor:
    *parts, axis = parts_and_axis
    return torch.cat(parts, axis)


def _block_diagonal(*parts_and_arguments) -> Tensor:
    *parts, sets, shape = parts_and_arguments
    fused = parts[0].new_zeros(shape)
    at = 0
    for part, rows in zip(parts, sets, strict=True):
        fused[index_of(rows), at : at + part.shape[1]] = part
        at += part.shape[1]
    return fused


def contract(
    mid: Tensor,  # (r, r, *kernel)
    a: Tensor,  # (r, in, *1)
) -> Tensor:  # (r, in, *kernel)
    """a of a standard convolution, in float64: Σ_n mid[m, n, kernel] a[n, i]."""
    return torch.einsum("mn...,ni->mi...", mid.double(), a.double().flatten(1))


OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "block_diagonal": _block_diagonal,
    "cat": _cat,
    "contract": contract,
    "reshape": lambda value, shape: value.reshape(shape),
    "scale": lambda value, factor: value.double() * factor,
    "take": taken,
    "transpose": lambda value, *axes: value.transpose(*axes),
}
ARITHMETIC = ("contract", "scale")  # in float64 until it is written


def stored(spec: TensorSpec) -> StoredTensor:
    """A stored tensor, unchanged."""
    return StoredTensor(shape=spec.shape, dtype=spec.dtype, spec=spec)


def from_spec(spec: TensorSpec) -> Expression:
    """A stored tensor's values; those in 8 bits in float32."""
    if type(spec) is TensorSpec:
        return stored(spec)
    coded = cast("BlockSpec | EightBits", spec)
    return DecodedTensor(shape=spec.shape, dtype=spec.dtype, spec=coded)


def constant(number: float | tuple[int, ...], dtype: str = "F32") -> Expression:
    """A number, or a vector of numbers."""
    shape = (len(number),) if isinstance(number, tuple) else ()
    return Constant(shape=shape, dtype=dtype, number=number)


def zeros(shape: tuple[int, ...], dtype: str) -> Expression:
    """Zeros in that shape."""
    return Constant(shape=shape, dtype=dtype, number=0.0)


def _operation(
    name: str, shape: Sequence[int], inputs: Sequence[Expression], *arguments: object
) -> Operation:
    """An operation, in the widest dtype of its inputs."""
    return Operation(
        shape=tuple(shape),
        dtype=widest([part.dtype for part in inputs]),
        inputs=tuple(inputs),
        name=name,
        arguments=arguments,
    )


def widest(names: Sequence[str]) -> str:
    """The dtype that holds every value of all of them."""
    common = reduce(torch.promote_types, map(dtypes.torch_dtype, names))
    return dtypes.name_of(common)


def is_made_by(expression: Expression, name: str) -> TypeGuard[Operation]:
    """True if an expression is that operation."""
    return isinstance(expression, Operation) and expression.name == name


def transposed(source: Expression, axes: tuple[int, int] = (-2, -1)) -> Expression:
    """Two axes swapped; counted from either end."""
    if is_made_by(source, "transpose") and source.arguments == axes:
        return source.inputs[0]
    shape, (i, j) = list(source.shape), axes
    shape[i], shape[j] = shape[j], shape[i]
    return _operation("transpose", shape, [source], *axes)


def reshaped(source: Expression, shape: tuple[int, ...]) -> Expression:
    """The same elements in this shape."""
    source = without_reshape(source)
    if source.shape == shape:
        return source
    assert math.prod(source.shape) == math.prod(shape)
    return _operation("reshape", shape, [source], shape)


def without_reshape(source: Expression) -> Expression:
    """The expression before a reshape."""
    return source.inputs[0] if is_made_by(source, "reshape") else source


def flat(source: Expression) -> Expression:
    """A tensor with at most one axis longer than 1, as a vector; others unchanged."""
    size = math.prod(source.shape)
    return reshaped(source, (size,)) if size in source.shape else source


def scaled(source: Expression, factor: float) -> Expression:
    """factor · source, in float64 until it is written."""
    if is_made_by(source, "scale"):
        source, factor = source.inputs[0], source.arguments[0] * factor
    return source if factor == 1 else _operation("scale", source.shape, [source], factor)


def contracted(mid: Expression, a: Expression) -> Expression:
    """a of a standard convolution, from a core and its a, in float64 until it is written."""
    shape = (mid.shape[0], a.shape[1], *mid.shape[2:])
    return _operation("contract", shape, [mid, a])


def padded(source: Expression, length: int, axis: int = 0) -> Expression:
    """Zeros after the entries of an axis, up to this length."""
    shape = list(source.shape)
    shape[axis] = length - shape[axis]
    if not shape[axis]:
        return source
    return joined([source, zeros(tuple(shape), source.dtype)], axis)


def gathered(source: Expression, rows: Rows, axis: int = 0) -> Expression:
    """Entries along an axis, by their indices."""
    if is_made_by(source, "take") and source.arguments[1] == axis:
        earlier = source.arguments[0]
        source, rows = source.inputs[0], compact([earlier[i] for i in rows])
    if rows == range(source.shape[axis]):
        return source
    inner = source.inputs[0] if is_made_by(source, "reshape") and axis == 0 else None
    if isinstance(inner, StoredTensor) and isinstance(rows, range):  # of a stack: contiguous
        return stored(inner.spec.narrowed(source.shape, rows.start, rows.stop))
    if is_made_by(source, "cat") and source.arguments == (axis,) and isinstance(rows, range):
        at = 0
        for part in source.inputs:
            if rows == range(at, at + part.shape[axis]):
                return part
            at += part.shape[axis]
    shape = list(source.shape)
    shape[axis] = len(rows)
    return _operation("take", shape, [source], rows, axis)


def joined(parts: Sequence[Expression], axis: int = 0) -> Expression:
    """Tensors one after the other along an axis."""
    first = parts[0]
    if len(parts) == 1:
        return first
    takes = [part for part in parts if is_made_by(part, "take") and part.arguments[1] == axis]
    if len(takes) == len(parts) and all(one.inputs == takes[0].inputs for one in takes):
        rows = [row for one in takes for row in one.arguments[0]]
        return gathered(takes[0].inputs[0], compact(rows), axis)
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return _operation("cat", shape, parts, axis)


def block_diagonal(parts: Sequence[Expression], rows: Sequence[Rows], out: int) -> Expression:
    """b of fused modules: part i in rows[i] of all `out` rows and in its own columns, zeros
    elsewhere."""
    shape = (out, sum(part.shape[1] for part in parts), *parts[0].shape[2:])
    return _operation("block_diagonal", shape, parts, tuple(rows), shape)


def index_of(rows: Rows) -> slice | list[int]:
    """An index of these entries of a tensor; a view if they are consecutive."""
    return slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)


def compact(rows: Sequence[int]) -> Rows:
    """Indices as a range if they are consecutive."""
    if isinstance(rows, range) and rows.step == 1:
        return rows
    if len(rows) and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return range(rows[0], rows[0] + len(rows))
    return tuple(rows)


def are_equal(parts: Sequence[Expression], reader: TensorReader) -> bool:
    """True if tensors have equal values; read while planning, because shapes depend on it."""
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


COLUMN = "column"  # of magnitudes: (out, 1, ...), where PEFT has vectors


class LayoutStep(NamedTuple):
    """A step of a format, in both directions."""

    read: Callable[[Expression], Expression]  # from the file
    write: Callable[[Expression], Expression]  # into the file


def _same(value: Expression) -> Expression:
    return value


def shared(source: Expression) -> Expression:
    """One of a stack's matrices if all are equal, as (1, ...)."""
    if is_made_by(source, "cat") and len(set(source.inputs)) == 1:
        return source.inputs[0]
    return source


GROUPED = "grouped"  # the step of factors that may be those of `merged_linear`
STEPS = {
    "transpose": LayoutStep(transposed, transposed),
    "shared": LayoutStep(_same, shared),  # a file may have one matrix for all
    COLUMN: LayoutStep(_same, _same),
}
