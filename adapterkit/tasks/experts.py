"""Stacked experts of one module with the prototypes that route tokens to them (Arrow, arXiv:2405.11157)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Product
from adapterkit.plan import TaskResult
from adapterkit.weights.reader import Reader

ITERATIONS = 15  # of PEFT's power iteration
TINY = 1e-8  # what PEFT adds to a norm that it divides by


@dataclass(frozen=True)
class StackedExperts:
    """One module's experts."""

    name: str
    parts: tuple[tuple[int, Factors], ...]  # expert's number, factors
    less: tuple[Factors, ...]  # of the general adapters that have the module
    generals: int  # how many there are in all
    experts: int
    compat: str | None
    seed: int
    dtype: str

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for f in (*(f for _, f in self.parts), *self.less) for spec in (f.a, f.b))

    @property
    def rank(self) -> int:
        """Of the widest expert, the general adapters' factors beside its own."""
        added = 0 if self.compat else sum(factors.rank for factors in self.less)
        return max(factors.rank for _, factors in self.parts) + added

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        count, (out, width) = len(self.parts), self.parts[0][1].shape
        stored = [
            Stored(f"{self.name}.a", self.dtype, (count, self.rank, width)),
            Stored(f"{self.name}.b", self.dtype, (count, out, self.rank)),
            Stored(f"{self.name}.scale", "F32", (count,)),
            Stored(f"{self.name}.prototype", "F32", (count, width)),
        ]
        return (
            (*stored, Stored(f"{self.name}.expert", "I32", (count,)))
            if self._partly
            else tuple(stored)
        )

    @property
    def _partly(self) -> bool:
        return len(self.parts) < self.experts

    @property
    def memory(self) -> int:
        return 4 * sum(s.nbytes for s in self.max_outputs) + 8 * sum(
            spec.nbytes for spec in self.reads
        )

    def compute(self, inputs: Reader) -> TaskResult:
        if self.compat == "peft":
            factors, scales = self._like_peft(inputs), [f.scale for _, f in self.parts]
            found = [(power_iteration(a, b, self.seed), None) for a, b in factors]
        elif self.less:
            general = [
                Product(p.left / self.generals, p.right)
                for f in self.less
                for p in f.products(inputs)
            ]
            products = [
                lowrank.stack_products(
                    [*f.products(inputs), *(Product(-g.left, g.right) for g in general)]
                )
                for _, f in self.parts
            ]
            factors, scales = (
                [lowrank.balance(product) for product in products],
                [1.0] * len(products),
            )
            found = [prototype(Product(b, a)) for a, b in factors]
        else:
            factors, scales = (
                [f.stored(inputs) for _, f in self.parts],
                [f.scale for _, f in self.parts],
            )
            found = [prototype(Product(b.double(), a.double())) for a, b in factors]
        return self._made(factors, scales, found)

    def _like_peft(self, inputs: Reader) -> list[tuple[Tensor, Tensor]]:
        pairs = [factors.stored(inputs) for _, factors in self.parts]
        if not self.less:
            return pairs
        others = [factors.stored(inputs) for factors in self.less]
        mean_a = torch.stack([a for a, _ in others]).mean(0)
        mean_b = torch.stack([b for _, b in others]).mean(0)
        return [(a - mean_a, b - mean_b) for a, b in pairs]

    def _made(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        scales: list[float],
        found: Sequence[tuple[Tensor, Any]],
    ) -> TaskResult:
        dtype, pad = dtypes.torch_dtype(self.dtype), torch.nn.functional.pad
        a = torch.stack([pad(a, (0, 0, 0, self.rank - len(a))) for a, _ in factors])
        b = torch.stack([pad(b, (0, self.rank - b.shape[1])) for _, b in factors])
        tensors = {
            f"{self.name}.a": a.to(dtype),
            f"{self.name}.b": b.to(dtype),
            f"{self.name}.scale": torch.tensor(scales, dtype=torch.float32),
            f"{self.name}.prototype": torch.stack([vector for vector, _ in found]).float(),
        }
        if self._partly:
            tensors[f"{self.name}.expert"] = torch.tensor(
                [number for number, _ in self.parts], dtype=torch.int32
            )
        gaps = [gap for _, gap in found]
        metrics: dict[str, Any] = (
            {} if None in gaps else {"gap": [float(f"{gap:.4g}") for gap in gaps]}
        )
        return TaskResult(tensors, metrics | {"rank": self.rank})


def prototype(product: Product) -> tuple[Tensor, float]:
    """The top right singular vector of a product, signed, and how much the first singular value stands out: (σ₁ - σ₂) / σ₁.

    Zero, with gap 0, where the product is zero: an untrained expert attracts no token.
    """
    svd = lowrank.svd(product)
    if not svd.s[0] > 0:
        return torch.zeros_like(svd.vh[0]), 0.0
    second = float(svd.s[1]) if len(svd.s) > 1 else 0.0
    return lowrank.fix_sign(svd.vh[0]), 1 - second / float(svd.s[0])


def power_iteration(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """PEFT's prototype: v ← aᵀ(bᵀb(a v)), normalised, 15 times in float32 from a random start; the sign is left as it comes."""
    a, b = a.float(), b.float()
    core = b.T @ b
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    v = v / (v.norm() + TINY)
    for _ in range(ITERATIONS):
        v = a.T @ (core @ (a @ v))
        v = v / (v.norm() + TINY)
    return v
