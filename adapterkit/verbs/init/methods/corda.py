"""corda: the factors take the component of the weight that matters most, or least, for the layer's
inputs."""

from dataclasses import dataclass

from adapterkit.core import options
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank import algebra, truncated, weighted
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.init.methods.protocol import ComputedInit

METHODS = ("ipm", "kpm")
DAMPING = 0.01  # of the mean of C's diagonal


@dataclass(frozen=True)
class Corda(ComputedInit):
    """scale·b@a = U_r U_rᵀ W, U_r the leading left singular vectors of W C' (`ipm`, instruction
    previewed) or the trailing ones (`kpm`, knowledge preserved), C' = C + 0.01·mean(diag C)·1, C =
    E[x xᵀ]; the base becomes W - scale·b@a.

    This equals PEFT's U_r S_r V_rᵀ C'⁻¹, because W C' C'⁻¹ = W. It needs no inverse, and not the
    larger damping that PEFT uses if its float32 inverse fails. The norms of each column of b and
    row of a are equal; PEFT's depend on the scale of C. A rank above min(out, in) is filled with
    zeros."""

    corda_method: str = "ipm"

    name = "corda"
    source = "arXiv:2406.05223"
    needs = ("weight", "covariance")
    changes_base = True
    kinds = ("linear",)

    def __post_init__(self):
        options.checked("corda_method", options.choice(METHODS), self.corda_method)

    def factors(
        self, weight: Tensor, rank: int, scale: float, covariance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) and covariance (in, in) float32.

        Raises ValueError for a matrix that is no covariance, as `weighted.normalized`."""
        damped = weighted.normalized(covariance)
        damped.diagonal().add_(DAMPING)
        wide = weight.double()
        oriented = wide @ damped  # float64: the values of C' differ by orders of magnitude
        if self.corda_method == "ipm":
            u = truncated.truncated_svd(oriented, rank, tolerance=1e-7).u
        else:
            u = truncated.trailing_svd(oriented, rank).u
        a, b = algebra.balance(Product(u, u.T @ wide / scale))
        beyond = rank - u.shape[1]
        return torch.nn.functional.pad(a, (0, 0, 0, beyond)).float(), torch.nn.functional.pad(
            b, (0, beyond)
        ).float()
