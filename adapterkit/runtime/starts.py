"""Initial factors of new adapters."""

import math

import torch
from torch import Tensor

from adapterkit.runtime.factors import FactorsPart


def start(
    init: str | bool,
    kind: type[FactorsPart],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """a and b of a new adapter."""
    a, b = torch.empty(a_shape), torch.zeros(b_shape)
    bound = 1 / math.sqrt(math.prod(a_shape[1:]))
    if init == "gaussian":
        a.normal_(0, 1 / a_shape[0], generator=generator)
    else:
        a.uniform_(-bound, bound, generator=generator)
    if init is False:
        bound = 1 / math.sqrt(math.prod(b_shape[1:]))
        b.uniform_(-bound, bound, generator=generator)
    return a, b
