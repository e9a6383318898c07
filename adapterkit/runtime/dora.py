"""DoRA (arXiv:2402.09353): the rows of W + delta get trained lengths.

y = g·(W + delta)·x + bias with g = magnitude / ‖W + delta‖, one per output; the norm is a constant
for autograd (section 4.3). It comes without the dense sum, from

    ‖W + s·b·a‖² = ‖W‖² + 2s·⟨W·aᵀ, b⟩ + s²·⟨b·(a·aᵀ), b⟩    per row,

in float32 products summed in float64. PEFT forms the dense sum at every step, and rounds new
magnitudes to the base's dtype; here they are float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adapterkit.runtime.memo import Memo
from adapterkit.runtime.quantized import is_readable, stored, weight_of

BLOCK = 2**24  # values that are widened to float32 at a time
SMALLEST = 2.0**-40  # of ‖W‖² + ‖delta‖²: what cancels to less is rounding


class RowNorms:
    """‖W + s·b·a‖ of each output; what depends on W alone, or on W and a, is computed once.

    `offload`: on the accelerator, where there is one, and not on the factors' device."""

    def __init__(self, *, offload: bool = False):
        self.offload = offload
        self.squares: Memo[Tensor] = Memo()
        self.projected: Memo[Tensor] = Memo()

    def __call__(
        self,
        host: nn.Module,
        axis: int,  # of the outputs in the host's weight
        a: Tensor,  # (r, in, ...)
        b: Tensor,  # (out, r / groups, ...)
        scale: float,
    ) -> Tensor:  # (out,) float32
        groups = a.shape[0] // b.shape[1]  # of a convolution
        where = (torch.accelerator.current_accelerator() if self.offload else None) or a.device
        rows = _Rows(host, axis, groups, where)
        source = [] if torch.compiler.is_compiling() else stored(host)
        squares = self.squares(rows.squares, source, where)
        projected = self.projected(lambda: rows.project(a), [*source, a], where)
        with torch.no_grad():
            wide = torch.float32 if where.type == "mps" else torch.float64
            core = _by_group(a.to(where, wide), groups)
            outer = _by_group(b.to(where, wide), groups)
            own = scale**2 * (outer @ (core @ core.mT) * outer).sum(-1)
            squares = squares.to(wide)
            total = squares + 2 * scale * (projected * outer).sum(-1) + own
            norms = total.maximum(SMALLEST * (squares + own)).sqrt()
            return norms.flatten().to(a.device, torch.float32)


class _Rows:
    """A host's weight as float32 rows, one for each output, read when they are needed."""

    def __init__(self, host: nn.Module, axis: int, groups: int, where: torch.device):
        self.host, self.axis, self.groups, self.where = host, axis, groups, where

    def blocks(self) -> Iterator[Tensor]:
        """Rows (n, in), or (groups, n / groups, in)."""
        weight = weight_of(self.host)
        rows = _by_group(weight.movedim(self.axis, 0), self.groups)
        size = rows.shape[-2]
        if weight.dtype != torch.float32 or weight.device != self.where:
            size = max(1, BLOCK * size // max(1, rows.numel()))
        for block in rows.split(size, -2):
            yield block.to(self.where, torch.float32)

    @torch.no_grad()
    def squares(self) -> Tensor:
        """‖W‖²"""
        norms = [torch.linalg.vector_norm(block, dim=-1) for block in self.blocks()]
        return torch.cat(norms, -1).square()

    @torch.no_grad()
    def project(self, a: Tensor) -> Tensor:
        """W·aᵀ"""
        columns = _by_group(a.to(self.where, torch.float32), self.groups).mT
        with torch.autocast(self.where.type, enabled=False):
            return torch.cat([block @ columns for block in self.blocks()], -2)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(n, ...) as (n, m), or as (groups, n / groups, m)."""
    rows = tensor.flatten(1)
    return rows if groups == 1 else rows.unflatten(0, (groups, -1))


def problem(host: nn.Module, axis: int | None) -> str | None:
    """Why a layer cannot have magnitudes; None if it can."""
    if axis is None:
        return f"a {type(host).__name__} has no DoRA"
    if not is_readable(host):
        return f"the weight of a {type(host).__name__} cannot be read (see register_quantized)"
    return None


def magnitude_shape(b_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out,); of a convolution (1, out, 1, ...), as files have it."""
    spatial = len(b_shape) - 2
    return (1, b_shape[0], *(1,) * spatial) if spatial else (b_shape[0],)


def ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g (out,) float32"""
    return magnitude.flatten().to(torch.float32) / norms


def on_outputs(vector: Tensor, behind: int) -> Tensor:
    """(out,) to be multiplied with a tensor that has `behind` axes behind that of its outputs."""
    return vector.view(-1, *(1,) * behind) if behind else vector
