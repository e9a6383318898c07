"""gta: mergekit's generalized task arithmetic, which prunes, weights, elects signs and adds as its
options say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adapterkit.core.lazy import torch
from adapterkit.verbs.combine.methods.common import (
    Prune,
    PrunedSum,
    add_pruned,
    check_count,
    check_share,
    elect_pruned,
    trim,
    without_outliers,
)
from adapterkit.verbs.combine.methods.protocol import Deltas, DenseDelta, Seeds
from adapterkit.verbs.combine.methods.random_masks import chances, check_chances, random_drop


@dataclass(frozen=True)
class Gta(PrunedSum):
    """Δ' = factor · Σᵢ kᵢ wᵢ δᵢ, with divide "weights" / Σᵢ kᵢ wᵢ, δᵢ = Δᵢ pruned, kᵢ = 1, with
    consensus "sum" [sign(wᵢ δᵢ) = sign of Σⱼ wⱼ δⱼ].

    Equals mergekit's ties, dare_ties, breadcrumbs_ties and similar methods, whose weights count in
    the election and whose divisor is a sum of weights. prune: none, magnitude (as ties), outliers
    (as breadcrumbs), random (as dare), ranks (as della). Kept elements keep their value; with
    rescale "l1" they are scaled to the former L1 norm of the delta. density: the share that is
    kept; densities: one for each delta. 0 counts as +; a divisor of 0 divides nothing. The random
    numbers are not mergekit's."""

    prune: Literal["none", "magnitude", "outliers", "random", "ranks"] = "magnitude"
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15
    rescale: Literal["none", "l1"] = "none"
    consensus: Literal["none", "sum"] = "none"
    divide: Literal["none", "weights"] = "none"
    factor: float = 1.0
    densities: tuple[float, ...] = ()
    name = "gta"
    tier = "experimental"
    source = "arXiv:2403.13257 (mergekit)"
    acts_on = "elements"
    draws = True

    def __post_init__(self):
        for density in (self.density, *self.densities):
            check_share("density", density, above_zero=self.prune in ("random", "ranks"))
            if self.prune == "ranks":
                check_chances(density, self.epsilon)
        check_share("gamma", self.gamma)
        check_share("epsilon", self.epsilon)

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        check_count(weights, deltas.count)
        scales = [
            weight * (self._rescaled(deltas, i, seeds) if self.rescale == "l1" else 1)
            for i, weight in enumerate(weights)
        ]
        divided = self.divide == "weights"
        prunes = self.prunings(deltas, seeds)
        if self.consensus == "none":
            divisor = math.fsum(weights) if divided else 1.0
            divisor = divisor if abs(divisor) >= 1e-8 else 1.0
            return add_pruned(deltas, [self.factor * one / divisor for one in scales], prunes)
        weighed = [_weighed(*pair) for pair in zip(prunes, scales, strict=True)]
        back = [1 / weight if divided and weight else 1.0 for weight in weights]
        shares = list(weights) if divided else None
        delta, metrics = elect_pruned(deltas, back, weighed, "total", shares, divided=divided)
        return DenseDelta(delta.mul_(self.factor), metrics)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        density = self.densities[which] if self.densities else self.density
        if density == 1 or self.prune == "none":
            return lambda block: None
        if self.prune == "magnitude":
            return trim(deltas, which, density)
        if self.prune == "outliers":
            return without_outliers(deltas, which, density, self.gamma)
        by_rank = lambda block: chances(block, density, self.epsilon)
        chance = by_rank if self.prune == "ranks" else density
        return random_drop(seeds, which, chance, divided=False)

    def _rescaled(self, deltas: Deltas, which: int, seeds: Seeds) -> float:
        """‖Δ‖₁ / ‖δ‖₁, summed exactly over the columns; 1 where one of them is below 1e-7."""
        prune = self.pruning(deltas, which, seeds)
        sums = torch.zeros(2, deltas.shape[1], dtype=torch.float64, device=deltas.device)
        for first, last in deltas.blocks():
            block = deltas.rows(which, first, last)
            sums[0].add_(block.abs().sum(0, dtype=torch.float64))
            prune(block)
            sums[1].add_(block.abs().sum(0, dtype=torch.float64))
        before, after = (math.fsum(columns) for columns in sums.tolist())
        return before / after if min(before, after) >= 1e-7 else 1.0


def _weighed(prune: Prune, scale: float) -> Prune:
    def weighed(block: torch.Tensor) -> None:
        prune(block)
        block.mul_(scale)

    return weighed
