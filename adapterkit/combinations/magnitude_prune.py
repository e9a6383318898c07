"""magnitude_prune: trim, then add."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_share, summed, trim
from adapterkit.combinations.protocol import Deltas, Merged, Seeds


@dataclass(frozen=True)
class MagnitudePrune:
    """Δ' = Σᵢ wᵢ τᵢ, τᵢ the int(density·n) largest magnitudes of Δᵢ, of equal ones the first in row-major order. (PEFT's.)"""

    density: float
    name = "magnitude_prune"
    source = "arXiv:2306.01708 (its trimming alone)"

    def __post_init__(self):
        check_share("density", self.density)

    def merged(self, deltas: Deltas, weights: Sequence[float], seeds: Seeds) -> Merged:
        return summed(deltas, weights, [trim(deltas, i, self.density) for i in range(deltas.count)])
