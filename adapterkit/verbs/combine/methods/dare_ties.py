"""dare_ties: drop elements at random and rescale the others; then elect signs as ties does."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import Majority, Prune, PrunedElection, check_share
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds
from adapterkit.verbs.combine.methods.random_masks import random_drop


@dataclass(frozen=True)
class DareTies(PrunedElection):
    """Δ' = Σᵢ kᵢ wᵢ δᵢ / max(Σᵢ kᵢ, 1), δᵢ = mᵢ Δᵢ / density as in dare_linear, kᵢ as in ties.

    As PEFT, with other random numbers. (mergekit's dare_ties rescales by L1 norms and does not
    divide by the number kept.)"""

    density: float
    majority: Majority = "total"
    name = "dare_ties"
    tier = "core"
    source = "arXiv:2311.03099"
    acts_on = "elements"
    draws = True

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        return random_drop(seeds, which, self.density)
