"""Stochastic rounding: up or down at random so that E[round(x)] = x, whereas rounding to nearest
loses changes below half a step.

The random numbers are splitmix64 (Steele, Lea and Flood 2014) of a tensor's key and an element's
position in it. They depend on nothing else, so they are the same on every device, for any pieces
and order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.block_sizes import piece

# elements worked on at once on a CPU, so that a few temporaries of them stay in cache
PIECE = 1 << 16
WORD = 1 << 64
STEP, *MIX = 0x9E3779B97F4A7C15, (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)
EXPONENT = {4: ("int32", 0xFF << 23), 8: ("int64", 0x7FF << 52)}  # bytes of a float -> its bits


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of the elements of one tensor, from element `first` on.

    `transposed`: the elements are read by columns, from number `local` on, from a stack of matrices
    of this shape (rows, columns).
    """

    key: int
    first: int = 0
    transposed: tuple[int, int] | None = None
    local: int = 0

    @classmethod
    def of(cls, seed: int, name: str) -> Draws:
        """The draws of a tensor by its key; different seeds and names give independent ones."""
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little"))

    def at(self, position: int) -> Draws:
        """The draws from `position` on."""
        if self.transposed:
            return replace(self, local=self.local + position)
        return replace(self, first=self.first + position)

    def by_columns(self, rows: int, columns: int) -> Draws:
        """The same numbers for the same elements, if matrices are stored transposed."""
        return replace(self, transposed=(rows, columns))

    def halves(self, count: int, device: torch.device) -> Tensor:  # (count,) int16
        """Uniform over all values of int16."""
        return self._lanes(count, device, torch.int16)

    def below(self, probability: float, count: int, device: torch.device) -> Tensor:  # bool
        """True with that probability, which is a multiple of 2^-32 and at least that."""
        last = max(round(probability * 2.0**32), 1) - (1 << 31) - 1
        return self._lanes(count, device, torch.int32) <= last

    def uniform(
        self, count: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> Tensor:  # (count,) float32
        """Numbers strictly between 0 and 1: the middles of 2^23 equal intervals; for bfloat16 of
        2^16, decreasing with the numbers of `halves`."""
        if dtype == torch.bfloat16:
            return (32767.5 - self.halves(count, device).float()).mul_(2.0**-16)
        numbers = (self._lanes(count, device, torch.int32) >> 9).float()
        return numbers.mul_(2.0**-23).add_(0.5 + 2.0**-24)

    def _lanes(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The bits of the words, some per element."""
        each = 8 // dtype.itemsize
        if self.transposed:
            position = self._positions(count, device)
            words = self._words(position // each).view(dtype).view(-1, each)
            return words.gather(1, (position % each)[:, None])[:, 0]
        low, high = self.first // each, -(-(self.first + count) // each)
        words = self._words(torch.arange(low, high, device=device)).view(dtype)
        return words[self.first - low * each :][:count]

    def _positions(self, count: int, device: torch.device) -> Tensor:
        assert self.transposed
        rows, columns = self.transposed
        index = torch.arange(self.local, self.local + count, device=device)
        matrix, column, row = index // (rows * columns), index // rows % columns, index % rows
        return self.first + (matrix * rows + row) * columns + column

    def _words(self, counter: Tensor) -> Tensor:
        """A hash of each count, in place; on a CPU numpy takes half as long as torch."""
        if counter.device.type == "cpu":
            _hash(counter.numpy().view(np.uint64), self.key)
            return counter
        words = counter.mul_(_signed(STEP)).add_(_signed(self.key))  # wraps
        for shift, factor in MIX:
            words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
        return words.bitwise_xor_(_shifted(words, 31))


class Zeros(Draws):
    """Numbers that round every value of a quantized format away from its nearest code, if it has
    two neighbors."""

    def uniform(self, count: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(count, device=device)


def _hash(words: np.ndarray, key: int) -> None:
    words *= np.uint64(STEP)  # wraps
    words += np.uint64(key)
    for shift, factor in MIX:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)


def _signed(word: int) -> int:
    return (word + WORD // 2) % WORD - WORD // 2


def _shifted(words: Tensor, count: int) -> Tensor:
    """A logical right shift of int64."""
    return (words >> count).bitwise_and_((1 << (64 - count)) - 1)


def round_to(
    x: Tensor,  # float32 or float64
    dtype: torch.dtype,  # bfloat16, float16 or float32
    draws: Draws,
) -> Tensor:
    """The neighbor of x in `dtype` that is farther from 0, with probability (|x| - lower) / (upper
    - lower), else the other.

    Values of `dtype` stay, zeros with their sign. Beyond its largest number x is rounded to
    nearest; infinities and NaN stay.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    flat, rounded = x.contiguous().view(-1), out.view(-1)
    each, largest = piece(x.device, PIECE), torch.finfo(dtype).max
    for first in range(0, len(flat), each):
        values, target = flat[first : first + each], rounded[first : first + each]
        if x.dtype == torch.float32 and dtype == torch.bfloat16:
            _to_bfloat16(values, target, draws.at(first))
        else:
            _to_any(values, target, draws.at(first))
        # a GPU would be waited for
        if x.device.type != "cpu" or not bool(values.abs().amax() <= largest):
            torch.where(values.abs() <= largest, target, values.to(dtype), out=target)
    return out


def _to_bfloat16(x: Tensor, out: Tensor, draws: Draws) -> None:
    """Add a random number to the dropped bits; the carry is the step up."""
    bits = draws.halves(len(x), x.device).to(torch.int32).add_(1 << 15).add_(x.view(torch.int32))
    out.view(torch.int16).copy_(bits.view(torch.int16)[1::2])


def _to_any(x: Tensor, out: Tensor, draws: Draws) -> None:
    size = x.abs()
    step = last_place(size, out.dtype)
    places = size.div_(step)  # exact, as step is a power of 2; so is the subtraction of the floor
    lower = places.floor()
    up = draws.uniform(len(x), x.device, out.dtype) < places.sub_(lower)
    out.copy_(lower.add_(up).mul_(step).copysign_(x))


def last_place(
    size: Tensor,  # magnitudes, float32 or float64
    dtype: torch.dtype,
) -> Tensor:
    """The distance between the two neighbors of each magnitude in `dtype`."""
    integer, mask = EXPONENT[size.dtype.itemsize]
    powers = size.view(getattr(torch, integer)).bitwise_and(mask).view(size.dtype)
    return powers.clamp_(min=torch.finfo(dtype).tiny).mul_(torch.finfo(dtype).eps)
