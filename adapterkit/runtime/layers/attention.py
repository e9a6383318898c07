"""Factors of nn.MultiheadAttention, which does not call its projections as modules."""

import torch
from torch import Tensor

from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.site import CHILD, Host, Values

OUTPUT = "out_proj"  # the child that the attention reads and does not call


class AttentionPatch(FactorsPatch):
    """in_proj_weight (3·E, E) + weight·scale·b·a while the attention runs: a (r, E), b (3·E, r).

    The sum is computed in float32 or wider and rounded once. As in PEFT, dropout does nothing,
    because it acts on the input of factors."""

    kind, role = "attention", "weight"
    parameter = "in_proj_weight"
    host_bias = "in_proj_bias"

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, host.embed_dim), (3 * host.embed_dim, rank)

    @classmethod
    def members(cls, path: str) -> list[tuple[str, type[FactorsPatch]]]:
        return [(path, cls), (f"{path}.{OUTPUT}", AttentionOutputPatch)]

    @classmethod
    def refusal_reason(cls, host: Host, rank: int) -> tuple[str, str] | None:
        is_one = host._qkv_same_embed_dim
        return None if is_one else ("factors", "one width of queries, keys and values")

    def change(self, values: Values, weight: float) -> None:
        scale = self.scale * weight
        with torch.autocast(self.a.device.type, enabled=False):
            own = values[self.parameter]
            wide = torch.promote_types(own.dtype, self.a.dtype)
            a, b = (x.to(wide) for x in self.joined())
            values[self.parameter] = torch.addmm(own.to(wide), b * scale, a)
            if self.bias is not None:
                own = values[self.host_bias]
                bias = self.bias * scale
                values[self.host_bias] = bias if own is None else own + bias

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return b @ a


class AttentionOutputPatch(AttentionPatch):
    """out_proj.weight (E, E) + weight·scale·b·a while the attention runs, at the attention's site.

    PEFT adapts both projections, or neither, and adds this delta twice."""

    kind, role = "attention_output", f"weight:{OUTPUT}"
    parameter = f"{OUTPUT}.weight"
    host_bias = f"{OUTPUT}.bias"

    @classmethod
    def members(cls, path: str) -> list[tuple[str, type[FactorsPatch]]]:
        return [(path, cls)]

    @classmethod
    def refusal_reason(cls, host: Host, rank: int) -> tuple[str, str] | None:
        return None

    @classmethod
    def place(cls, path: str) -> str:
        return path.rpartition(".")[0]

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, host.in_features), (host.out_features, rank)

    def module(self, path: str) -> str:
        return f"{path}.{OUTPUT}"

    def target(self, path: str) -> str:
        """The attention if both projections have factors, as PEFT adapts them; otherwise itself."""
        site: Host = self.host._modules[CHILD]
        has_other = AttentionPatch.role in site.patches[self.adapter]
        return path if has_other else self.module(path)
