"""What an adapter's factors do: norms and effective ranks of its deltas, and their size beside the base's weights.

`b @ a` is never multiplied out, the base is read some rows at a time, and what is wrong with a tensor is noted, not raised.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.record import Adapter, Lora
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, shown
from adapterkit.kernels import lowrank
from adapterkit.kernels.sums import all_finite, squared_norm
from adapterkit.plan import Progress
from adapterkit.planning.merge.changes import collect
from adapterkit.planning.merge.job import Job, Options
from adapterkit.weights.detect import check_not_quantized
from adapterkit.weights.parameters import Parameter
from adapterkit.weights.slots import Slot

BLOCK = 4 << 20  # bytes that are read at a time, of all but factors


@dataclass
class Join:
    """The base that an adapter is laid on, and where each of its modules, told by (module, depth), lies in it."""

    base: Checkpoint
    parameters: dict[tuple[str, int], Parameter] = field(default_factory=dict)
    experts: dict[tuple[str, int], int | None] = field(default_factory=dict)


def join(adapter: Adapter, on: Folder, problems: list[AdapterkitError]) -> Join:
    """Lay the adapter on the base as a merge would; what a merge refuses of the adapter becomes a problem."""
    base = open_checkpoint(on)
    check_not_quantized(base)
    job = Job(
        base, [adapter], [1.0], Options(expert_layout="peft-0.19")
    )  # a norm is the same in either layout
    collect(job)
    problems += job.errors
    problems += [Refused(note, where=adapter.label) for note in job.notes]
    found = Join(job.base)
    for change in job.changes.values():
        for part in change.parts:
            if part.product is not None:
                at = part.lora.module, part.lora.depth
                found.parameters[at], found.experts[at] = change.parameter, part.product.experts
    return found


@torch.inference_mode()
def read_factors(
    adapter: Adapter,
    modules: list[
        dict[str, Any]
    ],  # one for each of the adapter's loras, in their order; filled in here
    joined: Join | None,
    problems: list[AdapterkitError],
    progress: Progress,
) -> None:
    """Fill in what the factors say, one module at a time; the other tensors are looked at for NaN and infinity only."""
    parameters = joined.parameters if joined is not None else {}
    total = sum(spec.nbytes for spec in adapter.tensors.values())
    if joined is not None:
        total += sum(
            joined.base.tensors[slot.key].nbytes for p in parameters.values() for slot in p.slots
        )
    getattr(progress, "expect", lambda total: None)(total)
    factors = {spec.key for lora in adapter.loras for spec in (lora.a, lora.b)}
    base = joined.base.folder if joined is not None else adapter.folder
    with Sources((base, adapter.folder), {}) as sources:
        for lora, module in zip(adapter.loras, modules, strict=True):
            module |= _statistics(lora, module, sources, problems)
            progress(lora.a.nbytes + lora.b.nbytes)
            parameter = parameters.get((lora.module, lora.depth))
            if joined is not None and parameter is not None and module["norm"] is not None:
                whole = _norm(joined.base, parameter, sources, problems, progress)
                module["relative"] = finite(module["norm"] / whole) if whole else None
        for spec in adapter.tensors.values():
            if spec.key not in factors and spec.dtype in dtypes.FLOATS:
                _check_values(spec, sources, problems, progress)


def _statistics(
    lora: Lora, module: dict[str, Any], sources: Sources, problems: list[AdapterkitError]
) -> dict[str, Any]:
    """trained, norm and effective_rank, as far as the factors have them."""
    a, b = _matrix(lora.a, sources), _matrix(lora.b, sources)
    found: dict[str, Any] = {"trained": bool((b != 0).any())}
    bad = {
        spec.key: count
        for spec, factor in ((lora.a, a), (lora.b, b))
        if (count := int((~factor.isfinite()).sum()))
    }
    problems += [_not_finite(lora.a.file, key, f"{count} values") for key, count in bad.items()]
    if a.shape[0] != b.shape[1]:
        problems.append(_unlike(lora))
    elif not bad:
        sizes = [
            float(factor.abs().max()) or 1.0 for factor in (a, b)
        ]  # set apart: their product may leave float64's range
        values = _singular_values(a / sizes[0], b / sizes[1], module["experts"] or 1)
        ranks = [effective_rank(s) for s in values if bool(s.any())]
        found["effective_rank"] = sum(ranks) / len(ranks) if ranks else 0.0
        if module["scale"] is not None:
            norm = (
                float(torch.linalg.vector_norm(torch.cat(values)))
                * sizes[0]
                * sizes[1]
                * abs(module["scale"])
            )
            found["norm"] = finite(norm)
            problems += [] if math.isfinite(norm) else [_too_large(lora)]
    return found


def _singular_values(
    a: Tensor,  # (experts * r, in) float64, the expert slowest
    b: Tensor,  # (out, r * experts) float64, the expert fastest
    experts: int,
) -> list[Tensor]:
    """Singular values of each expert's b @ a, in PEFT's layout of a stack."""
    right, left = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
    return [lowrank.svd(lowrank.Product(left[:, :, i], right[i])).s for i in range(experts)]


def effective_rank(s: Tensor) -> float:
    """exp(-Σ p log p) with p = s² / Σ s², for `s` that are not all zero (Roy and Vetterli 2007, who take s in place of s²)."""
    p = (s / s.max()).square()
    p = p[p > 0] / p.sum()
    return float((-(p * p.log()).sum()).exp())


def _matrix(spec: TensorSpec, sources: Sources) -> Tensor:
    """A stored factor as a float64 matrix: a convolution's axes after the first are one."""
    stored = torch.frombuffer(sources.read(spec), dtype=dtypes.torch_dtype(spec.dtype))
    return stored.double().view(spec.shape[0], -1)


