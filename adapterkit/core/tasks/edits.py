"""Edits of the rows of one stored tensor, described before any data is read."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Loaded, RowEdit
from adapterkit.core.weights.parameters import Positions, taken
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels import rows as kernel


@dataclass(frozen=True, slots=True)
class Band:
    """Rows, or columns, [start, stop) of the grid, and the parameter's rows stored there.

    `at`: the parameter's row for each of them; None: the same, in order from 0. `of`: the positions
    that belong to the parameter, if these are not all (interleaved storage)."""

    start: int
    stop: int
    at: Positions | None = None
    of: Positions | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def positions(self) -> list[int]:
        return list(range(self.start, self.stop) if self.of is None else self.of)

    def selected(self, factor: Tensor, dim: int) -> Tensor:
        """The parameter's rows (or columns) that are stored here, in the order of `positions`."""
        return factor if self.at is None else taken(factor, self.at, dim)

    def placed(self, factor: Tensor, dim: int) -> Tensor:
        """The factor's rows (or columns) in stored order over [start, stop), zero for other
        contents of the stored tensor."""
        factor = self.selected(factor, dim)
        if self.of is None:
            return factor
        shape = list(factor.shape)
        shape[dim] = len(self)
        spread = factor.new_zeros(shape)
        where = torch.as_tensor(self.positions, device=factor.device) - self.start
        return spread.index_copy_(dim, where, factor)

    def overlap(self, w: Tensor, first: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield the block's rows that are stored here, and their slice of [start, stop); nothing if
        there are none. `first`: the block's first row."""
        low, high = max(self.start, first), min(self.stop, first + w.shape[0])
        if low < high:
            yield w[low - first : high - first], slice(low - self.start, high - self.start)


@dataclass(frozen=True, slots=True)
class Block:
    """The position of one product left @ right on the grid."""

    rows: Band
    columns: Band
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class PlacedFactors:
    """One adapter's low-rank addition to one stored tensor. Its factors have `flip` if the tensor's
    rows are the module's inputs."""

    factors: Factors
    blocks: tuple[Block, ...]

    @property
    def shared(self) -> bool:
        """True if other steps need other slices of the same factors, because experts are stored one
        by one."""
        return self.factors.experts is not None and len(self.blocks) < self.factors.experts

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """b, and a, or the slices of it for the blocks' experts."""
        if self.factors.experts is None:
            return self.factors.reads
        return (*(self._of_expert(block) for block in self.blocks), self.factors.b)

    def _of_expert(self, block: Block) -> TensorSpec:
        """The slice of a for the block's expert."""
        a, experts = self.factors.a, self.factors.experts
        assert experts is not None and block.expert is not None
        rank, at = self.factors.rank, block.expert
        return a.narrowed((experts * rank, *a.shape[1:]), at * rank, (at + 1) * rank)

    @property
    def flops(self) -> int:
        areas = (len(block.rows) * len(block.columns) for block in self.blocks)
        return 2 * self.factors.rank * sum(areas)

    def products(self, inputs: Reader) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """(block, left (n, r) with the scale folded in, right (r, m)) for each block."""
        for block, left, right in self.pairs(inputs):
            if self.factors.flip:
                left, right = right.T, left.T
            left, right = block.rows.placed(left, 0), block.columns.placed(right, 1)
            yield block, left.contiguous(), right.contiguous()

    def pairs(self, inputs: Reader) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """(block, b (out, r) with the scale folded in, a (r, in)); for experts, each one's own."""
        scale, rank, experts = self.factors.scale, self.factors.rank, self.factors.experts
        if experts is None:
            a, b = self.factors.stored(inputs)
            b = scale_factor(self.factors.weighted(b, a), scale)
            for block in self.blocks:
                yield block, b, a
            return
        split = lambda b: b.reshape(-1, rank, experts).permute(2, 0, 1).contiguous()
        # if each expert is stored alone, reading all experts' factors in each step would cost the
        # square of their number
        b = self.factors.b
        stack = inputs.shared(b, split) if self.shared else split(inputs.view(None).tensor(b))
        for block in self.blocks:
            a = inputs.tensor(self._of_expert(block)).reshape(rank, -1)
            own = stack[block.expert].to(inputs.dtype)
            yield block, scale_factor(self.factors.weighted(own, a, block.expert or 0), scale), a


def scale_factor(factor: Tensor, scale: float) -> Tensor:
    """scale * factor, rounded once (a power of two is exact)."""
    return factor if scale == 1.0 else (factor.double() * scale).to(factor.dtype)


@dataclass(frozen=True, slots=True)
class AddLowRank(RowEdit):
    """w += Σ scale * b @ a: one product per block, the factors stacked along the rank."""

    added: tuple[PlacedFactors, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for each in self.added for spec in each.reads)

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        return tuple(each.factors.b for each in self.added if each.shared)

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.added)

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        stacks: dict[tuple[int, int, int, int], list] = {}
        for each in self.added:
            for block, left, right in each.products(inputs):
                rows, columns = block.rows, block.columns
                place = rows.start, rows.stop, columns.start, columns.stop
                stacks.setdefault(place, []).append((left, right))
        products = []
        for (row, row_stop, *columns), pairs in sorted(stacks.items(), key=lambda item: item[0]):
            left = torch.cat([p[0] for p in pairs], 1) if len(pairs) > 1 else pairs[0][0]
            right = torch.cat([p[1] for p in pairs], 0) if len(pairs) > 1 else pairs[0][1]
            products.append((Band(row, row_stop), slice(*columns), left, right))
        norm = math.hypot(*(kernel.low_rank_norm(left, right) for *_, left, right in products))
        whole = slice(0, grid[1])

        def apply(w: Tensor, first: int) -> None:
            for rows, columns, left, right in products:
                for part, here in rows.overlap(w, first):
                    part = part if columns == whole else part[:, columns]
                    kernel.add_low_rank(part, left[here], right)

        return Loaded(apply, norm)


