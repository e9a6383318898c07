"""breadcrumbs: drop the largest and the smallest, then add."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapterkit.combinations.common import Prune, check_share, cut, summed
from adapterkit.combinations.protocol import Deltas, Merged, Seeds
from adapterkit.kernels.elementwise import Trim


@dataclass(frozen=True)
class Breadcrumbs:
    """Δ' = Σᵢ wᵢ βᵢ, βᵢ the int(density·n) largest magnitudes of Δᵢ that are left when the int(gamma·n) largest of all are dropped.

    Where density + gamma exceeds 1, fewer outliers are dropped and the density is kept; at density 1 none are (both as mergekit).
    The paper drops by layer, as here. Of equal magnitudes the first in row-major order count as larger.
    """

    density: float
    gamma: float = 0.01
    name = "breadcrumbs"
    source = "arXiv:2312.06795"

    def __post_init__(self):
        check_share("density", self.density)
        check_share("gamma", self.gamma)

    def merged(self, deltas: Deltas, weights: Sequence[float], seeds: Seeds) -> Merged:
        return summed(deltas, weights, [self._prune(deltas, i) for i in range(deltas.count)])

    def _prune(self, deltas: Deltas, which: int) -> Prune:
        size = deltas.shape[0] * deltas.shape[1]
        keep = int(self.density * size)
        top = min(int(self.gamma * size), size - keep)
        larger, outliers = Trim(cut(deltas, which, keep + top)), Trim(cut(deltas, which, top))

        def prune(block: Tensor) -> None:
            largest = block.clone()
            outliers(largest)
            larger(block)
            block.sub_(largest)

        return prune
