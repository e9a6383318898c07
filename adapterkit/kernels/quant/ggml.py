"""ggml's quantized types, the tensors of GGUF files, to float32 and back.

A weight is rows of whole blocks, which encode independently.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.kernels.quant.fp4 import Fp4Grid
from adapterkit.kernels.quant.ggml_blocks import (
    TYPES,
    BlockScales,
    BlockType,
    pack,
    table_values,
    unpack_codes,
    unpack_scales,
)
from adapterkit.kernels.quant.ggml_search import (
    Parts,
    cells,
    is_searched_fast,
    refit,
    rounding_error,
    search,
    table_codes,
)
from adapterkit.kernels.quant.grid import NOT_FINITE, Grid, RoundColumn, pieces
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.sums import all_finite

SETTLED = 1 / 8  # of the error of rounding: below, other scales hardly improve it
DISTINCT = 2.0**-18  # of a minimum: with larger scales no code is lost

__all__ = ["TYPES", "decode", "encode", "requantize", "round_column"]


@dataclass(frozen=True, kw_only=True)
class GgmlGrid(Grid):
    """level · scale - minimum or table[level] · scale, one row per sub-block; without a second
    scale the minimum is 0."""

    table: tuple[int, ...] = ()

    refuses = False
    large = True

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        scale, *minimum = scales
        scale = torch.where(scale == 0, 1.0, scale)
        return (x + minimum[0]).div_(scale) if minimum else x / scale

    def nearest(self, x: Tensor) -> Tensor:
        if not self.table:
            return super().nearest(x)
        codes = table_codes(self.table, x.device)
        return torch.index_select(codes, 0, cells(x).view(-1)).view(x.shape)

    def level(self, code: Tensor) -> Tensor:
        if not self.table:
            return super().level(code)
        return table_values(self.table, code.device)[code.int()]

    def multiplied(self, level: Tensor, *scales: Tensor) -> Tensor:
        x = level.mul_(scales[0])
        return x.sub_(scales[1]) if len(scales) > 1 else x


def decode(
    name: str,
    blocks: Tensor,  # (..., n · nbytes) uint8
) -> Tensor:  # (..., n · values) float32
    """Decode bit for bit as gguf-py's `dequantize`, except for sign and payload of NaN."""
    kind = TYPES[name]
    count, rest = divmod(blocks.shape[-1], kind.nbytes)
    if rest:
        raise ValueError(f"{blocks.shape[-1]} bytes are no whole blocks of {kind.nbytes}")
    flat = blocks.reshape(-1, kind.nbytes)
    out = torch.empty(len(flat), kind.values, device=blocks.device)
    for part in pieces(out.shape, out.device, large=True):
        some = flat[part]
        _values(kind, unpack_codes(kind, some), unpack_scales(kind, some), out[part])
    return out.view(*blocks.shape[:-1], count * kind.values)


def encode(
    name: str,
    w: Tensor,  # (rows, in) float32
    importance: Tensor | None = None,  # (in,) float32, ≥ 0: weights of squared errors
) -> Tensor:  # (rows, in / values · nbytes) uint8
    """Encode with the best scales that `search` finds, and the nearest codes.

    A block whose importances are all 0 is weighted equally. Raises ValueError for values that are
    not finite, and for importances that are not finite or below 0.
    """
    kind = TYPES[name]
    out = torch.empty(_packed_shape(kind, w), dtype=torch.uint8, device=w.device)
    importance, memory = _checked(kind, importance, w.shape[1]), _memory(w)
    for rows in pieces(w.shape, w.device, large=True):
        x = _blocks(kind, w[rows])
        scales = search(name, x, _tiled(importance, x), memory)
        codes = _codes(kind, _grid(kind, scales), x, None)
        out[rows] = pack(kind, scales, codes).view(-1, out.shape[1])
    return out


def requantize(
    name: str,
    old: Tensor,  # (rows, in / values · nbytes) uint8
    w: Tensor,  # (rows, in) float32
    *,
    draws: Draws | None = None,
    importance: Tensor | None = None,  # (in,) float32, ≥ 0
    keep: bool = False,
    stay: bool = False,
) -> Tensor:  # uint8, as old
    """Encode each block with its old scales, with these fitted again, or with new ones: those with
    the least Σ importance · (w - value)², in a tie the old ones. New ones are searched unless the
    old error is near the error of rounding (`SETTLED`). With `keep` or draws, only blocks with
    values beyond the old scales get new ones, with `stay` none; with draws codes are sampled, and
    errors are expected ones.

    A value that equals its decoded old code keeps this code, and a block of such values keeps all
    of its bytes.
    """
    kind = TYPES[name]
    if old.shape != _packed_shape(kind, w):
        raise ValueError(f"{tuple(old.shape)} are not the bytes of {tuple(w.shape)} values")
    importance, memory = _checked(kind, importance, w.shape[1]), _memory(w)
    out, renew = torch.empty_like(old), _Trial.nearest
    if stay or keep or draws is not None:
        renew = _Trial.none if stay else _Trial.beyond
    for rows in pieces(w.shape, w.device, large=True):
        x, blocks = _blocks(kind, w[rows]), old[rows].reshape(-1, kind.nbytes)
        here = None if draws is None else draws.at(rows.start * w.shape[1])
        new = _renewed(name, blocks, x, here, _tiled(importance, x), memory, renew)
        out[rows] = new.view(-1, out.shape[1])
    return out