@dataclass(frozen=True, slots=True)
class AddLikePeft(AddLowRank):
    """One adapter's addition with PEFT's roundings: the product is scaled after the matmul; with
    `delta_first` it is rounded to the weight's dtype before it is added; the sum is rounded before
    the next adapter (`merge_and_unload`, safe_merge=False)."""

    rounded: str
    delta_first: bool

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        (added,) = self.added
        scale = added.factors.scale
        unscaled = replace(added, factors=replace(added.factors, scale=1.0))
        products = list(unscaled.products(inputs))
        norms = [kernel.low_rank_norm(left, right) for _, left, right in products]
        norm = abs(scale) * math.hypot(*norms)
        rounded = dtypes.torch_dtype(self.rounded)

        def exact(w: Tensor, first: int, delta_first: bool = False) -> None:
            for block, left, right in products:
                for part, here in block.rows.overlap(w, first):
                    part = part[:, block.columns.start : block.columns.stop]
                    delta = (left[here] @ right) * scale
                    part += delta.to(rounded).to(w.dtype) if delta_first else delta

        def apply(w: Tensor, first: int) -> None:
            exact(w, first, self.delta_first)
            _round(w, rounded)

        return Loaded(apply, norm, exact)


@dataclass(frozen=True, slots=True)
class Decompose(RowEdit):
    """DoRA: w = magnitude * w / ‖w‖ per output row of the parameter (arXiv:2402.09353).

    `by_columns`: the parameter's outputs are the grid's columns (an embedding's axis, a transposed
    layer). Then the norms need every row, so the rows are read once before, with the earlier edits
    `before`. `of_stored`: the norm is that of the stored weight after `before` only, regardless of
    other additions to w (PEFT with several adapters)."""

    magnitude: TensorSpec = field(metadata=READ)
    rows: Band  # the outputs on the grid, if they are rows
    by_columns: bool
    before: tuple[RowEdit, ...]
    of_stored: bool = False

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        magnitude = inputs.tensor(self.magnitude).reshape(-1)
        if self.by_columns:
            squares = torch.zeros(grid[1], dtype=torch.float64, device=inputs.device)
            for _, w in self._blocks_before(inputs, source, grid):
                kernel.add_column_squares(w, squares)
            return Loaded(lambda w, first: kernel.scale_columns(w, magnitude, squares.sqrt()))
        norms = None
        if self.of_stored:
            norms = torch.cat(
                [kernel.row_norms(w) for _, w in self._blocks_before(inputs, source, grid)]
            )
        return Loaded(lambda w, first: self._scale_rows(w, first, magnitude, norms))

    def _blocks_before(
        self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]
    ) -> Iterator[tuple[int, Tensor]]:
        before = [edit.load(inputs, source, grid) for edit in self.before]
        for first, w in inputs.blocks(source, grid):
            for edit in before:
                edit.apply(w, first)
            yield first, w

    def _scale_rows(self, w: Tensor, first: int, magnitude: Tensor, norms: Tensor | None) -> None:
        rows = self.rows
        for part, here in rows.overlap(w, first):
            norm = kernel.row_norms(part) if norms is None else norms[rows.start : rows.stop][here]
            kernel.scale_rows(part, magnitude[here], norm)


