"""olora: the factors come from the weight's QR decomposition, the base keeps the rest."""

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import ComputedInit


@dataclass(frozen=True)
class Olora(ComputedInit):
    """b = Q_r, a = R_r of W = QR; the base becomes W - scale·b@a.

    Only the first r columns of Q are computed: they depend only on the first r columns of W. A rank
    above min(out, in) is filled with zeros."""

    name = "olora"
    source = "arXiv:2406.01775"
    needs = ("weight",)
    changes_base = True

    def factors(self, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight (out, in) float32."""
        b, _ = torch.linalg.qr(weight[:, : min(rank, *weight.shape)])
        b = torch.nn.functional.pad(b, (0, rank - b.shape[1])).contiguous()
        return b.T @ weight, b
