"""Loop over the rows of a step by chunks and slices; tensors of quantized checkpoints are decoded,
edited and encoded again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Effort, Loaded, Metrics, Step, Task, TaskResult
from adapterkit.core.tasks.metrics import ChangeMetrics, delta_norm
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked, read_parts
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.quant.stochastic import round_to
from adapterkit.kernels.rows import row_ranges
from adapterkit.kernels.sums import squared_norm

# elements of a chunk: about a core's cache, and so many that threads rarely wait for the
# interpreter lock
ELEMENTS = 1 << 18
# so many that a copy over the bus is worth its latency; several run at a time
CUDA_ELEMENTS = 1 << 22
# elements of a weight that are decoded and encoded at a time on a CPU, if its format allows that
SLICE = 1 << 20


def rounded(w: Tensor, step: Step, position: int = 0) -> Tensor:
    """Values of a step as they are written; `position`: of the first one in the tensor."""
    dtype = dtypes.torch_dtype(step.dtype)
    return w.to(dtype) if step.draws is None else round_to(w, dtype, step.draws.at(position))


def unrounded(w: Tensor, before: Tensor, edits: list[Loaded], first: int) -> Tensor:
    """The rows after the edits without the roundings of `--compat peft` between them; w if there
    are none."""
    if all(edit.exact is None for edit in edits):
        return w
    w = before.clone()
    for edit in edits:
        (edit.exact or edit.apply)(w, first)
    return w


def arithmetic(step: Step) -> torch.dtype:
    """The dtype of a step's arithmetic: float32; float64 if the source is float64, or `wide`."""
    return torch.promote_types(
        dtypes.torch_dtype(step.source.dtype), torch.float64 if step.wide else torch.float32
    )


def elements_of_chunk(device: torch.device) -> int:
    return ELEMENTS if device.type == "cpu" else CUDA_ELEMENTS


def chunks(grid: tuple[int, int], device: torch.device) -> list[tuple[int, int]]:
    """Rows [first, last) of each chunk of a grid."""
    return row_ranges(*grid, elements_of_chunk(device))


def byte_view(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class StepTask(Task):
    """A step whose source or result has another stored form than the arithmetic."""

    step: Step = field(metadata=READ)

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for edit in self.step.edits for spec in edit.shared_reads)

    @property
    def planned_metrics(self) -> Metrics:
        return {}

    @property
    def gpu_memory(self) -> int:
        return super().gpu_memory + sum(edit.gpu_memory for edit in self.step.edits)

    @property
    def effort(self) -> Effort:
        is_packed = isinstance(self.step.source, QuantizedWeight)
        decoded = Effort(decoded=math.prod(self.step.shape) if is_packed else 0)
        return self.step.effort + decoded


@dataclass(frozen=True)
class EditedTensor(StepTask):
    """One float tensor: a step's source, decoded if it is quantized, through its edits, rounded
    once."""

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (self.step.planned,)

    @property
    def memory(self) -> int:
        return dtypes.size(self.step.dtype, math.prod(self.step.shape)) + step_memory(
            self.step, 2, 20
        )

    def compute(self, inputs: Reader) -> TaskResult:
        weight = StoredWeight(self.step, inputs)
        dtype = dtypes.torch_dtype(self.step.dtype)
        out = torch.empty(self.step.shape, dtype=dtype, device=inputs.device)
        grid, change = out.view(weight.height, weight.width), weight.new_metrics()
        for part in weight.edit(change, compared=bool(weight.edits)):
            position = part.first * weight.width
            written = grid[part.first : part.last] = rounded(part.after, self.step, position)
            if weight.edits:
                change.compare(part.before, part.after, written)
        return TaskResult({self.step.key: out}, change.result(self.step))