@dataclass(frozen=True, slots=True)
class RoundTo(RowEdit):
    """w rounded to the weight's dtype between two adapters, as PEFT does."""

    rounded: str

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        dtype = dtypes.torch_dtype(self.rounded)
        return Loaded(lambda w, first: _round(w, dtype), exact=lambda w, first: None)


def _round(w: Tensor, dtype: torch.dtype) -> None:
    w.copy_(w.to(dtype))


@dataclass(frozen=True, slots=True)
class AddVector(RowEdit):
    """w += scale * vector, for biases: the grid is (n, 1)."""

    vector: TensorSpec = field(metadata=READ)
    scale: float
    rows: Band

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        vector = scale_factor(inputs.tensor(self.vector).reshape(-1, 1), self.scale)
        vector = self.rows.placed(vector, 0)

        def apply(w: Tensor, first: int) -> None:
            for part, here in self.rows.overlap(w, first):
                part += vector[here]

        return Loaded(apply, float(torch.linalg.vector_norm(vector.double())))


@dataclass(frozen=True, slots=True)
class ReplaceRows(RowEdit):
    """w[indices] = values: trained token rows. `by_columns`: the tokens are the grid's columns."""

    values: TensorSpec = field(metadata=READ)
    indices: tuple[int, ...]
    by_columns: bool = False

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        values = inputs.tensor(self.values)
        if self.by_columns:
            where = torch.tensor(self.indices, device=values.device)
            part = lambda w, first: values[:, first : first + w.shape[0]].T
            return Loaded(lambda w, first: _set_columns(w, where, part(w, first)))
        placed = _TargetRows(self.indices, values)
        return Loaded(lambda w, first: placed.set(w, first, slice(0, grid[1])))


class _TargetRows:
    """Rows with their target positions, sorted so that those of a block are adjacent."""

    def __init__(self, rows: Sequence[int], values: Tensor):
        where, order = torch.as_tensor(rows).sort()
        self.rows: list[int] = where.tolist()
        self.where, self.values = where.to(values.device), values[order.to(values.device)]

    def set(self, w: Tensor, first: int, columns: slice | Tensor) -> None:
        """Overwrite the rows that are in the block starting at `first`."""
        low, high = (bisect_left(self.rows, row) for row in (first, first + w.shape[0]))
        if low == high:
            return
        where, values = self.where[low:high] - first, self.values[low:high]
        if isinstance(columns, slice):
            w[:, columns].index_copy_(0, where, values)
        else:
            part = w.index_select(0, where)
            _set_columns(part, columns, values)
            w.index_copy_(0, where, part)


def _set_columns(w: Tensor, columns: Tensor, values: Tensor) -> None:
    # one index, of columns: with two, a GPU's deterministic mode sorts an index for each element
    w.index_copy_(1, columns, values)


@dataclass(frozen=True, slots=True)
class Assign(RowEdit):
    """w[block] = the parameter's trained value there, for replaced parameters that are stored in
    several tensors."""

    value: TensorSpec = field(metadata=READ)
    block: Block
    flip: bool

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        block, spec = self.block, self.value
        if block.expert is not None:
            spec = spec.narrowed(spec.shape, block.expert, block.expert + 1)
            spec = replace(spec, shape=spec.shape[1:])
        value = inputs.tensor(spec)
        value = value.reshape(value.shape[0], -1)
        value = value.T if self.flip else value
        value = block.columns.selected(block.rows.selected(value, 0), 1)
        rows, columns = block.rows, slice(block.columns.start, block.columns.stop)
        if block.columns.of is not None:
            columns = torch.as_tensor(block.columns.positions, device=value.device)
        if rows.of is not None:
            placed = _TargetRows(rows.positions, value)
            return Loaded(lambda w, first: placed.set(w, first, columns))

        def apply(w: Tensor, first: int) -> None:
            for part, here in rows.overlap(w, first):
                if isinstance(columns, slice):
                    part[:, columns].copy_(value[here])
                else:
                    _set_columns(part, columns, value[here])

        return Loaded(apply)
