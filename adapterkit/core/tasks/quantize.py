"""Quantize weights and measure their errors, rounding to nearest or with compensation. Compensation
keeps the whole weight in memory, because its columns depend on each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Compensation, Effort, Span, Step, Task, TaskResult
from adapterkit.core.tasks.common import covariance_errors
from adapterkit.core.tasks.metrics import ChangeMetrics, short
from adapterkit.core.tasks.rows import StepTask, StoredWeight, step_memory, unchanged_weight
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.quant import compensated as kernel
from adapterkit.kernels.quant.grid import LARGE_PIECE, RoundColumn
from adapterkit.kernels.sums import floats, square_sums

BLOCK = 1 << 20  # elements compared at a time, on a CPU


@dataclass(frozen=True)
class PackedWeight(Task):
    """One weight in a quantized format."""

    source: TensorSpec = field(metadata=READ)
    packed: QuantizedWeight

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return self.packed.max_outputs

    @property
    def effort(self) -> Effort:
        return Effort(encoded=math.prod(self.source.shape))


@dataclass(frozen=True)
class EncodedWeight(PackedWeight):
    """A weight rounded to nearest, or compensated with the scales of rounding to nearest."""

    compensation: Compensation | None = field(default=None, metadata=READ)

    @property
    def effort(self) -> Effort:
        more = Effort() if self.compensation is None else compensation_effort(self.compensation)
        return super().effort + more

    @property
    def memory(self) -> int:
        count = math.prod(self.source.shape)
        if self.compensation is not None:
            return 36 * count + compensation_memory(self.compensation)
        return max(6 * self.source.nbytes, 12 * count) + 24 * min(count, LARGE_PIECE)

    def compute(self, inputs: Reader) -> TaskResult:
        weight, metrics = inputs.tensor(self.source), dict[str, float]()
        tensors = self.packed.encode(weight)
        if self.compensation is not None:
            nearest = decode_checked(self.packed, tensors)
            rounder = self.packed.column_rounder(tensors)
            value, metrics = compensate(inputs, self.compensation, weight, nearest, rounder)
            tensors = self.packed.encode_rounded(tensors, value)
        error = relative_error(weight, decode_checked(self.packed, tensors))
        return TaskResult(tensors, {"error": error, **metrics})


def relative_error(weight: Tensor, other: Tensor) -> float:
    """‖other - W‖_F / ‖W‖_F, to six digits."""
    each, lost, size = piece(weight.device, BLOCK), [], []
    for x, y in zip(weight.reshape(-1).split(each), other.reshape(-1).split(each), strict=True):
        lost += square_sums(y - x)
        size += square_sums(x)
    values = floats(lost + size)
    norm = math.fsum(values[len(lost) :])
    return short((math.fsum(values[: len(lost)]) / norm) ** 0.5) if norm else 0.0


@dataclass(frozen=True)
class EncodedStep(StepTask):
    """A step whose result is encoded in a `format`, while its source has another one or none."""

    format: QuantizedWeight

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return self.format.max_outputs

    @property
    def effort(self) -> Effort:
        return super().effort + Effort(encoded=math.prod(self.step.shape))

    @property
    def memory(self) -> int:
        return step_memory(self.step, 3, 24) + 16 * math.prod(self.step.shape)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = StoredWeight(self.step, inputs)
        change = weight.new_metrics()
        exact = torch.empty(weight.height, weight.width, device=inputs.device)
        for part in weight.edit(change):
            exact[part.first : part.last] = part.after
        shape = self.format.shape
        tensors = self.format.encode(exact.view(shape))
        if self.step.draws is not None:
            tensors = self.format.encode_keeping_scales(tensors, exact.view(shape), self.step.draws)
        written = decode_checked(self.format, tensors).view(exact.shape)
        metrics = _change(weight, written).result(self.step, "requantization")
        return TaskResult(tensors, metrics)


@dataclass(frozen=True)
class CompensatedStep(StepTask):
    """A step with compensation, in a `format` with the scales of rounding to nearest, or in
    floats."""

    format: QuantizedWeight | None

    @property
    def compensation(self) -> Compensation:
        assert self.step.compensation is not None
        return self.step.compensation

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*super().reads, *self.compensation.reads)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        if self.format is not None:
            return self.format.max_outputs
        return (self.step.planned,)

    @property
    def effort(self) -> Effort:
        return super().effort + compensation_effort(self.compensation)

    @property
    def memory(self) -> int:
        return (
            step_memory(self.step, 3, 24)
            + 36 * math.prod(self.step.shape)
            + compensation_memory(self.compensation)
        )

    def compute(self, inputs: Reader) -> TaskResult:
        weight = StoredWeight(self.step, inputs)
        change = weight.new_metrics()
        exact = torch.empty(weight.height, weight.width, device=inputs.device)
        changed = False
        for part in weight.edit(change):
            exact[part.first : part.last] = part.after
            changed = changed or not torch.equal(part.before, part.after)
        if self.format is None:
            return self._floats(inputs, weight, exact)
        if not changed and self.format is self.step.source:
            return unchanged_weight(self.format, change, self.step)
        packed, shape = self.format, self.format.shape
        plain = plainly_encoded(packed, self.step, weight.original, exact)
        nearest = decode_checked(packed, plain).view(exact.shape)
        value, errors = compensate(
            inputs, self.compensation, exact, nearest, packed.column_rounder(plain)
        )
        tensors = packed.encode_rounded(plain, value.view(shape))
        written = decode_checked(packed, tensors).view(exact.shape)
        metrics = _change(weight, written).result(self.step, "requantization")
        return TaskResult(tensors, metrics | errors)

    def _floats(self, inputs: Reader, weight: StoredWeight, exact: Tensor) -> TaskResult:
        dtype = dtypes.torch_dtype(self.step.dtype)
        value, errors = compensate(
            inputs, self.compensation, exact, exact.to(dtype).float(), kernel.float_rounder(dtype)
        )
        metrics = _change(weight, value).result(self.step)
        return TaskResult({self.step.key: value.to(dtype).view(self.step.shape)}, metrics | errors)


def plainly_encoded(
    packed: QuantizedWeight, step: Step, stored: dict[str, Tensor], weight: Tensor
) -> dict[str, Tensor]:
    """The parts of a step's result rounded to nearest; if it has the source's format, with its
    scales."""
    value = weight.float().view(packed.shape)
    if packed is step.source:
        return packed.encode_keeping_scales(stored, value)
    return packed.encode(value)


def compensate(
    inputs: Reader,
    compensation: Compensation,
    weight: Tensor,  # float32, a grid
    nearest: Tensor,  # the same rounded to nearest
    round_column: RoundColumn,  # of all outputs
) -> tuple[Tensor, dict[str, float]]:
    """The value to store, and the errors ‖(Q - W) C^½‖ / ‖W C^½‖ of it and of `nearest`; over
    several modules the squares are summed. `Unrecoverable` for an invalid covariance."""
    if compensation.by_columns:
        weight, nearest = weight.T, nearest.T
    value, norms = nearest.clone(), {"size": [], "nearest": [], "compensated": []}
    for span in compensation.spans:
        c, factor = read_factor(inputs, span.covariance)
        w, at = _rows(weight, span)
        rounder = round_column if at is None else _of_rows(round_column, at, weight)
        q = kernel.round_weight(w, factor, rounder)
        norms["size"].append(kernel.output_norm(w, c))
        norms["compensated"].append(kernel.output_norm(q - w, c))
        norms["nearest"].append(kernel.output_norm(_rows(nearest, span)[0] - w, c))
        value = q if at is None else value.index_copy_(0, at, q)
    size = math.hypot(*norms.pop("size")) or 1.0
    errors = {name: short(math.hypot(*each) / size) for name, each in norms.items()}
    value = value.T if compensation.by_columns else value
    return value.contiguous(), {
        "output_error": errors["compensated"],
        "unweighted_output_error": errors["nearest"],
    }


def before_rounding(
    inputs: Reader,
    compensation: Compensation,
    weight: Tensor,  # (out, in) float64
    q: Tensor,  # (out, in) float64: what it was rounded to
) -> Tensor:  # (out, in) float64
    """The value of each element before it was rounded to q; see `compensated.unrounded`."""
    before = weight.clone()
    for span in compensation.spans:
        _, factor = read_factor(inputs, span.covariance)
        (w, at), part = _rows(weight, span), _rows(q, span)[0]
        value = kernel.unrounded(w, part, factor)
        before = value if at is None else before.index_copy_(0, at, value)
    return before


def read_factor(inputs: Reader, covariance: TensorSpec) -> tuple[Tensor, kernel.Factor]:
    """A covariance and its factor; `Unrecoverable` if it is invalid."""
    c = inputs.tensor(covariance).float()
    with covariance_errors(covariance):
        return c, kernel.factorize(c)


def compensation_memory(compensation: Compensation) -> int:
    """Bytes for a covariance, its factor and the factor's inverse, in float64."""
    return max(36 * math.prod(span.covariance.shape) for span in compensation.spans)