@dataclass(frozen=True)
class RequantizedWeight(StepTask):
    """One quantized weight with edits: decoded, changed in float32, encoded once, by slices of rows
    if its format allows that."""

    @property
    def packed(self) -> QuantizedWeight:
        assert isinstance(self.step.source, QuantizedWeight)
        return self.step.source

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return self.packed.max_outputs

    @property
    def effort(self) -> Effort:
        return super().effort + Effort(encoded=math.prod(self.step.shape))

    @property
    def memory(self) -> int:
        return step_memory(self.step, 3, 24)

    def compute(self, inputs: Reader) -> TaskResult:
        weight, same = StoredWeight(self.step, inputs), []
        change = weight.new_metrics()
        for part in weight.edit(change):
            if torch.equal(part.before, part.after):
                same.append((part.first, part.last))
            else:
                change.compare(part.before, part.after, weight.encode(part))
        if not change.sums:
            return unchanged_weight(self.packed, change, self.step)
        # encode all of the weight, because the encoder may write equal values as other bytes
        for first, last in same:
            value = weight.decode(first, last)
            change.compare(value, value, weight.encode(EditedRows(first, last, value, value)))
        tensors = weight.tensors()
        if weight.nested:
            # the stored scales differ from those that the codes were chosen for
            change, written = weight.new_metrics(), StoredWeight(self.step, inputs, tensors)
            for part in weight.edit(change):
                change.compare(part.before, part.after, written.decode(part.first, part.last))
        return TaskResult(tensors, change.result(self.step, "requantization"))


def unchanged_weight(packed: QuantizedWeight, change: ChangeMetrics, step: Step) -> TaskResult:
    """A weight that keeps its bytes, because its edits change nothing."""
    tensors = {part.key: part for part in packed.parts}
    return TaskResult(tensors, change.result(step) | {"survived": 1.0})


class EditedRows(NamedTuple):
    """Rows [first, last) of a weight before and after its edits: (last - first, columns)
    float32."""

    first: int
    last: int
    before: Tensor
    after: Tensor


def step_memory(step: Step, copies: int, bytes_each: int) -> int:
    """Bytes of `copies` of the stored weight, of `bytes_each` for an element of a slice, and of the
    edits' factors."""
    stored = copies * step.source.nbytes if isinstance(step.source, QuantizedWeight) else 0
    first, last = next(_ranges(step, SLICE), (0, 0))
    factors = sum(edit.memory for edit in step.edits)
    return stored + bytes_each * (last - first) * _grid(step)[1] + factors


def _grid(step: Step) -> tuple[int, int]:
    """Rows and columns of a weight, as in its edits."""
    if step.edits:
        return step.grid
    return math.prod(step.shape[:-1]), step.shape[-1] if step.shape else 1


