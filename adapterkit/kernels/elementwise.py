"""Elementwise steps of combinations: trimming by magnitude, dropping at random, electing signs.

Blocks are whole rows in float32 (or float64), changed in place, in row-major order. All counts are
exact, so neither the division into blocks nor the number of threads changes a trimmed element.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.quant.stochastic import Draws

CPU = torch.device("cpu")
SAMPLE = 1 << 16  # elements of the sample that brackets a threshold
ROOM = 1 << 18  # elements that may be collected in the bracket, at least
AT_ONCE = 1 << 26  # elements up to which a GPU selects a threshold from all of them
# elements worked on at once on a CPU: with fewer, threads wait for Python's lock too long
CACHED = 1 << 19
DRAWN = 1 << 17  # elements whose random numbers are drawn at once


class Threshold(NamedTuple):
    """The top k magnitudes: all above `value`, and of the `ties` that equal it the first
    `ties_kept` in row-major order."""

    value: float
    ties_kept: int = 0
    ties: int = 0


class Trim:
    """x ← x where |x| is among the top k, else 0; block after block."""

    def __init__(self, threshold: Threshold):
        self.value, self.ties_kept, self.ties = threshold

    def __call__(self, block: Tensor) -> None:
        bound = _below(self.value, block.dtype) if self.ties_kept else self.value
        if not 0 < self.ties_kept < self.ties:
            torch.hardshrink(block, bound, out=block)
            return
        ties = (block.abs() == self.value).nonzero()
        torch.hardshrink(block, bound, out=block)
        block[tuple(ties[self.ties_kept :].T)] = 0
        self.ties_kept = max(self.ties_kept - len(ties), 0)
        self.ties -= len(ties)


def top_k_threshold(
    read: Callable[[], Iterable[Tensor]],
    size: int,
    keep: int,
    subsample: Callable[[], Iterable[Tensor]] | None = None,
    device: torch.device = CPU,
) -> Threshold:
    """The threshold that keeps exactly `keep` of `size` elements, or all nonzero ones if these are
    fewer.

    `read()` yields all blocks at each call; they are overwritten. `subsample()` yields some rows of
    every tensor, if that is cheaper: the first estimate comes from them.

    A sample brackets the threshold; one pass counts magnitudes above the bracket and collects those
    inside, among which the threshold is selected. A bracket that misses or contains too many
    narrows the search, and bisection in between bounds the number of passes. A GPU selects among
    all elements if they are not too many.
    """
    if keep >= size:
        return Threshold(-1.0)
    if keep <= 0:
        return Threshold(math.inf)
    if device.type != "cpu" and size <= AT_ONCE:
        blocks = [block.abs_().reshape(-1) for block in read()]
        return _select(torch.cat(blocks) if len(blocks) > 1 else blocks[0], keep)
    sample = _sample((subsample or read)(), size)
    # the threshold is in (low, high], in which `within` elements are; `over` are above
    low, high, over, within = -1.0, math.inf, 0, size
    for turn in count():
        if turn > 1 and turn % 2 == 0:
            bottom, top = low, _middle(low, high, sample.dtype)
        else:
            spread = 4 if turn == 0 else 0
            bottom, top = _bracket(sample, low, high, (keep - over) / within, spread)
        above, inside, values = _collect(read(), bottom, top, max(ROOM, size // 16))
        if keep <= above:
            low, within = top, above - over
        elif keep > above + inside:
            high, over, within = bottom, above + inside, over + within - above - inside
        elif _below(top, sample.dtype) == bottom:
            return Threshold(top, keep - above, inside) if top else Threshold(0.0)
        elif len(values) == inside:
            return _select(values, keep - above)
        else:
            low, high, over, within, sample = bottom, top, above, inside, _descending(values)
    raise AssertionError("the search ends at a bracket of a single value")


def _sample(blocks: Iterable[Tensor], size: int) -> Tensor:
    """Magnitudes of at most about SAMPLE elements, descending; the stride is coprime to the row
    width, so no column is preferred."""
    stride, parts = max(1, size // SAMPLE), []
    for block in blocks:
        while math.gcd(stride, block.shape[1]) > 1:
            stride += 1
        parts.append(block.reshape(-1)[::stride].abs())
    return _descending(torch.cat(parts))


def _bracket(
    sample: Tensor, low: float, high: float, share: float, spread: float
) -> tuple[float, float]:
    """An interval (bottom, top] within (low, high] that likely contains the smallest of the largest
    `share`: `spread` standard deviations wide on each side, or a single value with 0."""
    sample = sample[(sample > low) & (sample <= high)]
    if not len(sample):
        return low, _middle(low, high, sample.dtype)
    margin = spread * math.sqrt(len(sample) * share * (1 - share)) + (2 if spread else 0)
    first, last = math.floor(len(sample) * share - margin), math.ceil(len(sample) * share + margin)
    if not spread:
        first = last = min(max(first, 0), len(sample) - 1)
    top = float(sample[first]) if first >= 0 else high
    return (_below(float(sample[last]), sample.dtype) if last < len(sample) else low), top


def _collect(
    blocks: Iterable[Tensor], bottom: float, top: float, limit: int
) -> tuple[int, int, Tensor]:
    """The numbers of magnitudes above `top` and in (bottom, top], and the first `limit` of the
    latter."""
    above, inside, values = 0, 0, []
    for block in blocks:
        over, within = _mask(torch.gt, block.abs_(), top), _mask(torch.gt, block, bottom)
        above += _count(over)
        here = _picked(block, within.logical_xor_(over))
        if inside < limit:
            values.append(here[: limit - inside])
        inside += len(here)
    return above, inside, torch.cat(values)


# On a CPU numpy compares eight times as fast as torch, counts and selects five times and sorts
# twenty times as fast.
_COMPARE = {torch.gt: np.greater, torch.lt: np.less, torch.ge: np.greater_equal}


def _mask(compare: Callable, x: Tensor, y: Tensor | float) -> Tensor:
    """compare(x, y) as bools."""
    if x.device.type != "cpu":
        return compare(x, y)
    return torch.from_numpy(_COMPARE[compare](x.numpy(), y.numpy() if isinstance(y, Tensor) else y))


def _count(mask: Tensor) -> int:
    if mask.device.type != "cpu":
        return int(torch.count_nonzero(mask))
    return int(np.count_nonzero(mask.numpy()))


def _picked(block: Tensor, mask: Tensor) -> Tensor:
    """block[mask]."""
    if block.device.type != "cpu":
        return block[mask]
    return torch.from_numpy(block.numpy().reshape(-1).take(np.flatnonzero(mask.numpy())))


def _descending(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return x.sort(descending=True).values
    return torch.from_numpy(np.sort(x.numpy())[::-1].copy())


def _kth_smallest(x: Tensor, k: int) -> float:
    """The k-th smallest value, counted from 0."""
    if x.device.type != "cpu":  # kthvalue would run on one processor of many
        upper = 2 * k >= len(x)
        values, _ = x.topk(len(x) - k if upper else k + 1, largest=upper, sorted=False)
        return float(values.amin() if upper else values.amax())
    return float(np.partition(x.numpy(), k)[k])


def _select(values: Tensor, keep: int) -> Threshold:
    """The threshold that keeps `keep` of these values."""
    value = _kth_smallest(values, len(values) - keep)
    above, reached = (_count(_mask(compare, values, value)) for compare in (torch.gt, torch.ge))
    return Threshold(value, keep - above, reached - above) if value else Threshold(0.0)


def _below(value: float, dtype: torch.dtype) -> float:
    """The next smaller magnitude; below 0 comes -1."""
    if value <= 0:
        return -1.0
    return float(torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(0, dtype=dtype)))


def _middle(low: float, high: float, dtype: torch.dtype) -> float:
    """The value half way between in the order of the floats, above `low`: the bit patterns of
    magnitudes have the order of the magnitudes."""
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    ends = [int(torch.tensor(v, dtype=dtype).view(bits)) if v >= 0 else -1 for v in (low, high)]
    first, last = ends
    return float(torch.tensor((first + last + 1) // 2, dtype=bits).view(dtype))


def drop(
    x: Tensor,  # (n, cols), changed in place
    probability: float | Tensor,  # the probability that an element stays
    draws: Draws,
    *,
    divided: bool = True,
) -> None:
    """x ← x / p with probability p, else 0, so that the expectation is x; not `divided`: x ← x or
    0. One draw per element, row by row."""
    each, flat = piece(x.device, DRAWN), x.view(-1)
    for first in range(0, len(flat), each):
        part, here = flat[first : first + each], draws.at(first)
        if isinstance(probability, Tensor):
            p = probability.view(-1)[first : first + each]
            stays = _mask(torch.lt, here.uniform(len(part), x.device), p)
        else:
            p, stays = probability, here.below(probability, len(part), x.device)
        part.mul_(stays.to(x.dtype))
        if divided:
            part.div_(p)


def ranks(
    x: Tensor,  # (n, cols)
) -> Tensor:  # (n, cols)
    """The rank of each magnitude in its row, from 0 (smallest) to 1, equal ones in the order of
    columns; 1/2 in a row of one."""
    cols = x.shape[1]
    if cols == 1:
        return torch.full_like(x, 0.5)
    order = _order(x)
    places = torch.arange(cols, dtype=x.dtype, device=x.device).div_(cols - 1)
    return torch.empty_like(x).scatter_(1, order, places.expand_as(x))


def _order(x: Tensor) -> Tensor:
    """The columns of each row by magnitude, a stable sort."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return x.abs().sort(dim=1, stable=True).indices
    # the bits of magnitudes have their order; with the column appended they are unique, and
    # sorted twice as fast
    keys = x.numpy().view(np.uint32).astype(np.uint64)
    keys &= 0x7FFFFFFF
    keys <<= 32
    keys |= np.arange(x.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys.view(np.int64))


