"""Search the scales of ggml's blocks with the least squared error. For each sub-block a few are
tried with their nearest codes; the best is fitted to its codes by least squares. In super-blocks
the same happens with the integers and the float16 that make up the scales."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.quant.fp4 import round_magnitudes
from adapterkit.kernels.quant.ggml_blocks import (
    TYPES,
    BlockScales,
    BlockType,
    PartScales,
    table_values,
)

HALF_MAX = 65504.0
LARGEST = 1e9  # more than any type but MXFP4 can hold
TINY = 1e-37  # stands for smaller numbers in a division
LAST_EXPONENT = 252  # of MXFP4, the largest with which all codes are finite
CELLS = 512  # parts of [-128, 128], of half a unit: the middles of integers are ends of them


CROSS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))


class SearchParams(NamedTuple):
    """The candidates of a search."""

    # of a part its range, or its value of largest magnitude, in units of a scale
    units: tuple[float, ...]
    more: tuple[float, ...] = ()  # with an importance, if others
    power: float = 0.0  # of large values' weights, without an importance
    rounds: int = 2  # of fitting a super-block's integers and its float16
    near: tuple[tuple[int, int], ...] = CROSS[:1]  # steps from integers of scale and minimum
    fits: int = 2  # of a part's scale to the codes that are nearest, without an importance


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


TERNARY = SearchParams((1.4, 2.4))
TRIED: Mapping[str, SearchParams] = {
    "Q4_0": SearchParams((-8.3,), _steps(-10, -4, 14)),
    "Q4_1": SearchParams((15,), _steps(11, 15.5, 12), fits=1),
    "Q5_0": SearchParams((-16,), _steps(-18, -12, 14)),
    "Q5_1": SearchParams((31,), _steps(27, 31.5, 12), fits=1),
    "Q8_0": SearchParams((127,), _steps(125, 127, 4), fits=0),
    "Q2_K": SearchParams(_steps(1.7, 3.5, 6), power=0.5, near=(*CROSS, (1, 1), (-1, -1))),
    "Q3_K": SearchParams((-5, -4, -3), _steps(-6, -2, 12), power=1),
    "Q4_K": SearchParams(_steps(12, 15.5, 7), power=0.5, rounds=3, near=CROSS),
    "Q5_K": SearchParams(_steps(28, 31.5, 6), power=0.5, rounds=3, near=CROSS),
    "Q6_K": SearchParams(_steps(-34, -30, 8), power=1),
    "IQ4_NL": SearchParams(_steps(-150, -80, 16), power=1),
    "IQ4_XS": SearchParams(_steps(-150, -80, 16), power=1),
    "TQ1_0": TERNARY,
    "TQ2_0": TERNARY,
}


class CodeSums(NamedTuple):
    """Sums of each sub-block, with the values l of its codes."""

    first: Tensor  # Σ w l
    second: Tensor  # Σ w l²
    product: Tensor  # Σ w l x


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Values that share a scale, and their weights.

    Products with a vector of ones take half the time, but their rounding depends on the number of
    rows.
    """

    x: Tensor  # (parts, sub)
    weight: Tensor | None  # as x
    nearest: Callable[[Tensor], Tensor]  # of scaled values, in their memory: the values of codes
    memory: Tensor  # (3, at least as many elements as x)

    @classmethod
    def of(cls, kind: BlockType, x: Tensor, weight: Tensor | None, memory: Tensor) -> "Parts":
        clamped = lambda t: t.round_().clamp_(*kind.ends)
        return cls(
            x=x.view(-1, kind.sub),
            weight=None if weight is None else weight.reshape(-1, kind.sub),
            nearest=_table_values(kind.table, x.device) if kind.table else clamped,
            memory=memory,
        )

    def errors(self, scale: Tensor, minimum: Tensor | None = None) -> Tensor:  # as scale
        """Σ w (x - value)² with the nearest codes."""
        return self._errors(self._levels(scale, minimum), scale, minimum, self.weight)

    def fit(
        self, scale: Tensor, minimum: Tensor | None, weight: Tensor | None
    ) -> tuple[CodeSums, Tensor]:  # as scale
        """Sums, and errors by another weight."""
        sums = self.sums(scale.view(-1), None if minimum is None else minimum.view(-1), line=True)
        level = self.memory[0, : self.x.numel()].view(self.x.shape)
        sums = CodeSums(*(each.view(scale.shape) for each in sums))
        return sums, self._errors(level, scale, minimum, weight)

    def _errors(
        self, level: Tensor, scale: Tensor, minimum: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        value = level.mul_(scale.view(-1, 1))
        value = value if minimum is None else value.sub_(minimum.view(-1, 1))
        error = value.sub_(self.x).square_()
        error = error if weight is None else error.mul_(weight.reshape(error.shape))
        return error.sum(1).view(scale.shape)

    def _levels(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The values of the nearest codes, in the first buffer."""
        level = self.memory[0, : self.x.numel()].view(self.x.shape)
        x = self.x if minimum is None else torch.add(self.x, minimum.view(-1, 1), out=level)
        return self.nearest(torch.mul(x, _inverse(scale).view(-1, 1), out=level))

    def weighted(self, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight

    def weights(self) -> Tensor:
        """Σ w."""
        if self.weight is None:
            return self.x.new_full((len(self.x),), self.x.shape[1])
        return self.weight.sum(1)

    def sums(self, scale: Tensor, minimum: Tensor | None = None, *, line: bool = False) -> CodeSums:
        """The sums with the nearest codes for these scales (parts,); the first only for a line."""
        level = self._levels(scale, minimum)
        other, weighted = (each[: self.x.numel()].view(self.x.shape) for each in self.memory[1:])
        weighted = level if self.weight is None else torch.mul(level, self.weight, out=weighted)
        product = torch.mul(weighted, self.x, out=other).sum(1)
        first = weighted.sum(1) if line else product
        return CodeSums(first, torch.mul(weighted, level, out=other).sum(1), product)


class _Best:
    """The candidate with the least error so far, for each sub-block."""

    def __init__(self):
        self.values: tuple[Tensor, ...] = ()  # the error is the first

    def add(self, *values: Tensor) -> None:
        if self.values:
            better = values[0] < self.values[0]
            pairs = zip(values, self.values, strict=True)
            values = tuple(torch.where(better, new, old) for new, old in pairs)
        self.values = values


def search(
    name: str,
    x: Tensor,  # (n, values) float32
    importance: Tensor | None,  # as x
    memory: Tensor,  # (3, at least as many elements as x)
) -> BlockScales:
    """The scales of n blocks with the least Σ w (x - value)² among the candidates.

    w = importance · (4 + x² / mean x²)^½, for MXFP4 importance alone; without importance (2 + x² /
    mean x²)^p. ggml's weights are between these and x²; it loses more, by its weights or none.
    """
    kind = TYPES[name]
    if "e" in kind.fields:
        return BlockScales(_exponents(x, importance))
    tried, nested = TRIED[name], kind.nested
    flat = x.view(-1)
    x = x if float(torch.dot(flat, flat)) < LARGEST**2 else x.clamp(-LARGEST, LARGEST)
    weight = _emphasized(x, tried.power if importance is None else 0.5, importance)
    parts = Parts.of(kind, x, weight, memory)
    units = tried.units if importance is None else tried.more or tried.units
    fits = tried.fits if importance is None else 2
    if kind.has_min:
        scale, minimum = fit_lines(parts, units, fits, signed=nested is None)
        if nested is not None:
            shape = (-1, kind.parts)
            return nest_lines(parts, nested, scale.view(shape), minimum.view(shape), tried)
        return BlockScales(half(scale)[:, None].half(), -minimum[:, None].half())
    scale = fit_scales(parts, units, fits)
    if nested is not None:
        return nest_scales(parts, nested, scale.view(-1, kind.parts), tried.rounds)
    return BlockScales(half(scale)[:, None].half())


def _emphasized(x: Tensor, power: float, importance: Tensor | None) -> Tensor | None:
    if power == 0:
        return importance
    weight = x.square()
    weight.mul_(_inverse(weight.mean(1, keepdim=True))).add_(2 if importance is None else 4)
    weight = weight.sqrt_() if power == 0.5 else weight
    return weight if importance is None else weight.mul_(importance)


def fit_scales(parts: Parts, tried: Sequence[float], fits: int) -> Tensor:  # (parts,)
    """`tried`: the value of largest magnitude in units of a scale."""
    high, low = parts.x.amax(1), parts.x.amin(1)
    extreme = torch.where(high > -low, high, low)
    if not fits:
        return extreme / tried[0]
    best = _Best()
    for each in tried:
        _, second, product = parts.sums(extreme / each)
        best.add(-_ratio(product * product, second), second, product)
    _, second, product = best.values
    return _ratio(product, second)


def fit_lines(
    parts: Parts, tried: Sequence[float], fits: int, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """scale and minimum (parts,) of scale · l - minimum; `tried`: the range of a sub-block, with 0
    in it unless minima are signed, in units of a scale."""
    high, low = parts.x.amax(1), parts.x.amin(1)
    low = low if signed else low.clamp_(max=0)
    if not fits:
        return (high - half(low)) / tried[0], -low
    weights, total = parts.weights(), parts.weighted(parts.x).sum(1)
    mean, spread = _ratio(total, weights), high - low
    inverse, best = _inverse(weights), _Best()
    for each in tried:
        first, second, product = parts.sums(spread / each, -low, line=True)
        around, varies = product - mean * first, second - first * first * inverse
        best.add(-_ratio(around * around, varies), first, second, product)
    one = CodeSums(*best.values[1:])
    scale, minimum = _line(one, weights, total, signed=signed)
    for _ in range(fits - 1):
        one = parts.sums(scale, minimum, line=True)
        scale, minimum = _line(one, weights, total, signed=signed)
    return scale, minimum


def _line(sums: CodeSums, weights: Tensor, total: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """scale and minimum of least Σ w (x - scale · l + minimum)²; signed minima become float16."""
    first, second, product = sums
    det = weights * second - first * first
    minimum = _ratio(first * product - second * total, det)
    # all codes are one: its value alone says what they are
    flat = det <= 1e-6 * weights * second
    minimum = torch.where(flat, torch.where(second > 0, 0.0, -_ratio(total, weights)), minimum)
    minimum = half(minimum) if signed else minimum.clamp_(min=0)
    return _ratio(product + minimum * first, second), minimum


def refit(
    kind: BlockType,
    parts: Parts,
    scales: BlockScales,
    changes: Tensor | None,  # (n, values)
) -> tuple[Tensor, BlockScales, Tensor]:  # (n,), bool (n,)
    """Return the error of blocks with their scales; scales with another float16 that best fits the
    nearest codes; and a mask of blocks where these are better. `changes`: other weights for the
    first error."""
    scale, *rest = scales.effective
    minimum = rest[0] if rest else None
    sums, error = parts.fit(scale, minimum, parts.weight if changes is None else changes)
    first, second, product = sums
    weights, total = parts.weights().view(first.shape), torch.zeros_like(scale)
    i = torch.ones_like(scale) if scales.scale is None else scales.scale.float()
    if minimum is None:
        d = half(_ratio(_sum(i * product), _sum(i * i * second)))
        new = replace(scales, d=d.half())
    else:
        total = parts.weighted(parts.x).sum(1).view(first.shape)
        if scales.min is None:
            d, m = _line(sums, weights, total, signed=True)
            new = BlockScales(half(d).half(), -m.half())
        else:
            d, m = _two_halves(sums, weights, total, i, scales.min.float())
            new = replace(scales, d=d.half(), m=m.half())
    error, others = error.sum(1), new.effective
    if changes is not None:
        return error, new, parts.errors(*others).sum(1) < error
    before = _error_change(sums, weights, total, scale, *rest)
    return error, new, _sum(_error_change(sums, weights, total, *others) - before)[:, 0] < 0


def _error_change(
    sums: CodeSums, weights: Tensor, total: Tensor, scale: Tensor, minimum: Tensor | float = 0.0
) -> Tensor:
    """Σ w (x - scale · l + minimum)² - Σ w x²."""
    first, second, product = sums
    error = scale * (scale * second - 2 * (product + minimum * first))
    return error + minimum * (minimum * weights + 2 * total)


def is_searched_fast(name: str, importance: Tensor | None) -> bool:
    """Return whether a search takes no longer than computing the errors of old scales."""
    return name not in TRIED or (importance is None and not TRIED[name].fits)


def rounding_error(kind: BlockType, parts: Parts, scales: BlockScales) -> Tensor:  # (n,)
    """Σ w (x - value)² of values at random between codes."""
    step = scales.effective[0].abs()
    if kind.table:
        step = step * ((max(kind.table) - min(kind.table)) / (len(kind.table) - 1))
    return (step.square() * parts.weights().view(step.shape)).sum(1) / 12


# Super-blocks.


def nest_scales(
    parts: Parts,
    nested: PartScales,
    scale: Tensor,  # (n, parts of each)
    rounds: int,
) -> BlockScales:
    """d · integer."""
    low, high = nested.ends
    d, best = _unit(scale, parts.weights().view(scale.shape), low, high), _Best()
    integer = _rounded(scale, d, low, high)
    for left in reversed(range(rounds)):
        each = d * integer
        sums = parts.sums(each.view(-1))
        second, product = sums.second.view(scale.shape), sums.product.view(scale.shape)
        best.add(_sum(each * (each * second - 2 * product)), d, integer)
        if left:
            integer = _rounded(_ratio(product, second), d, low, high)
            d = half(_ratio(_sum(integer * product), _sum(integer * integer * second)))
    _, d, integer = best.values
    return BlockScales(d.half(), scale=integer.to(torch.int16))


def nest_lines(
    parts: Parts,
    nested: PartScales,
    scale: Tensor,  # (n, parts of each)
    minimum: Tensor,  # as scale
    tried: SearchParams,
) -> BlockScales:
    """d · integer and m · integer."""
    shape, top, best = scale.shape, nested.ends[1], _Best()
    weights = parts.weights().view(shape)
    total = parts.weighted(parts.x).sum(1).view(shape)
    d, m = (_unit(each, weights, 0, top) for each in (scale, minimum))
    i, j = _rounded(scale, d, 0, top), _rounded(minimum, m, 0, top)
    for left in reversed(range(tried.rounds)):
        each = _Best()
        for di, dj in tried.near if left else ((0, 0),):
            i_, j_ = (i + di).clamp_(0, top), (j + dj).clamp_(0, top)
            scale, minimum = d * i_, m * j_
            sums = parts.sums(scale.view(-1), minimum.view(-1), line=True)
            first, second, product = (x.view(shape) for x in sums)
            one = CodeSums(first, second, product)
            error = _error_change(one, weights, total, scale, minimum)
            each.add(error, i_, j_, first, second, product)
        error, i, j, first, second, product = each.values
        best.add(_sum(error), d, m, i, j)
        if left:
            minimum = _line(CodeSums(first, second, product), weights, total, signed=False)[1]
            j = _rounded(minimum, m, 0, top)
            i = _rounded(_ratio(product + m * j * first, second), d, 0, top)
            d, m = _two_halves(CodeSums(first, second, product), weights, total, i, j)
    _, d, m, i, j = best.values
    return BlockScales(d.half(), m.half(), i.to(torch.int16), j.to(torch.int16))


def _two_halves(
    sums: CodeSums, weights: Tensor, total: Tensor, i: Tensor, j: Tensor
) -> tuple[Tensor, Tensor]:  # (n, 1)
    """d and m of least Σ w (x - d i l + m j)²."""
    first, second, product = sums
    a, b, c = _sum(i * i * second), _sum(i * j * first), _sum(j * j * weights)
    p, q = _sum(i * product), _sum(j * total)
    det = a * c - b * b
    m = torch.where(det > 1e-6 * a * c, _ratio(b * p - q * a, det), 0.0)
    m = half(m.clamp_(min=0))
    return half(_ratio(p + m * b, a)), m


STEPS = (-2.0, -1.25, -0.5, 0.0, 0.5, 1.25)


def _unit(x: Tensor, weight: Tensor, low: int, high: int) -> Tensor:  # (n, 1)
    """The float16 unit of integer scales with the least squared error, from a few."""
    most, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    extreme, end = (most, high) if low == 0 else (torch.where(most > -least, most, least), low)
    best = _Best()
    for step in STEPS:
        unit = half(extreme / (end + step))
        best.add(_sum((x - unit * _rounded(x, unit, low, high)).square_().mul_(weight)), unit)
    return best.values[1]


def _rounded(x: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    return (x * _inverse(unit)).round_().clamp_(low, high)


def _sum(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


# MXFP4.


def _exponents(x: Tensor, importance: Tensor | None) -> Tensor:  # (n, 1) uint8
    """The exponent with which the largest value is 4 to 8, or one more: 4 times that is finite."""
    x = x.abs()
    first = ((x.amax(1, keepdim=True).view(torch.int32) >> 23) - 2).clamp_(min=0)
    x = x * (254 - first << 23).view(torch.float32)  # 2^(127 - first)
    errors = []
    for factor in (1.0, 0.5):
        error = round_magnitudes(x * factor).sub_(x * factor).square_()
        error = error if importance is None else error.mul_(importance)
        errors.append(_sum(error) / factor**2)
    more = (errors[1] < errors[0]) & (first < LAST_EXPONENT)
    return (first + more.int()).to(torch.uint8)


# Shared.


def half(x: Tensor) -> Tensor:
    """The nearest float16 as float32, never infinite."""
    return x.clamp(-HALF_MAX, HALF_MAX).half().float()


def _inverse(x: Tensor) -> Tensor:
    """1 / x; 0 for values near 0."""
    return torch.where(x.abs() < TINY, 0.0, x.reciprocal())


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y of y ≥ 0; values near 0 are replaced by a slightly larger one."""
    return x / y.clamp(min=TINY)


def _table_values(table: tuple[int, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    near = table_values(table, device)[table_codes(table, device).long()]
    return lambda t: torch.index_select(near, 0, cells(t).view(-1), out=t.view(-1)).view(t.shape)


def cells(t: Tensor) -> Tensor:  # int32
    """The cell of each scaled value, which is overwritten."""
    return t.mul_(2).add_(CELLS // 2).clamp_(0, CELLS - 1).to(torch.int32)


@functools.cache
def table_codes(table: tuple[int, ...], device: torch.device) -> Tensor:  # (CELLS,) float32
    """The nearest code of each cell."""
    middles = (torch.arange(CELLS) - CELLS / 2 + 0.5) / 2
    return (middles[:, None] - torch.tensor(table)).abs().argmin(1).float().to(device)