def _renewed(
    name: str,
    blocks: Tensor,  # (n, nbytes)
    x: Tensor,  # (n, values)
    draws: Draws | None,
    importance: Tensor | None,  # as x
    memory: Tensor,
    renew: Callable[["_Trial", BlockScales], tuple[BlockScales, Tensor]],
) -> Tensor:  # as blocks
    kind = TYPES[name]
    scales, codes = unpack_scales(kind, blocks), unpack_codes(kind, blocks)
    moved = _values(kind, codes, scales, memory[0, : x.numel()].view(x.shape)).sub_(x).abs_()
    # NaN, too, of scales that are not finite; a test of each value would take ten times as long
    changed = moved.amax(1) != 0
    at = changed.nonzero()[:, 0]
    if draws is None and len(at) < len(x):  # draws are those of all
        new, some = blocks.clone(), None if importance is None else importance[at]
        if len(at):
            new[at] = _renewed(name, blocks[at], x[at], None, some, memory, renew)
        return new
    broken = ~torch.stack([each.sum(1) for each in scales.effective]).isfinite().all(0)
    scales = scales.without(broken.nonzero()[:, 0])
    stays = None if _are_distinct(kind, scales, codes) else moved == 0
    trial = _Trial(name, x, importance, stays, broken, memory, draws is not None)
    better, at = renew(trial, scales)
    nearest = _codes(kind, _grid(kind, better), x, draws)
    if stays is not None:
        nearest = torch.where(stays.index_fill_(0, at, False), codes, nearest)
    new = pack(kind, better, nearest)
    return torch.where(changed[:, None], new, blocks) if draws else new


@dataclass(frozen=True)
class _Trial:
    """Values of n blocks whose scales are searched."""

    name: str
    x: Tensor  # (n, values)
    importance: Tensor | None  # as x
    stays: Tensor | None  # as x: what keeps its code with the old scales
    broken: Tensor  # (n,): blocks that need new ones
    memory: Tensor
    sampled: bool

    def none(self, scales: BlockScales) -> tuple[BlockScales, Tensor]:
        return scales, self.broken.new_empty(0, dtype=torch.int64)

    def beyond(self, scales: BlockScales) -> tuple[BlockScales, Tensor]:
        """New scales of blocks with values beyond the old ones, where these are better: all scales,
        and the numbers of those blocks."""
        beyond = _grid(TYPES[self.name], scales).overflows(self.x).any(1)
        return self._searched(scales, (self.broken | beyond).nonzero()[:, 0])

    def nearest(self, scales: BlockScales) -> tuple[BlockScales, Tensor]:
        """The best scales."""
        kind = TYPES[self.name]
        parts = Parts.of(kind, self.x, self.importance, self.memory)
        if is_searched_fast(self.name, self.importance):
            return self._searched(scales, torch.arange(len(self.x), device=self.x.device))
        least, fitted, better = refit(kind, parts, scales, self._changes())
        fitted_at = better.nonzero()[:, 0]
        scales = scales.replaced(fitted_at, fitted.at(fitted_at))
        rounding = rounding_error(kind, parts, scales)
        unsettled = self.broken | ~(least < SETTLED * rounding)
        scales, at = self._searched(scales, unsettled.nonzero()[:, 0])
        return scales, torch.cat([fitted_at, at])

    def _searched(self, scales: BlockScales, at: Tensor) -> tuple[BlockScales, Tensor]:
        if not len(at):
            return scales, at
        some = self if len(at) == len(self.x) else self._at(at)
        new = search(self.name, some.x, some.importance, self.memory)
        better = some._are_better(scales.at(at), new)
        at = at[better]
        return scales.replaced(at, new.at(better)), at

    def _are_better(self, old: BlockScales, new: BlockScales) -> Tensor:  # (n,) bool
        changes = self._changes()
        before = self._errors(old, self.importance if changes is None else changes)
        return self.broken | ~(self._errors(new, self.importance) >= before)

    def _changes(self) -> Tensor | None:
        """The importances for old scales, because some values do not change with these."""
        if self.stays is None:
            return None
        return (~self.stays).float() if self.importance is None else self.importance * ~self.stays

    def _errors(self, scales: BlockScales, weight: Tensor | None) -> Tensor:  # (n,)
        kind = TYPES[self.name]
        if self.sampled:
            return _grid(kind, scales).errors(self.x, weight=weight).sum(1)
        return Parts.of(kind, self.x, weight, self.memory).errors(*scales.effective).sum(1)

    def _at(self, blocks: Tensor) -> "_Trial":
        some = lambda each: None if each is None else each[blocks]
        return replace(
            self,
            x=self.x[blocks],
            importance=some(self.importance),
            stays=some(self.stays),
            broken=self.broken[blocks],
        )


