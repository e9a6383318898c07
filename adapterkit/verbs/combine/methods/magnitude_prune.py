"""magnitude_prune: keep the largest elements of each delta, then add."""

from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import Prune, PrunedSum, check_share, trim
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds


@dataclass(frozen=True)
class MagnitudePrune(PrunedSum):
    """Δ' = Σᵢ wᵢ τᵢ, τᵢ the int(density·n) largest magnitudes of Δᵢ.

    As PEFT. Among equal magnitudes at the threshold, the first in row-major order are kept."""

    density: float
    name = "magnitude_prune"
    tier = "core"
    source = "arXiv:2306.01708 (its trimming alone)"
    acts_on = "elements"

    def __post_init__(self):
        check_share("density", self.density)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        return trim(deltas, which, self.density)
