"""Turn changes of parameters into steps: one for each stored tensor, in the base's order."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Refused, shown
from adapterkit.core.merge.job import Change, MergeState
from adapterkit.core.plan import RowEdit, Step
from adapterkit.core.registry import load
from adapterkit.core.tasks.edits import (
    AddLikePeft,
    AddLowRank,
    AddVector,
    Assign,
    Band,
    Block,
    Decompose,
    PlacedFactors,
    ReplaceRows,
    RoundTo,
)
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.parameters import Axis, Parameter, Slot, identity_slot
from adapterkit.doors import MERGES
from adapterkit.kernels.quant.stochastic import Draws

if TYPE_CHECKING:
    from adapterkit.adapters.formats.merged_deltas import PlacedDelta
    from adapterkit.verbs.combine.module_methods import ModuleMethods

WIDE = ("F32", "F64")  # types whose sums are taken in float64


def place_factors(parameter: Parameter, slot: Slot, factors: Factors) -> PlacedFactors:
    """The factors on one slot; `Refused` if the slot's layout does not allow it."""
    shape = parameter.shape
    if factors.experts is None and len(shape) > 2:  # a convolution: one row per output channel
        if not parameter.is_full_tensor:
            raise _layout_error(parameter, slot)
        whole = Block(Band(0, shape[0]), Band(0, math.prod(shape[1:])))
        return PlacedFactors(factors, (whole,))
    swapped, blocks = _blocks(parameter, slot, stack=factors.experts is not None)
    return PlacedFactors(replace(factors, flip=not factors.flip) if swapped else factors, blocks)


def _blocks(parameter: Parameter, slot: Slot, *, stack: bool) -> tuple[bool, tuple[Block, ...]]:
    """Return whether the stored matrix is the parameter's transpose; and the block of each expert,
    or of the single matrix."""
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
    rows = _band(row_axis[0], parameter.shape[row_axis[1]])
    columns = _band(col_axis[0], parameter.shape[col_axis[1]])
    blocks = (
        Block(_shifted(rows, place * height) if place else rows, columns, expert)
        for expert, place in experts
    )
    return swapped, tuple(blocks)


def _shifted(band: Band, by: int) -> Band:
    of = band.of
    if isinstance(of, range):
        of = range(of.start + by, of.stop + by, of.step)
    elif of is not None:
        of = of + by
    return Band(band.start + by, band.stop + by, band.at, of)


def _band(axis: Axis, length: int) -> Band:
    """The range of stored rows or columns that an axis of a parameter of that length takes."""
    at = None if axis.at == 0 and len(axis.of) == length else range(axis.at, axis.stop)
    if isinstance(axis.of, range) and axis.of.step == 1:
        return Band(axis.of.start, axis.of.stop, at)
    return Band(int(min(axis.of)), int(max(axis.of)) + 1, at, axis.of)


def place_vector(parameter: Parameter, slot: Slot, vector: TensorSpec, scale: float) -> AddVector:
    """A vector added to a one-dimensional parameter; `Refused` as `place_factors`."""
    rows = _band(slot.axes[0], parameter.shape[0])
    if rows.of is not None or len(slot.shape) != 1:
        raise _layout_error(parameter, slot)
    return AddVector(vector, scale, rows)


def place_magnitude(
    parameter: Parameter, slot: Slot, factors: Factors, before: tuple[RowEdit, ...]
) -> Decompose:
    """DoRA's rescaling of the parameter's outputs, one magnitude each, after the edits `before`;
    `Refused` as `place_factors`."""
    magnitude, axis = factors.magnitude, int(factors.flip)
    assert magnitude is not None
    if len(parameter.shape) > 2:
        if not parameter.is_full_tensor:
            raise _layout_error(parameter, slot)
        return Decompose(magnitude, Band(0, parameter.shape[0]), False, before)
    outputs, inputs = slot.axes[axis], slot.axes[1 - axis]
    shape = parameter.shape
    if outputs.at != 0 or len(outputs.of) != shape[axis] or len(inputs.of) != shape[1 - axis]:
        raise _layout_error(parameter, slot)  # the norm of a row needs all of it
    rows = _band(outputs, shape[axis])
    by_columns = outputs.axis == 1
    if rows.of is not None or (
        by_columns and not slot.is_full_tensor and slot.shape[1] != len(outputs.of)
    ):
        raise _layout_error(parameter, slot)
    return Decompose(magnitude, rows, by_columns, before)