def compensation_effort(compensation: Compensation) -> Effort:
    """The effort of carrying errors from column to column and of three norms of outputs, 2·out·in²
    each, and of the factors of the covariances."""
    effort = Effort()
    for span in compensation.spans:
        width = span.covariance.shape[0]
        flops = 8 * len(span.outputs) * width**2
        effort += Effort(flops=flops, wide=2 * width**3, columns=width)
    return effort


def positions(span: Span) -> Tensor:
    """The numbers of the span's outputs."""
    return torch.as_tensor(list(span.outputs))


def _rows(m: Tensor, span: Span) -> tuple[Tensor, Tensor | None]:
    """The span's outputs, and their numbers if it is not all outputs."""
    if span.outputs == range(len(m)):
        return m, None
    at = positions(span).to(m.device)
    return m[at], at


def _of_rows(round_column: RoundColumn, at: Tensor, weight: Tensor) -> RoundColumn:
    """The rounding function for some outputs only."""

    def round_some(w: Tensor, column: int | None) -> Tensor:
        assert column is not None
        return round_column(weight[:, column].index_copy(0, at, w), column)[at]

    return round_some


def _change(weight: StoredWeight, written: Tensor) -> ChangeMetrics:
    """The metrics over all written rows of a weight."""
    change = weight.new_metrics()
    for part in weight.edit(change):
        change.compare(part.before, part.after, written[part.first : part.last])
    return change