def elect(
    blocks: Sequence[Tensor],  # the same rows of each delta, (n, cols), overwritten
    weights: Sequence[float],
    majority: str,
    out: Tensor,  # (n, cols), overwritten
    shares: Sequence[float] | None = None,
    *,
    divided: bool = True,
) -> tuple[int, int]:
    """out = Σ keepᵢ·shareᵢ·wᵢ·xᵢ / Σ keepᵢ·shareᵢ (0 if nothing is kept), keepᵢ = 1 if sign(xᵢ) is
    the majority's, else 0; not `divided`: the numerator alone.

    The majority is the sign of Σ xᵢ (total) or of Σ sign(xᵢ) (frequency), without the weights; 0
    counts as +. Returns the number of positions with two or more nonzero values, and the number of
    these where signs differ.
    """
    overlaps = conflicts = 0
    for stripe in _stripes(out):
        parts = [x[stripe] for x in blocks]
        # a GPU counts and trims all of them by one launch
        together = parts if out.device.type == "cpu" else torch.stack(parts)
        counts = _elect(together, weights, majority, out[stripe], shares, divided=divided)
        overlaps, conflicts = overlaps + counts[0], conflicts + counts[1]
    return overlaps, conflicts


def _elect(
    blocks: Sequence[Tensor] | Tensor,
    weights: Sequence[float],
    majority: str,
    out: Tensor,
    shares: Sequence[float] | None,
    *,
    divided: bool,
) -> tuple[int, int]:
    dtype = torch.uint8 if len(blocks) < 256 else torch.int32
    positive, negative = (_votes(compare, blocks, dtype) for compare in (torch.gt, torch.lt))
    overlaps = _count(_mask(torch.ge, positive + negative, 2))
    conflicts = _count(torch.minimum(positive, negative))
    if majority == "total":
        minus = _mask(torch.lt, _total(blocks), 0)
    else:
        minus = _mask(torch.gt, negative, positive)
    minus = minus.view(torch.uint8)  # numbers of 8 bits are several times as fast as bools
    sign = minus.to(out.dtype).mul_(-2).add_(1)
    is_stack = isinstance(blocks, Tensor)
    if is_stack:
        blocks.mul_(sign).relu_()
    for i, (x, weight) in enumerate(zip(blocks, weights, strict=True)):
        kept = x if is_stack else x.mul_(sign).relu_()
        factor = weight * (shares[i] if shares else 1)
        out.add_(kept, alpha=factor) if i else torch.mul(kept, factor, out=out)
    if not divided:
        out.mul_(sign)
        return overlaps, conflicts
    if shares:
        divisor = torch.zeros_like(out)
        for x, share in zip(blocks, shares, strict=True):
            divisor.add_(_mask(torch.gt, x, 0).view(torch.uint8), alpha=share)
        divisor.add_(divisor == 0)
    else:
        elected = negative.sub_(positive).mul_(minus).add_(positive)  # votes on the elected side
        divisor = elected.to(out.dtype).clamp_(min=1)
    out.div_(divisor).mul_(sign)
    return overlaps, conflicts


