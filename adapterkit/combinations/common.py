"""What the methods share: checks of options, ways to prune the blocks of a delta, and two ways to
combine pruned deltas."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adapterkit.combinations.protocol import Deltas, DenseDelta, Metrics, OnFactors, Seeds
from adapterkit.errors import Refused
from adapterkit.kernels.elementwise import Majority, Threshold, Trim, drop, elect, top_k_threshold
from adapterkit.kernels.lowrank.algebra import Product, Svd, stack_products

SUBSAMPLE = 4  # one row in four of each block is enough to estimate a threshold
# changes a block in place; the blocks of a delta come in row-major order
Prune = Callable[[Tensor], None]


class WeightedSum(OnFactors):
    """Δ' = Σ shareᵢ Δᵢ: the factors side by side. The one kind of method on factors that is also
    defined for what has no factors: values that were trained whole."""

    stacks = True

    @abstractmethod
    def shares(self, weights: Sequence[float]) -> list[float]:
        """What each delta is multiplied by."""

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Metrics]:
        return stack_products(products, self.shares(weights)), {}


def check_share(option: str, value: float, above_zero: bool = False) -> None:
    """Raises `Refused` for an option outside [0, 1], or of 0 with `above_zero`."""
    if not 0 <= value <= 1 or (above_zero and value == 0):
        bounds = "above 0, at most 1" if above_zero else "from 0 to 1"
        raise Refused(
            f"{option} {value}",
            expected=f"a number {bounds}",
            where=f"--{option}",
            hint="give a share, 0.2 for a fifth",
        )


def check_majority(value: str) -> None:
    """Raises `Refused` for an unknown rule of electing signs."""
    if value not in ("total", "frequency"):
        raise Refused(
            f"majority {value!r}",
            expected="total or frequency",
            where="--majority",
            hint="use one of these",
        )


def check_count(weights: Sequence[float], deltas: int) -> None:
    """Raises ValueError for another number of weights than of deltas: a mistake of the planner."""
    if len(weights) != deltas:
        raise ValueError(f"{len(weights)} weights for {deltas} deltas")


def threshold(deltas: Deltas, which: int, keep: int) -> Threshold:
    """The threshold above which the `keep` largest magnitudes of a delta lie."""

    def read(part: int = 1) -> Iterator[Tensor]:
        return (
            deltas.rows(which, first, first + math.ceil((last - first) / part))
            for first, last in deltas.blocks()
        )

    size, some = math.prod(deltas.shape), lambda: read(SUBSAMPLE)
    return top_k_threshold(read, size, keep, some, deltas.device)


def trim(deltas: Deltas, which: int, density: float) -> Trim:
    """Keeps the int(density · n) largest magnitudes of a delta, of equal ones the first."""
    return Trim(threshold(deltas, which, int(density * math.prod(deltas.shape))))


def random_drop(seeds: Seeds, which: int, density: float | Callable[[Tensor], Tensor]) -> Prune:
    """Keeps each element with probability `density`, of all or of those of a block, divided by it
    (DARE, arXiv:2311.03099); at 1 all of them, and nothing is drawn."""
    if density == 1:
        return lambda block: None
    draws = seeds(which)

    def prune(block: Tensor) -> None:
        nonlocal draws
        drop(block, density(block) if callable(density) else density, draws)
        draws = draws.at(block.numel())

    return prune


def add_pruned(deltas: Deltas, weights: Sequence[float], prunes: Sequence[Prune]) -> DenseDelta:
    """Σ wᵢ pruneᵢ(Δᵢ)."""
    check_count(weights, deltas.count)
    total = torch.empty(deltas.shape, device=deltas.device)
    for first, last in deltas.blocks():
        for i, block in enumerate(_pruned(deltas, prunes, first, last)):
            part = total[first:last]
            part.add_(block, alpha=weights[i]) if i else torch.mul(block, weights[i], out=part)
    return DenseDelta(total, {})


def elect_pruned(
    deltas: Deltas, weights: Sequence[float], prunes: Sequence[Prune], majority: Majority
) -> DenseDelta:
    """The weighted mean of the pruned deltas over those whose sign is the majority's, element by
    element."""
    check_count(weights, deltas.count)
    mean, overlaps, conflicts = torch.empty(deltas.shape, device=deltas.device), 0, 0
    for first, last in deltas.blocks():
        blocks = list(_pruned(deltas, prunes, first, last))
        counts = elect(blocks, weights, majority, mean[first:last])
        overlaps, conflicts = overlaps + counts[0], conflicts + counts[1]
    return DenseDelta(mean, conflict_metric(overlaps, conflicts))


def conflict_metric(overlaps: int, conflicts: int) -> Metrics:
    """Of the positions with two or more nonzero values the share whose signs differ."""
    return {"conflict": conflicts / overlaps if overlaps else 0.0}


def _pruned(deltas: Deltas, prunes: Sequence[Prune], first: int, last: int) -> Iterator[Tensor]:
    for i, prune in enumerate(prunes):
        block = deltas.rows(i, first, last)
        prune(block)
        yield block


def without_noise(svd: Svd, size: float) -> Svd:
    """The triplets above float64's noise in a matrix of that norm; perhaps none."""
    return svd.top(int(torch.count_nonzero(svd.s > 1e-12 * size)))
