"""gaussian: a is normal, b is zero."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import DrawnInit


@dataclass(frozen=True)
class Gaussian(DrawnInit):
    """a ~ N(0, 1/r²), b = 0: the delta is zero (as in diffusers)."""

    name = "gaussian"
    tier = "core"
    source = "diffusers"
    changes_base = False
    zero_b = True

    def draw(
        self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """a and b in float32; r is a's first axis."""
        a = torch.empty(a_shape).normal_(0, 1 / a_shape[0], generator=generator)
        return a, torch.zeros(b_shape)
