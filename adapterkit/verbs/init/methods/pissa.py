"""pissa: the factors take the principal component of the weight, the base keeps the rest."""

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor
from adapterkit.kernels.lowrank import leading
from adapterkit.kernels.lowrank.algebra import balanced_factors
from adapterkit.verbs.init.methods.protocol import ComputedInit


@dataclass(frozen=True)
class Pissa(ComputedInit):
    """scale·b@a = U_r S_r V_rᵀ, the leading triplets of W, split evenly; the base becomes W -
    scale·b@a.

    Singular values to 1e-5 of the largest one, by block Krylov where that is faster; PEFT
    decomposes in full. `niter`: a randomized method of so many rounds, from its own seed. It is as
    fast and less exact, for comparisons with PEFT's `pissa_niter_4`."""

    niter: int | None = None

    name = "pissa"
    tier = "core"
    source = "arXiv:2404.02948"
    needs = ("weight",)
    changes_base = True

    def factors(self, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) float32."""
        if self.niter is None:
            return balanced_factors(leading.leading_triplets(weight, rank), rank, scale)
        return balanced_factors(leading.randomized_triplets(weight, rank, self.niter), rank, scale)
