"""One loop over the rows of a step, by chunks and slices; tensors of quantized checkpoints that are
decoded, edited and encoded again."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import TensorPlan
from adapterkit.kernels.quant.stochastic import round_to
from adapterkit.kernels.sums import squared_norm
from adapterkit.plan import READ, Loaded, Step, Task, TaskResult
from adapterkit.tasks.common import short
from adapterkit.weights.codec import QuantizedWeight, decode_checked, read_parts
from adapterkit.weights.reader import Reader

# of one chunk: near a core's cache, and large enough that threads seldom meet at the interpreter
# lock
ELEMENTS = 1 << 18
# enough for a copy over the bus to be worth its start; several are under way at a time
CUDA_ELEMENTS = 1 << 22


def rounded(w: Tensor, step: Step, position: int = 0) -> Tensor:
    """Values of a step as they are written; `position`: of the first of them in the tensor."""
    dtype = dtypes.torch_dtype(step.dtype)
    return w.to(dtype) if step.draws is None else round_to(w, dtype, step.draws.at(position))


def unrounded(w: Tensor, before: Tensor, edits: list[Loaded], first: int) -> Tensor:
    """The rows after the edits without roundings between these (of `--compat peft`); w where there
    are none."""
    if all(edit.exact is None for edit in edits):
        return w
    w = before.clone()
    for edit in edits:
        (edit.exact or edit.apply)(w, first)
    return w


def arithmetic(step: Step) -> torch.dtype:
    """The dtype that a step is computed in: float32; float64 where the source is, or `wide`."""
    return torch.promote_types(
        dtypes.torch_dtype(step.source.dtype), torch.float64 if step.wide else torch.float32
    )


def chunk_height(columns: int, device: str = "cpu") -> int:
    """Rows of a chunk: a function of the shape and the kind of device alone."""
    return max(1, (ELEMENTS if device == "cpu" else CUDA_ELEMENTS) // max(columns, 1))


def chunks(grid: tuple[int, int], device: torch.device) -> list[tuple[int, int]]:
    """Rows [first, last) of each chunk of a grid."""
    rows, columns = grid
    step = chunk_height(columns, device.type)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def byte_view(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


# elements of a weight that are decoded and encoded at a time, where its format allows that
SLICE = 1 << 20


@dataclass(frozen=True)
class StepTask(Task):
    """A step whose source, or whose result, is not stored as it is computed."""

    step: Step = field(metadata=READ)

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for edit in self.step.edits for spec in edit.shared_reads)

    @property
    def planned_metrics(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class EditedTensor(StepTask):
    """One float tensor: a step's source, decoded if it is quantized, through its edits, rounded
    once."""

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(self.step.key, self.step.dtype, self.step.shape),)

    @property
    def memory(self) -> int:
        return dtypes.size(self.step.dtype, math.prod(self.step.shape)) + step_memory(
            self.step, 2, 20
        )

    def compute(self, inputs: Reader) -> TaskResult:
        weight = StoredWeight(self.step, inputs)
        edits = weight.load_edits()
        dtype = dtypes.torch_dtype(self.step.dtype)
        out = torch.empty(self.step.shape, dtype=dtype, device=inputs.device)
        grid = out.view(weight.rows, weight.columns)
        survival = Survival()
        for part in weight.edit(edits, compared=bool(edits)):
            position = part.first * weight.columns
            written = grid[part.first : part.last] = rounded(part.after, self.step, position)
            if edits:
                survival.add(part, written.to(part.after.dtype))
        metrics = weight.metrics(edits) | survival.metrics(self.step, "rounding")
        return TaskResult({self.step.key: out}, metrics)


@dataclass(frozen=True)
class RequantizedWeight(StepTask):
    """One quantized weight with edits: decoded, changed in float32, encoded once, by slices of rows
    where its format allows that."""

    @property
    def packed(self) -> QuantizedWeight:
        assert isinstance(self.step.source, QuantizedWeight)
        return self.step.source

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return self.packed.max_outputs

    @property
    def memory(self) -> int:
        return step_memory(self.step, 3, 24)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = StoredWeight(self.step, inputs)
        edits, same, survival = weight.load_edits(), [], Survival()
        for part in weight.edit(edits):
            if torch.equal(part.before, part.after):
                same.append((part.first, part.last))
            else:
                survival.add(part, weight.encode(part))
        metrics = weight.metrics(edits)
        if not survival.sums:
            tensors = {part.key: part for part in self.packed.parts}
            return TaskResult(tensors, metrics | {"survived": 1.0})
        # the encoder may write equal values in other bytes: all of the weight goes through it
        for first, last in same:
            value = weight.read(first, last)
            part = EditedRows(first, last, value, value)
            survival.add(part, weight.encode(part))
        tensors = weight.tensors()
        if weight.nested:
            # the scales that are read back are others than those that the codes were chosen for
            survival, written = Survival(), StoredWeight(self.step, inputs, tensors)
            for part in weight.edit(edits):
                survival.add(part, written.read(part.first, part.last))
        return TaskResult(tensors, metrics | survival.metrics(self.step))


class EditedRows(NamedTuple):
    """Rows [first, last) of a weight before and after its edits: (last - first, columns)
    float32."""

    first: int
    last: int
    before: Tensor
    after: Tensor


class Survival:
    """How much of a change Δ = after - before is in what is stored.

    `survived`: ⟨stored - before, Δ⟩ / ‖Δ‖², 1 if all of it is there, 0 if nothing moved. Beside it
    the noise, ‖stored - after‖ / ‖Δ‖, of `requantization` or `rounding`;
    where a step asks for it ‖stored - after‖ / ‖before‖, the `error`.
    """

    def __init__(self):
        self.sums: list[tuple[float, float, float, float]] = []

    def add(self, part: EditedRows, stored: Tensor) -> None:
        tensors = (part.before, part.after, stored)
        for x, y, z in zip(*(t.reshape(-1).split(ELEMENTS) for t in tensors), strict=True):
            delta = y - x
            inner, squares = float(torch.dot(z - x, delta)), float(torch.dot(delta, delta))
            self.sums.append((inner, squares, float((z - y).square().sum()), squared_norm(x)))

    def metrics(self, step: Step, noise: str = "requantization") -> dict[str, float]:
        if not self.sums:
            return {}
        inner, squares, lost, size = (math.fsum(column) for column in zip(*self.sums, strict=True))
        metrics = {"survived": 1.0}
        if squares:
            metrics = {"survived": short(inner / squares), noise: short((lost / squares) ** 0.5)}
        if step.measures_error:
            metrics["error"] = short((lost / size) ** 0.5) if size else 0.0
        return metrics


def _grid(step: Step) -> tuple[int, int]:
    """Rows and columns of a weight: those of its edits."""
    if step.edits:
        return step.grid
    return math.prod(step.shape[:-1]), step.shape[-1] if step.shape else 1


def _slices(step: Step) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are decoded and encoded alone, the first one the largest."""
    (count, columns), source = _grid(step), step.source
    if isinstance(source, QuantizedWeight):
        return source.row_ranges(SLICE) if source.shape[-1] == columns else iter([(0, count)])
    each = max(1, SLICE // max(columns, 1))
    return ((first, min(first + each, count)) for first in range(0, count, each))


def step_memory(step: Step, copies: int, bytes_each: int) -> int:
    """Bytes of `copies` of what is stored, of `bytes_each` for an element of a slice, and of the
    edits' factors."""
    stored = copies * step.source.nbytes if isinstance(step.source, QuantizedWeight) else 0
    first, last = next(_slices(step), (0, 0))
    factors = 4 * sum(spec.nbytes for edit in step.edits for spec in edit.reads)
    return stored + bytes_each * (last - first) * _grid(step)[1] + factors


class StoredWeight:
    """One stored weight: read by slices of rows, edited, and encoded again if it is quantized.

    If there is one slice only, it is decoded once. `stored`: its parts, where they are not those of
    the file.
    """

    def __init__(self, step: Step, inputs: Reader, stored: dict[str, Tensor] | None = None):
        self.step, self.inputs, self.source = step, inputs, step.source
        self.dtype = arithmetic(step)
        self.rows, self.columns = _grid(step)
        self.nested = False  # whether there are scales of scales, which are encoded anew
        self.squares: list[float] = []  # Σ w² of each slice, before the edits
        self.whole: Tensor | None = None
        if isinstance(self.source, QuantizedWeight):
            self.original = stored or read_parts(self.source, inputs.view(None).tensor)
            # with draws the scales of scales do not change
            self.record, self.parts = (
                (self.source, self.original)
                if step.draws
                else self.source.split_nested(self.original)
            )
            self.nested = self.record is not self.source
            # without scales of scales the new bytes replace the old ones, which are not read again
            self.encoded = (
                {key: part.clone() for key, part in self.parts.items()}
                if self.nested
                else self.parts
            )
        ranges = list(itertools.islice(_slices(step), 2))
        if len(ranges) == 1:
            self.whole = self._decode(*ranges[0])

    def load_edits(self) -> list[Loaded]:
        inputs = self.inputs.view(self.dtype, self._blocks)
        return [edit.load(inputs, self.source, self.step.grid) for edit in self.step.edits]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the chunks of the edits, decoded."""
        slices = ((first, self.read(first, last)) for first, last in _slices(self.step))
        for first, pieces in _chunk(slices, self.rows, self.columns, self.inputs.device):
            yield first, torch.cat(pieces).to(self.dtype)

    def read(self, first: int, last: int) -> Tensor:
        """Rows of one slice in float32; not to be changed where there is one slice only."""
        return self._decode(first, last) if self.whole is None else self.whole

    def _decode(self, first: int, last: int) -> Tensor:
        source, columns = self.source, self.columns
        if isinstance(source, QuantizedWeight):
            record, parts = self._narrow(self.parts, first, last)
            value = decode_checked(record, parts, hint="download the checkpoint again")
            return value.view(last - first, columns)
        start, stop = (
            source.start + dtypes.size(source.dtype, row * columns) for row in (first, last)
        )
        shape = (last - first, columns)
        return self.inputs.tensor(replace(source, shape=shape, start=start, stop=stop))

    def _narrow(
        self, parts: dict[str, Tensor], first: int, last: int
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        """A slice as a quantized weight, and its parts."""
        if self.record.shape[-1] != self.columns:
            return self.record, parts
        return self.record.rows(parts, first, last)

    def edit(self, edits: list[Loaded], compared: bool = True) -> Iterator[EditedRows]:
        """The slices before and after the edits; the two are one tensor unless they are to be
        `compared`.

        As in `engines.local` the edits work on chunks of `chunks`, whatever the slices are: a
        product of another height may differ in its last bit. It is another loop, because chunks are
        read from a file there, each by itself and by any worker, and here they are cut from slices
        that a format decodes together.
        """
        self.squares, pending = [], deque[EditedRows]()

        def slices() -> Iterator[tuple[int, Tensor]]:
            for first, last in _slices(self.step):
                before = self.read(first, last)
                self.squares += [squared_norm(before)] if edits else []
                pending.append(
                    EditedRows(first, last, before, before.clone() if compared else before)
                )
                yield first, pending[-1].after

        for first, pieces in _chunk(slices(), self.rows, self.columns, self.inputs.device):
            block = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.dtype)
            for edit in edits:
                edit.apply(block, first)
            if block is not pieces[0]:
                values = block.split([len(piece) for piece in pieces])
                for piece, value in zip(pieces, values, strict=True):
                    piece.copy_(value)
            done = first + len(block)
            del block, pieces
            while pending and pending[0].last <= done:
                yield pending.popleft()

    def metrics(self, edits: list[Loaded]) -> dict[str, Any]:
        """The adapters, and `delta`: the norm of what was added to it, relative to its own."""
        metrics: dict[str, Any] = {}
        if self.step.adapters:
            metrics["adapters"] = list(self.step.adapters)
        norms = [edit.delta_norm for edit in edits if edit.delta_norm is not None]
        size = math.sqrt(math.fsum(self.squares))
        if norms and size:
            metrics["delta"] = short(math.hypot(*norms) / size)
        return metrics

    def encode(self, part: EditedRows) -> Tensor:
        """Encode the rows of a slice; what they decode to."""
        record, stored = self._narrow(self.parts, part.first, part.last)
        draws = self.step.draws and self.step.draws.at(part.first * self.columns)
        tensors = record.encode_keeping_scales(stored, part.after.view(record.shape), draws)
        value = decode_checked(record, tensors).view(part.after.shape)
        if stored is self.parts:
            self.encoded = tensors
        else:
            for key, room in self._narrow(self.encoded, part.first, part.last)[1].items():
                if room is not self.encoded[key]:
                    room.copy_(tensors[key])
        return value

    def tensors(self) -> dict[str, Tensor]:
        """All parts, once each slice is encoded."""
        assert isinstance(self.source, QuantizedWeight)
        new = self.encoded if self.step.draws else self.source.join_nested(self.encoded)
        return self.original | new


def _chunk(
    slices: Iterable[tuple[int, Tensor]], count: int, columns: int, device: torch.device
) -> Iterator[tuple[int, list[Tensor]]]:
    """The chunks of `count` rows, wherever slices end: (first row, its pieces, views of the
    slices)."""
    each, pieces = chunk_height(columns, device.type), []
    for first, value in slices:
        at, last = first, first + len(value)
        while at < last:
            stop = min(last, (at // each + 1) * each)
            pieces.append(value[at - first : stop - first])
            at = stop
            if at % each == 0 or at == count:
                yield at - sum(map(len, pieces)), pieces
                pieces = []
