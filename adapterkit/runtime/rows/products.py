"""Linear layers in a mixed batch: the products of all rows at once, DoRA's factors included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.kernels import mixed
from adapterkit.runtime.layers.linear import Conv1DPart, LinearPart
from adapterkit.runtime.parts.factors import FactorsPart
from adapterkit.runtime.site import Part, Site


@dataclass(frozen=True)
class AdapterTerm:
    """One adapter at a linear layer: stretch·y + offset + scale·(x·aᵀ)·bᵀ."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    stretch: Tensor | None  # (out,)
    offset: Tensor | None  # (out,)


def share_of(site: Site, parts: Mapping[str, Part]) -> AdapterTerm | None:
    """The share of an adapter whose only part here is a linear layer's factors, else None."""
    part = parts.get("delta")
    if len(parts) != 1 or type(part) not in (LinearPart, Conv1DPart):
        return None
    assert isinstance(part, FactorsPart)
    if part.magnitude is None:
        a, b = part.joined()
        scale = part.stored_scale
        return AdapterTerm(a, b, scale, None, None if part.bias is None else part.bias * scale)
    stretch, a, b = part.folded()
    bias = site.host._parameters.get("bias")
    assert stretch is not None
    return AdapterTerm(a, b, 1.0, stretch, None if bias is None else (1 - stretch) * bias)


class LinearRows:
    """The products of all rows at one linear layer; factors are stacked at the first call."""

    def __init__(self, shares: Sequence[AdapterTerm], index: Sequence[int], *, in_place: bool):
        dtypes = [tensor.dtype for share in shares for tensor in (share.a, share.b)]
        self.dtype = dtypes[0]
        for dtype in dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.factors = [(s.a.to(self.dtype), s.b.to(self.dtype), s.scale) for s in shares]
        self.index, self.in_place = index, in_place
        self.stretch = self._rows([s.stretch for s in shares], 1.0)
        self.offset = self._rows([s.offset for s in shares], 0.0)
        self._dense: tuple[Tensor, Tensor, Tensor] | None = None
        self._groups: mixed.Groups | None = None
        self._sizes: dict[int, int] = {}  # by the tokens of a row

    def _rows(self, values: Sequence[Tensor | None], default: float) -> Tensor | None:
        """(rows, 1, out), the default for rows without a value; None where no row has one."""
        given = next((value for value in values if value is not None), None)
        if given is None:
            return None
        plain = torch.full_like(given, default)
        own = [plain if value is None else value for value in values]
        return torch.stack([own[i] if i >= 0 else plain for i in self.index])[:, None].to(
            self.dtype
        )

    def _size(self, tokens: int) -> int:
        if tokens not in self._sizes:
            self._sizes[tokens] = mixed.group_size(self.index, tokens)
        return self._sizes[tokens]

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y, the base's output, changed for each row; x: its input."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._add(y, x)
        return self._add(y, x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        rows = len(self.index)
        x = x.reshape(rows, -1, x.shape[-1])
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        owned = self.in_place and y.dtype == self.dtype and not y.requires_grad
        out = y if owned and y.is_contiguous() else y.to(self.dtype, copy=True).contiguous()
        total = out.view(rows, -1, y.shape[-1])
        if self.stretch is not None:
            total.mul_(self.stretch)
        if self.offset is not None:
            total.add_(self.offset)
        if mixed.dense_is_better(rows, len(self.factors), x.shape[1]):
            if self._dense is None:
                with torch.inference_mode(False), torch.no_grad():
                    self._dense = mixed.dense_factors(self.factors, self.index)
            mixed.add_dense_(total, x, *self._dense)
        else:
            size = self._size(x.shape[1])
            if self._groups is None or self._groups.size != size:
                with torch.inference_mode(False), torch.no_grad():
                    self._groups = mixed.grouped_factors(self.factors, self.index, size)
            mixed.add_grouped_(total, x, self._groups)
        return out if out.dtype == y.dtype else out.to(y.dtype)


def linear_rows(site: Site, names: Sequence[str | None]) -> LinearRows | None:
    """All rows at once, where each adapter has the factors of a linear layer here; else None."""
    adapters = [name for name in dict.fromkeys(names) if name is not None]
    index = [-1 if name is None else adapters.index(name) for name in names]
    shares = []
    # not in inference mode, or no later call could record gradients of its input
    with torch.inference_mode(False), torch.no_grad():
        for name in adapters:
            share = share_of(site, site.parts[name])
            if share is None:
                return None
            shares.append(share)
        # the output of another class may be a view, or not writable (8-bit layers)
        return LinearRows(shares, index, in_place=type(site.host) is nn.Linear)
