"""Low-rank factors of one adapter on one module: the part that all kinds of layers share."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.adapters.keys import part_keys
from adapterkit.runtime.site import Part, Site


class FactorsPart(Part):
    """y + weight·scale·b(a(dropout(x))) of one adapter on one module.

    a (r, in) and b (out, r) as in the file, float32 unless the caller says otherwise. Subclasses
    say what b·a means for their layer. `initial`: factors that the base lacks (PiSSA and the like):
    their product is subtracted, so the base itself never changes.
    """

    stored_as: ClassVar[str] = "module"  # the layout of its keys
    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(
        self,
        adapter: str,
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        initial: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.adapter, self.scale, self.dropout = adapter, scale, dropout
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude, requires_grad=False)
        for name, value in zip(("initial_a", "initial_b"), initial or (None, None), strict=True):
            self.register_buffer(name, value)

    @property
    def stored_rank(self) -> int:
        """The rank of the file: with the initial factors."""
        return self.rank + (0 if self.initial_a is None else self.initial_a.shape[0])

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @classmethod
    def shapes(cls, host: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b for a host."""
        raise NotImplementedError

    def product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """b·a applied to the host's input."""
        raise NotImplementedError

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        """b·a in the layout of the host's parameter."""
        raise NotImplementedError

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        update = self.product(x, self.a, self.b)
        if self.initial_a is not None and self.initial_b is not None:
            update = update - self.product(x, self.initial_a, self.initial_b)
        if self.bias is not None:
            update = update + self.bias
        return y + update * (self.scale * weight)

    def input(self, x: Tensor) -> Tensor:
        """The host's input in the factors' dtype."""
        return x if x.dtype == self.a.dtype else x.to(self.a.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """scale·b·a in the layout of the host's parameter, float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        delta = self.dense(self.a.to(wide), self.b.to(wide))
        if self.initial_a is not None and self.initial_b is not None:
            delta -= self.dense(self.initial_a.to(wide), self.initial_b.to(wide))
        return delta.mul_(self.scale)

    def norm(self) -> float:
        """‖scale·b·a‖, Frobenius."""
        return float(self.delta().norm())

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        values["weight"].add_(self.delta(), alpha=weight)
        if self.bias is not None:
            values["bias"].add_(self.bias, alpha=weight * self.scale)

    def unmergeable(self, site: Site, weight: float) -> str | None:
        if self.bias is not None and site.host._parameters.get("bias") is None:
            return "it adds a bias (lora_bias) and the layer has none"
        return None

    def rescale(self, factor: float) -> None:
        self.scale *= factor

    def stored(self, path: str) -> dict[str, Tensor]:
        """Initial factors join the trained ones: b·a - b0·a0 = [b, -b0]·[a; a0], right on the
        original base."""
        a, b = self.a, self.b
        if self.initial_a is not None and self.initial_b is not None:
            a, b = torch.cat([a, self.initial_a]), torch.cat([b, -self.initial_b], 1)
        values = {"a": a, "b": b, "bias": self.bias, "magnitude": self.magnitude}
        keys = part_keys(path, self.stored_as)
        return {keys[role]: value for role, value in values.items() if value is not None}

    def extra_repr(self) -> str:
        shapes = f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}"
        return f"{shapes}, scale={self.scale:g}, dropout={self.dropout:g}"
