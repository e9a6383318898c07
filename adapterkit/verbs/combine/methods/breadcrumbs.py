"""breadcrumbs: drop the largest and the smallest elements of each delta, then add."""

from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import Prune, PrunedSum, check_share, without_outliers
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds


@dataclass(frozen=True)
class Breadcrumbs(PrunedSum):
    """Δ' = Σᵢ wᵢ βᵢ, βᵢ = Δᵢ without its outliers, the int(gamma·n) largest magnitudes, and without
    all but the int(density·n) largest of the others.

    If density + gamma exceeds 1, fewer outliers are dropped and the density is kept; at density 1
    none are (both as mergekit). The paper drops by layer, as here. Among equal magnitudes, the
    first in row-major order count as larger."""

    density: float
    gamma: float = 0.01
    name = "breadcrumbs"
    source = "arXiv:2312.06795"
    acts_on = "elements"

    def __post_init__(self):
        check_share("density", self.density)
        check_share("gamma", self.gamma)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        return without_outliers(deltas, which, self.density, self.gamma)
