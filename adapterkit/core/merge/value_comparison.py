"""Compare stored values in blocks, before a plan exists."""

import math
from collections.abc import Iterator
from functools import partial

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import same_bytes
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.codec import QuantizedWeight, read_parts
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.kernels.rows import row_ranges

BLOCK = 4 << 20  # elements compared at a time


def differing_rows(one: tuple[Folder, TensorSpec], other: tuple[Folder, TensorSpec]) -> int:
    """The number of rows in which two stored tensors of one shape differ, the wider one rounded to
    the other's dtype. A tensor without axes has one row."""
    counts = [0, 0]
    for a, b in _blocks(one, other):
        for i, unequal in enumerate((a != b.to(a.dtype), b != a.to(b.dtype))):
            counts[i] += int(unequal.any(1).sum())
    return min(counts)


def relative_difference(one: tuple[Folder, TensorSpec], other: tuple[Folder, TensorSpec]) -> float:
    """‖one - other‖ / ‖one‖ of two stored tensors of one shape."""
    return _relative(_blocks(one, other))


def decoded_difference(
    one: tuple[Folder, TensorSpec], other: tuple[Folder, QuantizedWeight]
) -> float:
    """‖one - other‖ / ‖one‖ of two tensors of one shape, with the other one decoded."""
    (folder, spec), (other_folder, weight) = one, other
    parts = read_parts(weight, partial(_read, other_folder))
    grid = math.prod(weight.shape[:-1]), weight.shape[-1]

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for first, last in weight.row_ranges(BLOCK):
            a = _read(folder, spec.narrowed(grid, first, last))
            record, own = weight.rows(parts, first, last)
            yield a, record.decode(own).view(a.shape)

    return _relative(pairs())


def _relative(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """‖a - b‖ / ‖a‖ over all pairs."""
    difference = norm = 0.0
    for a, b in pairs:
        difference += float((a.double() - b.double()).square().sum())
        norm += float(a.double().square().sum())
    return math.sqrt(difference / norm) if norm else math.inf


def _blocks(
    one: tuple[Folder, TensorSpec], other: tuple[Folder, TensorSpec]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of rows of both; none for tensors without elements."""
    shape = one[1].shape
    grid = shape[0] if shape else 1, math.prod(shape[1:])
    for first, last in row_ranges(*grid, BLOCK) if grid[1] else ():
        a, b = (_read(folder, spec.narrowed(grid, first, last)) for folder, spec in (one, other))
        yield a, b


def equal_values(
    sides: tuple[Checkpoint, Checkpoint], old: StoredParameter, new: StoredParameter
) -> bool:
    """Return whether two parameters have the same values, or one has the other's rounded to its
    dtype."""
    if old.shape != new.shape:
        return False
    if not old.dtypes | new.dtypes <= set(dtypes.FLOATS) and old.dtypes != new.dtypes:
        return False
    if not (old.is_one_tensor and new.is_one_tensor):
        a, b = (
            one.native(partial(_read, side.folder))
            for one, side in zip((old, new), sides, strict=True)
        )
        if a.dtype == b.dtype:
            return torch.equal(a, b)
        return torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)
    tensors = (sides[0].folder, old.specs[0]), (sides[1].folder, new.specs[0])
    if old.dtypes == new.dtypes:
        return same_bytes(*tensors)
    return differing_rows(*tensors) == 0


def _read(folder: Folder, spec: TensorSpec) -> Tensor:
    """A stored tensor in its own dtype."""
    data = bytearray(folder.read(spec.file, spec.start, spec.stop))
    return dtypes.tensor_of(data, spec.dtype, spec.shape)
