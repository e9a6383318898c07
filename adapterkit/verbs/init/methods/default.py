"""default: a is uniform, as in torch's linear layers, and b is zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import DrawnInit


@dataclass(frozen=True)
class Default(DrawnInit):
    """a ~ U(-1/√in, 1/√in), b = 0: the delta is zero (Kaiming-uniform, as in LoRA's own code)."""

    name = "default"
    tier = "core"
    source = "arXiv:2106.09685"
    changes_base = False
    zero_b = True

    def draw(
        self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """a and b in float32; `in` includes the kernel's elements."""
        bound = 1 / math.sqrt(math.prod(a_shape[1:]))
        a = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
        return a, torch.zeros(b_shape)
