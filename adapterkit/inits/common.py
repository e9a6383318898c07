"""What several inits share."""

from typing import Any

import torch
from torch import Generator, Tensor


def draw(
    method: Any,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    generator: Generator,
    embedding: bool,
) -> tuple[Tensor, Tensor]:
    """a and b of a method that needs nothing, float32.

    On an embedding the factor of the lookup is the one that is zero, as in LoRA's own code.
    """
    if embedding and method.zero_b:
        return torch.zeros(a_shape), torch.randn(b_shape, generator=generator)
    return method.draw(a_shape, b_shape, generator)
