"""From parameters to stored tensors: an edit of a parameter, split into edits of its slots.

A stored tensor's grid has its first axis as rows (of a stack of experts: expert and first axis
together), all others as columns.
"""

import math
from dataclasses import replace

from adapterkit.adapters.factors import Factors
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.plan import Edit
from adapterkit.tasks.edits import AddVector, Assign, Block, Decompose, PlacedFactors, ReplaceRows
from adapterkit.weights.parameters import Parameter
from adapterkit.weights.slots import Axis, Positions, Slot


def grid_rows(slot: Slot, stack: bool) -> int:
    """Rows of the slot's stored tensor as a grid; `stack` when the parameter is a stack of
    matrices."""
    if stack and slot.axes[0].axis is not None:
        return slot.shape[0] * slot.shape[1]
    return slot.shape[0] if slot.shape else 1


def place_factors(parameter: Parameter, slot: Slot, factors: Factors) -> PlacedFactors:
    """The factors on one slot; `Refused` where the slot's layout does not allow it."""
    shape = parameter.shape
    if factors.experts is None and len(shape) > 2:  # a convolution: one row per output channel
        if not parameter.whole:
            raise _layout_error(parameter, slot)
        return PlacedFactors(factors, (Block(0, shape[0], 0, math.prod(shape[1:])),))
    swapped, blocks = _blocks(parameter, slot, stack=factors.experts is not None)
    return PlacedFactors(replace(factors, flip=factors.flip ^ swapped), blocks)


def _blocks(parameter: Parameter, slot: Slot, *, stack: bool) -> tuple[bool, tuple[Block, ...]]:
    """Whether the stored matrix is the parameter's transpose, and the block of each expert (or of
    the one matrix)."""
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
            raise _layout_error(parameter, slot)
    where = (first.axis, second.axis)
    if where == matrix:
        swapped, row_axis, col_axis = False, (first, -2), (second, -1)
    elif where == matrix[::-1]:
        swapped, row_axis, col_axis = True, (second, -1), (first, -2)
    else:
        raise _layout_error(parameter, slot)
    height = slot.shape[matrix[0]]
    row, row_stop, row_at, row_of = _span(row_axis[0], parameter.shape[row_axis[1]])
    col, col_stop, col_at, col_of = _span(col_axis[0], parameter.shape[col_axis[1]])
    blocks = []
    for expert, place in experts:
        by = place * height
        moved = None if row_of is None else _shifted(row_of, by)
        blocks.append(
            Block(row + by, row_stop + by, col, col_stop, expert, row_at, col_at, moved, col_of)
        )
    return swapped, tuple(blocks)


def _shifted(positions: Positions, by: int) -> Positions:
    if isinstance(positions, range):
        return range(positions.start + by, positions.stop + by, positions.step)
    return positions + by


def _span(axis: Axis, length: int) -> tuple[int, int, Positions | None, Positions | None]:
    """Stored range [start, stop), the parameter's positions in it (None: all, in order), and which
    positions of the range these are (None: all)."""
    at = None if axis.at == 0 and len(axis.of) == length else range(axis.at, axis.stop)
    if isinstance(axis.of, range) and axis.of.step == 1:
        return axis.of.start, axis.of.stop, at, None
    return int(min(axis.of)), int(max(axis.of)) + 1, at, axis.of


def place_vector(parameter: Parameter, slot: Slot, vector: TensorSpec, scale: float) -> AddVector:
    """A vector added to a one-dimensional parameter; `Refused` as `place_factors`."""
    row, row_stop, at, of = _span(slot.axes[0], parameter.shape[0])
    if of is not None or len(slot.shape) != 1:
        raise _layout_error(parameter, slot)
    return AddVector(vector, scale, row, row_stop, at)


def place_magnitude(
    parameter: Parameter, slot: Slot, magnitude: TensorSpec, axis: int, before: tuple[Edit, ...]
) -> Decompose:
    """DoRA's rescaling of the parameter's `axis`, one magnitude per position, after the edits
    `before`; `Refused` as `place_factors`."""
    if len(parameter.shape) > 2:
        if not parameter.whole:
            raise _layout_error(parameter, slot)
        return Decompose(magnitude, (0, parameter.shape[0]), False, before)
    outputs, inputs = slot.axes[axis], slot.axes[1 - axis]
    shape = parameter.shape
    if outputs.at != 0 or len(outputs.of) != shape[axis] or len(inputs.of) != shape[1 - axis]:
        raise _layout_error(parameter, slot)  # the norm of a row needs all of it
    row, row_stop, _, of = _span(outputs, shape[axis])
    by_columns = outputs.axis == 1
    if of is not None or (by_columns and not slot.whole and slot.shape[1] != len(outputs.of)):
        raise _layout_error(parameter, slot)
    return Decompose(magnitude, (row, row_stop), by_columns, before)


def place_rows(
    parameter: Parameter, slot: Slot, values: TensorSpec, indices: tuple[int, ...]
) -> ReplaceRows:
    """Trained rows of an embedding; `Refused` as `place_factors`."""
    axis = slot.axes[0]
    if axis.at != 0 or len(slot.shape) != 2 or axis.of != range(parameter.shape[0]):
        raise _layout_error(parameter, slot)
    return ReplaceRows(values, indices, by_columns=axis.axis == 1)


def place_value(parameter: Parameter, slot: Slot, value: TensorSpec) -> tuple[Assign, ...]:
    """A parameter's new value on a stored tensor that has a part of it; `Refused` as
    `place_factors`."""
    if len(parameter.shape) == 1:
        row, row_stop, at, of = _span(slot.axes[0], parameter.shape[0])
        return (Assign(value, Block(row, row_stop, 0, 1, None, at, None, of), False),)
    if len(parameter.shape) > 3:
        raise _layout_error(parameter, slot)
    swapped, blocks = _blocks(parameter, slot, stack=len(parameter.shape) == 3)
    return tuple(Assign(value, block, swapped) for block in blocks)


def _layout_error(parameter: Parameter, slot: Slot) -> Refused:
    return Refused(
        f"{shown(parameter.name)} {parameter.shape} lies in {shown(slot.key)} {slot.shape} in a "
        "way this edit cannot follow",
        expected="rows and columns of the parameter on rows and columns of the stored tensor",
        where="base",
        hint="save the model once with transformers (from_pretrained, save_pretrained) and use "
        "that as the base",
    )