def place_rows(
    parameter: Parameter, slot: Slot, values: TensorSpec, indices: tuple[int, ...]
) -> ReplaceRows:
    """Trained rows of an embedding; `Refused` as `place_factors`."""
    axis = slot.axes[0]
    if axis.at != 0 or len(slot.shape) != 2 or axis.of != range(parameter.shape[0]):
        raise _layout_error(parameter, slot)
    return ReplaceRows(values, indices, by_columns=axis.axis == 1)


def place_value(parameter: Parameter, slot: Slot, value: TensorSpec) -> tuple[Assign, ...]:
    """A parameter's new value on a stored tensor that has some of its elements; `Refused` as
    `place_factors`."""
    if len(parameter.shape) == 1:
        rows = _band(slot.axes[0], parameter.shape[0])
        return (Assign(value, Block(rows, Band(0, 1)), False),)
    if len(parameter.shape) > 3:
        raise _layout_error(parameter, slot)
    swapped, blocks = _blocks(parameter, slot, stack=len(parameter.shape) == 3)
    return tuple(Assign(value, block, swapped) for block in blocks)


def _layout_error(parameter: Parameter, slot: Slot) -> Refused:
    return Refused(
        f"{shown(parameter.name)} {parameter.shape} is in {shown(slot.key)} {slot.shape} in a "
        "layout that this edit does not support",
        expected="rows and columns of the parameter on rows and columns of the stored tensor",
        where="base",
        hint="save the model once with transformers (from_pretrained, save_pretrained) and use "
        "that as the base",
        code="AK406",
    )


def plan_steps(state: MergeState) -> dict[str, list[Step]]:
    """Steps per output file, in the base's order; new tensors at the end of the last file. Changes
    that cannot be mapped to stored tensors join the job's errors."""
    changed: dict[str, Step] = {}
    for change in state.changes.values():
        for slot in change.parameter.slots:
            with state.errors.collected():
                _place(state, changed, change, slot)
    dtype = dtypes.parse(state.options.dtype) if state.options.dtype else None
    groups: dict[str, list[Step]] = {name: [] for name in state.base.shards}
    obsolete = _obsolete(state) if state.new else set()
    for key, spec in state.base.tensors.items():
        if key in obsolete:
            continue
        step = changed.get(key) or Step(key, spec.dtype, spec.shape, spec)
        groups[spec.file].append(_with_rounding(state, step, dtype))
    last = list(groups)[-1]
    for name, change in state.new.items():
        groups[last].append(_with_rounding(state, _new_step(state, name, change), dtype))
    return {name: steps for name, steps in groups.items() if steps}


def _obsolete(state: MergeState) -> set[str]:
    """Keys of the old head, which the class with a new head no longer has."""
    model = state.names.model
    if model is None or state.config.get("architectures") == state.base.config.get("architectures"):
        return set()
    used = {slot.key for parameter in model.parameters.values() for slot in parameter.slots}
    obsolete = set(state.base.tensors) - used - set(state.changes)
    if obsolete:
        class_name = state.config["architectures"][0]
        state.notes.append(f"dropped, not part of {class_name}: {', '.join(sorted(obsolete))}")
    return obsolete


def _with_rounding(state: MergeState, step: Step, dtype: str | None) -> Step:
    """The step, cast to `dtype` if it has floats; with edits also the width of its arithmetic and
    the draws of its rounding.

    Tensors that are only cast are rounded to nearest, which is closer. Rounded float32 sums differ
    from exact ones in 30 to 60 % of the elements; 16-bit sums in 1e-5. PEFT's are in float32."""
    if dtype is not None and step.dtype in dtypes.FLOATS:
        step = replace(step, dtype=dtype)
    if not step.edits:
        return step
    is_wide = any(name in WIDE for name in _types(state, step))
    step = replace(step, wide=is_wide and state.options.compat is None)
    if state.options.rounding != "stochastic" or not is_rounded(state, step):
        return step
    return replace(step, draws=Draws.of(state.options.seed, step.key))


