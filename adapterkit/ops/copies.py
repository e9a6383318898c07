"""Copies of the base's weights that PEFT stores beside the factors of an adapted embedding or head (`base_layer.weight`).

PEFT puts them in place of the base's own on loading. Of the base that the adapter was trained on that changes nothing; of another
one, or of one that an adapter was merged into since, it undoes what was merged.
"""

import math
from dataclasses import replace

from adapterkit import dtypes
from adapterkit.adapter import EMBEDDINGS, Adapter
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.ops.job import Job

BLOCK = 4 << 20  # elements compared at a time


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
                where=adapter.given,
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


def rows_apart(one: tuple[Folder, TensorSpec], other: tuple[Folder, TensorSpec]) -> int:
    """In how many rows two stored tensors of one shape differ, once the wider is rounded to the other's dtype."""
    shape = one[1].shape
    width = math.prod(shape[1:])
    if not width:
        return 0
    step = max(1, BLOCK // width)
    apart = [0, 0]
    for first in range(0, shape[0], step):
        a, b = (
            _rows(folder, spec, first, min(first + step, shape[0]), width)
            for folder, spec in (one, other)
        )
        for i, unequal in enumerate((a != b.to(a.dtype), b != a.to(b.dtype))):
            apart[i] += int(unequal.any(1).sum())
    return min(apart)


def _rows(folder: Folder, spec: TensorSpec, first: int, stop: int, width: int):
    import torch

    size = dtypes.size(spec.dtype, width)
    data = folder.read(spec.file, spec.start + first * size, spec.start + stop * size)
    return torch.frombuffer(bytearray(data), dtype=dtypes.torch_dtype(spec.dtype)).view(
        stop - first, width
    )
