"""Compute the factors of the difference of two parameters, or the new parameter in full; then set
ranks and keys."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import factor_keys, value_key
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Change, Effort, Finalize, Task, TaskResult, unchanged
from adapterkit.core.tasks.common import CopiedTensor
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.lowrank import weighted as weighted_kernel
from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.verbs.combine.tasks.truncate import FittedFactors, finalize_by_size
from adapterkit.verbs.shared.options import TruncationOptions
from adapterkit.verbs.shared.statistics_file import read_root, root_memory

BLOCK = 1 << 20  # elements converted to float32 at a time on a CPU


@dataclass(frozen=True)
class DifferenceFactors(FittedFactors):
    """Factors of one weight's difference between both sides; for a stack of experts, of each
    matrix."""

    module: str
    old: StoredParameter = field(metadata=READ)
    new: StoredParameter = field(metadata=READ)
    transposed: bool
    target: str  # its name in PEFT's config

    def with_keys(self, wrappers: Mapping[str, int], depth: int) -> DifferenceFactors:
        """A copy with keys as deep as they can become, `depth` among those of its module."""
        a_key, b_key = factor_keys(self.module, wrappers, depth)
        return replace(self, place=replace(self.place, a_key=a_key, b_key=b_key))

    @property
    def _shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        return self.place.out, math.prod(self.place.a_tail)

    @property
    def full_rank(self) -> int:
        return min(self._shape)

    @property
    def effort(self) -> Effort:
        root = 0 if self.covariance is None else self.covariance.shape[0]
        weighted = Effort(flops=2 * self.place.out * root**2, wide=root**3)
        return weighted + self.decomposition(self.max_rank)

    @property
    def memory(self) -> int:
        """Bytes of one matrix' difference, the vectors of its decomposition or a product of its
        short side, and the factors; with statistics also its outputs and the root."""
        size, short_side = math.prod(self._shape), min(self._shape)
        factors = sum(4 * math.prod(stored.shape) for stored in self.max_outputs)
        plain = 8 * size + 32 * min(short_side**2, size) + 2 * factors + 32 * BLOCK
        if self.covariance is None:
            return plain
        return plain + 8 * size + 3 * factors + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        differences = (_difference(old, new, inputs) for old, new in self._matrices())
        damping: dict[str, float] = {}
        decompositions: list[weighted_kernel.Decomposition | None] = []
        for delta in differences:
            if delta is None or not bool(delta.any()):
                decompositions.append(None)
                continue
            root, damping = read_root(inputs, self.covariance)
            decompositions.append(self._decompose(delta, root))
        if all(one is None for one in decompositions):
            return TaskResult({}, {"unchanged": True})
        out, width = self._shape
        zeros = partial(torch.zeros, device=inputs.device)
        zero = Svd(zeros(out, 1), zeros(1), zeros(1, width))
        return self.fit(
            [one or weighted_kernel.Decomposition(zero, 0.0) for one in decompositions], damping
        )

    def _matrices(self) -> Iterator[tuple[StoredParameter, StoredParameter]]:
        """Yield both sides of each matrix."""
        if self.place.experts is None:
            yield self.old, self.new
        for i in range(self.place.experts or 0):
            yield self.old.expert(i), self.new.expert(i)

    def _decompose(self, delta: Tensor, root: Tensor | None) -> weighted_kernel.Decomposition:
        delta = delta.T if self.transposed else delta.reshape(self._shape)
        energy, ratio = self.truncation.energy, self.truncation.sv_ratio
        return weighted_kernel.decompose_dense(delta, self.max_rank, energy, ratio, root=root)


@dataclass(frozen=True)
class WholeParameter(Task):
    """One parameter's value, assembled if it is stored in parts or inside another tensor."""

    parameter: str
    value: StoredParameter = field(metadata=READ)
    key: str
    only_with_factors: bool = False  # written only if its layer has factors

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(self.key, dtypes.name_of(self.value.widest), self.value.shape),)

    @property
    def memory(self) -> int:
        return 2 * sum(spec.nbytes for spec in self.value.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        if self.value.is_one_tensor:
            copy = CopiedTensor(self.name, self.value.specs[0], self.key, checked=True)
            return copy.compute(inputs)
        tensor = self.value.native(inputs.view(None).tensor).contiguous()
        return TaskResult({self.key: tensor}, {"taken": True})


def _difference(old: StoredParameter, new: StoredParameter, inputs: Reader) -> Tensor | None:
    """new - old in float32, a block of rows at a time; None if both store the same, or one is the
    other's rounding."""
    each = piece(inputs.device, BLOCK)
    blocks = new.row_ranges(each)
    blocks = blocks if len(old.row_ranges(each)) == len(blocks) else [(0, new.shape[0])]
    pieces = [(first, old.rows(first, last), new.rows(first, last)) for first, last in blocks]
    if _same_bytes(old, new, pieces, inputs) or _is_rounding(old, new, pieces, inputs):
        return None
    delta: Tensor | None = None
    for first, before, after in pieces:
        part = after.read(inputs).sub_(before.read(inputs))
        if len(pieces) == 1:
            return part
        delta = part.new_empty(new.shape) if delta is None else delta
        delta[first : first + len(part)] = part
    return delta


Pieces = list[tuple[int, StoredParameter, StoredParameter]]


def _same_bytes(old: StoredParameter, new: StoredParameter, pieces: Pieces, inputs: Reader) -> bool:
    """True if both sides store the same bytes, compared before any conversion."""
    if not old.same_storage(new):
        return False
    pairs = (
        (a, b)
        for _, before, after in pieces
        for a, b in zip(before.specs, after.specs, strict=True)
    )
    return all(inputs.bytes(a) == inputs.bytes(b) for a, b in pairs)


def _is_rounding(
    old: StoredParameter, new: StoredParameter, pieces: Pieces, inputs: Reader
) -> bool:
    """True if one side is the rounding of the other."""
    if old.dtypes == new.dtypes or len(old.dtypes) > 1 or len(new.dtypes) > 1:
        return False
    (first,), (second,) = (
        {dtypes.torch_dtype(name) for name in side.dtypes} for side in (old, new)
    )
    down = up = True
    for _, before, after in pieces:
        a, b = before.read(inputs), after.read(inputs)
        down = down and torch.equal(a.to(second), b.to(second))
        up = up and torch.equal(b.to(first), a.to(first))
        if not down and not up:
            return False
    return True


def finalize_extraction(
    truncation: TruncationOptions, tasks: Sequence[Task], made_for: str
) -> Finalize | None:
    """Give each module its share of the size, and keys that depend on which modules have factors.

    PEFT wraps a module with factors, and names the inner module `base_layer`; it wraps a module's
    parameters in their order, so that the last one's wrapper is the outermost."""
    by_size = finalize_by_size(truncation, tasks, made_for) if truncation.max_size else None
    targets = Counter(task.module for task in tasks if isinstance(task, DifferenceFactors))
    if all(_has_fixed_keys(task, targets) for task in tasks):
        return by_size
    return partial(_finalize_keys, by_size, tasks)


def _finalize_keys(
    by_size: Finalize | None, tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    changes = by_size(metrics) if by_size else [unchanged] * len(tasks)
    wrappers = Counter(
        task.module
        for task, metric in zip(tasks, metrics, strict=True)
        if isinstance(task, DifferenceFactors) and "rank" in metric
    )
    depths: Counter[str] = Counter()  # wrappers around the module's next factors
    last_first = []
    for task, metric, change in reversed(list(zip(tasks, metrics, changes, strict=True))):
        if isinstance(task, DifferenceFactors) and "rank" in metric:
            keys = factor_keys(task.module, wrappers, depths[task.module])
            renamed = dict(zip((task.place.a_key, task.place.b_key), keys, strict=True))
            change = partial(_rename, change, renamed)
            depths[task.module] += 1
        elif isinstance(task, WholeParameter):
            lone = task.only_with_factors and not wrappers[task.parameter.rpartition(".")[0]]
            key = value_key(task.parameter, wrappers)
            change = _drop if lone else partial(_rename, change, {task.key: key})
        last_first.append(change)
    return last_first[::-1]


def _has_fixed_keys(task: Task, targets: Mapping[str, int]) -> bool:
    """True if a task's keys do not depend on which of the modules `targets` have factors."""
    if isinstance(task, DifferenceFactors):
        around = prefixes(task.module)[:-1]
        return targets[task.module] == 1 and not any(path in targets for path in around)
    if isinstance(task, WholeParameter):
        return not any(path in targets for path in prefixes(task.parameter))
    return True


def _drop(result: TaskResult) -> TaskResult:
    return TaskResult({}, {})


def _rename(change: Change, keys: dict[str, str], result: TaskResult) -> TaskResult:
    result = change(result)
    tensors = {keys[key]: tensor for key, tensor in result.tensors.items()}
    return TaskResult(tensors, result.metrics)


def prefixes(path: str) -> list[str]:
    """The modules of a dotted path, from the outermost to the path itself."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
