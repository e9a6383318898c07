"""Experts of a linear layer, and routing of tokens to them (Arrow, arXiv:2405.11157)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.core.engine.device import with_float64
from adapterkit.core.errors import Refused, shown
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.routing import add_routed
from adapterkit.runtime.patches.factors import padded
from adapterkit.runtime.sharding import full_tensor, spread
from adapterkit.runtime.site import Patch, Site


@dataclass(frozen=True)
class Experts:
    """The experts of one module as `adapterkit arrow` stores them, ranks padded with zeros."""

    names: tuple[str, ...]
    a: Tensor  # (E, r, in)
    b: Tensor  # (E, out, r)
    scales: tuple[float, ...]
    prototypes: Tensor  # (E, in)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Experts":
        a, b, prototypes = (t.to(device, dtype) for t in (self.a, self.b, self.prototypes))
        return Experts(self.names, a, b, self.scales, prototypes)

    def followed_by(self, others: "Experts") -> "Experts":
        """These experts followed by others, padded to the larger rank."""
        rank = max(self.a.shape[1], others.a.shape[1])
        return Experts(
            self.names + others.names,
            torch.cat([padded(each.a, 1, rank) for each in (self, others)]),
            torch.cat([padded(each.b, 2, rank) for each in (self, others)]),
            self.scales + others.scales,
            torch.cat([self.prototypes, others.prototypes]),
        )

    def without(self, name: str) -> "Experts | None":
        """These experts except one, or None if none remains; unused ranks are removed."""
        rest = [i for i, other in enumerate(self.names) if other != name]
        if not rest:
            return None
        a, b = self.a[rest], self.b[rest]
        used = (a.ne(0).any(2) | b.ne(0).any(1)).any(0).nonzero()  # rows of a, columns of b
        rank = int(used.max()) + 1 if len(used) else 1
        return Experts(
            tuple(self.names[i] for i in rest),
            a[:, :rank],
            b[:, :, :rank],
            tuple(self.scales[i] for i in rest),
            self.prototypes[rest],
        )


class RoutedPatch(Patch):
    """y + weight·Σ_e coefficient_e·scale_e·b_e·a_e·x, e the `top_k` experts with the largest
    |x·prototype_e| and the coefficients their softmax at `temperature`, for each token.

    x in the factors' dtype, not normalized. Modules that only some experts have route between
    these.
    """

    down: nn.Parameter  # (E·r + E, in): every a, then the prototypes
    up: nn.Parameter  # (E·r, out): every bᵀ
    scale_of_each: Tensor  # (E,)

    def __init__(self, adapter: str, experts: Experts, top_k: int, temperature: float):
        super().__init__()
        self.adapter, self.top_k, self.temperature = adapter, top_k, temperature
        self.hold(experts)

    def hold(self, experts: Experts) -> None:
        """Replace the experts."""
        down = torch.cat([experts.a.flatten(0, 1), experts.prototypes])
        up = experts.b.transpose(1, 2).flatten(0, 1).contiguous()
        self.names, self.scales = experts.names, experts.scales
        for name, value in (("down", down), ("up", up)):
            before = self._parameters.get(name)
            value = value if before is None else spread(value, before)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("scale_of_each", torch.tensor(self.scales).to(down))

    @property
    def experts(self) -> Experts:
        count, width = len(self.names), self.up.shape[0]
        down, up = full_tensor(self.down.detach()), full_tensor(self.up.detach())
        a = down[:width].view(count, -1, down.shape[1])
        b = up.view(count, -1, up.shape[1]).transpose(1, 2)
        return Experts(self.names, a, b, self.scales, down[width:])

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # neighbors stay in order
            with torch.autocast(x.device.type, enabled=False):
                return self._add(y, weight, x)
        return self._add(y, weight, x)

    def _add(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        dtype = self.down.dtype
        gradient = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        # the output of another class may be a view, or not writable
        own = type(self.host) is nn.Linear or y.dtype != dtype
        total = add_routed(
            y.to(dtype).reshape(-1, y.shape[-1]),
            x.to(dtype).reshape(-1, x.shape[-1]),
            self.down,
            self.up,
            self.scale_of_each,
            top_k=min(self.top_k, len(self.names)),
            temperature=self.temperature,
            weight=weight,
            in_place=own and not gradient,
        )
        return total.view(y.shape)

    def unmergeable(self, site: Site, weight: float) -> str | None:
        return "which experts act depends on the token (Arrow)"

    def rescale(self, factor: float) -> None:
        self.scales = tuple(scale * factor for scale in self.scales)
        self.scale_of_each.mul_(factor)

    def stored(self, path: str) -> dict[str, Tensor]:
        raise Refused(
            f"{shown(self.adapter)} routes between experts (Arrow)",
            expected="an adapter of low-rank factors",
            where=shown(path),
            hint="save writes a router by itself; combine the experts' adapters",
            code="AK806",
        )

    @property
    def rank(self) -> int:
        """The largest rank of the experts."""
        return self.up.shape[0] // len(self.names)

    def norms(self) -> Sequence[float]:
        """‖scale·b·a‖ of each expert, Frobenius."""
        where = with_float64(self.experts.a[0].device), torch.float64
        both = zip(self.experts.a, self.experts.b, self.scales, strict=True)
        return [abs(s) * algebra.norm(Product(b.to(*where), a.to(*where))) for a, b, s in both]

    def extra_repr(self) -> str:
        return f"{len(self.names)} experts of rank {self.rank}, top_k={self.top_k}"