def _are_distinct(kind: BlockType, scales: BlockScales, codes: Tensor) -> bool:
    """Return whether each value's nearest code is surely the code it was decoded from. That is
    unknown if a scale is 0 or much smaller than its minimum; some codes are never written."""
    scale, *minimum = scales.effective
    least = minimum[0].abs() * DISTINCT if minimum else torch.zeros(())
    if "e" in kind.fields or not bool((scale.abs() > least).all()):
        return False
    low, high = (end + kind.zero for end in kind.ends)
    return int(codes.amin()) >= low and int(codes.amax()) <= high


def round_column(
    name: str,
    old: Tensor,  # (rows, in / values · nbytes) uint8
) -> RoundColumn:
    """Round to nearest with the scales of these blocks; `requantize` encodes the result."""
    kind = TYPES[name]
    scales = unpack_scales(kind, old.reshape(-1, kind.nbytes))
    return _grid(kind, scales, rows=len(old)).round_column


def _grid(kind: BlockType, scales: BlockScales, rows: int | None = None) -> Grid:
    """The grid of blocks as rows, or of this many rows of them."""
    by_part = scales.effective
    if rows is not None:
        by_part = tuple(each.reshape(rows, -1) for each in by_part)
    block = (1, kind.sub)
    if "e" in kind.fields:  # powers of half its table's unit
        return Fp4Grid(scales=(by_part[0] * 2,), block=block)
    return GgmlGrid(scales=by_part, block=block, ends=kind.ends, table=kind.table)


def _codes(kind: BlockType, grid: Grid, x: Tensor, draws: Draws | None) -> Tensor:
    """(n, values) uint8"""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    grid.encoded(x, codes.view(torch.int8), draws)
    return codes.add_(kind.zero) if kind.zero else codes  # wraps


def _values(
    kind: BlockType,
    codes: Tensor,  # (n, values) uint8
    scales: BlockScales,
    out: Tensor,  # as codes
) -> Tensor:  # out
    if kind.table:
        table = table_values(kind.table, codes.device)
        torch.index_select(table, 0, codes.view(-1).int(), out=out.view(-1))
    else:
        out.copy_(codes)
    x = out.view(len(codes), kind.parts, kind.sub)
    scale, *minimum = (each[:, :, None] for each in scales.effective)
    x = x.sub_(kind.zero) if kind.zero else x
    x.mul_(scale)
    return out if not minimum else x.sub_(minimum[0]).view(out.shape)


def _blocks(kind: BlockType, w: Tensor) -> Tensor:  # (n, values)
    """The values as blocks. Raises ValueError for values that are not finite."""
    if not all_finite(w):
        raise ValueError(NOT_FINITE)
    return w.reshape(-1, kind.values)


def _memory(w: Tensor) -> Tensor:
    """Memory for three temporaries of a piece, because allocating it takes as long as using it."""
    first = next(pieces(w.shape, w.device, large=True), slice(0, 0))
    return torch.empty(3, first.stop * w.shape[1], device=w.device)


def _packed_shape(kind: BlockType, w: Tensor) -> tuple[int, int]:
    rows, size = w.shape
    if size % kind.values:
        raise ValueError(f"{size} columns are no whole blocks of {kind.values}")
    return rows, size // kind.values * kind.nbytes


def _checked(kind: BlockType, importance: Tensor | None, size: int) -> Tensor | None:
    """Importances (1, in), normalized to mean 1; ones where a block has none."""
    if importance is None:
        return None
    if importance.shape != (size,):
        raise ValueError(f"expected importances of {size} columns, not {tuple(importance.shape)}")
    if not all_finite(importance) or bool((importance < 0).any()):
        raise ValueError("the importances hold values that are not finite, or below 0")
    each = importance.double().view(-1, kind.values)
    mean = each.mean(1, keepdim=True)
    return torch.where(mean > 0, each / mean, 1.0).float().view(1, -1)


def _tiled(importance: Tensor | None, x: Tensor) -> Tensor | None:
    """A value per element of blocks, for whole rows."""
    if importance is None:
        return None
    return importance.expand(x.numel() // importance.shape[1], -1).reshape(x.shape)
