"""LoftQ (arXiv:2310.08659): quantize a weight together with factors that compensate its error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Change, Effort, Finalize, Task, TaskResult
from adapterkit.core.tasks.common import FactorsTask, RankedFactors, decomposition
from adapterkit.core.tasks.handoff import handoff_keys, handoff_of
from adapterkit.core.tasks.metrics import short
from adapterkit.core.tasks.quantize import PackedWeight
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import subspace, weighted
from adapterkit.kernels.lowrank.algebra import Svd, balanced_factors
from adapterkit.kernels.sums import norm, squared_norm
from adapterkit.verbs.shared.statistics_file import read_root, root_memory

# share of a squared norm below which the rest of it is computed from the matrices: a difference
# would cancel
CANCELLATION = 1e-3
Accept = Callable[[str, Tensor, Tensor], bool]  # (module, a, b) -> whether to keep its factors


@dataclass(frozen=True)
class LoftQWeight(PackedWeight):
    """A weight quantized together with factors that compensate its error; the factors are passed on
    to the adapter's file."""

    module: str
    rank: int  # padded with zeros where the weight has fewer
    scale: float
    iterations: int
    transposed: bool
    covariance: TensorSpec | None = field(default=None, metadata=READ)

    @property
    def handoff_writes(self) -> tuple[str, ...]:
        return handoff_keys(self.module)

    @property
    def effort(self) -> Effort:
        out, width = self.source.shape
        return self.iterations * (super().effort + decomposition(out, width, self.rank))

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.packed.shape) + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        root, damping = read_root(inputs, self.covariance)
        best = alternate(weight, self.packed, self.rank, self.iterations, self.transposed, root)
        out, width = weight.shape[::-1] if self.transposed else weight.shape
        zero = Svd(weight.new_zeros(out, 1), weight.new_zeros(1), weight.new_zeros(1, width))
        a, b = balanced_factors(best.svd or zero, self.rank, self.scale)
        metrics = {
            "error": short(best.before),
            "error_after": short(best.after),
            "iterations": best.number,
            **damping,
        }
        return TaskResult(best.stored, metrics, handoff_of(self.module, a, b))


@dataclass
class Round:
    """One round of LoftQ: the stored tensors of Q, the triplets of scale·b@a, and the errors before
    and after, relative to W's norm."""

    number: int
    stored: dict[str, Tensor]
    svd: Svd | None
    before: float
    after: float


def alternate(
    weight: Tensor,
    packed: QuantizedWeight,
    rank: int,
    iterations: int,
    transposed: bool = False,
    root: Tensor | None = None,
) -> Round:
    """The best of `iterations` rounds of Q = encode(W - L), L = the best approximation of W - Q of
    that rank; round 0 is L = 0.

    With `root` (in, in), norms are those of W·root. `transposed`: the weight is (in, out).
    """
    size = norm(_weighted(weight.T if transposed else weight, root)) or 1.0
    best: Round | None = None
    low: Tensor | None = None
    leading: Svd | None = None  # of the last errors
    for number in range(1, iterations + 1):
        stored = packed.encode(weight if low is None else torch.sub(weight, low, out=low))
        rest = decode_checked(packed, stored)
        # in its memory: to allocate a weight costs more than to subtract it
        torch.sub(weight, rest, out=rest)
        matrix = rest.T if transposed else rest
        errors = _weighted(matrix, root)
        before = squared_norm(errors)
        best = best or Round(0, stored, None, before**0.5 / size, before**0.5 / size)
        leading = subspace.near_optimal_svd(errors, rank, start=leading, squares=before)
        # the triplets are a projection of the errors
        after = before - float(leading.s.double().square().sum())
        if after < CANCELLATION * before:
            after = squared_norm(errors - _product(leading))
        svd = leading if root is None else weighted.project(leading.u, matrix)
        if after**0.5 / size < best.after:
            best = Round(number, stored, svd, best.before, after**0.5 / size)
        if number < iterations:
            low = _product(svd)
            low = low.T if transposed else low
    assert best is not None
    return best


def _weighted(matrix: Tensor, root: Tensor | None) -> Tensor:
    return matrix if root is None else matrix @ root


def _product(svd: Svd) -> Tensor:
    return (svd.u * svd.s) @ svd.vh


@dataclass(frozen=True)
class LoftQFactors(RankedFactors):
    """A module's factors for an unchanged quantized weight: the best approximation of W -
    decode(Q), in one step, padded with zeros if the weight has a lower rank."""

    original: TensorSpec = field(metadata=READ)
    packed: QuantizedWeight = field(metadata=READ)
    scale: float
    transposed: bool
    covariance: TensorSpec | None = field(default=None, metadata=READ)

    @property
    def effort(self) -> Effort:
        return Effort(decoded=math.prod(self.packed.shape)) + self.decomposition(self.rank)

    @property
    def memory(self) -> int:
        return 16 * math.prod(self.packed.shape) + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.original)
        root, damping = read_root(inputs, self.covariance)
        size = norm(_weighted(weight.T if self.transposed else weight, root)) or 1.0
        rest = weight.sub_(inputs.tensor(self.packed))
        rest = rest.T if self.transposed else rest
        errors = _weighted(rest, root)
        leading = subspace.near_optimal_svd(errors, self.rank)
        before, after = norm(errors) / size, norm(errors - _product(leading)) / size
        svd = leading if root is None else weighted.project(leading.u, rest)
        a, b = balanced_factors(svd, self.rank, self.scale)
        metrics = {
            "rank": self.rank, "error": short(before), "error_after": short(after), **damping
        }  # fmt: skip
        return TaskResult(self.round_matrices(a, b, self.rank), metrics)


def finalize_accepted(accept: Accept, tasks: Sequence[Task]) -> Finalize:
    """Call `accept` for one module after another, so each decision can depend on those before."""
    return partial(_ask_each, accept, [cast(FactorsTask, task) for task in tasks])


def _ask_each(accept: Accept, tasks: Sequence[FactorsTask], metrics: list[dict]) -> list[Change]:
    return [partial(_accepted, accept, task) for task in tasks]


def _accepted(accept: Accept, task: FactorsTask, result: TaskResult) -> TaskResult:
    """The factors, with b = 0 if they are not accepted."""
    a, b = task.place.pair(result.tensors)
    if accept(task.name, a, b):
        return TaskResult(result.tensors, result.metrics | {"accepted": True})
    metrics = result.metrics | {"accepted": False, "error_after": result.metrics["error"]}
    return TaskResult(task.place.keyed(a, torch.zeros_like(b)), metrics)
