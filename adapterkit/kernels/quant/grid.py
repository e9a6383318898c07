"""The common grid of quantized formats: the values that codes can take with blocks' scales.

A format defines the scaling of values, the nearest code, and the value of a code. This module has
rounding to nearest, stochastic rounding, errors, kept scales, and rounding by columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.block_sizes import padded, piece
from adapterkit.kernels.quant.stochastic import PIECE, Draws
from adapterkit.kernels.sums import all_finite, are_finite

# (float32 values (out,) of a column of a weight, its number) -> the nearest that can be stored;
# (values (out, in), None), of all columns at once, where blocks are not rows of the grid
RoundColumn = Callable[[Tensor, int | None], Tensor]
# for formats with few operations: with fewer elements threads wait too long for Python's lock
LARGE_PIECE = 1 << 19
# of formats: values with one scale, scales with one scale, bits of a word of codes
MX_GROUP, NV_GROUP, NESTED, WORD = 32, 16, 256, 32
NOT_FINITE = "the matrix holds values that are not finite"


class Encoded(NamedTuple):
    """codes · scale."""

    codes: Tensor
    scale: Tensor


class Neighbors(NamedTuple):
    """The nearest code of each value, and the code on the value's other side."""

    level: Tensor  # integers: codes in the order of their values
    other: Tensor
    distance: Tensor  # |value - value of level|
    gap: Tensor  # |value of other - value of level|; 0 without a code beyond

    def sample(self, draws: Draws) -> Tensor:
        """Sample the other code with probability distance / gap, else the nearest."""
        uniform = draws.uniform(self.level.numel(), self.level.device).view(self.level.shape)
        up = uniform.mul_(self.gap) < self.distance
        return torch.where(up & (self.gap > 0), self.other, self.level)

    def expected_error(self) -> Tensor:
        """E[(sampled value - value)²]."""
        between = self.distance * (self.gap - self.distance).clamp_(min=0)
        return torch.where(self.gap > 0, between, self.distance.square())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values of a matrix (out, in) in one format, by the scales of its blocks.

    A code is a level, an integer in the order of the values; with `sign`, it is a level of
    magnitudes and a sign bit. The default value is that integer times the first scale.
    """

    scales: tuple[Tensor, ...]  # (ceil(out/h), ceil(in/w)); codes are multiplied by the first
    block: tuple[int, int]  # (h, w); of the last, parts may be missing
    ends: tuple[int, int]  # the lowest and the highest level

    sign: ClassVar[int] = 0
    refuses: ClassVar[bool] = True  # whether values that are not finite raise ValueError
    large: ClassVar[bool] = False  # whether its pieces are large

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        """Values in units of their scales, in new memory."""
        return x / torch.where(scales[0] == 0, 1.0, scales[0])

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest codes of scaled values, which may be overwritten."""
        return x.round_().clamp_(*self.ends)

    def level(self, code: Tensor) -> Tensor:
        """The values of codes at scale 1, in float32; float codes are overwritten."""
        return code.float()

    def multiplied(self, level: Tensor, *scales: Tensor) -> Tensor:
        """Levels times their scales, in place."""
        return level.mul_(scales[0])

    def value(self, code: Tensor, *scales: Tensor) -> Tensor:
        """The float32 values of codes, bit for bit as in decoding, so that decoded values stay."""
        return self.multiplied(self.level(code), *scales)

    def decode(self, out: Tensor, expand: Callable[[slice, Tensor], object]) -> Tensor:
        """The values of codes in `out`, for which `expand` writes the levels of some rows."""
        for rows in pieces(out.shape, out.device, large=self.large):
            expand(rows, out[rows])
            x, scales = self.place(out[rows], rows)
            self.multiplied(x, *scales)
        return out

    def place(self, x: Tensor, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """The rows of the matrix in blocks, and their scales, shaped to broadcast."""
        (height, width), count = self.block, self.scales[0].shape[1]
        at = rows if height == 1 else _numbers(rows, height, x.device)
        scales = [scale[at] for scale in self.scales]
        if x.shape[1] == count * width:
            return x.view(len(x), count, width), [scale[:, :, None] for scale in scales]
        return x, [scale.repeat_interleave(width, 1)[:, : x.shape[1]] for scale in scales]

    def column(self, number: int, rows: int) -> list[Tensor]:  # (rows,)
        """The scales of a column's elements."""
        height, at = self.block[0], number // self.block[1]
        if height == 1:
            return [scale[:, at] for scale in self.scales]
        return [scale[:, at].repeat_interleave(height)[:rows] for scale in self.scales]

    def encode(self, w: Tensor, draws: Draws | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Encode some rows after the previous ones: to nearest, sampled with draws. After the last
        it raises ValueError if values are not finite."""
        sums: list[Tensor] = []
        for rows in pieces(w.shape, w.device, large=self.large):
            x, scales = self.place(w[rows], rows)
            scaled = self.scaled(x, *scales)
            sums += [scaled.sum()] if self.refuses else []
            code = self.nearest(scaled)
            if draws is not None:
                level = self.neighbors(x, code, scales).sample(draws.at(rows.start * w.shape[1]))
                code = level | code & self.sign if self.sign else level
            yield rows, code.view(-1, w.shape[1])
        if not are_finite(sums) and not all_finite(w):
            raise ValueError(NOT_FINITE)

    def encoded(self, w: Tensor, out: Tensor, draws: Draws | None = None) -> Tensor:
        """`out` with the codes of `encode`."""
        for rows, code in self.encode(w, draws):
            out[rows] = code
        return out

    def round_column(self, w: Tensor, number: int | None) -> Tensor:
        """Round a column; see `RoundColumn`."""
        if number is not None:
            scales = self.column(number, len(w))
            return self.value(self.nearest(self.scaled(w, *scales)), *scales)
        out = torch.empty_like(w)
        for rows in pieces(w.shape, w.device, large=self.large):
            x, scales = self.place(w[rows], rows)
            value = self.value(self.nearest(self.scaled(x, *scales)), *scales)
            out[rows] = value.view(-1, w.shape[1])
        return out

    def neighbors(self, x: Tensor, code: Tensor, scales: Sequence[Tensor]) -> Neighbors:
        """The codes on both sides of each value, the nearest of which are given; of magnitudes if
        there is a sign."""
        x, code, scales = self._magnitudes(x, code, scales)
        falling = scales[0] < 0
        level = code.int()
        near = self.value(level, *scales)
        distance = x - near
        # as codes rise; a GPU would be waited for
        falls = x.device.type != "cpu" or bool(falling.any())
        step = (torch.where(falling, -distance, distance) if falls else distance).sign()
        other = step.int().add_(level).clamp_(*self.ends)
        gap = (self.value(other, *scales) - near).abs_()
        return Neighbors(level, other, distance.abs_(), gap)

    def _magnitudes(
        self, x: Tensor, code: Tensor, scales: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        if not self.sign:
            return x, code, scales
        return x.abs(), code & ~self.sign, [scale.abs() for scale in scales]

    def errors(self, w: Tensor, sampled: bool = True, weight: Tensor | None = None) -> Tensor:
        """The squared error of each block: expected if codes are sampled, else of the nearest; with
        weights of the elements."""
        (height, width), count = self.block, self.scales[0].shape[1]
        total = torch.zeros(self.scales[0].shape, device=w.device)
        for rows in pieces(w.shape, w.device, large=self.large):
            x, scales = self.place(w[rows], rows)
            code = self.nearest(self.scaled(x, *scales))
            if sampled:
                error = self.neighbors(x, code, scales).expected_error()
            else:
                x, code, scales = self._magnitudes(x, code, scales)
                error = (x - self.value(code, *scales)).square_()
            error = error.view(-1, w.shape[1])
            error = error if weight is None else error.mul_(weight[rows])
            error = padded(error, (0, count * width - w.shape[1]))
            error = error.view(-1, count, width).sum(2)
            total.index_add_(0, _numbers(rows, height, w.device), error)
        return total

    def overflows(self, w: Tensor) -> Tensor:  # bool
        """Blocks with values beyond their lowest or highest one."""
        if self.sign:
            return block_amax(w, self.block) > self._end(1).abs()
        x, low, high = w.reshape(*self.scales[0].shape, -1), self._end(0), self._end(1)
        return (x.amin(2) < torch.minimum(low, high)) | (x.amax(2) > torch.maximum(low, high))

    def _end(self, which: int) -> Tensor:
        code = torch.full_like(self.scales[0], self.ends[which], dtype=torch.int32)
        return self.value(code, *self.scales)


def loses_less(w: Tensor, old: Grid, new: Grid) -> Tensor:  # bool
    """Blocks with values beyond the old scale's, and a smaller expected error with the new one; all
    others keep theirs, so that unchanged values keep their codes."""
    beyond = old.overflows(w)
    return beyond & (new.errors(w) < old.errors(w)) if bool(beyond.any()) else beyond


def chosen(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new scales where they are better, bit for bit, even in dtypes that torch only stores."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[old.dtype.itemsize]
    return torch.where(better, new.view(bits), old.view(bits)).view(old.dtype)


def pieces(shape: Sequence[int], device: torch.device, *, large: bool = False) -> Iterator[slice]:
    """Slices of rows with about PIECE elements, LARGE_PIECE, or a GPU's number."""
    rows, columns = shape
    step = max(1, piece(device, LARGE_PIECE if large else PIECE) // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices in the last two axes, concatenated."""
    return zip(*(t.reshape(-1, *t.shape[-2:]) for t in tensors), strict=True)


def block_amax(
    w: Tensor,  # (..., out, in)
    block: tuple[int, int],
) -> Tensor:  # (..., ceil(out/h), ceil(in/w))
    """The largest magnitude of each block; NaN if it has one."""
    (height, width), (out, columns) = block, w.shape[-2:]
    amax = w.new_empty(*w.shape[:-2], math.ceil(out / height), math.ceil(columns / width))
    for x, target in matrices(w.contiguous(), amax):
        for up in pieces((len(target), height * columns), w.device):
            rows = x[up.start * height : up.stop * height]
            rows = padded(rows, (0, -columns % width, 0, -len(rows) % height))
            rows = rows.view(-1, height, rows.shape[1])
            if height > 1:
                high = torch.maximum(rows.amax(1), rows.amin(1).neg_()).abs_()
            else:
                high = rows.abs().squeeze(1)
            target[up] = high.view(len(high), -1, width).amax(2)
    return amax


def scale_as_float(scale: Tensor) -> Tensor:
    """Scales of any float dtype as float32; uint8 means exponents (E8M0)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def check_finite(*values: Tensor, problem: str = NOT_FINITE) -> None:
    """Raises ValueError for NaN and infinities."""
    if not all(bool(each.isfinite().all()) for each in values):
        raise ValueError(problem)


def _numbers(rows: slice, height: int, device: torch.device) -> Tensor:  # of rows' blocks
    return torch.arange(rows.start, rows.stop, device=device) // height
