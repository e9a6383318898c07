"""Tasks that compute the tensors of a converted adapter from stored ones."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapterkit.adapters.formats.modules.deltas import Fit, FitReader, Fitted
from adapterkit.adapters.formats.modules.tensors import Expression, StoredTensor
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Task, TaskResult
from adapterkit.core.tasks.common import CopiedTensor
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.reader import Reader, TensorReader

LOSS = 2.0**-8  # of a tensor's norm that rounding may lose: bfloat16's largest relative error
MANY = 8  # outputs of one stored tensor that are made together


@dataclass(frozen=True)
class ConvertedTensor:
    """An expression under `key`, rounded once to `dtype`."""

    key: str
    expression: Expression
    dtype: str
    module: str = ""  # for the receipt

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.expression.reads


@dataclass(frozen=True)
class ConvertedTensors(Task):
    """One tensor, or several that read the same large ones or share fits, so that each is read or
    computed once. The receipt gets the rounding error, or for fits ‖Δ - b @ a‖ / ‖Δ‖."""

    outputs: tuple[ConvertedTensor, ...] = field(metadata=READ)
    fits: tuple[Fit, ...] = ()

    @property
    def is_known_early(self) -> bool:
        return all(one.expression.known_early for one in self.outputs)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return tuple(TensorPlan(one.key, one.dtype, one.expression.shape) for one in self.outputs)

    @property
    def memory(self) -> int:
        made = sum(16 * math.prod(one.expression.shape) for one in self.outputs)
        if not self.fits:
            return made + sum(8 * math.prod(spec.shape) for spec in self.reads)
        kept = sum(8 * fit.rank * sum(fit.delta.shape) for fit in self.fits)
        return made + kept + max(fit.delta.memory for fit in self.fits)

    def compute(self, inputs: Reader) -> TaskResult:
        fits = FitReader(inputs)
        reader = fits if self.fits else _ReadOnce(inputs.view(None))
        tensors: dict[str, Tensor | TensorSpec] = {}
        rounding: list[float] = []
        for one in self.outputs:
            tensors[one.key], lost = rounded(one, reader)
            rounding += [] if lost is None else [lost]
        if not self.fits:
            return TaskResult(tensors, {"rounding": max(rounding)} if rounding else {})
        factors = [fits.factors(fit) for fit in self.fits]
        norm = math.hypot(*(one.norm for one in factors))
        lost = math.hypot(*(one.lost for one in factors))
        metrics = {
            "rank": max(fit.rank for fit in self.fits),
            "norm": short(norm),
            "error": short(lost / norm) if norm else 0.0,
        }
        return TaskResult(tensors, metrics)


class _ReadOnce:
    """A reader that keeps the tensors it has read."""

    def __init__(self, reader: TensorReader):
        self.reader = reader
        self.tensors: dict[TensorSpec, Tensor] = {}

    def tensor(self, spec: TensorSpec) -> Tensor:
        if spec not in self.tensors:
            self.tensors[spec] = self.reader.tensor(spec)
        return self.tensors[spec]


def rounded(one: ConvertedTensor, reader: TensorReader) -> tuple[Tensor, float | None]:
    """The tensor in its dtype, and ‖value - rounded‖ / ‖value‖, None if nothing is rounded.

    `Unrecoverable` if any piece has values too small for the dtype, because the loss of a small
    piece does not show in the norm of larger ones.
    """
    value, own = one.expression.value(reader), dtypes.torch_dtype(one.dtype)
    tensor = value.to(own).contiguous()
    if value.dtype == own:
        return tensor, None
    lost = worst = loss(value, tensor)
    pieces = one.expression.joined_parts
    if len(pieces) > 1:
        del value
        parts = (piece.value(reader) for piece in pieces)
        worst = max(loss(part, part.to(own)) for part in parts)
    # overflow gives infinities, which the engine refuses
    if own.is_floating_point and max(LOSS, torch.finfo(own).eps) < worst < math.inf:
        raise Unrecoverable(
            f"values of {shown(one.key)} are too small for {str(own).removeprefix('torch.')}, "
            f"which loses {worst:.2g} of their norm",
            expected=f"at most {LOSS:.2g}, as bfloat16 loses",
            where=shown(one.key),
            hint="give --dtype fp32, or choose a format that stores the scale of each module",
            code="AK606",
        )
    return tensor, lost


def loss(value: Tensor, tensor: Tensor) -> float:
    """‖value - tensor‖ / ‖value‖ of a rounded tensor; 1 where the squares of its values are 0."""
    wide = value.double()
    lost = torch.linalg.vector_norm(tensor.double() - wide)
    norm = torch.linalg.vector_norm(wide)
    return float(lost / norm) if norm else float(wide.any())


def tasks_of(tensors: Sequence[ConvertedTensor]) -> tuple[Task, ...]:
    """One task per tensor, or per group that shares fits or is made from the same stored ones."""
    fitted: list[ConvertedTensor] = []
    others: list[Task] = []
    for tensor in tensors:
        if fits_of(tensor.expression):
            fitted.append(tensor)
        else:
            others.append(_task(tensor))
    return _together([*others, *_fitted(fitted)])


def fits_of(expression: Expression) -> list[Fit]:
    """The fits that give an expression its factors, each once."""
    fits = {id(one.fit): one.fit for one in expression if isinstance(one, Fitted)}
    return list(fits.values())


def _fitted(tensors: Sequence[ConvertedTensor]) -> list[Task]:
    """One task for all tensors that share fits, as parts of a fused module do."""
    groups: dict[int, list[ConvertedTensor]] = {}  # by the first of their fits
    owner: dict[int, int] = {}
    fits: dict[int, Fit] = {}
    for tensor in tensors:
        own = fits_of(tensor.expression)
        fits |= {id(fit): fit for fit in own}
        joined = {owner.setdefault(id(fit), id(fit)) for fit in own}
        home = min(joined)
        groups[home] = [one for old in sorted(joined) for one in groups.pop(old, [])] + [tensor]
        owner = {fit: home if old in joined else old for fit, old in owner.items()}
    tasks: list[Task] = []
    for home, members in groups.items():
        own = tuple(fits[fit] for fit, place in owner.items() if place == home)
        tasks.append(ConvertedTensors(members[0].module, tuple(members), own))
    return tasks


def _task(tensor: ConvertedTensor) -> Task:
    """A copy of bytes if nothing is computed."""
    if isinstance(tensor.expression, StoredTensor) and tensor.dtype == tensor.expression.dtype:
        return CopiedTensor(tensor.key, tensor.expression.spec, tensor.key, checked=True)
    return ConvertedTensors(tensor.key, (tensor,))


def _together(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Join tensors made from the same stored ones into one task, for example experts of a stack,
    because each would otherwise read the whole stack."""
    readers = Counter(spec for task in tasks for spec in task.reads)
    groups: dict[TensorSpec, list[ConvertedTensors]] = {}
    result: list[Task] = []
    for task in tasks:
        shared = next((spec for spec in task.reads if readers[spec] > MANY), None)
        if shared is None or not isinstance(task, ConvertedTensors) or not task.is_known_early:
            result.append(task)
        else:
            groups.setdefault(shared, []).append(task)
    for own in groups.values():
        outputs = tuple(output for task in own for output in task.outputs)
        result.append(ConvertedTensors(own[0].name, outputs))
    return tuple(result)
