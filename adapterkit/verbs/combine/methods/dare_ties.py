"""dare_ties: drop at random, rescale, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import Majority, check_share, elect_pruned
from adapterkit.verbs.combine.methods.protocol import Deltas, DenseDelta, OnElements, Seeds
from adapterkit.verbs.combine.methods.random_masks import random_drop


@dataclass(frozen=True)
class DareTies(OnElements):
    """Δ' = Σᵢ kᵢ wᵢ δᵢ / max(Σᵢ kᵢ, 1), δᵢ = mᵢ Δᵢ / density as in dare_linear, kᵢ as in ties.

    As PEFT, but for the random numbers. (mergekit's dare_ties rescales by L1 norms and does not
    divide by the number kept.)
    """

    density: float
    majority: Majority = "total"
    name = "dare_ties"
    tier = "core"
    source = "arXiv:2311.03099"
    acts_on = "elements"
    draws = True

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        return elect_pruned(
            deltas,
            weights,
            [random_drop(seeds, i, self.density) for i in range(deltas.count)],
            self.majority,
        )
