"""From parameters to stored tensors: an edit of a parameter, cut into edits of the slots that hold it.

A stored tensor's grid: its rows are its first axis (for a stack of experts: expert and first axis together), its columns the rest.
"""

import math
from dataclasses import dataclass

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.plan import Edit
from adapterkit.tasks.edits import AddVector, Assign, Block, Decompose, ReplaceRows, Term
from adapterkit.weights.parameters import Parameter
from adapterkit.weights.slots import Axis, Positions, Slot


@dataclass(frozen=True, slots=True)
class Product:
    """scale * b @ a as it lies on a parameter: `flip` where the parameter's rows are the module's inputs."""

    a: TensorSpec
    b: TensorSpec
    scale: float
    rank: int
    flip: bool
    experts: int | None = None  # the parameter is a stack of that many


def grid_rows(slot: Slot, stack: bool) -> int:
    """Rows of the slot's stored tensor as a grid; `stack` when the parameter is a stack of matrices."""
    if stack and slot.axes[0].axis is not None:
        return slot.shape[0] * slot.shape[1]
    return slot.shape[0] if slot.shape else 1


def place_product(parameter: Parameter, slot: Slot, product: Product) -> Term:
    """The product's part on one slot."""
    shape = parameter.shape
    if product.experts is None and len(shape) > 2:  # a convolution: one row per output channel
        if not parameter.whole:
            raise unplaceable(parameter, slot)
        blocks = (Block(0, shape[0], 0, math.prod(shape[1:])),)
        return Term(product.a, product.b, product.scale, product.rank, blocks, product.flip)
    swapped, blocks = _blocks(parameter, slot, stack=product.experts is not None)
    flip = product.flip ^ swapped
    return Term(product.a, product.b, product.scale, product.rank, blocks, flip, product.experts)


def _blocks(parameter: Parameter, slot: Slot, *, stack: bool) -> tuple[bool, tuple[Block, ...]]:
    """Whether the stored matrix is the parameter's transpose, and the block of each expert (of the one matrix)."""
    first, second = slot.axes[-2], slot.axes[-1]
    experts: list[tuple[int | None, int]] = [(None, 0)]
    matrix = (0, 1)
    if stack:
        axis = slot.axes[0]
        if axis.axis is None:
            experts = [(axis.at, 0)]
        elif axis.axis == 0:
            matrix = (1, 2)
            experts = [(axis.at + i, int(at)) for i, at in enumerate(axis.of)]
        else:
            raise unplaceable(parameter, slot)
    where = (first.axis, second.axis)
    if where == matrix:
        swapped, row_axis, col_axis = False, (first, -2), (second, -1)
    elif where == matrix[::-1]:
        swapped, row_axis, col_axis = True, (second, -1), (first, -2)
    else:
        raise unplaceable(parameter, slot)
    height = slot.shape[matrix[0]]
    row, row_stop, row_at, row_of = _span(row_axis[0], parameter.shape[row_axis[1]])
    col, col_stop, col_at, col_of = _span(col_axis[0], parameter.shape[col_axis[1]])
    blocks = []
    for expert, place in experts:
        by = place * height
        moved = None if row_of is None else tuple_range(row_of, by)
        blocks.append(
            Block(row + by, row_stop + by, col, col_stop, expert, row_at, col_at, moved, col_of)
        )
    return swapped, tuple(blocks)


def tuple_range(positions: Positions, by: int) -> Positions:
    """The positions, all moved by one distance."""
    if isinstance(positions, range):
        return range(positions.start + by, positions.stop + by, positions.step)
    return positions + by


def _span(axis: Axis, length: int) -> tuple[int, int, Positions | None, Positions | None]:
    """Stored range [start, stop), the parameter's positions in it (None: all, in order), the range's positions meant."""
    at = None if axis.at == 0 and len(axis.of) == length else range(axis.at, axis.stop)
    if isinstance(axis.of, range) and axis.of.step == 1:
        return axis.of.start, axis.of.stop, at, None
    return int(min(axis.of)), int(max(axis.of)) + 1, at, axis.of


def place_vector(parameter: Parameter, slot: Slot, vector: TensorSpec, scale: float) -> AddVector:
    """A vector added to a one-dimensional parameter."""
    row, row_stop, at, of = _span(slot.axes[0], parameter.shape[0])
    if of is not None or len(slot.shape) != 1:
        raise unplaceable(parameter, slot)
    return AddVector(vector, scale, row, row_stop, at)


def place_magnitude(
    parameter: Parameter, slot: Slot, magnitude: TensorSpec, outputs: int, before: tuple[Edit, ...]
) -> Decompose:
    """DoRA's rescaling; `outputs` is the parameter's axis that has one magnitude per position."""
    if len(parameter.shape) > 2:
        if not parameter.whole:
            raise unplaceable(parameter, slot)
        return Decompose(magnitude, (0, parameter.shape[0]), False, before)
    axis, other = slot.axes[outputs], slot.axes[1 - outputs]
    if (
        axis.at != 0
        or len(axis.of) != parameter.shape[outputs]
        or len(other.of) != parameter.shape[1 - outputs]
    ):
        raise unplaceable(parameter, slot)  # a row's norm needs the whole row
    row, row_stop, _, of = _span(axis, parameter.shape[outputs])
    by_columns = axis.axis == 1
    if of is not None or (by_columns and not slot.whole and slot.shape[1] != len(axis.of)):
        raise unplaceable(parameter, slot)
    return Decompose(magnitude, (row, row_stop), by_columns, before)


def place_rows(
    parameter: Parameter, slot: Slot, values: TensorSpec, indices: tuple[int, ...]
) -> ReplaceRows:
    """Trained rows of an embedding."""
    axis = slot.axes[0]
    if axis.at != 0 or len(slot.shape) != 2 or axis.of != range(parameter.shape[0]):
        raise unplaceable(parameter, slot)
    return ReplaceRows(values, indices, by_columns=axis.axis == 1)


def place_value(parameter: Parameter, slot: Slot, value: TensorSpec) -> tuple[Assign, ...]:
    """A parameter's new value, put into a stored tensor that holds a part of it."""
    if len(parameter.shape) == 1:
        row, row_stop, at, of = _span(slot.axes[0], parameter.shape[0])
        return (Assign(value, Block(row, row_stop, 0, 1, None, at, None, of), False),)
    if len(parameter.shape) > 3:
        raise unplaceable(parameter, slot)
    swapped, blocks = _blocks(parameter, slot, stack=len(parameter.shape) == 3)
    return tuple(Assign(value, block, swapped) for block in blocks)


def unplaceable(parameter: Parameter, slot: Slot) -> Refused:
    return Refused(
        f"{shown(parameter.name)} {parameter.shape} lies in {shown(slot.key)} {slot.shape} in a way this edit cannot follow",
        expected="rows and columns of the parameter on rows and columns of the stored tensor",
        where="base",
        hint="save the model once with transformers (from_pretrained, save_pretrained) and use that as the base",
    )
