"""Compare pairs in a diff: tensors, deltas and token rows that both sides have."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.record import Tokens
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.reader import Reader, TensorReader
from adapterkit.kernels import compare as kernel
from adapterkit.kernels.lowrank.algebra import Product, inner, rank_for_energy, stack_products

BLOCK = 1 << 18  # elements compared at a time: near a core's cache
MAX_COLUMNS = 1 << 17  # of a matrix that gets a suggested rank: its sketch takes 64 MB
NOISE = 2.0**-44  # of ‖b‖ ‖a‖: rounding of float64 arithmetic on factors where the delta is zero
# from the same bytes to different beyond the tolerance
STATES = ("identical", "equal", "rounded", "within", "changed")
Rows = Callable[[int, int], Tensor]  # rows [first, last) of one side, in its dtype


@dataclass
class Result:
    """The result of one comparison; `row` has its figures if the pair changed."""

    state: str
    row: Json = field(default_factory=dict)
    squares: tuple[float, float] | None = None  # ‖A−B‖² and ‖A‖², where they were measured


@dataclass(frozen=True)
class Pair(ABC):
    """A tensor, delta or row that both sides have."""

    name: str
    kind: str
    a: Any
    b: Any

    @abstractmethod
    def compare(self, reader: Reader, energy: float) -> Result:
        """The result; `energy`: the share that the suggested rank keeps, 0 for no suggestion."""


class MatrixStack(NamedTuple):
    """A tensor as a stack of matrices of `height` rows; all axes after the first are columns."""

    rows: int
    columns: int
    height: int

    @staticmethod
    def of(shape: tuple[int, ...], name: str) -> MatrixStack:
        """The grid of a tensor; vectors, and matrices too wide for a sketch, are one column."""
        stack = len(shape) == 3 and "expert" in name
        height, columns = shape[0] if shape else 1, math.prod(shape[1:])
        if stack:
            height, columns = shape[1:]
        if len(shape) < 2 or min(height, columns) < 2 or columns > MAX_COLUMNS:
            return MatrixStack(math.prod(shape), 1, max(math.prod(shape), 1))
        return MatrixStack(math.prod(shape) // columns, columns, height)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK // self.columns)
        return ((first, min(first + step, stop)) for first in range(start, stop, step))

    @property
    def exact(self) -> bool:
        """True if all singular values are computed and none estimated."""
        return self.columns <= kernel.EXACT or min(self.height, self.columns) <= kernel.SKETCH


class TensorPair(Pair):
    """A tensor of both sides: `TensorSpec`s."""

    def compare(self, reader: Reader, energy: float) -> Result:
        floats = self.a.dtype in dtypes.FLOATS and self.b.dtype in dtypes.FLOATS
        if self.a.shape != self.b.shape:
            return _changed(self, "shape")
        if not floats and self.a.dtype != self.b.dtype:
            return _changed(self, "dtype")
        if not floats:
            return self._compare_bytes(reader)
        sides = self.sides(reader)
        state = self.state(sides)
        return Result(state) if state else self._measure(sides, energy)

    @property
    def grid(self) -> MatrixStack:
        return MatrixStack.of(self.a.shape, self.name)

    def sides(self, reader: Reader) -> tuple[Rows, Rows]:
        """The rows of A and of B; a quantized weight is decoded once."""
        grid = self.grid[:2]

        def rows(spec: TensorSpec) -> Rows:
            if not isinstance(spec, QuantizedWeight):
                return partial(reader.rows, spec, grid)
            value = reader.tensor(spec).reshape(grid)
            return lambda first, last: value[first:last]

        return rows(self.a), rows(self.b)

    def _blocks(
        self, sides: tuple[Rows, Rows], start: int, stop: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, its rows of A, of B)."""
        for first, last in self.grid.blocks(start, stop):
            a, b = (rows(first, last) for rows in sides)
            yield first, a, b

    def state(self, sides: tuple[Rows, Rows]) -> str | None:
        """ "identical", "equal" or "rounded", or None at the first block that is none of these."""
        same_dtype, identical, forth, back = self.a.dtype == self.b.dtype, True, True, True
        for _, a, b in self._blocks(sides, 0, self.grid.rows):
            if not same_dtype:
                forth, back = forth and kernel.rounds_to(a, b), back and kernel.rounds_to(b, a)
            elif not torch.equal(_bits(a), _bits(b)):
                identical = False
                forth = kernel.same_values(a, b)
            if not forth and (same_dtype or not back):
                return None
        return "rounded" if not same_dtype else "identical" if identical else "equal"

    def _compare_bytes(self, reader: Reader) -> Result:
        width = max(1, dtypes.BITS[self.a.dtype] // 8)  # elements smaller than a byte: by bytes
        count, differing = self.a.nbytes // width, 0
        sides = [replace(spec, dtype="U8") for spec in (self.a, self.b)]
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            a, b = (reader.rows(spec, (count, width), first, last) for spec in sides)
            if not torch.equal(a, b):
                differing += int((a != b).any(1).sum())
        if not differing:
            return Result("identical")
        return _changed(self, "values", differing=differing / count)

    def _measure(self, sides: tuple[Rows, Rows], energy: float) -> Result:
        grid, sums, spectra = self.grid, kernel.PairSums(), []
        for start in range(0, grid.rows, grid.height):
            spectra.append(self._spectrum(sides, start, start + grid.height, sums, energy))
        rank = None
        if grid.columns > 1:
            rank = _suggested_rank(kernel.pool_spectra(spectra), sums.squared_error, grid, energy)
        return _changed(self, "values", rank, **_figures(sums, math.prod(self.a.shape)))

    def _spectrum(
        self, sides: tuple[Rows, Rows], start: int, stop: int, sums: kernel.PairSums, energy: float
    ) -> Tensor:
        """Singular values of rows [start, stop) of A − B, whose sums are added to `sums`."""
        columns = self.grid.columns
        if not energy or columns == 1:
            for _, a, b in self._blocks(sides, start, stop):
                sums.add(a, b)
            return torch.zeros(1)
        if columns <= kernel.EXACT:
            gram = kernel.Gram(columns)
            for _, a, b in self._blocks(sides, start, stop):
                gram.add(sums.add(a, b))
            return gram.values()
        wide = "F64" in (self.a.dtype, self.b.dtype)
        sketch = kernel.Sketch(columns, torch.float64 if wide else torch.float32)
        for first, a, b in self._blocks(sides, start, stop):
            sketch.add(sums.add(a, b), first)
        gram = kernel.Gram(columns, sketch.basis())
        for _, a, b in self._blocks(sides, start, stop):
            gram.add(kernel.base_and_difference(a, b, sketch.z.dtype)[1])
        return gram.values()


@dataclass(frozen=True)
class Bias:
    """scale * bias of a LoRA's b, as a product of rank one."""

    spec: TensorSpec  # (out,)
    scale: float
    rank: int = 1
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def products(self, reader: TensorReader) -> list[Product]:
        column = reader.tensor(self.spec).double().reshape(-1, 1) * self.scale
        return [Product(column, torch.ones(1, 1, dtype=torch.float64))]


class DeltaPair(Pair):
    """scale * b @ a, or scale * bias, of both sides: `Factors` or `Bias`."""

    def compare(self, reader: Reader, energy: float) -> Result:
        if (_shape(self.a), self.a.experts) != (_shape(self.b), self.b.experts):
            return _changed(self, "shape")
        state = self._state_of_factors(reader)
        return Result(state) if state else self._measure(reader, energy)

    def _state_of_factors(self, reader: Reader) -> str | None:
        """The state of the stored factors; None if they or their scales differ."""
        if (self.a.scale, self.a.rank) != (self.b.scale, self.b.rank):
            return None
        states = []
        for one, other in zip(_factors(self.a), _factors(self.b), strict=True):
            if one.shape != other.shape:
                return None
            pair = TensorPair("", "", one, other)
            state = pair.state(pair.sides(reader))
            if state is None:
                return None
            states.append(state)
        return max(states, key=STATES.index)

    def _measure(self, reader: Reader, energy: float) -> Result:
        squares = [0.0, 0.0, 0.0]  # ‖A‖², ⟨A, B⟩, ‖B‖²
        spectra, noise = [], 0.0
        for x, y in zip(self.a.products(reader), self.b.products(reader), strict=True):
            for i, (one, other) in enumerate(((x, x), (x, y), (y, y))):
                squares[i] += inner(one, other)
            difference = stack_products([x, y], [1.0, -1.0])
            sizes = (NOISE * float(p.left.norm() * p.right.norm()) for p in (x, y))
            noise = math.hypot(noise, *sizes)
            spectra.append(kernel.singular_values(difference))
        s = kernel.pool_spectra(spectra)
        error, norm = float(s.norm()), math.sqrt(max(squares[0], 0.0))
        if error <= noise:
            return Result("rounded")
        needed = rank_for_energy(s, energy) if energy and math.isfinite(error) else None
        rank = {"energy": energy, "needed": needed, "above": None, "estimate": False}
        return _changed(
            self,
            "values",
            rank if needed else None,
            relative_error=kernel.relative(error, norm),
            cosine=kernel.cosine(*squares),
            norm=norm,
            squares=(error * error, norm * norm),
        )


def _factors(part: Factors | Bias) -> tuple[TensorSpec, ...]:
    return (part.a, part.b) if isinstance(part, Factors) else (part.spec,)


class TokenRowsPair(Pair):
    """Trained token rows of both sides, compared token by token: `Tokens`."""

    def compare(self, reader: Reader, energy: float) -> Result:
        if self.a.values.shape[1:] != self.b.values.shape[1:]:
            return _changed(self, "shape")
        if self.a.indices == self.b.indices:
            tensors = TensorPair(self.name, self.kind, self.a.values, self.b.values)
            return tensors.compare(reader, energy)
        at = {index: row for row, index in enumerate(self.b.indices)}
        common = [(row, at[index]) for row, index in enumerate(self.a.indices) if index in at]
        a = reader.tensor(self.a.values)[[row for row, _ in common]]
        b = reader.tensor(self.b.values)[[row for _, row in common]]
        sums = kernel.PairSums()
        sums.add(a, b)
        only_a, only_b = len(self.a.indices) - len(common), len(self.b.indices) - len(common)
        if not (only_a or only_b):
            if kernel.same_values(a, b):
                return Result("equal")
            if a.dtype != b.dtype and (kernel.rounds_to(a, b) or kernel.rounds_to(b, a)):
                return Result("rounded")
        reason = "rows" if only_a or only_b else "values"
        result = _changed(self, reason, **_figures(sums, max(1, a.numel())))
        result.row |= {"rows_only_a": only_a, "rows_only_b": only_b}
        return result


def make_pair(kind: str, name: str, a: object, b: object) -> Pair:
    classes = {"delta": DeltaPair, "bias": DeltaPair, "rows": TokenRowsPair}
    return classes.get(kind, TensorPair)(name, kind, a, b)


def stored_specs(part: Any) -> tuple[TensorSpec, ...]:
    """The stored tensors of one side of a pair, in file order."""
    if isinstance(part, Factors):
        return tuple(sorted((part.a, part.b), key=lambda spec: spec.start))
    if isinstance(part, Tokens):
        return (part.values,)
    return (part.spec if isinstance(part, Bias) else part,)


def summary_of(part: object) -> Json:
    """One side of a pair in a row: rank, scale and shape of a delta, else dtype and shape."""
    if isinstance(part, Factors | Bias):
        summary = {"rank": part.rank, "scale": part.scale, "shape": list(_shape(part))}
        return summary | ({"experts": part.experts} if part.experts else {})
    spec = stored_specs(part)[0]
    dtype = spec.format if isinstance(spec, QuantizedWeight) else spec.dtype
    return {"dtype": dtype, "shape": list(spec.shape)}


def _shape(part: Factors | Bias) -> tuple[int, ...]:
    """(out, in) of a delta, (out, in, *kernel) of a convolution's, (out,) of a bias."""
    return (part.shape[0], *part.a.shape[1:]) if isinstance(part, Factors) else part.shape


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def _figures(sums: kernel.PairSums, elements: int) -> Json:
    return {
        "relative_error": sums.relative,
        "max_abs": sums.largest,
        "cosine": sums.cosine,
        "differing": sums.differing / elements,
        "norm": math.sqrt(sums.squares),
        "squares": (sums.squared_error, sums.squares),
    }


def _changed(
    pair: Pair,
    reason: str,
    rank: dict | None = None,
    squares: tuple[float, float] | None = None,
    **figures: float,
) -> Result:
    """The result of a pair that differs; figures that are missing or not finite are None."""
    names = ("relative_error", "max_abs", "cosine", "differing", "norm")
    row = {"name": pair.name, "kind": pair.kind, "why": reason}
    row |= {"a": summary_of(pair.a), "b": summary_of(pair.b)}
    row |= {
        name: figures[name] if math.isfinite(figures.get(name, math.nan)) else None
        for name in names
    }
    return Result("changed", row | {"rank": rank}, squares)


def _suggested_rank(s: Tensor, total: float, grid: MatrixStack, energy: float) -> dict | None:
    """The smallest rank that keeps the share `energy` of ‖D‖² = total; None if D, or its singular
    values s, are not finite."""
    if not energy or not math.isfinite(total) or not bool(s.isfinite().all()):
        return None
    needed = rank_for_energy(s, energy, None if grid.exact else total)
    needed = min(needed, grid.height, grid.columns)
    above = not grid.exact and needed > kernel.SKETCH
    return {
        "energy": energy,
        "needed": None if above else needed,
        "above": kernel.SKETCH if above else None,
        "estimate": not grid.exact,
    }
