"""The initial factors of a new adapter."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.inits.common import draw
from adapterkit.kernels.sums import norm
from adapterkit.plan import TaskResult
from adapterkit.tasks.common import FactorsTask, short
from adapterkit.tasks.handoff import handoff_of
from adapterkit.weights.parameters import StoredParameter
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class InitialFactors(FactorsTask):
    """One module's factors by an init, in the dtype of the file; as they are rounded they are
    handed on to the files that need them: the base that is left, or a copy."""

    method: Any  # of `adapterkit.inits`
    rank: int
    alpha: float
    scale: float
    seed: int
    weight: StoredParameter | None  # where the method needs it; of a stack all experts
    statistics: tuple[tuple[str, TensorSpec], ...] = ()  # by kind
    hands_on: bool = False

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        weight = () if self.weight is None else self.weight.reads
        return (*weight, *(spec for _, spec in self.statistics))

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def memory(self) -> int:
        matrix = 0
        if self.weight is not None:
            matrix = math.prod(self.weight.shape) // (self.place.experts or 1)
        statistics = sum(math.prod(spec.shape) for _, spec in self.statistics)
        factors = sum(math.prod(stored.shape) for stored in self.max_outputs)
        return 24 * matrix + 32 * statistics + 12 * factors

    def compute(self, inputs: Reader) -> TaskResult:
        statistics = {kind: inputs.tensor(spec) for kind, spec in self.statistics}
        taken, size, pairs = 0.0, 0.0, []
        for expert in range(self.place.experts or 1):
            matrix = self._matrix(inputs, expert)
            a, b = self._factors(matrix, statistics, expert)
            pairs.append((a, b))
            if matrix is not None:
                taken += product_norm(a, b * self.scale) ** 2
                size += norm(matrix) ** 2
        tensors = self.round(self.place.stored(pairs))
        metrics: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha}
        if self.method.changes_base:
            metrics["taken"] = short(math.sqrt(taken / size)) if size else 0.0
        handoff = handoff_of(self.name, *tensors.values()) if self.hands_on else {}
        return TaskResult(tensors, metrics, handoff)

    def _matrix(self, inputs: Reader, expert: int) -> Tensor | None:
        if self.weight is None:
            return None
        weight = self.weight if self.place.experts is None else self.weight.expert(expert)
        return weight.matrix(inputs).contiguous()

    def _factors(
        self, matrix: Tensor | None, statistics: dict[str, Tensor], expert: int
    ) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank), a kernel's axes flattened."""
        if self.method.needs:
            return self.method.factors(matrix, self.rank, self.scale, **statistics)
        a_shape, b_shape = (self.rank, *self.place.a_tail), (self.place.out, self.rank)
        generator = generator_of(self.seed, f"{self.name} {expert}")
        a, b = draw(self.method, a_shape, b_shape, generator, self.place.is_embedding)
        return a.reshape(self.rank, -1), b


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers of one module: those of others, and their order, do not matter."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def product_norm(a: Tensor, b: Tensor) -> float:
    """‖b @ a‖_F, without the product."""
    a, b = a.double(), b.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
