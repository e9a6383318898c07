"""The initial factors of a new adapter."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Unrecoverable, shown
from adapterkit.inits.protocol import ComputedInit, DrawnInit, Initialization
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.sums import norm
from adapterkit.plan import TaskResult
from adapterkit.tasks.common import LARGE, FactorsTask, short
from adapterkit.tasks.handoff import handoff_keys, handoff_of
from adapterkit.weights.parameters import StoredParameter
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class InitialFactors(FactorsTask):
    """One module's factors by an init, in the dtype of the file; as they are rounded they are
    handed on to the files that need them: the base that is left, or a copy."""

    method: Initialization
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
    def handoff_writes(self) -> tuple[str, ...]:
        return handoff_keys(self.name) if self.hands_on else ()

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def foreseen(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha}

    @property
    def prefers_card(self) -> bool:
        decomposed = {"weight", "gradient"}.intersection(self.method.needs)
        return bool(decomposed) and min(self.place.out, math.prod(self.place.a_tail)) >= LARGE

    @property
    def memory(self) -> int:
        matrix = 0
        if self.weight is not None:
            matrix = math.prod(self.weight.shape) // (self.place.experts or 1)
        statistics = sum(math.prod(spec.shape) for _, spec in self.statistics)
        factors = sum(math.prod(stored.shape) for stored in self.max_outputs)
        # the trailing triplets are of an inverse, in float64
        return 56 * matrix + 32 * statistics + 12 * factors

    def compute(self, inputs: Reader) -> TaskResult:
        statistics = {kind: inputs.tensor(spec) for kind, spec in self.statistics}
        taken, size, pairs = 0.0, 0.0, []
        for expert in range(self.place.experts or 1):
            matrix = self._matrix(inputs, expert)
            a, b = self._factors(matrix, statistics, expert)
            pairs.append((a, b))
            if matrix is not None:
                product = Product(b.double() * self.scale, a.double())
                taken += algebra.norm(product) ** 2
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
        generator = generator_of(self.seed, f"{self.name} {expert}")
        method = self.method
        if isinstance(method, ComputedInit):
            return self._computed(method, matrix, statistics, generator)
        assert isinstance(method, DrawnInit)
        a_shape, b_shape = (self.rank, *self.place.a_tail), (self.place.out, self.rank)
        a, b = method.start(a_shape, b_shape, generator, self.place.is_embedding)
        return a.reshape(self.rank, -1), b

    def _computed(
        self,
        method: ComputedInit,
        matrix: Tensor | None,
        statistics: dict[str, Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Those of a method that needs something; `Unrecoverable` for statistics that it cannot
        use."""
        if matrix is None:
            matrix = torch.empty(self.place.out, math.prod(self.place.a_tail), device="meta")
        try:
            return method.start(matrix, self.max_rank, self.scale, statistics, generator)
        except ValueError as error:
            if not self.statistics:
                raise
            keys = ", ".join(shown(spec.key) for _, spec in self.statistics)
            raise Unrecoverable(
                f"{keys}: {error}",
                expected="statistics of this module's inputs and gradients",
                where=self.statistics[0][1].file,
                hint="collect them on texts that reach this module, and store them in float32",
            ) from error


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers of one module: those of others, and their order, do not matter."""
    return torch.Generator().manual_seed(Draws.of(seed, name).key >> 1)
