"""From changes of parameters to steps: one per stored tensor, in the base's own order."""

from dataclasses import replace

from adapterkit import dtypes
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.plan import Edit, Step
from adapterkit.planning.merge.job import Change, MergeJob
from adapterkit.planning.merge.placement import (
    grid_rows,
    place_factors,
    place_magnitude,
    place_rows,
    place_value,
    place_vector,
)
from adapterkit.tasks.edits import AddLikePeft, AddLowRank, RoundTo
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.slots import Slot, identity_slot


def plan_steps(job: MergeJob) -> dict[str, list[Step]]:
    """Steps per output file, in the base's order; new tensors at the end of the last file. Changes
    that cannot be laid on stored tensors join the job's errors."""
    changed = _changed(job)
    dtype = dtypes.parse(job.options.dtype) if job.options.dtype else None
    groups: dict[str, list[Step]] = {name: [] for name in job.base.shards}
    obsolete = _obsolete(job)
    for key, spec in job.base.tensors.items():
        if key in obsolete:
            continue
        step = changed.get(key) or Step(key, spec.dtype, spec.shape, spec)
        groups[spec.file].append(_with_rounding(job, _cast(step, dtype)))
    last = list(groups)[-1]
    for name, change in job.new.items():
        step = _new_step(job, name, change)
        groups[last].append(_with_rounding(job, _cast(step, dtype)))
    return {name: steps for name, steps in groups.items() if steps}


def _obsolete(job: MergeJob) -> set[str]:
    """Keys that the class with the new head no longer has (the old head)."""
    model = job.names.model
    if model is None or job.config.get("architectures") == job.base.config.get("architectures"):
        return set()
    used = {slot.key for parameter in model.parameters.values() for slot in parameter.slots}
    obsolete = set(job.base.tensors) - used - set(job.changes)
    if obsolete:
        class_name = job.config["architectures"][0]
        job.notes.append(f"dropped, not part of {class_name}: {', '.join(sorted(obsolete))}")
    return obsolete


def _cast(step: Step, dtype: str | None) -> Step:
    if dtype is None or step.dtype not in dtypes.FLOATS:
        return step
    return replace(step, dtype=dtype)


def _with_rounding(job: MergeJob, step: Step) -> Step:
    """The step with the width of its arithmetic and the draws of its rounding, if it has edits.

    Tensors that are only cast are rounded to nearest, which is nearer. Rounded float32 sums differ
    from exact ones in 30 to 60 % of the elements, in 16 bits in 1e-5; PEFT's are in float32."""
    if not step.edits:
        return step
    step = replace(step, wide=not _is_narrow(job, step) and job.options.compat is None)
    if job.options.rounding != "stochastic" or not is_rounded(job, step):
        return step
    return replace(step, draws=Draws.of(job.options.seed, step.key))


def is_rounded(job: MergeJob, step: Step) -> bool:
    """Whether a step's edits are written with fewer digits than they are computed with."""
    narrower = dtypes.BITS[step.dtype] < dtypes.BITS[step.source.dtype]
    return bool(step.edits) and (_is_narrow(job, step) or narrower)


def _is_narrow(job: MergeJob, step: Step) -> bool:
    """Whether it is written in less than 32 bits."""
    quantized = isinstance(step.source, QuantizedWeight) and not job.options.dequantize
    return quantized or dtypes.BITS[step.dtype] < 32


def _changed(job: MergeJob) -> dict[str, Step]:
    """The steps of stored tensors that the job changes, by key."""
    steps: dict[str, Step] = {}
    for change in job.changes.values():
        for slot in change.parameter.slots:
            try:
                _place(job, steps, change, slot)
            except AdapterkitError as error:
                job.errors.append(error)
    return steps


def _place(job: MergeJob, steps: dict[str, Step], change: Change, slot: Slot) -> None:
    parameter = change.parameter
    spec = job.base.tensors[slot.key]
    step = steps.get(slot.key) or Step(slot.key, spec.dtype, spec.shape, spec)
    edits: list[Edit] = list(step.edits)
    resized = slot
    if change.value is not None:
        if parameter.whole:
            value = change.value
            step = replace(
                step,
                source=value,
                shape=value.shape if len(value.shape) == len(spec.shape) else spec.shape,
            )
            resized = identity_slot(slot.key, value.shape)
        else:
            edits += place_value(parameter, slot, change.value)
    if spec.dtype not in dtypes.FLOATS and (edits or change.additions or change.rows):
        raise Refused(
            f"{shown(slot.key)} is {spec.dtype}",
            expected="a float weight",
            where=job.base.name,
            hint="dequantize the base",
        )
    steps[slot.key] = _edited(job, step, edits, change, resized)


