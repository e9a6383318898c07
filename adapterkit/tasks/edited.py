"""Tensors of a quantized checkpoint: copied, decoded and edited, or decoded, edited and encoded again."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.kernels.sums import squared_norm
from adapterkit.plan import Loaded, Step, TaskResult, kept_by
from adapterkit.tasks.common import short
from adapterkit.tasks.rows import arithmetic, rounded
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.reader import Reader, ReaderView

ROWS = 1 << 18  # elements of a weight that are edited at a time
SLICE = (
    1 << 20
)  # elements of a weight that are decoded and encoded at a time, where its format allows that


@dataclass(frozen=True)
class CopiedTensor:
    """One stored tensor, byte for byte."""

    source: TensorSpec
    copied = True  # the plan counts it so

    @property
    def name(self) -> str:
        return self.source.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.source.key, self.source.dtype, self.source.shape),)

    @property
    def memory(self) -> int:
        return 0

    def compute(self, inputs: Reader) -> TaskResult:
        return TaskResult({self.source.key: self.source}, {})


@dataclass(frozen=True)
class EditedTensor:
    """One float tensor: a step's source, decoded if it is packed, through its edits, rounded once."""

    step: Step

    @property
    def name(self) -> str:
        return self.step.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (
            *stored_parts(self.step.source),
            *(spec for edit in self.step.edits for spec in edit.reads),
        )

    @property
    def kept(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for edit in self.step.edits for spec in kept_by(edit))

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.step.key, self.step.dtype, self.step.shape),)

    @property
    def memory(self) -> int:
        return dtypes.size(self.step.dtype, math.prod(self.step.shape)) + _memory(self.step, 2, 20)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = _Weight(self.step, inputs)
        edits = weight.edits()
        out = torch.empty(self.step.shape, dtype=dtypes.torch_dtype(self.step.dtype))
        grid = out.view(weight.rows, weight.columns)
        survival = Survival()
        for part in weight.changed(edits, compared=bool(edits)):
            here = grid[part.first : part.last] = rounded(
                part.after, self.step, part.first * weight.columns
            )
            if edits:
                survival.add(part, here.to(part.after.dtype))
        return TaskResult(
            {self.step.key: out}, weight.metrics(edits) | survival.metrics("rounding")
        )


@dataclass(frozen=True)
class RequantizedWeight:
    """One packed weight with edits: decoded, changed in float32, encoded once, by slices of rows where its format allows that."""

    step: Step
    packed: QuantizedWeight

    @property
    def name(self) -> str:
        return self.step.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.packed.parts, *(spec for edit in self.step.edits for spec in edit.reads))

    @property
    def kept(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for edit in self.step.edits for spec in kept_by(edit))

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return self.packed.max_outputs

    @property
    def variable_size(self) -> tuple[str, ...]:
        return self.packed.variable_size

    @property
    def memory(self) -> int:
        return _memory(self.step, 3, 24)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = _Weight(self.step, inputs)
        edits, same, survival = weight.edits(), [], Survival()
        for part in weight.changed(edits):
            if torch.equal(part.before, part.after):
                same.append((part.first, part.last))
            else:
                survival.add(part, weight.write(part))
        metrics = weight.metrics(edits)
        if not survival.sums:
            return TaskResult(
                {part.key: part for part in self.packed.parts}, metrics | {"survived": 1.0}
            )
        for (
            first,
            last,
        ) in same:  # its encoder may write the same values in other bytes: all of the weight goes through it
            value = weight.read(first, last)
            part = Part(first, last, value, value)
            survival.add(part, weight.write(part))
        tensors = weight.written()
        if (
            weight.nested
        ):  # the scales that are read back are others than those that the codes were chosen for
            survival, again = Survival(), _Weight(self.step, inputs, tensors)
            for part in weight.changed(edits):
                survival.add(part, again.read(part.first, part.last))
        return TaskResult(tensors, metrics | survival.metrics())


