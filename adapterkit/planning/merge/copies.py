"""Copies of the base's weights that PEFT stores beside the factors of an embedding or head."""

from dataclasses import replace

from adapterkit import dtypes
from adapterkit.adapters.record import EMBEDDINGS, Adapter
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.planning.merge.job import Job
from adapterkit.planning.rows import rows_apart


def settle_copies(job: Job) -> None:
    """Take the copies of the base's own weights out of the job's adapters; those of other weights are refused, unless the options
    say which weight counts: the base's ("ignore") or the copy ("adapter", as in PEFT)."""
    job.adapters = [replace(adapter, replaced=_trained(job, adapter)) for adapter in job.adapters]


def _trained(job: Job, adapter: Adapter) -> dict[str, TensorSpec]:
    """What of an adapter's replaced parameters is no copy of the base's."""
    kept, differing = dict(adapter.replaced), {}
    for name, spec in adapter.replaced.items():
        beside = name in adapter.copies
        unasked = EMBEDDINGS.search(name) and not adapter.saves(name) and not name.endswith("bias")
        parameter = job.names.parameter(name) if (beside or unasked) and job.takes(name) else None
        if (
            parameter is None
            or parameter.shape != spec.shape
            or not spec.shape
            or spec.dtype not in dtypes.FLOATS
        ):
            continue  # another vocabulary: no copy; what is no float weight was refused with the file
        stored = job.base.tensors[parameter.slots[0].key]
        comparable = (
            parameter.whole and type(stored) is TensorSpec and stored.dtype in dtypes.FLOATS
        )
        count = (
            rows_apart((adapter.folder, spec), (job.base.folder, stored))
            if comparable
            else spec.shape[0]
        )
        if count == 0 or (beside and job.options.base_copies == "ignore"):
            del kept[name]
        if count and beside:
            differing[spec.key] = (
                f"{count} of {spec.shape[0]} rows differ"
                if comparable
                else "the base's is quantized"
            )
    text = ", ".join(f"{shown(key)} ({how})" for key, how in differing.items())
    if differing and job.options.base_copies is None:
        job.errors.append(
            Refused(
                f"copies of another base's weights: {text}",
                expected="the base that the adapter was trained on",
                where=adapter.label,
                hint="if another adapter was merged into BASE, give --base-copies ignore to add to its weights as they are; "
                "--base-copies adapter starts from the copies instead, as PEFT does",
            )
        )
    elif differing:
        whose = (
            "left out" if job.options.base_copies == "ignore" else "taken in place of the base's"
        )
        job.notes.append(f"{adapter.name}: copies of another base's weights {whose}: {text}")
    return kept