def _ranges(step: Step, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are decoded and encoded alone, in order, of about `size` elements if the
    format allows that; the first one is the largest."""
    (count, columns), source = _grid(step), step.source
    if isinstance(source, QuantizedWeight):
        return source.row_ranges(size) if source.shape[-1] == columns else iter([(0, count)])
    return iter(row_ranges(count, columns, size))


class StoredRows:
    """The rows that a step starts from, (height, width), decoded by ranges of about `size`
    elements; its edits work on them in `dtype`, and may read them all while they load.

    `keeps`: cache the range that was decoded last; a single range is always cached. `parts`: the
    tensors of a quantized weight by key, if they are not the file's."""

    def __init__(
        self,
        step: Step,
        inputs: Reader,
        size: int,
        dtype: torch.dtype,
        *,
        keeps: bool = False,
        parts: dict[str, Tensor] | None = None,
    ):
        self.step, self.inputs, self.source, self.dtype = step, inputs, step.source, dtype
        self.height, self.width = _grid(step)
        self.ranges = list(_ranges(step, size))
        self.keeps = keeps or len(self.ranges) == 1
        self.kept: tuple[tuple[int, int], Tensor] | None = None
        if isinstance(self.source, QuantizedWeight):
            self.record = self.source
            self.parts = parts or read_parts(self.source, inputs.view(None).tensor)

    @cached_property
    def edits(self) -> list[Loaded]:
        inputs, grid = self.inputs.view(self.dtype, self.blocks), self.step.grid
        return [edit.load(inputs, self.source, grid) for edit in self.step.edits]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the chunks of the edits, decoded."""
        decoded = ((first, self.decode(first, last)) for first, last in self.ranges)
        for first, pieces in _chunk(decoded, self.height, self.width, self.inputs.device):
            yield first, torch.cat(pieces).to(self.dtype)

    def decode(self, first: int, last: int) -> Tensor:
        """Rows of one range, in float32 if they are quantized; do not change them if they are
        cached."""
        if self.kept is not None and self.kept[0] == (first, last):
            return self.kept[1]
        value = self._decode(first, last)
        if self.keeps:
            self.kept = (first, last), value
        return value

    def _decode(self, first: int, last: int) -> Tensor:
        if isinstance(self.source, QuantizedWeight):
            rows = self.narrow(self.parts, first, last)
            value = decode_checked(*rows, hint="download the checkpoint again")
            return value.view(last - first, self.width)
        grid = self.height, self.width
        return self.inputs.tensor(self.source.narrowed(grid, first, last))

    def narrow(
        self, parts: dict[str, Tensor], first: int, last: int
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        """One range, or all rows, of these parts as a separate quantized weight."""
        if self.record.shape[-1] != self.width:
            return self.record, parts
        return self.record.rows(parts, first, last)


class StoredWeight(StoredRows):
    """One stored weight: decoded by slices of rows, edited, and encoded again if it is
    quantized."""

    def __init__(self, step: Step, inputs: Reader, parts: dict[str, Tensor] | None = None):
        size = piece(inputs.device, SLICE)
        super().__init__(step, inputs, size, arithmetic(step), parts=parts)
        if not isinstance(self.source, QuantizedWeight):
            return
        self.original = self.parts
        if not step.draws:  # with draws the scales of scales do not change
            self.record, self.parts = self.source.split_nested(self.original)
        # with scales of scales, which are encoded again, the old bytes are needed; without them the
        # new bytes replace the old ones
        self.nested = self.record is not self.source
        self.encoded = self.parts
        if self.nested:
            self.encoded = {key: part.clone() for key, part in self.parts.items()}

    def new_metrics(self) -> ChangeMetrics:
        """The metrics of one pass of `edit`, with the norm of the additions relative to the
        weight's."""
        return ChangeMetrics(delta_norm(self.edits))

    def edit(self, change: ChangeMetrics, compared: bool = True) -> Iterator[EditedRows]:
        """Yield the slices before and after the edits; both are one tensor unless `compared` is
        set.

        As in `core.engine.local`, the edits work on chunks of `chunks`, independent of the slices,
        because a product of another height may differ in its last bit. There, chunks are read from
        a file one by one, by any worker; here they are cut from slices that a format decodes
        together."""
        pending = deque[EditedRows]()

        def slices() -> Iterator[tuple[int, Tensor]]:
            for first, last in self.ranges:
                before = self.decode(first, last)
                change.squares += [squared_norm(before)] if self.edits else []
                pending.append(
                    EditedRows(first, last, before, before.clone() if compared else before)
                )
                yield first, pending[-1].after

        for first, pieces in _chunk(slices(), self.height, self.width, self.inputs.device):
            block = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.dtype)
            for edit in self.edits:
                edit.apply(block, first)
            if block is not pieces[0]:
                values = block.split([len(piece) for piece in pieces])
                for piece, value in zip(pieces, values, strict=True):
                    piece.copy_(value)
            done = first + len(block)
            del block, pieces
            while pending and pending[0].last <= done:
                yield pending.popleft()

    def encode(self, part: EditedRows) -> Tensor:
        """Encode the rows of a slice, and return the values that they decode to."""
        record, stored = self.narrow(self.parts, part.first, part.last)
        draws = self.step.draws and self.step.draws.at(part.first * self.width)
        tensors = record.encode_keeping_scales(stored, part.after.view(record.shape), draws)
        value = decode_checked(record, tensors).view(part.after.shape)
        if stored is self.parts:
            self.encoded = tensors
        else:
            for key, buffer in self.narrow(self.encoded, part.first, part.last)[1].items():
                if buffer is not self.encoded[key]:
                    buffer.copy_(tensors[key])
        return value

    def tensors(self) -> dict[str, Tensor]:
        """All parts, after each slice is encoded."""
        assert isinstance(self.source, QuantizedWeight)
        new = self.encoded if self.step.draws else self.source.join_nested(self.encoded)
        return self.original | new


def _chunk(
    slices: Iterable[tuple[int, Tensor]], count: int, columns: int, device: torch.device
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the chunks of `count` rows, independent of slices: (first row, its pieces, as views of
    the slices)."""
    each, pieces = max(1, elements_of_chunk(device) // max(columns, 1)), []
    for first, value in slices:
        at, last = first, first + len(value)
        while at < last:
            stop = min(last, (at // each + 1) * each)
            pieces.append(value[at - first : stop - first])
            at = stop
            if at % each == 0 or at == count:
                yield at - sum(map(len, pieces)), pieces
                pieces = []
