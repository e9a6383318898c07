"""lora_ga: the first step of the factors approximates that of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.core import options
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank import truncated
from adapterkit.kernels.lowrank.algebra import Svd, fix_sign
from adapterkit.verbs.init.methods.protocol import ComputedInit

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass(frozen=True)
class LoraGa(ComputedInit):
    """a = rows of Vᵀ, b = columns of U S, of the leading 2r triplets of the gradient dLoss/dW; the
    base becomes W - scale·b@a.

    `direction`: `ArB2r` (a the first r, b the second), `A2rBr` (the other way around), `ArBr` (b
    the 1st, 3rd, ..., a the 2nd, 4th, ...), `random` (r of them, the same in both). `scale` of b:
    `stable` (out^¼ / √stable_gamma), `weight_svd` (W's largest singular value over b's largest),
    `gd_scale` (a and b over the adapter's scale), `unit` (none).

    As PEFT, which unlike the paper's code keeps S in b and leaves a as it is. Unlike PEFT: the
    decomposition is exact; `out` is the layer's also if the weight is stored as (in, out); `random`
    with `weight_svd` uses b's largest value, not the first one drawn, relative to which others may
    be large. Each row of Vᵀ has its largest element positive. If the gradient has fewer than 2r
    triplets, zeros replace them."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    name = "lora_ga"
    source = "arXiv:2407.05000"
    needs = ("weight", "gradient")
    changes_base = True
    kinds = ("linear",)
    triplets_per_rank = 2

    def __post_init__(self):
        options.checked("direction", options.choice(DIRECTIONS), self.direction)
        options.checked("scale", options.choice(SCALES), self.scale)
        options.checked("stable_gamma", options.COUNT, self.stable_gamma)

    @property
    def draws(self) -> bool:
        """True if the factors need random numbers."""
        return self.direction == "random"

    def factors(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        gradient: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank); weight and gradient (out, in) float32."""
        u, s, vh = _leading(gradient, 2 * rank)
        in_a, in_b = self._indices(rank, generator)
        a, b = vh[in_a], u[:, in_b] * s[in_b]
        if self.scale == "stable":
            b = b * (len(weight) ** 0.25 / self.stable_gamma**0.5)
        elif self.scale == "weight_svd":
            largest = float(s[in_b].max())
            if largest > 0:
                b = b * (float(truncated.truncated_svd(weight, 1).s[0]) / largest)
        elif self.scale == "gd_scale":
            a, b = a / scale, b / scale
        return a.contiguous(), b.contiguous()

    def _indices(self, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The indices of the triplets for a and for b."""
        order = torch.arange(2 * rank)
        if self.direction == "random":
            assert generator is not None
            drawn = torch.randperm(2 * rank, generator=generator)[:rank]
            return drawn, drawn
        if self.direction == "ArBr":
            return order[1::2], order[0::2]
        first, second = order[:rank], order[rank:]
        return (first, second) if self.direction == "ArB2r" else (second, first)


def _leading(gradient: Tensor, count: int) -> Svd:
    """`count` triplets with fixed signs, zeros if there are fewer."""
    u, s, vh = truncated.truncated_svd(gradient, count)
    signs = torch.stack([(fix_sign(row) * row).sum().sign() for row in vh])
    missing = count - len(s)
    return Svd(
        torch.nn.functional.pad(u * signs, (0, missing)),
        torch.nn.functional.pad(s, (0, missing)),
        torch.nn.functional.pad(vh * signs[:, None], (0, 0, 0, missing)),
    )