class Part(NamedTuple):
    """Rows [first, last) of a weight before and after its edits: (last - first, columns) float32."""

    first: int
    last: int
    before: Tensor
    after: Tensor


class Survival:
    """What a change comes to once it is stored: `survived` ⟨stored - before, Δ⟩ / ‖Δ‖², 1 if it is all there, 0 if nothing moved;
    the noise beside it, called `requantization` or `rounding`, ‖stored - after‖ / ‖Δ‖. Δ = after - before."""

    def __init__(self):
        self.sums: list[tuple[float, float, float]] = []

    def add(self, part: Part, stored: Tensor) -> None:
        for x, y, z in zip(
            *(t.reshape(-1).split(ROWS) for t in (part.before, part.after, stored)), strict=True
        ):
            delta = y - x
            self.sums.append(
                (
                    float(torch.dot(z - x, delta)),
                    float(torch.dot(delta, delta)),
                    float((z - y).square().sum()),
                )
            )

    def metrics(self, noise: str = "requantisation") -> dict[str, float]:
        if not self.sums:
            return {}
        inner, squares, error = (math.fsum(column) for column in zip(*self.sums, strict=True))
        if not squares:
            return {"survived": 1.0}
        return {"survived": short(inner / squares), noise: short((error / squares) ** 0.5)}


