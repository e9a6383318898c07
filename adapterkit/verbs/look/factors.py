"""Norms and effective ranks of an adapter's deltas, and the norms relative to the base's weights.

`b @ a` is never multiplied out and the base is read by blocks of rows. Errors of a tensor join the
problems and are not raised."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterkit.core import dtypes
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import (
    WARNING,
    AdapterkitError,
    Damaged,
    Problems,
    Refused,
    listed,
    shown,
)
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress, expect
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.core.weights.parameters import Parameter, Slot
from adapterkit.core.weights.reader import Reader
from adapterkit.doors import ADAPTERS
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.sums import all_finite, squared_norm
from adapterkit.verbs.look.heatmaps import module_label

BLOCK = 4 << 20  # bytes of a base's weight that are read at a time
CHECK_BASE = "check the base"
NOT_FINITE = "values that are not finite (NaN or infinity)"
LEAST = 1 / 8  # of an axis: smaller blocks may be heads or neurons that nothing used
ROWS = "rows of b"
SHARES = {1 / 2: "half", 1 / 4: "a quarter", 3 / 4: "three quarters"}
# fused modules: training may have left out the rows, or columns, of one of several
FUSED = re.compile(
    r"qkv|gate_up|query_key_value|c_attn|in_proj|W_pack|kv_proj|to_kv|experts|linear[12]$", re.I
)


@dataclass
class LostShards:
    """Detect factors that were saved without one process's share: most modules have a block of
    zeros. `blocks`: those modules, and the first and last of their zeros, of how many and what."""

    trained: int = 0
    blocks: dict[str, tuple[int, int, int, str]] = field(default_factory=dict)

    def record_factors(self, lora: Lora, a: Tensor, b: Tensor) -> None:
        """Check a (rank, in) and b (out, rank) of a module. Embeddings are skipped because most
        tokens are not seen, and zero b because nothing was trained."""
        if lora.kind == "embedding" or not b.any():
            return
        self.trained += 1
        for what, zero in (("columns of a", (a == 0).all(0)), (ROWS, (b == 0).all(1))):
            places = zero.nonzero().flatten().tolist()
            is_block = bool(places) and places[-1] - places[0] + 1 == len(places)
            if is_block and len(places) >= LEAST * len(zero):
                self.blocks[lora.module] = places[0], places[-1], len(zero), what

    def problem(self, folder: Folder) -> Refused | None:
        """The problem if most of the trained modules have such a block, and not only fused ones."""
        count, blocks = len(self.blocks), self.blocks
        if count < max(2, self.trained / 2) or all(map(FUSED.search, blocks)):
            return None
        some = [
            f"{shown(name)} {i} to {j} of {n} {what}" for name, (i, j, n, what) in blocks.items()
        ]
        return Refused(
            f"{self._share()}: {listed(some)}",
            expected="complete factors: a save that loses the shard of a process leaves such zeros",
            where=folder.label,
            hint=load(ADAPTERS["how to join"])(folder),
            code="AK302",
        )

    def _share(self) -> str:
        """The zeros in words: one share of all b, or a count of modules."""
        found = list(self.blocks.values())
        for share, name in SHARES.items() if len(found) == self.trained else ():
            near = (abs(last - first + 1 - share * size) < 1 for first, last, size, _ in found)
            if all(near) and all(what == ROWS for *_, what in found):
                return f"{name} of the rows of every b are zero"
        return f"{len(found)} of {self.trained} trained modules have a block of zeros"


def lost_shards(adapter: Adapter) -> list[str]:
    """The warning of a merge of an adapter that lost a process's share."""
    lost = LostShards()
    with Sources((adapter.folder,) * (adapter.number + 1), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=False)
        for lora in adapter.loras:
            lost.record_factors(lora, *(reader.tensor(x).flatten(1) for x in (lora.a, lora.b)))
    if (problem := lost.problem(adapter.folder)) is None:
        return []
    hint = problem.hint.partition("\n")[0]  # the receipt has this text, and no paths of a machine
    return [f"{WARNING}{adapter.name}: {problem.problem}; {hint}"]


def read_factors(
    adapter: Adapter,
    modules: list[Json],  # of the adapter's loras, in their order; changed in place
    base: Checkpoint | None,
    parameters: Mapping[tuple[str, int], Parameter],  # of the base, by module and depth
    problems: Problems,
    progress: Progress,
    spectra: dict[str, Tensor] | None = None,
) -> None:
    """Add the statistics of the factors to `modules`; check all other tensors for NaN and infinity.
    `spectra` gets the singular values of scale * b @ a by the module's label; for a stack, the root
    mean square over the experts."""
    total = sum(spec.nbytes for spec in adapter.tensors.values())
    if base is not None:
        slots = (slot for parameter in parameters.values() for slot in parameter.slots)
        total += sum(base.tensors[slot.key].nbytes for slot in slots)
    expect(progress, total)
    factors = {spec.key for lora in adapter.loras for spec in (lora.a, lora.b)}
    lost = LostShards()
    first = adapter.folder if base is None else base.folder
    with Sources((first, adapter.folder), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=False)
        for lora, module in zip(adapter.loras, modules, strict=True):
            statistics, spectrum = _statistics(lora, module, reader, problems, lost)
            module |= statistics
            if spectra is not None and spectrum is not None:
                spectra[module_label(module)] = spectrum
            progress(lora.a.nbytes + lora.b.nbytes)
            parameter = parameters.get((lora.module, lora.depth))
            if base is not None and parameter is not None and module["norm"] is not None:
                norm = _weight_norm(base, parameter, reader, problems, progress)
                module["relative"] = finite(module["norm"] / norm) if norm else None
        for spec in adapter.tensors.values():
            if spec.key not in factors and spec.dtype in dtypes.FLOATS:
                _check_values(spec, reader, problems, progress)
    if (problem := lost.problem(adapter.folder)) is not None:
        problems.append(problem)