def _total(blocks: Sequence[Tensor] | Tensor) -> Tensor:
    """Σ xᵢ in float64: exact in practice, so the order of the adapters does not change a sign."""
    total = blocks[0].to(torch.float64, copy=True)
    for x in blocks[1:]:
        if x.device.type == "cpu":
            # numpy adds to another dtype twice as fast as torch
            np.add(total.numpy(), x.numpy(), out=total.numpy())
        else:
            total.add_(x)
    return total


def _votes(compare: Callable, blocks: Sequence[Tensor] | Tensor, dtype: torch.dtype) -> Tensor:
    """The number of blocks above 0, or below 0, at each position."""
    if isinstance(blocks, Tensor):
        return compare(blocks, 0).sum(0, dtype=dtype)
    votes = torch.zeros(blocks[0].shape, dtype=dtype, device=blocks[0].device)
    for x in blocks:
        votes.add_(_mask(compare, x, 0).view(torch.uint8))
    return votes


def deviation(
    blocks: Sequence[Tensor],  # the same rows of each delta, (n, cols)
    out: Tensor,  # (n, cols), overwritten
) -> None:
    """out = sqrt(Σ (xᵢ - mean)² / k), computed in float64: exactly 0 where all are equal."""
    for stripe in _stripes(out):
        parts = [x[stripe].double() for x in blocks]
        mean = torch.stack(parts).sum(0).div_(len(parts))
        squares = torch.zeros_like(mean)
        for part in parts:
            squares.add_(part.sub_(mean).square_())
        out[stripe] = squares.div_(len(parts)).sqrt_()


def _stripes(x: Tensor) -> Iterator[slice]:
    """Rows of a block, in stripes that fit the cache."""
    step = max(1, piece(x.device, CACHED) // x.shape[1])
    return (slice(first, first + step) for first in range(0, len(x), step))
