"""pissa: the factors are the principal part of the weight, the base keeps the rest."""

from dataclasses import dataclass

from torch import Tensor

from adapterkit.kernels.lowrank import balanced_factors
from adapterkit.kernels.truncated import truncated_svd


@dataclass(frozen=True)
class Pissa:
    """scale·b@a = U_r S_r V_rᵀ, the leading triplets of W, split evenly; the base becomes
    W - scale·b@a.

    Singular values to 1e-6 of the largest one, by block Krylov where that is faster; PEFT
    decomposes in full (`pissa`) or by a randomized method of a few rounds (`pissa_niter_4`), whose
    error is larger.
    """

    name = "pissa"
    source = "arXiv:2404.02948"
    needs = "weight"
    changes_base = True

    def factors(self, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) float32."""
        return balanced_factors(truncated_svd(weight, rank), rank, scale)
