"""random: a and b are uniform, so the delta is not zero; for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.verbs.init.methods.protocol import DrawnInit


@dataclass(frozen=True)
class Random(DrawnInit):
    """a ~ U(-1/√in, 1/√in), b ~ U(-1/√r, 1/√r): a delta from the start (PEFT's False).

    On an embedding too, where PEFT draws both from N(0, 1)."""

    name = "random"
    source = "PEFT"
    changes_base = False
    zero_b = False

    def draw(
        self, a_shape: tuple[int, ...], b_shape: tuple[int, ...], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """a and b in float32."""

        def uniform(shape: tuple[int, ...]) -> Tensor:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        return uniform(a_shape), uniform(b_shape)
