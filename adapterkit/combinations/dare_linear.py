"""dare_linear: drop at random, rescale, and add."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_share, summed, thin
from adapterkit.combinations.protocol import Deltas, Merged, Seeds


@dataclass(frozen=True)
class DareLinear:
    """Δ' = Σᵢ wᵢ mᵢ Δᵢ / density, mᵢ = 1 with probability density, else 0, for each element apart: Σᵢ wᵢ Δᵢ in expectation.

    As PEFT, but for the random numbers. (mergekit rescales each delta to its former L1 norm instead, which keeps that sum of
    magnitudes and not the expectation.) At density 1 nothing is drawn.
    """

    density: float
    name = "dare_linear"
    source = "arXiv:2311.03099"

    def __post_init__(self):
        check_share("density", self.density, above_zero=True)

    def merged(self, deltas: Deltas, weights: Sequence[float], seeds: Seeds) -> Merged:
        return summed(deltas, weights, [thin(seeds, i, self.density) for i in range(deltas.count)])
