"""Copies of the base's weights that PEFT stores beside the factors of an embedding or head."""

from dataclasses import replace

from adapterkit import dtypes
from adapterkit.adapters.record import EMBEDDINGS, Adapter
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import listed, shown
from adapterkit.planning.adapters.value_comparison import differing_rows, relative_difference
from adapterkit.planning.inputs.earlier_merges import holds, merged_change
from adapterkit.planning.merge.job import MergeJob

ROUNDING = 2.0**-8  # what bf16 adds to the relative change that a receipt tells


def remove_base_copies(job: MergeJob) -> None:
    """Remove the copies of the base's own weights from the job's adapters.

    Copies of other weights are refused, unless the option says which weight counts: the base's
    ("ignore") or the copy ("adapter", as in PEFT)."""
    job.adapters = [replace(adapter, replaced=_trained(job, adapter)) for adapter in job.adapters]


def _trained(job: MergeJob, adapter: Adapter) -> dict[str, TensorSpec]:
    """Those of an adapter's replaced parameters that are no copies of the base's."""
    trained, differing = dict(adapter.replaced), {}
    explained: list[str] = []
    for name, spec in adapter.replaced.items():
        is_copy = name in adapter.copies
        is_automatic = (
            EMBEDDINGS.search(name) and not adapter.saves(name) and not name.endswith("bias")
        )
        if not (is_copy or is_automatic) or not job.is_selected_value(name):
            continue
        parameter = job.names.parameter(name)
        if parameter is None or parameter.shape != spec.shape:
            continue  # another vocabulary
        if not spec.shape or spec.dtype not in dtypes.FLOATS:
            continue  # refused when the file was read
        stored = job.base.tensors[parameter.slots[0].key]
        comparable = (
            parameter.whole and type(stored) is TensorSpec and stored.dtype in dtypes.FLOATS
        )
        count = spec.shape[0]
        if comparable:
            count = differing_rows((adapter.folder, spec), (job.base.folder, stored))
        if count == 0 or (is_copy and job.options.base_copies == "ignore"):
            del trained[name]
        is_told = count and is_copy and comparable and not job.options.base_copies
        if is_told and _is_of_original(job, adapter, spec, stored):
            del trained[name]
            explained.append(spec.key)
        elif count and is_copy:
            differing[spec.key] = (
                f"{count} of {spec.shape[0]} rows differ"
                if comparable
                else "the base's is quantized"
            )
    if explained:
        job.notes.append(
            f"{adapter.name}: {listed(explained)}: weights of the base before what its receipt "
            "says was merged; the base's own count"
        )
    text = ", ".join(f"{shown(key)} ({difference})" for key, difference in differing.items())
    if differing and job.options.base_copies is None:
        job.errors.add(
            f"copies of another base's weights: {text}",
            "the base that the adapter was trained on",
            "if another adapter was merged into BASE, give --base-copies ignore to add to its "
            "weights as they are; --base-copies adapter starts from the copies instead, as PEFT "
            "does",
            where=adapter.label,
        )
    elif differing:
        effect = "ignored" if job.options.base_copies == "ignore" else "replace the base's"
        job.notes.append(f"{adapter.name}: copies of another base's weights {effect}: {text}")
    return trained


def _is_of_original(job: MergeJob, adapter: Adapter, copy: TensorSpec, stored: TensorSpec) -> bool:
    """Whether a copy is of the base before the merges that its receipt tells of: this adapter is
    one of them, or the copy differs by about what the last merge changed."""
    if not job.merged_before:
        return False
    if holds(job.merged_before, adapter):
        return True
    changed = merged_change(job.original.folder, stored.key)
    sides = (job.base.folder, stored), (adapter.folder, copy)
    return changed > 0 and relative_difference(*sides) <= 1.1 * changed + ROUNDING
