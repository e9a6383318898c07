"""Factors of linear layers: nn.Linear, quantized ones, and GPT-2's Conv1D."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.core.weights.layers import is_conv1d
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.quantized import quantization_of, weight_of
from adapterkit.runtime.site import Host, Site


class LinearPatch(FactorsPatch):
    """a (r, in), b (out, r); delta (out, in)."""

    kind, axis = "linear", 0
    takes = ("dora", "lora_bias", "invocation_tokens", "tie")
    is_matrix = mixes_rows = True

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, host.in_features), (host.out_features, rank)

    @classmethod
    def matrix(cls, host: Host) -> Tensor:
        return weight_of(host).detach().float()

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_plain():
            return super().forward(y, weight, x)
        a, b = self.a, self.b
        is_dense = not y.is_nested and y.is_contiguous()
        if not (is_dense and x.dtype == y.dtype == a.dtype == b.dtype):
            return super().forward(y, weight, x)
        # y is fresh; with autograd the gradient would be copied
        u = F.linear(x, a)  # (..., r)
        rows = y.view(-1, y.shape[-1])
        rows.addmm_(u.view(-1, u.shape[-1]), b.T, alpha=self.scale * weight)
        return y

    def _is_plain(self) -> bool:
        """Return whether nn.Linear's own forward gave the output, and only b·a is added."""
        return (
            self.magnitude is self.bias is self.padded is self._buffers["initial_a"] is None
            and not (self.dropout and self.training)
            and self.site.is_plain
        )

    def unmergeable(self, site: Site, weight: float) -> str | None:
        host = site.host
        if not (isinstance(host, nn.Linear) or is_conv1d(host) or quantization_of(host)):
            return (
                f"how a {type(host).__name__} uses its weight is not known (see register_quantized)"
            )
        return super().unmergeable(site, weight)

    def product(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, a), b, bias)

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return b @ a


class Conv1DPatch(LinearPatch):
    """GPT-2's Conv1D stores its weight as (in, out); delta is (b·a)ᵀ."""

    kind, axis = "conv1d", 1
    takes = ("dora", "lora_bias", "invocation_tokens")

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        columns, rows = host.weight.shape
        return (rank, columns), (rows, rank)

    @classmethod
    def matrix(cls, host: Host) -> Tensor:
        return weight_of(host).detach().float().T

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T