def stored_parts(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """The stored tensors that hold a tensor."""
    return spec.parts if isinstance(spec, QuantizedWeight) else (spec,)


def _grid(step: Step) -> tuple[int, int]:
    """Rows and columns of a weight: those that its edits go by."""
    if step.edits:
        return step.grid
    return math.prod(step.shape[:-1]), step.shape[-1] if step.shape else 1


def _slices(step: Step) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are worked on alone, the first one the largest."""
    (rows, columns), source = _grid(step), step.source
    if isinstance(source, QuantizedWeight):
        return source.row_ranges(SLICE) if source.shape[-1] == columns else iter([(0, rows)])
    each = max(1, SLICE // max(columns, 1))
    return ((first, min(first + each, rows)) for first in range(0, rows, each))


def _memory(step: Step, copies: int, bytes_each: int) -> int:
    """Bytes that edited rows take at most: copies of what is stored, `bytes_each` for an element of a slice, the factors."""
    stored = copies * step.source.nbytes if isinstance(step.source, QuantizedWeight) else 0
    first, last = next(_slices(step), (0, 0))
    return (
        stored
        + bytes_each * (last - first) * _grid(step)[1]
        + 4 * sum(spec.nbytes for edit in step.edits for spec in edit.reads)
    )


class _Weight:
    """One stored weight: read by slices of rows, edited, and written again if it is packed.

    What has one slice only is decoded once. `stored`: its parts, where they are not those of the file."""

    def __init__(self, step: Step, inputs: Reader, stored: dict[str, Tensor] | None = None):
        self.step, self.inputs, self.source = step, inputs, step.source
        self.dtype = arithmetic(step)
        self.rows, self.columns = _grid(step)
        self.nested, self.squares, self.whole = False, [], None
        if isinstance(self.source, QuantizedWeight):
            self.original = stored or {part.key: inputs.stored(part) for part in self.source.parts}
            # with draws the scales of scales stay
            self.record, self.parts = (
                (self.source, self.original)
                if step.draws
                else self.source.split_nested(self.original)
            )
            self.nested = self.record is not self.source
            # without scales of scales the new bytes take the place of the old ones, which are read no more
            self.new = (
                {key: part.clone() for key, part in self.parts.items()}
                if self.nested
                else self.parts
            )
        ranges = list(itertools.islice(_slices(step), 2))
        if len(ranges) == 1:
            self.whole = self._decoded(*ranges[0])

    def edits(self) -> list[Loaded]:
        reader = ReaderView(self.inputs, self.dtype, self._blocks)
        return [edit.load(reader, self.source, self.step.grid) for edit in self.step.edits]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        slices = ((first, self.read(first, last)) for first, last in _slices(self.step))
        for first, pieces in _chunked(slices, self.rows, self.columns):
            yield first, torch.cat(pieces).to(self.dtype)

    def read(self, first: int, last: int) -> Tensor:
        """Rows of one slice in float32; not to be changed where there is one slice only."""
        return self._decoded(first, last) if self.whole is None else self.whole

    def _decoded(self, first: int, last: int) -> Tensor:
        source, columns = self.source, self.columns
        if isinstance(source, QuantizedWeight):
            value = decode_checked(
                *self._at(self.parts, first, last), hint="download the checkpoint again"
            )
            return value.view(last - first, columns)
        start, stop = (
            source.start + dtypes.size(source.dtype, row * columns) for row in (first, last)
        )
        return self.inputs.tensor(
            replace(source, shape=(last - first, columns), start=start, stop=stop)
        )

    def _at(
        self, parts: dict[str, Tensor], first: int, last: int
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        return (
            self.record.rows(parts, first, last)
            if self.record.shape[-1] == self.columns
            else (self.record, parts)
        )

    def changed(self, edits: list[Loaded], compared: bool = True) -> Iterator[Part]:
        """Its slices before and after the edits; the two are one unless they are to be `compared`.

        Edits work on the same chunks of rows whatever the slices are: a product of another height may differ in its last bit."""
        self.squares, waiting = [], deque()

        def opened() -> Iterator[tuple[int, Tensor]]:
            for first, last in _slices(self.step):
                before = self.read(first, last)
                self.squares += [squared_norm(before)] if edits else []
                waiting.append(Part(first, last, before, before.clone() if compared else before))
                yield first, waiting[-1].after

        for first, pieces in _chunked(opened(), self.rows, self.columns):
            block = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.dtype)
            for edit in edits:
                edit.apply(block, first)
            if block is not pieces[0]:
                for piece, value in zip(
                    pieces, block.split([len(piece) for piece in pieces]), strict=True
                ):
                    piece.copy_(value)
            done = first + len(block)
            del block, pieces
            while waiting and waiting[0].last <= done:
                yield waiting.popleft()

    def metrics(self, edits: list[Loaded]) -> dict[str, Any]:
        """What was added to it."""
        metrics: dict[str, Any] = (
            {"adapters": list(self.step.adapters)} if self.step.adapters else {}
        )
        norms, size = (
            [edit.delta_norm for edit in edits if edit.delta_norm is not None],
            math.sqrt(math.fsum(self.squares)),
        )
        if norms and size:
            metrics["delta"] = short(math.hypot(*norms) / size)
        return metrics

    def write(self, part: Part) -> Tensor:
        """Encode the rows of a slice; what they decode to."""
        record, stored = self._at(self.parts, part.first, part.last)
        draws = self.step.draws and self.step.draws.at(part.first * self.columns)
        tensors = record.encode_keeping_scales(stored, part.after.view(record.shape), draws)
        value = decode_checked(record, tensors).view(part.after.shape)
        if stored is self.parts:
            self.new = tensors
        else:
            for key, room in self._at(self.new, part.first, part.last)[1].items():
                if room is not self.new[key]:
                    room.copy_(tensors[key])
        return value

    def written(self) -> dict[str, Tensor]:
        """All parts, once each slice has been written."""
        assert isinstance(self.source, QuantizedWeight)
        return self.original | (self.new if self.step.draws else self.source.join_nested(self.new))


def _chunked(
    slices: Iterable[tuple[int, Tensor]], rows: int, columns: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Chunks of about ROWS elements, whatever slices they lie in: (first row, its pieces, views of the slices)."""
    each, pieces = max(1, ROWS // max(columns, 1)), []
    for first, value in slices:
        at, last = first, first + len(value)
        while at < last:
            stop = min(last, (at // each + 1) * each)
            pieces.append(value[at - first : stop - first])
            at = stop
            if at % each == 0 or at == rows:
                yield at - sum(map(len, pieces)), pieces
                pieces = []
