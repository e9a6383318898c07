"""orthogonal: a and b act on orthogonal halves of the rank, so both train from the start and the
delta is zero."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.core.errors import Refused, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import DrawnInit


@dataclass(frozen=True)
class Orthogonal(DrawnInit):
    """a = (G₁ Q₁)ᵀ/10, b = G₂ᵀ Q₂/10 with Q₁ and Q₂ the even and the odd rows of an orthogonal
    (r, r) matrix, G₁ and G₂ normal: b@a = 0, and both factors train from the start."""

    name = "orthogonal"
    source = "PEFT"
    changes_base = False
    zero_b = False
    kinds = ("linear", "embedding", "experts")

    def draw(
        self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """a (r, in) and b (out, r) in float32; `Refused` for an odd rank and for convolutions."""
        if len(a_shape) != 2 or a_shape[0] % 2:
            raise Refused(
                f"orthogonal factors of shapes {shown(str(a_shape))}, {shown(str(b_shape))}",
                expected="an even rank, and matrices",
                where="init",
                hint="give an even rank, or exclude the convolutions",
                code="AK105",
            )
        (rank, width), out = a_shape, b_shape[0]
        q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        a = torch.randn(width, rank // 2, generator=generator) @ q[0::2]
        b = torch.randn(rank // 2, out, generator=generator).T @ q[1::2]
        return (a.T / 10).contiguous(), b / 10
