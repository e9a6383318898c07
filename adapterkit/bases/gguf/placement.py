"""Map rows of GGUF tensors to rows of the parameters built from them, so that transformers' names
and layouts can be inverted.

transformers' code only reads, so tests with numbers reveal its layout: zeros reveal the added
constant; numbered elements reveal which tensor row becomes which parameter row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from adapterkit.core.lazy import Tensor, torch

ReadArray = Callable[[str], Any]  # a GGUF tensor's decoded values by its name, as a numpy array
Build = Callable[[ReadArray], "Tensor"]  # of a parameter; a picklable record
Shapes = Mapping[str, tuple[int, ...]]  # of GGUF tensors, by name
MAX_COUNTED = 1 << 20  # elements that are all counted; of larger parameters so many columns
NARROW = 4  # or as many


@dataclass(frozen=True)
class RowPlacement:
    """A parameter as rows of GGUF tensors: after `transposed` of the last two axes, row `rows[i]`
    is row i of the concatenated tensors, and column `columns[i]` is column i; `shift` was added to
    each value."""

    shapes: tuple[tuple[int, ...], ...]
    rows: Tensor | None = None  # int64; None: in their order
    transposed: bool = False
    shift: float = 0.0
    columns: Tensor | None = None  # likewise

    @property
    def plain(self) -> bool:
        """Return whether the parameter equals one GGUF tensor."""
        return (
            len(self.shapes) == 1
            and self.rows is self.columns is None
            and not self.transposed
            and not self.shift
        )

    @cached_property
    def block(self) -> int | None:
        """The smallest number of rows that form a block in both parameter and tensor; None for
        several tensors, and for other shapes than matrices and plain stacks."""
        shape, *others = self.shapes
        if self.plain:
            return 1 if len(shape) > 1 else None
        if others or len(shape) != 2 or self.transposed:
            return None
        if self.rows is None:
            return 1
        count = len(self.rows)
        ends = self.rows.cummax(0).values == torch.arange(count)
        sizes = (size for size in range(1, count + 1) if count % size == 0)
        return next(size for size in sizes if bool(ends[size - 1 :: size].all()))

    def of_rows(self, first: int, last: int) -> "RowPlacement":
        """The placement of some blocks as a parameter of its own."""
        rows = None if self.rows is None else self.rows[first:last] - first
        return replace(self, shapes=((last - first, self.shapes[0][-1]),), rows=rows)

    @cached_property
    def _inverses(self) -> list[Tensor | None]:
        orders = self.rows, self.columns
        return [None if order is None else torch.argsort(order) for order in orders]

    def join(self, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Build the parameter of this shape from the values of the GGUF tensors (rows, columns)."""
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        for axis, order in enumerate(self._inverses):
            rows = rows if order is None else rows.index_select(axis, order.to(rows.device))
        rows = rows + self.shift if self.shift else rows
        if not self.transposed:
            return rows.view(shape)
        return rows.view(*shape[:-2], shape[-1], shape[-2]).transpose(-2, -1).contiguous()

    def split(self, weight: Tensor) -> list[Tensor]:
        """Split a value of the parameter into the values of the GGUF tensors (rows, columns)."""
        if self.plain:
            return [weight.reshape(-1, self.shapes[0][-1])]  # of some rows, too
        rows = (weight.transpose(-2, -1) if self.transposed else weight).reshape(
            -1, self.shapes[0][-1]
        )
        rows = rows - self.shift if self.shift else rows
        for axis, order in enumerate((self.rows, self.columns)):
            rows = rows if order is None else rows.index_select(axis, order.to(rows.device))
        return list(rows.split([math.prod(shape[:-1]) for shape in self.shapes]))


def find_placement(shapes: Shapes, build: Build) -> RowPlacement | None:
    """The placement of a parameter that `build` makes of GGUF tensors of these shapes; None if
    `build` does more than move rows and add a number."""
    if len({shape[-1] for shape in shapes.values()}) > 1:
        return None
    return _of_rows(shapes, build) or _of_columns(shapes, build)


def _of_rows(shapes: Shapes, build: Build) -> RowPlacement | None:
    """A placement that moves rows."""
    columns = max(NARROW, MAX_COUNTED // sum(math.prod(shape[:-1]) for shape in shapes.values()))
    narrow = {name: (*shape[:-1], min(columns, shape[-1])) for name, shape in shapes.items()}
    with np.errstate(all="ignore"):
        zeros = _built(build, {name: np.zeros(shape) for name, shape in narrow.items()})
        counted = _built(build, _counted(narrow))
    if zeros is None or counted is None:
        return None
    shift = float(zeros.flatten()[0])
    numbers = counted - shift
    is_known = bool((zeros == shift).all()) and counted.dtype == torch.float64
    if not is_known or not math.isfinite(shift):
        return None
    own, width = tuple(shapes.values()), next(iter(narrow.values()))[-1]
    for transposed in (False, True):
        if transposed and numbers.dim() < 2:
            break
        turned = numbers.transpose(-2, -1) if transposed else numbers
        rows = _rows(turned, width)
        if rows is not None:
            in_order = torch.equal(rows, torch.arange(len(rows)))
            return RowPlacement(own, None if in_order else rows, transposed, shift)
    return None


def _of_columns(shapes: Shapes, build: Build) -> RowPlacement | None:
    """A placement of one matrix that moves columns, found with a few rows."""
    (name, *others), shape = shapes, next(iter(shapes.values()))
    if others or len(shape) != 2 or min(shape) == 0:
        return None
    few = {name: (min(NARROW, shape[0]), shape[1])}
    numbers = _built(build, _counted(few))
    if numbers is None:
        return None
    expected = torch.arange(few[name][0])[:, None] * shape[1] + numbers[:1].long()
    if numbers.shape != few[name] or not torch.equal(numbers, expected.to(numbers.dtype)):
        return None
    order = torch.argsort(numbers[0])
    found = torch.equal(numbers[0, order].long(), torch.arange(shape[1]))
    return RowPlacement((shape,), columns=order) if found else None


def _built(build: Build, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    """The parameter built from these arrays; None if transformers' code refuses them."""
    try:
        return build(arrays.__getitem__)
    except Exception:  # of any kind; without a placement a change is refused, by name
        return None


def _counted(shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays whose elements are numbered consecutively."""
    arrays, first = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        arrays[name] = np.arange(first, first + count, dtype=np.float64).reshape(shape)
        first += count
    return arrays


def _rows(
    numbers: Tensor,  # (..., width) float64
    width: int,
) -> Tensor | None:  # (rows,) int64
    """The parameter's row for each row of the GGUF tensors; None unless all appear intact and
    once."""
    if numbers.shape[-1:] != (width,):
        return None
    rows = numbers.reshape(-1, width)
    sources = (rows[:, 0] / width).long()
    expected = (sources[:, None] * width + torch.arange(width)).double()
    if not torch.equal(rows, expected):
        return None
    order = torch.argsort(sources)
    return order if torch.equal(sources[order], torch.arange(len(order))) else None
