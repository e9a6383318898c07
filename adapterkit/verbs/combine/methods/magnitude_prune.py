"""magnitude_prune: trim, then add."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import add_pruned, check_share, trim
from adapterkit.verbs.combine.methods.protocol import Deltas, DenseDelta, OnElements, Seeds


@dataclass(frozen=True)
class MagnitudePrune(OnElements):
    """Δ' = Σᵢ wᵢ τᵢ, τᵢ the int(density·n) largest magnitudes of Δᵢ.

    As PEFT. Of equal magnitudes at the threshold the first in row-major order stay.
    """

    density: float
    name = "magnitude_prune"
    tier = "core"
    source = "arXiv:2306.01708 (its trimming alone)"
    acts_on = "elements"

    def __post_init__(self):
        check_share("density", self.density)

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        return add_pruned(
            deltas, weights, [trim(deltas, i, self.density) for i in range(deltas.count)]
        )
