"""Factors of linear layers: nn.Linear, quantized ones, and GPT-2's Conv1D."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from adapterkit.runtime.factors import FactorsPart
from adapterkit.runtime.quantized import weight_of


class LinearPart(FactorsPart):
    """a (r, in), b (out, r); delta (out, in)."""

    axis = 0

    @classmethod
    def shapes(cls, host: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, host.in_features), (host.out_features, rank)

    @classmethod
    def matrix(cls, host: Any) -> Tensor:
        return weight_of(host).detach().float()

    def product(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, a), b, bias)

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return b @ a


class Conv1DPart(LinearPart):
    """GPT-2's Conv1D stores its weight as (in, out); delta is (b·a)ᵀ."""

    axis = 1

    @classmethod
    def shapes(cls, host: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        columns, rows = host.weight.shape
        return (rank, columns), (rows, rank)

    @classmethod
    def matrix(cls, host: Any) -> Tensor:
        return weight_of(host).detach().float().T

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T
