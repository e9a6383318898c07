"""Random masks of deltas: drop elements with one probability (DARE), or by their rank in a row
(DELLA)."""

from __future__ import annotations

from collections.abc import Callable

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor
from adapterkit.kernels import elementwise
from adapterkit.verbs.combine.methods.common import Prune
from adapterkit.verbs.combine.methods.protocol import Seeds


def random_drop(
    seeds: Seeds, which: int, density: float | Callable[[Tensor], Tensor], *, divided: bool = True
) -> Prune:
    """Keep each element with probability `density`, one for all or by element, and divide it by
    that (DARE, arXiv:2311.03099) if `divided`; at 1 nothing is drawn."""
    if density == 1:
        return lambda block: None
    draws = seeds(which)

    def prune(block: Tensor) -> None:
        nonlocal draws
        chance = density(block) if callable(density) else density
        elementwise.drop(block, chance, draws, divided=divided)
        draws = draws.at(block.numel())

    return prune


def chances(block: Tensor, density: float, epsilon: float) -> Tensor:
    """density + epsilon·(2·rank - 1) for each element, rank from 0, the smallest magnitude of its
    row, to 1 (arXiv:2406.11617)."""
    return elementwise.ranks(block).mul_(2 * epsilon).add_(density - epsilon)


def check_chances(density: float, epsilon: float) -> None:
    """Raise `Refused` unless all `chances` are above 0 and at most 1; density 1 has none."""
    if density < 1 and not epsilon < density <= 1 - epsilon:
        low, high = density - epsilon, density + epsilon
        raise Refused(
            f"density {density} with epsilon {epsilon}: probabilities from {low:g} to {high:g}",
            expected="probabilities above 0, at most 1",
            where="--set epsilon",
            hint=f"give an epsilon below {min(density, 1 - density):g}",
            code="AK101",
        )
