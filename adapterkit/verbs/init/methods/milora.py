"""milora: the factors take the minor component of the weight, the base keeps the rest."""

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor
from adapterkit.kernels.lowrank import truncated
from adapterkit.kernels.lowrank.algebra import Svd, balanced_factors
from adapterkit.verbs.init.methods.protocol import ComputedInit


@dataclass(frozen=True)
class Milora(ComputedInit):
    """scale·b@a = U S Vᵀ of the smallest singular values of W; the base becomes W - scale·b@a.

    A rank above min(out, in) is filled with zeros.
    """

    name = "milora"
    source = "arXiv:2406.09044"
    needs = ("weight",)
    changes_base = True

    def factors(self, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) float32."""
        u, s, vh = (part.to(weight.dtype) for part in truncated.trailing_svd(weight, rank))
        return balanced_factors(Svd(u, s, vh), rank, scale)
