"""dare_ties: drop at random, rescale, elect a sign, and average what agrees with it."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_majority, check_share, elected, thin
from adapterkit.combinations.protocol import Deltas, Merged, Seeds
from adapterkit.kernels.elementwise import Majority


@dataclass(frozen=True)
class DareTies:
    """Δ' = Σᵢ kᵢ wᵢ δᵢ / max(Σᵢ kᵢ, 1), δᵢ = mᵢ Δᵢ / density as in dare_linear, kᵢ as in ties.

    As PEFT, but for the random numbers. (mergekit's dare_ties rescales by L1 norms and does not divide by the number kept.)
    """

    density: float
    majority: Majority = "total"
    name = "dare_ties"
    source = "arXiv:2311.03099"

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)
        check_majority(self.majority)

    def merged(self, deltas: Deltas, weights: Sequence[float], seeds: Seeds) -> Merged:
        return elected(
            deltas,
            weights,
            [thin(seeds, i, self.density) for i in range(deltas.count)],
            self.majority,
        )
