"""Stacked experts of one module with the prototypes that route tokens to them (Arrow,
arXiv:2405.11157)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Metrics, Task, TaskResult
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product

ITERATIONS = 15  # of PEFT's power iteration
TINY = 1e-8  # what PEFT adds to a norm that it divides by


@dataclass(frozen=True)
class StackedExperts(Task):
    """One module's experts: a (E, r, in), b (E, out, r), scale (E), prototype (E, in)."""

    parts: tuple[tuple[int, Factors], ...] = field(metadata=READ)  # expert's number, factors
    general: tuple[Factors, ...] = field(metadata=READ)  # of those general adapters that have it
    generals: int  # how many general adapters there are
    experts: int
    compat: str | None
    seed: int
    dtype: str

    @property
    def rank(self) -> int:
        """Of the expert of the largest rank, the general adapters' factors beside its own."""
        added = 0 if self.compat else sum(factors.rank for factors in self.general)
        return max(factors.rank for _, factors in self.parts) + added

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        count, (out, width) = len(self.parts), self.parts[0][1].shape
        stored = [
            TensorPlan(f"{self.name}.a", self.dtype, (count, self.rank, width)),
            TensorPlan(f"{self.name}.b", self.dtype, (count, out, self.rank)),
            TensorPlan(f"{self.name}.scale", "F32", (count,)),
            TensorPlan(f"{self.name}.prototype", "F32", (count, width)),
        ]
        if self._is_partial:
            stored.append(TensorPlan(f"{self.name}.expert", "I32", (count,)))
        return tuple(stored)

    @property
    def _is_partial(self) -> bool:
        """Whether some experts lack the module."""
        return len(self.parts) < self.experts

    @property
    def memory(self) -> int:
        return 4 * sum(s.nbytes for s in self.max_outputs) + 8 * sum(
            spec.nbytes for spec in self.reads
        )

    def compute(self, inputs: Reader) -> TaskResult:
        if self.compat == "peft":
            factors, scales = self._like_peft(inputs), [own.scale for _, own in self.parts]
            prototypes = [(power_iteration(a, b, self.seed), None) for a, b in factors]
        elif self.general:
            general = [
                Product(product.left / self.generals, product.right)
                for factors in self.general
                for product in factors.products(inputs)
            ]
            negative = [Product(-product.left, product.right) for product in general]
            factors = [
                algebra.balance(algebra.stack_products([*own.products(inputs), *negative]))
                for _, own in self.parts
            ]
            scales = [1.0] * len(factors)
            prototypes = [prototype(Product(b, a)) for a, b in factors]
        else:
            factors = [own.stored(inputs) for _, own in self.parts]
            scales = [own.scale for _, own in self.parts]
            prototypes = [prototype(Product(b.double(), a.double())) for a, b in factors]
        return self._result(factors, scales, prototypes)

    def _like_peft(self, inputs: Reader) -> list[tuple[Tensor, Tensor]]:
        pairs = [own.stored(inputs) for _, own in self.parts]
        if not self.general:
            return pairs
        others = [factors.stored(inputs) for factors in self.general]
        mean_a = torch.stack([a for a, _ in others]).mean(0)
        mean_b = torch.stack([b for _, b in others]).mean(0)
        return [(a - mean_a, b - mean_b) for a, b in pairs]

    def _result(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scales: list[float],
        prototypes: Sequence[tuple[Tensor, float | None]],  # with their gaps
    ) -> TaskResult:
        dtype, pad = dtypes.torch_dtype(self.dtype), torch.nn.functional.pad
        a = torch.stack([pad(a, (0, 0, 0, self.rank - len(a))) for a, _ in factors])
        b = torch.stack([pad(b, (0, self.rank - b.shape[1])) for _, b in factors])
        tensors = {
            f"{self.name}.a": a.to(dtype),
            f"{self.name}.b": b.to(dtype),
            f"{self.name}.scale": torch.tensor(scales, dtype=torch.float32),
            f"{self.name}.prototype": torch.stack([vector for vector, _ in prototypes]).float(),
        }
        if self._is_partial:
            numbers = [number for number, _ in self.parts]
            tensors[f"{self.name}.expert"] = torch.tensor(numbers, dtype=torch.int32)
        gaps = [short(gap, 4) for _, gap in prototypes if gap is not None]
        metrics: Metrics = {"gap": gaps} if gaps else {}
        return TaskResult(tensors, metrics | {"rank": self.rank})


def prototype(product: Product) -> tuple[Tensor, float]:
    """The top right singular vector of a product, signed, and how much the first singular value
    stands out: (σ₁ - σ₂) / σ₁.

    Zero, with gap 0, where the product is zero: an untrained expert attracts no token.
    """
    svd = algebra.svd(product)
    if not svd.s[0] > 0:
        return torch.zeros_like(svd.vh[0]), 0.0
    second = float(svd.s[1]) if len(svd.s) > 1 else 0.0
    return algebra.fix_sign(svd.vh[0]), 1 - second / float(svd.s[0])


def power_iteration(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """PEFT's prototype: v ← aᵀ(bᵀb(a v)) / ‖·‖, 15 times in float32 from a random start, of either
    sign."""
    a, b = a.float(), b.float()
    core = b.T @ b
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    v = v.to(a.device)
    v = v / (v.norm() + TINY)
    for _ in range(ITERATIONS):
        v = a.T @ (core @ (a @ v))
        v = v / (v.norm() + TINY)
    return v
