"""What the methods share: checks of options, ways to prune the blocks of a delta, and the two ways to join pruned deltas."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adapterkit.combinations.protocol import Deltas, Facts, Merged, Seeds
from adapterkit.errors import Refused
from adapterkit.kernels.elementwise import Cut, Majority, Trim, drop, elect, largest
from adapterkit.kernels.lowrank import Product, Svd, stacked

GLANCE = 4  # a fourth of each block's rows is enough for the first guess of a threshold
Prune = Callable[
    [Tensor], None
]  # changes a block in place; the blocks of a delta come in row-major order


def check_share(option: str, value: float, above_zero: bool = False) -> None:
    """Refuse an option that is no share."""
    if not 0 <= value <= 1 or (above_zero and value == 0):
        bounds = "above 0, at most 1" if above_zero else "from 0 to 1"
        raise Refused(
            f"{option} {value}",
            expected=f"a number {bounds}",
            where=f"--{option}",
            hint="give a share, 0.2 for a fifth",
        )


def check_majority(value: str) -> None:
    """Refuse a rule for signs that does not exist."""
    if value not in ("total", "frequency"):
        raise Refused(
            f"majority {value!r}",
            expected="total or frequency",
            where="--majority",
            hint="use one of these",
        )


def check_count(weights: Sequence[float], deltas: int) -> None:
    """The planner gives a weight to each delta; anything else is a mistake in it."""
    if len(weights) != deltas:
        raise ValueError(f"{len(weights)} weights for {deltas} deltas")


def trim(deltas: Deltas, which: int, density: float) -> Trim:
    """Leaves the int(density * n) largest magnitudes of a delta, the first of equals."""
    return Trim(cut(deltas, which, int(density * math.prod(deltas.shape))))


def cut(deltas: Deltas, which: int, keep: int) -> Cut:
    """Where the `keep` largest magnitudes of a delta end."""

    def read(part: int = 1) -> Iterator[Tensor]:
        return (
            deltas.rows(which, first, first + math.ceil((last - first) / part))
            for first, last in deltas.blocks()
        )

    return largest(read, math.prod(deltas.shape), keep, lambda: read(GLANCE))


def thin(seeds: Seeds, which: int, density: float) -> Prune:
    """Leaves each element with probability `density`, divided by it (DARE); all of them, and nothing drawn, at 1."""
    if density == 1:
        return lambda block: None
    generator = seeds(which)
    return lambda block: drop(block, density, generator)


class WeightedSum:
    """What methods share that are Σ shareᵢ Δᵢ: the factors side by side."""

    def shares(self, weights: Sequence[float]) -> list[float]:
        """What each delta is multiplied by."""
        raise NotImplementedError

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]:
        return stacked(products, self.shares(weights)), {}


def summed(deltas: Deltas, weights: Sequence[float], prunes: Sequence[Prune]) -> Merged:
    """Σ wᵢ pruneᵢ(Δᵢ)."""
    check_count(weights, deltas.count)
    merged = torch.empty(deltas.shape)
    for first, last in deltas.blocks():
        for i, block in enumerate(_pruned(deltas, prunes, first, last)):
            merged = merged.to(block.device)
            part = merged[first:last]
            part.add_(block, alpha=weights[i]) if i else torch.mul(block, weights[i], out=part)
    return Merged(merged, {})


def elected(
    deltas: Deltas, weights: Sequence[float], prunes: Sequence[Prune], majority: Majority
) -> Merged:
    """The weighted mean of the pruned deltas over those whose sign is the majority's, element by element."""
    check_count(weights, deltas.count)
    merged, several, differ = torch.empty(deltas.shape), 0, 0
    for first, last in deltas.blocks():
        blocks = list(_pruned(deltas, prunes, first, last))
        merged = merged.to(blocks[0].device)
        found = elect(blocks, weights, majority, merged[first:last])
        several, differ = several + found[0], differ + found[1]
    return Merged(merged, conflict(several, differ))


def conflict(several: int, differ: int) -> Facts:
    """The share of the positions with two or more nonzero values whose signs differ."""
    return {"conflict": differ / several if several else 0.0}


def _pruned(deltas: Deltas, prunes: Sequence[Prune], first: int, last: int) -> Iterator[Tensor]:
    for i, prune in enumerate(prunes):
        block = deltas.rows(i, first, last)
        prune(block)
        yield block


def significant(found: Svd, size: float) -> Svd:
    """The triplets above float64's noise in a matrix of that size; perhaps none."""
    return found.top(int(torch.count_nonzero(found.s > 1e-12 * size)))