def _edited(job: MergeJob, step: Step, edits: list[Edit], change: Change, slot: Slot) -> Step:
    """The step with these edits, then the change's rows, then its additions on the slot: in PEFT a
    LoRA wraps the rows of the same weight."""
    edits = edits + [
        place_rows(change.parameter, slot, values, indices) for values, indices in change.rows
    ]
    edits = _additions(job, edits, change, slot, step.dtype)
    names = tuple(dict.fromkeys((*step.adapters, *change.adapters)))
    rows = grid_rows(slot, change.stack and len(slot.shape) in (2, 3))
    return replace(step, edits=tuple(edits), rows=rows, adapters=names)


def _additions(
    job: MergeJob, edits: list[Edit], change: Change, slot: Slot, dtype: str
) -> list[Edit]:
    """The edits, followed by those of the change's additions."""
    parameter = change.parameter
    if job.options.compat == "peft":
        return _additions_like_peft(edits, change, slot, dtype)
    placed = [
        place_factors(parameter, slot, addition.factors)
        for addition in change.additions
        if addition.factors is not None
    ]
    for addition in change.additions:
        if addition.vector is not None:
            edits.append(place_vector(parameter, slot, addition.vector, addition.scale))
    if placed:
        # neighbors in one stored tensor (q, k, v in a fused projection) share one edit, so one
        # pass
        last = edits[-1] if edits else None
        if isinstance(last, AddLowRank):
            edits.pop()
            placed = [*last.added, *placed]
        edits.append(AddLowRank(tuple(placed)))
    for addition in change.additions:
        if addition.magnitude is not None:
            axis, before = addition.output_axis, tuple(edits)
            edits.append(place_magnitude(parameter, slot, addition.magnitude, axis, before))
    return edits


def _additions_like_peft(edits: list[Edit], change: Change, slot: Slot, dtype: str) -> list[Edit]:
    """The same in PEFT's order, with its roundings to `dtype` between."""
    parameter = change.parameter
    rounded = dtypes.torch_dtype(dtype)
    for addition in change.additions:
        if addition.factors is None:
            assert addition.vector is not None
            edits.append(place_vector(parameter, slot, addition.vector, addition.scale))
            continue
        placed = place_factors(parameter, slot, addition.factors)
        if addition.magnitude is None:
            edits.append(AddLikePeft(placed, rounded, addition.delta_first))
            continue
        # PEFT's DoRA norm is that of the weight before any merge: W' = g ⊙ (W + Δ), rounded before
        # the next adapter
        delta, axis = AddLowRank((placed,)), addition.output_axis
        magnitude = place_magnitude(parameter, slot, addition.magnitude, axis, (delta,))
        edits += [delta, replace(magnitude, of_stored=True), RoundTo(rounded)]
    return edits


def _new_step(job: MergeJob, name: str, change: Change) -> Step:
    """The step of a tensor that the base does not store: an untied weight, or a head."""
    parameter = change.parameter
    if not parameter.slots:
        assert change.value is not None
        dtype = _usual_dtype(job, change.value.dtype)
        return Step(name, dtype, change.value.shape, change.value, adapters=tuple(change.adapters))
    spec = job.base.tensors[parameter.slots[0].key]
    source = change.value or spec
    change = replace(change, parameter=replace(parameter, shape=source.shape))
    return _edited(
        job,
        Step(name, spec.dtype, source.shape, source),
        [],
        change,
        identity_slot(spec.key, source.shape),
    )


def _usual_dtype(job: MergeJob, fallback: str) -> str:
    """The dtype of most of the base's bytes, the fallback if none are floats: a head trained in
    float32 beside a bf16 model is loaded as bf16."""
    sizes: dict[str, int] = {}
    for spec in job.base.tensors.values():
        if spec.dtype in dtypes.FLOATS:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else fallback