def is_rounded(state: MergeState, step: Step) -> bool:
    """Return whether a step's edits are written with fewer digits than they are computed with."""
    narrower = dtypes.BITS[step.dtype] < dtypes.BITS[step.source.dtype]
    narrower = narrower or any(name not in WIDE for name in _types(state, step))
    return bool(step.edits) and narrower


def _types(state: MergeState, step: Step) -> tuple[str, ...]:
    """The names of the types in which it is written."""
    weight = state.base.tensors.get(step.key, step.source)
    if state.options.dequantize or not isinstance(weight, QuantizedWeight):
        return (step.dtype,)
    return weight.types_written(state.options.changed_type)


def _place(state: MergeState, steps: dict[str, Step], change: Change, slot: Slot) -> None:
    parameter = change.parameter
    spec = state.base.tensors[slot.key]
    step = steps.get(slot.key) or Step(slot.key, spec.dtype, spec.shape, spec)
    edits: list[RowEdit] = list(step.edits)
    resized = slot
    if change.value is not None:
        if parameter.is_full_tensor:
            value = change.value
            step = replace(
                step,
                source=value,
                shape=value.shape if len(value.shape) == len(spec.shape) else spec.shape,
            )
            resized = identity_slot(slot.key, value.shape)
        else:
            edits += place_value(parameter, slot, change.value)
    if spec.dtype not in dtypes.FLOATS and (edits or change.has_edits):
        raise Refused(
            f"{shown(slot.key)} is {spec.dtype}",
            expected="a float weight",
            where=state.base.name,
            hint="dequantize the base",
            code="AK404",
        )
    steps[slot.key] = _edited(state, step, edits, change, resized)


def _edited(
    state: MergeState, step: Step, edits: list[RowEdit], change: Change, slot: Slot
) -> Step:
    """The step with these edits, then the change's rows, then its additions on the slot, because in
    PEFT a LoRA wraps the rows of the same weight."""
    parameter = change.parameter
    edits = [*edits, *(place_rows(parameter, slot, *rows) for rows in change.rows)]
    edits += [place_vector(parameter, slot, *vector) for vector in change.vectors]
    if state.methods is not None and change.weights:
        edits.append(_combined(state, change, slot, state.methods))
    else:
        edits += (one.edit(weight) for one, weight in change.deltas)
        if state.options.compat == "peft":
            _add_like_peft(state, edits, change, slot, step.dtype)
        elif change.additions:
            _add_factors(edits, change, slot)
    are_stacks = (factors.experts is not None for factors in change.additions)
    # the three axes of a convolution's kernel or of another table are no stack of experts
    is_stack = len(parameter.shape) == 3 and not change.deltas and all(are_stacks)
    has_stack = is_stack and len(slot.shape) in (2, 3) and slot.axes[0].axis is not None
    rows = math.prod(slot.shape[: 2 if has_stack else 1])  # of the stored tensor as a grid
    names = tuple(dict.fromkeys((*step.adapters, *change.adapters)))
    return replace(step, edits=tuple(edits), rows=rows, adapters=names)


def _add_factors(edits: list[RowEdit], change: Change, slot: Slot) -> None:
    """Append the additions' products, then DoRA's rescaling. Neighbors in one stored tensor (q, k,
    v in a fused projection) become one edit, so that one pass is enough."""
    placed = [place_factors(change.parameter, slot, factors) for factors in change.additions]
    if edits and isinstance(last := edits[-1], AddLowRank):
        edits.pop()
        placed = [*last.added, *placed]
    edits.append(AddLowRank(tuple(placed)))
    for factors in change.additions:
        if factors.magnitude is not None:
            edits.append(place_magnitude(change.parameter, slot, factors, tuple(edits)))


