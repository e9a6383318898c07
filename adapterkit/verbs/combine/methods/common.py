"""Shared code of the methods: checks of options, pruning of a delta's blocks, and two ways to
combine pruned deltas."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from adapterkit.core import registry
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels import dense, elementwise
from adapterkit.kernels.lowrank.algebra import Product, Svd, norm, stack_products, svd
from adapterkit.verbs.combine.methods.protocol import (
    Deltas,
    DenseDelta,
    Metrics,
    OnElements,
    OnFactors,
    Seeds,
)

Majority = Literal["total", "frequency"]
SUBSAMPLE = 4  # one row in four of each block is enough to estimate a threshold
NOISE = 1e-12  # of a norm: singular values below it are float64's rounding
# changes a block in place; the blocks of a delta come in row-major order
Prune = Callable[[Tensor], None]


class WeightedSum(OnFactors):
    """Δ' = Σ shareᵢ Δᵢ: stacked factors. The only methods on factors that also apply to fully
    trained values, which have no factors."""

    stacks = True

    @abstractmethod
    def shares(self, weights: Sequence[float]) -> list[float]:
        """The factor of each delta."""

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        return stack_products(products, self.shares(weights)), {}


class InCores(OnFactors):
    """Δ' = U · inner(Uᵀ Δ₁ Vᵀ, Uᵀ Δ₂ Vᵀ, ...; w) · V: a method on elements, applied in shared bases
    of the deltas, in float64."""

    density: float
    majority: Majority
    inner: str

    def __post_init__(self):
        self._inner()

    @abstractmethod
    def bases(self, products: Sequence[Product]) -> tuple[Tensor, Tensor | None]:
        """U (out, R) and V (R', in), orthonormal; V is None if the inputs keep their
        coordinates."""

    def _inner(self) -> OnElements:
        """The method inside; `Refused` for one without a density."""
        declared = registry.declarations("combinations")
        known = [
            name
            for name, kind in declared.items()
            if kind.constants["acts_on"] == "elements" and "density" in kind.options
        ]
        if self.inner not in known:
            raise Refused(
                f"inner {self.inner!r}",
                expected=", ".join(known),
                where="--set inner",
                hint="use one of these",
                code="AK101",
            )
        given = {"density": self.density, "majority": self.majority}
        takes = declared[self.inner].options
        inner = registry.member("combinations", self.inner)
        return inner(**{name: given[name] for name in given if name in takes})

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        u, v = self.bases(products)
        cores = Deltas(cores_of(products, u, v))
        merged, metrics = self._inner().combine_elements(cores, weights, seeds)
        return (Product(u, merged) if v is None else Product(u @ merged, v)), metrics


class PrunedSum(OnElements):
    """Δ' = Σ wᵢ pruneᵢ(Δᵢ)."""

    @abstractmethod
    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        """The function that prunes the blocks of a delta in place."""

    def prunings(self, deltas: Deltas, seeds: Seeds) -> list[Prune]:
        return [self.pruning(deltas, which, seeds) for which in range(deltas.count)]

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        return add_pruned(deltas, weights, self.prunings(deltas, seeds))


class PrunedElection(PrunedSum):
    """The mean of the wᵢ pruneᵢ(Δᵢ) over those whose sign is the majority's, element by element."""

    majority: Majority

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        return elect_pruned(deltas, weights, self.prunings(deltas, seeds), self.majority)


def cores_of(products: Sequence[Product], u: Tensor, v: Tensor | None) -> list[Tensor]:
    """Uᵀ Δᵢ Vᵀ of each, (R, R'), or Uᵀ Δᵢ (R, in)."""
    return [(u.T @ p.left) @ (p.right if v is None else p.right @ v.T) for p in products]


def basis(
    x: Tensor,  # (n, k)
) -> Tensor:  # (n, R)
    """The left singular vectors of x above float64's noise, as `with_signs`; one column of zeros if
    x is zero."""
    u, s, _ = dense.svd(x)
    return with_signs(u[:, s > NOISE * x.norm()] if bool(x.any()) else torch.zeros_like(u[:, :1]))


def with_signs(
    u: Tensor,  # (n, R)
) -> Tensor:  # (n, R)
    """The columns, each with its largest element positive: the choice matters where signs are
    elected and a sum is 0."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    return u * torch.where(largest < 0, -1.0, 1.0)


def svd_of_sum(products: Sequence[Product], weights: Sequence[float]) -> Svd:
    """The triplets of Σ wᵢ Δᵢ above noise; one triplet of zeros for a sum of 0."""
    check_count(weights, len(products))
    whole = svd(stack_products(products, weights))
    clean = without_noise(whole, sizes(products, weights).sum())
    return clean if len(clean.s) else Svd(*(0 * part for part in whole.top(1)))


def without_noise(svd: Svd, size: float | Tensor) -> Svd:
    """The triplets above float64's noise in a matrix of that norm, possibly none."""
    return svd.top(int(torch.count_nonzero(svd.s > NOISE * size)))


def sizes(products: Sequence[Product], weights: Sequence[float]) -> Tensor:
    """‖wᵢ Δᵢ‖ of each, (k,) float64 on the CPU."""
    norms = [abs(w) * norm(p) for p, w in zip(products, weights, strict=True)]
    return torch.tensor(norms, dtype=torch.float64)


def nearest_orthogonal(
    x: Tensor,  # (n, K), of unit columns
) -> Tensor:  # (n, K)
    """The orthogonal matrix (orthonormal columns, or rows if K > n) nearest to x, on its span:
    X = P Σ Qᵀ becomes P Qᵀ over the Σ above 1e-8."""
    q, core = dense.qr(x)
    p, s, qh = dense.svd(core)
    p, qh = p[:, s > 1e-8], qh[s > 1e-8]
    return q @ p @ qh


def check_share(option: str, value: float, above_zero: bool = False) -> None:
    """Raise `Refused` for an option outside [0, 1], or for 0 with `above_zero`."""
    if not 0 <= value <= 1 or (above_zero and value == 0):
        bounds = "above 0, at most 1" if above_zero else "from 0 to 1"
        raise Refused(
            f"{option} {value}",
            expected=f"a number {bounds}",
            where=registry.as_flag(option),
            hint="give a share, 0.2 for a fifth",
            code="AK101",
        )


def check_count(weights: Sequence[float], deltas: int) -> None:
    """Raise ValueError if there are not as many weights as deltas: a mistake of the planner."""
    if len(weights) != deltas:
        raise ValueError(f"{len(weights)} weights for {deltas} deltas")


def threshold(deltas: Deltas, which: int, keep: int) -> elementwise.Threshold:
    """The threshold above which a delta has its `keep` largest magnitudes."""

    def read(part: int = 1) -> Iterator[Tensor]:
        return (
            deltas.rows(which, first, first + math.ceil((last - first) / part))
            for first, last in deltas.blocks()
        )

    size, some = math.prod(deltas.shape), lambda: read(SUBSAMPLE)
    return elementwise.top_k_threshold(read, size, keep, some, deltas.device)


def trim(deltas: Deltas, which: int, density: float) -> elementwise.Trim:
    """Keep the int(density · n) largest magnitudes of a delta; among equal ones, the first."""
    return elementwise.Trim(threshold(deltas, which, int(density * math.prod(deltas.shape))))


def add_pruned(deltas: Deltas, weights: Sequence[float], prunes: Sequence[Prune]) -> DenseDelta:
    """Σ wᵢ pruneᵢ(Δᵢ)."""
    check_count(weights, deltas.count)
    total = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    for first, last in deltas.blocks():
        for i, block in enumerate(_pruned(deltas, prunes, first, last)):
            part = total[first:last]
            part.add_(block, alpha=weights[i]) if i else torch.mul(block, weights[i], out=part)
    return DenseDelta(total, {})


def without_outliers(deltas: Deltas, which: int, density: float, gamma: float) -> Prune:
    """Drop the int(gamma · n) largest magnitudes of a delta, fewer if less than the density would
    remain; keep the int(density · n) largest of the others."""
    size = math.prod(deltas.shape)
    keep = int(density * size)
    top = min(int(gamma * size), size - keep)
    larger = elementwise.Trim(threshold(deltas, which, keep + top))
    outliers = elementwise.Trim(threshold(deltas, which, top))

    def prune(block: Tensor) -> None:
        largest = block.clone()
        outliers(largest)
        larger(block)
        block.sub_(largest)

    return prune


def elect_pruned(
    deltas: Deltas,
    weights: Sequence[float],
    prunes: Sequence[Prune],
    majority: Majority,
    shares: Sequence[float] | None = None,
    *,
    divided: bool = True,
) -> DenseDelta:
    """The weighted mean of the pruned deltas over those with the majority's sign, element by
    element. `shares`: the share of each in the mean; their sum, not the mean, unless `divided`."""
    check_count(weights, deltas.count)
    mean, overlaps, conflicts = (
        torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device),
        0,
        0,
    )
    for first, last in deltas.blocks():
        blocks = list(_pruned(deltas, prunes, first, last))
        counts = elementwise.elect(
            blocks, weights, majority, mean[first:last], shares, divided=divided
        )
        overlaps, conflicts = overlaps + counts[0], conflicts + counts[1]
    return DenseDelta(mean, conflict_metric(overlaps, conflicts))


def conflict_metric(overlaps: int, conflicts: int) -> Metrics:
    """The share of positions whose signs differ, among those with two or more nonzero values."""
    return {"conflict": conflicts / overlaps if overlaps else 0.0}


def _pruned(deltas: Deltas, prunes: Sequence[Prune], first: int, last: int) -> Iterator[Tensor]:
    for i, prune in enumerate(prunes):
        block = deltas.rows(i, first, last)
        prune(block)
        yield block