def _statistics(
    lora: Lora, module: Json, reader: Reader, problems: Problems, lost: LostShards
) -> tuple[Json, Tensor | None]:
    """trained, and effective_rank and norm if the factors are finite and fit each other; then also
    their singular values."""
    a, b = (reader.tensor(spec).double().flatten(1) for spec in (lora.a, lora.b))
    statistics: Json = {"trained": bool((b != 0).any())}
    bad = {
        spec.key: count
        for spec, factor in ((lora.a, a), (lora.b, b))
        if (count := int((~factor.isfinite()).sum()))
    }
    problems += [
        _not_finite(f"{count} {NOT_FINITE}", f"{lora.a.file}: {shown(key)}")
        for key, count in bad.items()
    ]
    if a.shape[0] != b.shape[1]:
        problems.add(
            f"factors of {shown(lora.module)} with shapes {lora.a.shape} and {lora.b.shape}",
            "as many columns of b as rows of a",
            "save the adapter again (factors of a grouped convolution cannot be read here)",
            where=lora.a.file,
            kind=Damaged,
            code="AK202",
        )
        return statistics, None
    if bad:
        return statistics, None
    lost.record_factors(lora, a, b)
    # scaled separately: the product may exceed float64's range
    sizes = [float(factor.abs().max()) or 1.0 for factor in (a, b)]
    products = algebra.products_of(a / sizes[0], b / sizes[1], module["experts"] or 1)
    spectra = [algebra.svd(product).s for product in products]
    ranks = [effective_rank(s) for s in spectra if bool(s.any())]
    statistics["effective_rank"] = sum(ranks) / len(ranks) if ranks else 0.0
    if module["scale"] is not None:
        norm = float(torch.linalg.vector_norm(torch.cat(spectra)))
        norm *= sizes[0]
        norm *= sizes[1]
        norm *= abs(module["scale"])
        statistics["norm"] = finite(norm)
        if not math.isfinite(norm):
            problem = f"the delta of {shown(lora.module)} is larger than any number of float64"
            problems.append(_not_finite(problem, lora.a.file))
    spectrum = torch.stack(spectra).square().mean(0).sqrt() * sizes[0] * sizes[1]
    spectrum *= abs(module["scale"] or 1.0)
    return statistics, spectrum if all_finite(spectrum) else None


def effective_rank(s: Tensor) -> float:
    """exp(-Σ p log p) with p = s² / Σ s², for `s` that are not all zero.

    Roy and Vetterli 2007, who use s instead of s²."""
    p = (s / s.max()).square()
    p = p[p > 0] / p.sum()
    return float((-(p * p.log()).sum()).exp())


def _not_finite(problem: str, where: str) -> AdapterkitError:
    """The problem of a tensor, or a delta, with values that training does not produce."""
    hint = "the training run diverged: use an earlier save"
    return Damaged(problem, expected="finite values", where=where, hint=hint, code="AK208")


def _check_values(spec: TensorSpec, reader: Reader, problems: Problems, progress: Progress) -> None:
    for _, values in reader.blocks(spec, (math.prod(spec.shape), 1)):
        progress(values.nbytes)
        if not all_finite(values):
            where = f"{spec.file}: {shown(spec.key)}"
            problems.append(_not_finite(NOT_FINITE, where))
            return


def _weight_norm(
    base: Checkpoint, parameter: Parameter, reader: Reader, problems: Problems, progress: Progress
) -> float | None:
    """‖W‖_F of a parameter; None, with a problem, where it is zero, not finite or not floats."""
    specs = [base.tensors[slot.key] for slot in parameter.slots]
    packed = next((spec for spec in specs if spec.dtype not in dtypes.FLOATS), None)
    if packed is not None:
        problem = f"{shown(packed.key)} is {packed.dtype}"
        problems.add(
            problem, "a float weight", "dequantize the base", where=base.name, code="AK202"
        )
        return None
    pairs = zip(specs, parameter.slots, strict=True)
    total = sum(_sum_of_squares(spec, slot, reader, progress) for spec, slot in pairs)
    if total and math.isfinite(total):
        return math.sqrt(total)
    problem = f"the norm of {shown(parameter.name)} is {'not finite' if total else 'zero'}"
    problems.add(
        problem, "a weight to compare with", CHECK_BASE, where=base.name, kind=Damaged, code="AK202"
    )
    return None


def _sum_of_squares(spec: TensorSpec, slot: Slot, reader: Reader, progress: Progress) -> float:
    """Σ w² over the positions of one slot, by blocks of rows of the stored tensor."""
    positions = {
        axis.axis: torch.as_tensor(list(axis.of)) for axis in slot.axes if axis.axis is not None
    }
    rows, rest, total = positions.pop(0), slot.shape[1:], 0.0
    width = dtypes.size(spec.dtype, math.prod(rest))
    step, stop = max(1, BLOCK // max(width, 1)), int(rows.max()) + 1
    for first in range(int(rows.min()), stop, step):
        last = min(first + step, stop)
        block = reader.rows(spec, (slot.shape[0], math.prod(rest)), first, last)
        block = block.view(last - first, *rest)
        progress((last - first) * width)
        here = rows[(rows >= first) & (rows < last)] - first
        block = block if len(here) == len(block) else block[here]
        for axis, of in positions.items():
            block = block if len(of) == block.shape[axis] else block.index_select(axis, of)
        total += squared_norm(block)
    return total


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