def _combined(state: MergeState, change: Change, slot: Slot, methods: "ModuleMethods") -> RowEdit:
    """The edit that adds the method's combination of the change's deltas. Deltas of weight 0 are
    left out unless all have it."""
    placed: dict[int, list[PlacedFactors]] = {}
    for factors in change.additions:
        one = place_factors(change.parameter, slot, factors)
        placed.setdefault(factors.a.folder, []).append(one)
    deltas = [cast("PlacedDelta", one) for one, _ in change.deltas]  # others are refused
    others = {number: one for one in deltas for number in one.folders}
    weights = {n: w for n, w in change.weights.items() if w} or change.weights
    module = change.parameter.name.removesuffix(".weight")
    whole = Block(Band(0, slot.shape[0]), Band(0, math.prod(slot.shape[1:])))
    parts, places, new_part = [], set(), load(MERGES["part"])
    for number, weight in weights.items():
        other, own = others.get(number), tuple(placed.get(number, ()))
        if other is not None and (own or len(other.rows) < change.parameter.shape[0]):
            raise Refused(
                f"{shown(module)}: several parts of {state.adapter(number).name}",
                expected="one delta of each adapter for all of the parameter",
                where=f"--method {methods.method.name}",
                hint="combine the adapters first, and merge the result",
                code="AK406",
            )
        parts.append(new_part(weight, own, other.delta if other else None))
        places |= {(each.blocks, each.factors.flip) for each in own} or {((whole,), False)}
    ((blocks, flip),) = places
    shape = change.additions[0].shape if change.additions else deltas[0].delta.shape
    method = methods.of(module, [number - 1 for number in weights])
    method.check_weights([*weights.values()])
    seed = state.options.seed
    return load(MERGES["combined"])(module, tuple(parts), blocks, flip, shape, method, seed)


def _add_like_peft(
    state: MergeState, edits: list[RowEdit], change: Change, slot: Slot, dtype: str
) -> None:
    """Append the same edits in PEFT's order, with its roundings to `dtype` between them."""
    parameter = change.parameter
    for factors in change.additions:
        placed = place_factors(parameter, slot, factors)
        if factors.magnitude is None:
            edits.append(AddLikePeft((placed,), dtype, _delta_first(state, parameter, factors)))
            continue
        # PEFT takes DoRA's norm from the weight before any merge: W' = g ⊙ (W + Δ), rounded before
        # the next adapter
        delta = AddLowRank((placed,))
        magnitude = place_magnitude(parameter, slot, factors, (delta,))
        edits += [delta, replace(magnitude, of_stored=True), RoundTo(dtype)]


def _delta_first(state: MergeState, parameter: Parameter, factors: Factors) -> bool:
    """Return whether PEFT rounds this kind of delta before it adds it."""
    return (
        factors.kind == "embedding"
        or factors.leaf is not None
        or not parameter.name.endswith(".weight")
        or state.adapter(factors.a.folder).attention(factors) is not None
    )


def _new_step(state: MergeState, name: str, change: Change) -> Step:
    """The step of a tensor that the base does not store: an untied weight, or a head."""
    parameter = change.parameter
    if not parameter.slots:
        assert change.value is not None
        dtype = _usual_dtype(state, change.value.dtype)
        return Step(name, dtype, change.value.shape, change.value, adapters=tuple(change.adapters))
    spec = state.base.tensors[parameter.slots[0].key]
    source = change.value or spec
    change = replace(change, parameter=replace(parameter, shape=source.shape))
    return _edited(
        state,
        Step(name, spec.dtype, source.shape, source),
        [],
        change,
        identity_slot(spec.key, source.shape),
    )


def _usual_dtype(state: MergeState, fallback: str) -> str:
    """The dtype of most of the base's bytes; the fallback if none are floats. For example, a
    float32 head in a bf16 model is loaded as bf16."""
    sizes: dict[str, int] = {}
    for spec in state.base.tensors.values():
        if spec.dtype in dtypes.FLOATS:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else fallback
