"""Stochastic rounding: up or down at random, so that E[round(x)] = x, where rounding to nearest swallows what is below half a step.

The draws come from a counter: splitmix64 (Steele, Lea and Flood 2014) of a tensor's key and an element's position in it. They are a
function of those alone, the same on every device, in whatever pieces and order the elements are rounded.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 1 << 16  # elements worked on at once, so that a few temporaries of them stay in cache
WORD = 1 << 64
STEP, *MIX = 0x9E3779B97F4A7C15, (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
EXPONENT = {
    torch.float32: (torch.int32, 0xFF << 23),
    torch.float64: (torch.int64, 0x7FF << 52),
}  # bits of the power of 2
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of the elements of one tensor, from element `first` on. `turned`: of a stack of matrices (rows, columns) that
    is read by columns, from its element `local` on."""

    key: int
    first: int = 0
    turned: tuple[int, int] | None = None
    local: int = 0

    @classmethod
    def of(cls, seed: int, name: str) -> "Draws":
        """Those of a tensor by its key. Other seeds and other names give independent ones."""
        return cls(
            int.from_bytes(
                hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little"
            )
        )

    def at(self, position: int) -> "Draws":
        """Those from `position` on."""
        if self.turned:
            return replace(self, local=self.local + position)
        return replace(self, first=self.first + position)

    def by_columns(self, rows: int, columns: int) -> "Draws":
        """The same numbers for the same elements, of matrices that are stored transposed."""
        return replace(self, turned=(rows, columns))

    def halves(self, count: int, device: torch.device) -> Tensor:  # (count,) int16, uniform
        return self._lanes(count, device, torch.int16)

    def uniform(
        self, count: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tensor:  # (count,) float32
        """Numbers strictly between 0 and 1: the middles of 2^23 equal parts; of 2^16, as `halves` counts down, for bfloat16."""
        if dtype == torch.bfloat16:
            return (32767.5 - self.halves(count, device).float()).mul_(2.0**-16)
        return (
            (self._lanes(count, device, torch.int32) >> 9)
            .float()
            .add_(0.5)
            .mul_(2.0**-23)
            .add_(0.5)
        )

    def _lanes(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The words' bits, some for each element."""
        each = 8 // dtype.itemsize
        if self.turned:
            position = self._positions(count, device)
            words = self._words(position // each).view(dtype).view(-1, each)
            return words.gather(1, (position % each)[:, None])[:, 0]
        low, high = self.first // each, -(-(self.first + count) // each)
        return self._words(torch.arange(low, high, device=device)).view(dtype)[
            self.first - low * each :
        ][:count]

    def _positions(self, count: int, device: torch.device) -> Tensor:
        assert self.turned
        rows, columns = self.turned
        index = torch.arange(self.local, self.local + count, device=device)
        matrix, column, row = index // (rows * columns), index // rows % columns, index % rows
        return self.first + (matrix * rows + row) * columns + column

    def _words(self, counter: Tensor) -> Tensor:
        """A hash of each count, in place."""
        words = counter.mul_(_signed(STEP)).add_(_signed(self.key))  # wraps
        for shift, factor in MIX:
            words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
        return words.bitwise_xor_(_shifted(words, 31))


def _signed(word: int) -> int:
    return (word + WORD // 2) % WORD - WORD // 2


def _shifted(words: Tensor, count: int) -> Tensor:
    """Without the sign."""
    return (words >> count).bitwise_and_((1 << (64 - count)) - 1)


def round_to(
    x: Tensor,  # float32 or float64
    dtype: torch.dtype,  # bfloat16, float16 or float32
    draws: Draws,
) -> Tensor:
    """The neighbour of x in `dtype` that is farther from 0 with probability (|x| - lower) / (upper - lower), else the nearer one.

    What `dtype` holds stays, zeros with their sign. Beyond its largest number x goes to the nearest, as without draws, and so do
    infinities and NaN.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    flat, rounded = x.contiguous().view(-1), out.view(-1)
    each = PIECE if x.device.type == "cpu" else max(1, len(flat))
    for first in range(0, len(flat), each):
        piece, target = flat[first : first + each], rounded[first : first + each]
        if x.dtype == torch.float32 and dtype == torch.bfloat16:
            _to_bfloat16(piece, target, draws.at(first))
        else:
            _to_any(piece, target, draws.at(first))
        largest = piece.abs().amax()
        if not bool(largest <= torch.finfo(dtype).max):
            torch.where(piece.abs() <= torch.finfo(dtype).max, target, piece.to(dtype), out=target)
    return out


def _to_bfloat16(x: Tensor, out: Tensor, draws: Draws) -> None:
    """A random number is added to the bits that are dropped; the carry is the step up."""
    bits = draws.halves(len(x), x.device).to(torch.int32).add_(1 << 15).add_(x.view(torch.int32))
    out.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


def _to_any(x: Tensor, out: Tensor, draws: Draws) -> None:
    size = x.abs()
    step = last_place(size, out.dtype)
    places = size.div_(
        step
    )  # exact, as the step is a power of 2; so is the difference to the whole part
    lower = places.floor()
    up = draws.uniform(len(x), x.device, out.dtype) < places.sub_(lower)
    out.copy_(lower.add_(up).mul_(step).copysign_(x))


def last_place(
    size: Tensor,  # magnitudes, float32 or float64
    dtype: torch.dtype,
) -> Tensor:
    """The distance of the two numbers of `dtype` on both sides of each."""
    integer, mask = EXPONENT[size.dtype]
    powers = size.view(integer).bitwise_and(mask).view(size.dtype)
    return powers.clamp_(min=torch.finfo(dtype).tiny).mul_(2.0 ** -MANTISSA[dtype])


class Between(NamedTuple):
    """Values between their nearest codes and the next ones on their side."""

    level: Tensor  # integers: codes by rising value
    other: Tensor
    away: Tensor  # |value - that of level|
    gap: Tensor  # the distance of the two codes' values; 0 where nothing lies beyond the first

    def drawn(self, draws: Draws) -> Tensor:
        """The other code with probability away / gap, else the nearest."""
        up = (
            draws.uniform(self.level.numel(), self.level.device)
            .view(self.level.shape)
            .mul_(self.gap)
            < self.away
        )
        return torch.where(up & (self.gap > 0), self.other, self.level)

    def spread(self) -> Tensor:
        """E[(rounded - value)²]."""
        return torch.where(
            self.gap > 0, self.away * (self.gap - self.away).clamp_(min=0), self.away.square()
        )


def between(
    w: Tensor,
    level: Tensor,  # integers: the nearest codes
    value: Callable[
        [Tensor], Tensor
    ],  # what codes stand for, by every bit as they are decoded: so what is decoded stays
    ends: tuple[int, int],  # the lowest and the highest code
    falling: Tensor | None = None,  # where values fall as codes rise
) -> Between:
    level = level.int()
    near = value(level)
    away = w - near
    step = away.sign() if falling is None else torch.where(falling, -away, away).sign()
    other = step.int().add_(level).clamp_(*ends)
    return Between(level, other, away.abs_(), (value(other) - near).abs_())
