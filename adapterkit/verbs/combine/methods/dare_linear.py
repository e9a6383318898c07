"""dare_linear: drop elements at random, rescale the others, and add."""

from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import Prune, PrunedSum, check_share
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds
from adapterkit.verbs.combine.methods.random_masks import random_drop


@dataclass(frozen=True)
class DareLinear(PrunedSum):
    """Δ' = Σᵢ wᵢ mᵢ Δᵢ / density, mᵢ = 1 with probability density, else 0, independently for each
    element: Σᵢ wᵢ Δᵢ in expectation.

    As PEFT, with other random numbers. (mergekit rescales each delta to its former L1 norm instead,
    which preserves that norm and not the expectation.) At density 1 nothing is drawn."""

    density: float
    name = "dare_linear"
    tier = "core"
    source = "arXiv:2311.03099"
    acts_on = "elements"
    draws = True

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        return random_drop(seeds, which, self.density)
