"""LoftQ (arXiv:2310.08659): one weight quantized together with the factors that make up for its error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.kernels.lowrank import Svd
from adapterkit.kernels.subspace import near_optimal_svd
from adapterkit.kernels.sums import norm, squared_norm
from adapterkit.kernels.weighted import project
from adapterkit.plan import Change, Finalize, Task, TaskResult
from adapterkit.tasks import common
from adapterkit.tasks.common import short
from adapterkit.tasks.covariances import given, room, root_of
from adapterkit.tasks.quantized import EncodedWeight
from adapterkit.tasks.residual import balanced_factors
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.reader import Reader

CANCELLED = (
    1e-3  # of what was lost: what is left is not taken from a difference of the two below this
)
Accept = Callable[[str, Tensor, Tensor], bool]  # (module, a, b) -> whether its factors are kept


@dataclass(frozen=True)
class LoftQWeight(EncodedWeight):
    """One weight quantized together with the factors that make up for it; the factors are laid aside for the adapter's file."""

    module: str
    rank: int  # filled up with zeros where the weight has fewer
    scale: float
    iterations: int
    covariance: TensorSpec | None = None

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source, *given(self.covariance))

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.packed.shape) + room(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        turned = weight.shape != self.packed.shape or getattr(self.packed, "transposed", False)
        root, said = root_of(inputs, self.covariance)
        found = alternated(weight, self.packed, self.rank, self.iterations, turned, root)
        out, width = (weight.shape[1], weight.shape[0]) if turned else weight.shape
        nothing = Svd(weight.new_zeros(out, 1), weight.new_zeros(1), weight.new_zeros(1, width))
        a, b = balanced_factors(found.svd or nothing, self.rank, self.scale)
        metrics = {
            "error": short(found.before),
            "error_after": short(found.after),
            "iterations": found.round,
            **said,
        }
        return TaskResult(found.stored, metrics, {f"{self.module}.a": a, f"{self.module}.b": b})


@dataclass
class Round:
    """One round of LoftQ: the stored tensors of Q, the triplets of scale·b@a, and the errors before and after, relative to W's
    norm."""

    stored: dict[str, Tensor]
    svd: Svd | None
    before: float
    after: float
    round: int


def alternated(
    weight: Tensor,
    packed: QuantizedWeight,
    rank: int,
    iterations: int,
    turned: bool = False,
    root: Tensor | None = None,
) -> Round:
    """The best of `iterations` rounds of Q = encode(W - L), L = the best approximation of W - Q of that rank; round 0 is L = 0.

    Norms are those of W·root (in, in) where it is given. `turned`: the weight is (in, out).
    """
    size = norm(_weighted(weight.T if turned else weight, root)) or 1.0
    best: Round | None = None
    low: Tensor | None = None
    seen: Svd | None = None
    for number in range(1, iterations + 1):
        stored = packed.encode(weight if low is None else torch.sub(weight, low, out=low))
        rest = decode_checked(packed, stored)
        torch.sub(
            weight, rest, out=rest
        )  # in its memory: new room for a weight costs more than to subtract it
        matrix = rest.T if turned else rest
        errors = _weighted(matrix, root)
        lost = squared_norm(errors)
        best = best or Round(stored, None, lost**0.5 / size, lost**0.5 / size, 0)
        seen = near_optimal_svd(errors, rank, start=seen, squares=lost)
        left = lost - float(
            seen.s.double().square().sum()
        )  # the triplets are a projection of the errors
        if left < CANCELLED * lost:
            left = squared_norm(errors - _product(seen))
        svd = seen if root is None else project(seen.u, matrix)
        if left**0.5 / size < best.after:
            best = Round(stored, svd, best.before, left**0.5 / size, number)
        if number < iterations:
            low = _product(svd)
            low = low.T if turned else low
    assert best is not None
    return best


def _weighted(matrix: Tensor, root: Tensor | None) -> Tensor:
    return matrix if root is None else matrix @ root


def _product(svd: Svd) -> Tensor:
    return (svd.u * svd.s) @ svd.vh


@dataclass(frozen=True)
class LoftQFactors:
    """One module's factors for a quantized weight that stays: the best approximation of W - decode(Q), in one step."""

    name: str
    original: TensorSpec
    packed: QuantizedWeight
    place: Place
    rank: int  # filled up with zeros where the weight has fewer
    scale: float
    dtype: str
    turned: bool
    covariance: TensorSpec | None = None

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.original, *self.packed.parts, *given(self.covariance))

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return common.bounds(self.place, self.rank, self.dtype)

    @property
    def memory(self) -> int:
        return 16 * math.prod(self.packed.shape) + room(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.original)
        root, said = root_of(inputs, self.covariance)
        size = norm(_weighted(weight.T if self.turned else weight, root)) or 1.0
        rest = weight.sub_(inputs.tensor(self.packed))
        rest = rest.T if self.turned else rest
        errors = _weighted(rest, root)
        seen = near_optimal_svd(errors, self.rank)
        before, after = norm(errors) / size, norm(errors - _product(seen)) / size
        svd = seen if root is None else project(seen.u, rest)
        a, b = balanced_factors(svd, self.rank, self.scale)
        dtype = dtypes.torch_dtype(self.dtype)
        metrics = {"rank": self.rank, "error": short(before), "error_after": short(after), **said}
        return TaskResult({self.place.a_key: a.to(dtype), self.place.b_key: b.to(dtype)}, metrics)


def finalize_accepted(accept: Accept, tasks: Sequence[Task]) -> Finalize:
    """Ask of one module after the other, so that each answer can depend on those before."""
    return partial(_ask_each, accept, tasks)


def _ask_each(accept: Accept, tasks: Sequence[Task], metrics: list[dict]) -> list[Change]:
    return [partial(_ask, accept, task) for task in tasks]


def _ask(accept: Accept, task: Any, result: TaskResult) -> TaskResult:
    """The factors, or b = 0 where they are not accepted."""
    a, b = (cast(Tensor, result.tensors[key]) for key in (task.place.a_key, task.place.b_key))
    if accept(task.name, a, b):
        return TaskResult(result.tensors, result.metrics | {"accepted": True})
    tensors = {task.place.a_key: a, task.place.b_key: torch.zeros_like(b)}
    metrics = result.metrics | {"accepted": False, "error_after": result.metrics["error"]}
    return TaskResult(tensors, metrics)
