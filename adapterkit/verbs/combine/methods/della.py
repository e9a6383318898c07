"""della: drop elements at random, small ones of a row more often, and rescale the others; then as
ties."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor
from adapterkit.verbs.combine.methods.common import Majority, Prune, PrunedElection, check_share
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds
from adapterkit.verbs.combine.methods.random_masks import chances, check_chances, random_drop


@dataclass(frozen=True)
class Della(PrunedElection):
    """Δ' = Σᵢ kᵢ wᵢ δᵢ / max(Σᵢ kᵢ, 1), δᵢ = mᵢ Δᵢ / pᵢ, mᵢ = 1 with probability pᵢ = density +
    epsilon·(2·rank - 1), kᵢ as in ties.

    rank goes from 0, the smallest magnitude of the row, to 1. epsilon is half the spread of pᵢ as
    in mergekit (the paper's ε is the whole spread). Each element is divided by its own pᵢ as in the
    paper, so that the expectation is Δᵢ; mergekit rescales the whole delta to its former L1 norm.
    The paper's λ multiplies every weight: include it in the weights. density 1 drops nothing."""

    density: float
    epsilon: float = 0.15
    majority: Majority = "total"
    name = "della"
    source = "arXiv:2406.11617"
    acts_on = "elements"
    draws = True

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)
        check_share("epsilon", self.epsilon)
        check_chances(self.density, self.epsilon)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        density = 1 if self.density == 1 else self.probabilities
        return random_drop(seeds, which, density)

    def probabilities(self, block: Tensor) -> Tensor:
        """The probability to keep each element."""
        return chances(block, self.density, self.epsilon)