def _unlike(lora: Lora) -> AdapterkitError:
    return Damaged(
        f"factors of {shown(lora.module)} with shapes {lora.a.shape} and {lora.b.shape}",
        expected="as many columns of b as rows of a",
        where=lora.a.file,
        hint="save the adapter again (of a grouped convolution: such factors cannot be read here)",
    )


def _too_large(lora: Lora) -> AdapterkitError:
    found = f"the delta of {shown(lora.module)} is larger than any number of float64"
    return Damaged(
        found,
        expected="finite values",
        where=lora.a.file,
        hint="the training run diverged: use an earlier save",
    )


def _not_finite(file: str, key: str, what: str) -> AdapterkitError:
    return Damaged(
        f"{what} that are not finite (NaN or infinity)",
        expected="finite values",
        where=f"{file}: {shown(key)}",
        hint="the training run diverged: use an earlier save",
    )


def _check_values(
    spec: TensorSpec, sources: Sources, problems: list[AdapterkitError], progress: Progress
) -> None:
    for start in range(0, spec.nbytes, BLOCK):
        data = bytearray(min(BLOCK, spec.nbytes - start))
        sources.read_into(spec, start, memoryview(data))
        progress(len(data))
        if not all_finite(torch.frombuffer(data, dtype=dtypes.torch_dtype(spec.dtype))):
            problems.append(_not_finite(spec.file, spec.key, "values"))
            return


def _norm(
    base: Checkpoint,
    parameter: Parameter,
    sources: Sources,
    problems: list[AdapterkitError],
    progress: Progress,
) -> float | None:
    """‖W‖_F of a parameter, wherever its parts are stored; None, and a problem, where it is no number to divide by."""
    packed = next(
        (slot.key for slot in parameter.slots if base.tensors[slot.key].dtype not in dtypes.FLOATS),
        None,
    )
    if packed is not None:
        found = f"{shown(packed)} is {base.tensors[packed].dtype}"
        problems.append(
            Refused(found, expected="a float weight", where=base.name, hint="dequantize the base")
        )
        return None
    total = sum(
        _squares(base.tensors[slot.key], slot, sources, progress) for slot in parameter.slots
    )
    if total and math.isfinite(total):
        return math.sqrt(total)
    found = f"the norm of {shown(parameter.name)} is {'not finite' if total else 'zero'}"
    problems.append(
        Damaged(found, expected="a weight to compare with", where=base.name, hint="check the base")
    )
    return None


def _squares(spec: TensorSpec, slot: Slot, sources: Sources, progress: Progress) -> float:
    """Σ w² over the positions of one slot, some rows of the stored tensor at a time."""
    picked = {
        axis.axis: torch.as_tensor(list(axis.of)) for axis in slot.axes if axis.axis is not None
    }
    rows, rest, total = picked.pop(0), slot.shape[1:], 0.0
    width = dtypes.size(spec.dtype, math.prod(rest))
    step, stop = max(1, BLOCK // max(width, 1)), int(rows.max()) + 1
    for first in range(int(rows.min()), stop, step):
        last = min(first + step, stop)
        data = bytearray((last - first) * width)
        sources.read_into(spec, first * width, memoryview(data))
        progress(len(data))
        block = torch.frombuffer(data, dtype=dtypes.torch_dtype(spec.dtype)).view(
            last - first, *rest
        )
        here = rows[(rows >= first) & (rows < last)] - first
        block = block if len(here) == len(block) else block[here]
        for axis, of in picked.items():
            block = block if len(of) == block.shape[axis] else block.index_select(axis, of)
        total += squared_norm(block)
    return total


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
