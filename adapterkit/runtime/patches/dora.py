"""DoRA (arXiv:2402.09353): trained lengths for the rows of W + delta.

y = g·(W + delta)·x + bias with g = magnitude / ‖W + delta‖, one per output; the norm is a constant
for autograd (section 4.3). It is computed without the dense sum, from

    ‖W + s·b·a‖² = ‖W‖² + 2s·⟨W·aᵀ, b⟩ + s²·⟨b·(a·aᵀ), b⟩    per row,

in float32 products summed in float64. In a forward W·aᵀ has torch's float32 precision: three digits
if the process allows TF32, in a term that is small relative to ‖W‖². PEFT forms the dense sum at
every step, and rounds new magnitudes to the base's dtype; here they are float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adapterkit.core.engine.device import has_float64
from adapterkit.runtime.patches.memo import Memo
from adapterkit.runtime.quantized import plainly_stored, unreadable, weight_of

BLOCK = 2**24  # values that are widened to float32 at a time
SHARE = 2.0**-40  # of ‖W‖² + ‖delta‖²: a smaller difference is rounding
SMALLEST = 2.0**-100  # the norm of a row of zeros, so that there is a ratio


class RowNorms:
    """‖W + s·b·a‖ of each output; terms that depend only on W, or on W and a, are computed once.

    `offload`: compute on an available accelerator, not on the factors' device."""

    def __init__(self, *, offload: bool = False):
        self.offload = offload
        self.squares: Memo[Tensor] = Memo()
        self.projected: Memo[Tensor] = Memo()

    def __call__(
        self,
        host: nn.Module,
        axis: int,  # of the outputs in the host's weight
        a: Tensor,  # (r, in, ...)
        b: Tensor,  # (out, r, ...)
        scale: float,
    ) -> Tensor:  # (out,) float32
        # a CUDA build of torch names its accelerator on machines without one, too
        offload = self.offload and torch.accelerator.is_available()
        where = (torch.accelerator.current_accelerator() if offload else None) or a.device
        rows = _Rows(host, axis, where)
        if torch.compiler.is_compiling():
            squares, projected = rows.squares(), rows.project(a)
        else:
            squares = self.squares(rows.squares, plainly_stored(host), where)
            # of the same weight while its squares are kept
            projected = self.projected(lambda: rows.project(a), [a], self.squares.made, where)
        with torch.no_grad(), torch.autocast(where.type, enabled=False):
            wide = torch.float64 if has_float64(where) else torch.float32
            right, left = a.flatten(1).to(where, wide), b.flatten(1).to(where, wide)
            own = scale**2 * (left @ (right @ right.T) * left).sum(-1)
            squares = squares.to(wide)
            total = squares + 2 * scale * (projected * left).sum(-1) + own
            norms = total.maximum(SHARE * (squares + own)).sqrt().clamp_min(SMALLEST)
            return norms.to(a.device, torch.float32)


class _Rows:
    """A host's weight as float32 rows, one for each output, read on demand."""

    def __init__(self, host: nn.Module, axis: int, where: torch.device):
        self.host, self.axis, self.where = host, axis, where

    def blocks(self) -> Iterator[Tensor]:
        """Rows (n, in)"""
        weight = weight_of(self.host)
        rows = weight.movedim(self.axis, 0).flatten(1)
        size = len(rows)
        if weight.dtype != torch.float32 or weight.device != self.where:
            size = max(1, BLOCK // max(1, rows.shape[1]))
        for block in rows.split(size):
            yield block.to(self.where, torch.float32)

    def squares(self) -> Tensor:
        """‖W‖²"""
        with torch.no_grad():
            norms = [torch.linalg.vector_norm(block, dim=1) for block in self.blocks()]
            return torch.cat(norms).square()

    def project(self, a: Tensor) -> Tensor:
        """W·aᵀ"""
        with torch.no_grad(), torch.autocast(self.where.type, enabled=False):
            columns = a.flatten(1).to(self.where, torch.float32).T
            return torch.cat([block @ columns for block in self.blocks()])


def problem(host: nn.Module, axis: int | None) -> str | None:
    """The reason why a layer cannot have magnitudes, or None."""
    if axis is None:
        return f"a {type(host).__name__} has no DoRA"
    if getattr(host, "groups", 1) != 1:
        return f"a {type(host).__name__} with groups has no DoRA"
    return unreadable(host)


def magnitude_shape(b_shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out,); for a convolution (1, out, 1, ...), as files store it."""
    spatial = len(b_shape) - 2
    return (1, b_shape[0], *(1,) * spatial) if spatial else (b_shape[0],)


def ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g (out,) float32"""
    return magnitude.flatten().to(torch.float32) / norms


def on_outputs(vector: Tensor, behind: int) -> Tensor:
    """(out,) shaped to multiply a tensor with `behind` axes after that of its outputs."""
    return vector.view(-1, *(1,) * behind) if behind else vector
