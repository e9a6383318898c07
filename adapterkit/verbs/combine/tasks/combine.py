"""One module of a combination: its adapters' factors in, new factors out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import PIECE_BYTES, READ, Effort, Metrics, TaskResult
from adapterkit.core.tasks.common import FactorsTask, RankedFactors
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels import elementwise
from adapterkit.kernels.block_sizes import GPU
from adapterkit.kernels.lowrank import algebra, weighted
from adapterkit.kernels.lowrank.algebra import Product, Svd
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.verbs.combine.methods.common import WeightedSum, add_pruned
from adapterkit.verbs.combine.methods.protocol import Deltas, Method, Seeds
from adapterkit.verbs.combine.tasks.truncate import energies_of, fit_metrics
from adapterkit.verbs.shared.statistics_file import (
    covariance_errors,
    read_covariance,
    read_root,
    root_memory,
)

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.dora import DoRA

Delta = Product | Tensor  # Δ as left @ right in float64, or (out, in) float32


@dataclass(frozen=True)
class Refit:
    """How a result becomes factors: a rank, a share of the energy, the inputs' largest rank, or
    unchanged (exact).

    `clamp`: b = U s and a = Vᵀ are clamped to this quantile of their elements and their negatives
    (PEFT's svd_clamp)."""

    rank: int | None = None
    energy: float | None = None
    largest: bool = False
    clamp: float | None = None

    @property
    def exact(self) -> bool:
        return not (self.rank or self.energy or self.largest or self.clamp)


@dataclass(frozen=True)
class Operand:
    """One adapter's factors and weight on a module."""

    number: int
    factors: Factors
    weight: float
    dora: DoRA | None = None  # if its delta depends on the base's weight

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.dora.reads if self.dora else self.factors.reads

    @property
    def memory(self) -> int:
        dense = self.dora.memory + 8 * math.prod(self.factors.shape) if self.dora else 0
        return 12 * (self.factors.a.nbytes + self.factors.b.nbytes) + dense

    def deltas(self, inputs: Reader) -> list[Delta]:
        """Its delta, or one for each expert."""
        return [self.dora.value(inputs)] if self.dora else list(self.factors.products(inputs))


@dataclass(frozen=True)
class CombinedFactors(FactorsTask):
    """The factors of one module that a method computes from all adapters' deltas, or from their
    factors (space "factors")."""

    operands: tuple[Operand, ...] = field(metadata=READ)
    method: Method
    refit: Refit
    space: str = "delta"
    seed: int = 0
    # of the module's inputs: of each operand's, or one for all; with them the refit is in the norm
    # of the outputs
    covariances: tuple[TensorSpec, ...] = field(default=(), metadata=READ)

    @property
    def is_dense(self) -> bool:
        """True if the result is dense: the method needs the deltas multiplied out, or one of them
        is no product."""
        return self.method.acts_on == "elements" or any(operand.dora for operand in self.operands)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each delta."""
        return self.operands[0].factors.shape

    @property
    def max_rank(self) -> int:
        ranks = [operand.factors.rank for operand in self.operands]
        if self.space == "factors":
            return ranks[0]
        full = min(self.shape)
        full = full if self.is_dense else min(sum(ranks), full)
        return min(full, max(ranks) if self.refit.largest else self.refit.rank or full)

    @property
    def planned_metrics(self) -> Metrics | None:
        known = self.space == "factors" or self.method.acts_on == "elements"
        known = known or (self.method.acts_on == "factors" and self.method.stacks)
        return {"rank": self.max_rank} if known and not self.refit.energy else None

    @property
    def effort(self) -> Effort:
        roots = Effort(wide=sum(spec.shape[0] ** 3 for spec in self.covariances))
        if not self.is_dense:
            return roots
        size = math.prod(self.shape) * (self.place.experts or 1)
        flops = 2 * size * sum(operand.factors.rank for operand in self.operands)
        elements = size * len(self.operands)
        drawn = elements if self.method.draws else 0
        dense = Effort(elected=elements, drawn=drawn, flops=flops)
        return roots + dense + self.decomposition(self.max_rank)

    @property
    def memory(self) -> int:
        factors, size = sum(operand.memory for operand in self.operands), math.prod(self.shape)
        if self.covariances:
            dense = 8 * size if self.is_dense else 0
            factors += factors + dense + root_memory(*self.covariances)
        by_elements = self.method.acts_on == "elements" or isinstance(self.method, WeightedSum)
        if self.is_dense and not by_elements:
            return factors + 40 * len(self.operands) * size  # dense deltas as products in float64
        return factors + (12 * size if self.is_dense else 0)

    @property
    def gpu_memory(self) -> int:
        """Also counts blocks of all deltas, twice while signs are elected, and all elements of one
        delta whose largest are selected."""
        if not self.is_dense:
            return super().gpu_memory
        size, each = math.prod(self.shape), 8 * len(self.operands) + PIECE_BYTES
        return super().gpu_memory + each * min(GPU, size) + 16 * min(elementwise.AT_ONCE, size)

    def compute(self, inputs: Reader) -> TaskResult:
        if self.space == "factors":
            return self._on_factors(inputs)
        weights = [operand.weight for operand in self.operands]
        results, metrics, spans = [], [], []
        root, damping = None, {}
        if self.method.acts_on != "covariances":
            root, damping = read_root(inputs, *self.covariances)
        for expert, deltas in enumerate(
            zip(*(operand.deltas(inputs) for operand in self.operands), strict=True)
        ):
            if self.method.acts_on == "covariances":
                result, root, measured = self._regress(deltas, weights, inputs)
            else:
                seeds = module_seeds(self.seed, f"{self.name}/{expert}")
                result, measured = combined_delta(self.method, deltas, weights, seeds)
            results.append(result)
            metrics.append(measured | damping | _cosines(deltas))
            spans.append(None if isinstance(result, Product) else _span(deltas))
        return self._refit(results, metrics, spans, root)

    def _regress(
        self, deltas: Sequence[Delta], weights: list[float], inputs: Reader
    ) -> tuple[Product, Tensor, Metrics]:
        assert self.method.acts_on == "covariances"
        products = [algebra.as_product(delta) for delta in deltas]
        with self.covariance_errors():
            return self.method.combine_covariances(
                products, weights, lambda which: self.covariance(inputs, which)
            )

    def covariance(self, inputs: Reader, which: int) -> Tensor:
        """E[x xᵀ] (in, in) float32 of the inputs of an operand."""
        return read_covariance(inputs, self.covariances[which])

    def covariance_errors(self) -> AbstractContextManager[None]:
        """Report a ValueError inside as the error of a covariance."""
        return covariance_errors(*self.covariances)

    def _refit(
        self,
        results: list[Delta],
        metrics: list[dict],
        spans: list[Svd | None],
        root: Tensor | None,
    ) -> TaskResult:
        """Refit the results. `spans`: for each result, a basis near its singular vectors; `root`:
        of the norm of the refit."""
        products = [result for result in results if isinstance(result, Product)]
        if self.refit.exact and products and products[0].rank <= min(self.shape):
            pairs = [algebra.balance(product) for product in products]
            norm = math.hypot(*map(algebra.norm, products))
            return self._result(pairs, metrics, {"norm": short(norm), "energy": 1.0})
        most, share = self.max_rank, self.refit.energy
        decompositions = [
            weighted.decompose_product(result, root)
            if isinstance(result, Product)
            else weighted.decompose_dense(result, most, share, start=near, root=root)
            for result, near in zip(results, spans, strict=True)
        ]
        if share:
            rank = max(
                algebra.rank_for_energy(one.svd.s, share, one.total) for one in decompositions
            )
            rank = min(rank, most)
        else:
            rank = min(most, *(len(one.svd.s) for one in decompositions))
        fit = fit_metrics(energies_of(decompositions, rank), rank)
        if root is None:
            del fit["error"]  # √(1 - energy)
        return self._result([self._factors(one, rank) for one in decompositions], metrics, fit)

    def _factors(self, decomposition: weighted.Decomposition, rank: int) -> tuple[Tensor, Tensor]:
        if self.refit.clamp is None:
            return decomposition.factors(rank)
        svd = decomposition.svd
        a, b = svd.vh[:rank], svd.u[:, :rank] * svd.s[:rank]
        values = torch.cat([b.reshape(-1), a.reshape(-1)])
        # PEFT's quantile of the signed values depends on the signs that the decomposition happens
        # to give
        limit = quantile(torch.cat([values, -values]), self.refit.clamp)
        return a.clamp(-limit, limit), b.clamp(-limit, limit)

    def _on_factors(self, inputs: Reader) -> TaskResult:
        """PEFT's rule: the method acts on the a's with sign(c)√|c| and on the b's with √|c|, c =
        weight · scale; the products have cross terms."""
        pairs = [operand.factors.stored(inputs) for operand in self.operands]
        roots = [
            (math.copysign(abs(c) ** 0.5, c), abs(c) ** 0.5)
            for c in (p.weight * p.factors.scale for p in self.operands)
        ]
        sides = []
        for side in (0, 1):
            matrices, weights = [pair[side] for pair in pairs], [root[side] for root in roots]
            if self.method.acts_on == "elements":
                seeds = module_seeds(self.seed, f"{self.name}/{'ab'[side]}")
                sides.append(self.method.combine_elements(Deltas(matrices), weights, seeds)[0])
            else:
                sides.append(sum(m * w for m, w in zip(matrices, weights, strict=True)))
        rank = self.operands[0].factors.rank
        a, b = sides
        return TaskResult(self.round_matrices(a, b, rank), {"rank": rank})

    def _result(
        self, pairs: list[tuple[Tensor, Tensor]], metrics: list[dict], fit: dict[str, float]
    ) -> TaskResult:
        """The factors of the pairs; `fit`: metrics of the fit's error."""
        merged: Metrics = {"rank": len(pairs[0][0]), **fit}
        # of a stack of experts: the mean over them
        merged |= {key: _mean([metric[key] for metric in metrics]) for key in metrics[0]}
        return TaskResult(self.round(self.place.stored(pairs)), merged)


def combined_delta(
    method: Method,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    seeds: Seeds,
    *,
    wide: bool = False,
) -> tuple[Delta, Metrics]:
    """The delta by a method without covariances, a product if the method keeps one, else dense, and
    its metrics; `wide`: as in `Deltas`."""
    if method.acts_on == "elements":
        return method.combine_elements(Deltas(deltas, wide=wide), weights, seeds)
    assert method.acts_on == "factors"
    is_dense = not all(isinstance(delta, Product) for delta in deltas)
    if is_dense and isinstance(method, WeightedSum):
        shares = method.shares(weights)
        dense = Deltas(deltas, wide=wide)
        return add_pruned(dense, shares, [lambda block: None] * len(shares))
    return method.combine_factors([algebra.as_product(d) for d in deltas], weights, seeds)


def module_seeds(seed: int, name: str) -> Seeds:
    """Random numbers for each delta of one module, from the run's seed and the module's name."""
    return lambda which: Draws.of(seed, f"{name}\0{which}")


def quantile(values: Tensor, share: float) -> float:
    """The quantile with linear interpolation, for any number of values (torch.quantile stops at 16
    million)."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    first = float(values.kthvalue(low + 1).values)
    second = float(values.kthvalue(min(low + 2, len(values))).values)
    return first + (second - first) * (at - low)


def _span(deltas: Sequence[Delta]) -> Svd | None:
    """The directions of all factors, which nearly span every combination of their products; None if
    one delta is dense."""
    products = [delta for delta in deltas if isinstance(delta, Product)]
    if len(products) < len(deltas):
        return None
    left, right = torch.cat([p.left for p in products], 1), torch.cat([p.right for p in products])
    sizes = left.norm(dim=0), right.norm(dim=1)
    used = (sizes[0] > 0) & (sizes[1] > 0)
    if not bool(used.any()):
        return None
    left, right = (left / sizes[0])[:, used], (right / sizes[1][:, None])[used]
    return Svd(left, left.new_ones(len(right)), right)


def _cosines(deltas: Sequence[Delta]) -> dict[str, list[float]]:
    """Cosines between the inputs' deltas, row by row of the triangle above the diagonal."""
    products = [delta for delta in deltas if isinstance(delta, Product)]
    table = algebra.gram(products) if len(products) == len(deltas) else _gram(Deltas(deltas))
    norms = table.diagonal().clamp_min(0).sqrt()
    pairs = itertools.combinations(range(len(deltas)), 2)
    return {
        "cosines": [
            float(table[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] else 0.0
            for i, j in pairs
        ]
    }


def _gram(deltas: Deltas) -> Tensor:
    """All inner products of dense deltas, in float64."""
    table = torch.zeros(deltas.count, deltas.count, dtype=torch.float64)
    for first, last in deltas.blocks():
        rows = torch.stack(
            [deltas.rows(i, first, last).reshape(-1) for i in range(deltas.count)]
        ).double()
        table += (rows @ rows.T).cpu()
    return table


def _mean(values: list) -> Any:
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return short(math.fsum(values) / len(values))


@dataclass(frozen=True)
class SubtractedFactors(RankedFactors):
    """PEFT's subtraction: a - mean of the general a's, scale · (b - mean of the general b's)."""

    task_adapter: Factors = field(metadata=READ)
    generals: tuple[Factors, ...] = field(metadata=READ)

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = self.task_adapter.stored(inputs)
        others = [factors.stored(inputs) for factors in self.generals]
        count = len(others)
        a = a - sum(other for other, _ in others) / count
        b = (b - sum(other for _, other in others) / count) * self.task_adapter.scale
        return TaskResult(self.round_matrices(a, b, self.rank), self.planned_metrics)
