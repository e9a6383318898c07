"""Tasks shared by several verbs: a stored tensor as it is, a sum of tensors, and the base class of
tasks that make factors."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Place
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import unrecoverable
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Effort, Metrics, Task, TaskResult
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.block_sizes import piece

BLOCK = 1 << 20  # elements that are summed at a time on a CPU
# a decomposition's products with the matrix, each way, and its oversampled columns
SWEEPS, BEYOND = 12, 16


def decomposition(out: int, width: int, rank: int) -> Effort:
    """The effort of computing that many singular triplets; for most of them, by a Gram matrix."""
    columns = min(rank + BEYOND, min(out, width) // 4)
    return Effort(flops=2 * SWEEPS * out * width * columns, decompositions=1)


def covariance_errors(*covariances: TensorSpec) -> AbstractContextManager[None]:
    """Turn a ValueError into `Unrecoverable` for a module's covariance."""
    return unrecoverable(
        covariances[0].key,
        expected="a covariance E[x xᵀ]",
        where=", ".join(dict.fromkeys(one.file for one in covariances)),
        hint="collect it on texts that reach this module, and store it in float32",
        code="AK106",
    )


@dataclass(frozen=True)
class CopiedTensor(Task):
    """One stored tensor, byte for byte, under `key`.

    `checked`: it must be finite, which a training run's result may not be. Otherwise its bytes are
    copied unread."""

    source: TensorSpec = field(metadata=READ)
    key: str
    checked: bool = False

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(self.key, self.source.dtype, self.source.shape),)

    @property
    def planned_metrics(self) -> Metrics:
        return {}

    @property
    def copied(self) -> bool:
        return not self.checked

    @property
    def memory(self) -> int:
        return 2 * self.source.nbytes if self.checked else 0

    def compute(self, inputs: Reader) -> TaskResult:
        if not self.checked:
            return TaskResult({self.key: self.source}, {})
        data = inputs.bytes(self.source)
        tensor = dtypes.tensor_of(data, self.source.dtype, self.source.shape)
        return TaskResult({self.key: tensor}, {"taken": True})


@dataclass(frozen=True)
class SummedTensor(Task):
    """Σ scale · value in float64, rounded once: biases of b, averages of fully trained values."""

    key: str
    terms: tuple[tuple[TensorSpec, float], ...] = field(metadata=READ)  # none: zeros
    dtype: str
    shape: tuple[int, ...]

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(self.key, self.dtype, self.shape),)

    @property
    def planned_metrics(self) -> Metrics:
        return {}

    @property
    def memory(self) -> int:
        return 12 * sum(math.prod(spec.shape) for spec, _ in self.terms)

    def compute(self, inputs: Reader) -> TaskResult:
        values = [(inputs.tensor(spec).view(-1), scale) for spec, scale in self.terms]
        dtype = dtypes.torch_dtype(self.dtype)
        out = torch.empty(self.shape, dtype=dtype, device=inputs.device)
        each = piece(inputs.device, BLOCK)
        for first in range(0, out.numel(), each):
            here = slice(first, first + each)
            out.view(-1)[here] = sum(value[here].double() * scale for value, scale in values)
        return TaskResult({self.key: out}, {})


@dataclass(frozen=True)
class FactorsTask(Task):
    """The factors a and b of one module, under the keys of `place`; `compute` decides their
    rank."""

    place: Place
    dtype: str

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """Their largest possible rank."""

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        place, (a, b) = self.place, self.place.shapes(self.max_rank)
        return (TensorPlan(place.a_key, self.dtype, a), TensorPlan(place.b_key, self.dtype, b))

    def decomposition(self, rank: int) -> Effort:
        """The effort for that many singular triplets of the module's weight, of each expert's."""
        shape = self.place.out, math.prod(self.place.a_tail)
        return (self.place.experts or 1) * decomposition(*shape, rank)

    def round(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the dtype of the file."""
        dtype = dtypes.torch_dtype(self.dtype)
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    def round_matrices(self, a: Tensor, b: Tensor, rank: int) -> dict[str, Tensor]:
        """The file's tensors of a (rank * experts, in) and b (out, rank * experts)."""
        a_shape, b_shape = self.place.shapes(rank)
        return self.round(self.place.keyed(a.reshape(a_shape), b.reshape(b_shape)))


@dataclass(frozen=True)
class RankedFactors(FactorsTask):
    """Factors of a rank that is known when they are planned."""

    rank: int

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def planned_metrics(self) -> Metrics:
        return {"rank": self.rank}


@dataclass(frozen=True)
class SomeOutputs(Task):
    """The tensors of a task with these keys, if one file gets some of them and another file the
    rest; it is computed once for each file."""

    task: Task
    keys: tuple[str, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.task.reads

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        return self.task.shared_reads

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return tuple(one for one in self.task.max_outputs if one.key in self.keys)

    @property
    def planned_metrics(self) -> Metrics | None:
        return self.task.planned_metrics

    @property
    def effort(self) -> Effort:
        return self.task.effort

    @property
    def memory(self) -> int:
        return self.task.memory

    def compute(self, inputs: Reader) -> TaskResult:
        result = self.task.compute(inputs)
        tensors = {key: value for key, value in result.tensors.items() if key in self.keys}
        return result._replace(tensors=tensors)
