"""mica: b has the weight's weakest left singular vectors and stays fixed, a is zero."""

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor
from adapterkit.kernels.lowrank import truncated
from adapterkit.verbs.init.methods.protocol import ComputedInit


@dataclass(frozen=True)
class Mica(ComputedInit):
    """b = the left singular vectors of the smallest singular values, a = 0: the delta is zero, and
    only a is trained."""

    name = "mica"
    source = "PEFT"
    needs = ("weight",)
    changes_base = False
    fixed = ("b",)

    def factors(self, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) float32."""
        u = truncated.trailing_svd(weight, rank).u
        return weight.new_zeros(rank, weight.shape[1]), u.to(weight.dtype).contiguous()
