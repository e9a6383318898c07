"""breadcrumbs: drop the largest and the smallest, then add."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterkit.combinations.common import Prune, add_pruned, check_share, threshold
from adapterkit.combinations.protocol import Deltas, DenseDelta, OnElements, Seeds
from adapterkit.kernels.elementwise import Trim


@dataclass(frozen=True)
class Breadcrumbs(OnElements):
    """Δ' = Σᵢ wᵢ βᵢ, βᵢ = Δᵢ without its outliers, the int(gamma·n) largest magnitudes, and without
    all but the int(density·n) largest of the others.

    Where density + gamma exceeds 1, fewer outliers are dropped and the density is kept; at density
    1 none are (both as mergekit). The paper drops by layer, as here. Of equal magnitudes the first
    in row-major order count as larger.
    """

    density: float
    gamma: float = 0.01
    name = "breadcrumbs"
    source = "arXiv:2312.06795"
    acts_on = "elements"

    def __post_init__(self):
        check_share("density", self.density)
        check_share("gamma", self.gamma)

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        return add_pruned(deltas, weights, [self._prune(deltas, i) for i in range(deltas.count)])

    def _prune(self, deltas: Deltas, which: int) -> Prune:
        size = deltas.shape[0] * deltas.shape[1]
        keep = int(self.density * size)
        top = min(int(self.gamma * size), size - keep)
        larger = Trim(threshold(deltas, which, keep + top))
        outliers = Trim(threshold(deltas, which, top))

        def prune(block: Tensor) -> None:
            largest = block.clone()
            outliers(largest)
            larger(block)
            block.sub_(largest)

        return prune
