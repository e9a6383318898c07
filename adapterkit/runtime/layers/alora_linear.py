"""Factors of aLoRA (arXiv:2504.12397): a linear layer's, from an invocation sequence on."""

import torch
from torch import Tensor

from adapterkit.core.errors import Refused
from adapterkit.runtime.layers.linear import Conv1DPart, LinearPart
from adapterkit.runtime.parts.alora import Invocations
from adapterkit.runtime.parts.factors import FactorsPart
from adapterkit.runtime.site import Site


class InvokedPart(LinearPart):
    """Factors that act on the last tokens of each row, as many as the invocation says."""

    mixes_rows = False
    invocations: Invocations

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        rows, length = self.invocations.shape
        count = self.invocations.count(self.adapter)
        if x.ndim == 2:  # (rows * tokens, in), as routers of experts get it
            tokens = x.shape[0] // max(rows, 1)
            if tokens not in (1, length) or tokens * rows != x.shape[0]:
                raise Refused(
                    f"an input of {x.shape[0]} vectors for {rows} rows of {length} tokens",
                    expected="one vector for each token, in order",
                    where="aLoRA",
                    hint="exclude this layer from targets",
                    code="AK806",
                )
            shaped = self.forward(
                y.view(rows, tokens, y.shape[-1]), weight, x.view(rows, tokens, x.shape[-1])
            )
            return shaped.reshape(y.shape[0], -1)
        length = x.shape[1]
        longest = min(max(count, default=0), length)
        if longest == 0:
            return y
        first = length - longest
        tail = y[:, first:]
        changed = super().forward(tail.clone(), weight, x[:, first:])
        if min(count) < longest:
            acts = self.invocations.last(count, longest, x.device)
            changed = torch.where(acts[..., None], changed, tail.to(changed.dtype))
        return torch.cat([y[:, :first].to(changed.dtype), changed], 1) if first else changed

    def unmergeable(self, site: Site, weight: float) -> str | None:
        return "an activated LoRA acts on the tokens after its invocation only"


class InvokedConv1DPart(InvokedPart, Conv1DPart):
    """The same on GPT-2's Conv1D."""


INVOKED: dict[type[FactorsPart], type[InvokedPart]] = {
    LinearPart: InvokedPart,
    Conv1DPart: InvokedConv1DPart,
}
