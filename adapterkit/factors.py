"""The factors of one adapted module, wherever and however a file stores them: as products for arithmetic, and back again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapterkit.adapter import Adapter, Lora, canonical
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.kernels.lowrank import Product


class Reads(Protocol):
    def tensor(self, spec: TensorSpec) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter's scale * b @ a on one module; a convolution's kernel axes are flattened, a stack of experts is that many
    products.

    For `experts`, a is stored (experts * rank, in), the expert slowest, and b (out, rank * experts), the expert fastest.
    """

    a: TensorSpec
    b: TensorSpec
    scale: float
    rank: int
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each product."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    def stored(self, inputs: Reads) -> tuple[Tensor, Tensor]:
        """a (rank * experts, in) and b (out, rank * experts) as matrices, in the inputs' dtype, without the scale."""
        a, b = inputs.tensor(self.a), inputs.tensor(self.b)
        return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)

    def products(self, inputs: Reads) -> list[Product]:
        """scale * b, a in float64: one product, or one for each expert."""
        a, b = self.stored(inputs)
        a, b = a.double(), b.double() * self.scale
        if self.experts is None:
            return [Product(b, a)]
        a, b = a.view(self.experts, self.rank, -1), b.view(-1, self.rank, self.experts)
        return [Product(b[:, :, e], a[e]) for e in range(self.experts)]


def factors_of(adapter: Adapter, lora: Lora) -> Factors:
    """A module's factors with their scale; `Refused` where rank and config disagree, or a convolution has groups."""
    rank, scale = _resolved(adapter, lora)
    rows, experts = lora.a.shape[0], None
    if rows != rank and rows % rank == 0 and adapter.config.get("target_parameters") and lora.kind == "module":
        experts = rows // rank
    elif rows != rank:
        raise Refused(
            f"rank {rows} in the file for {shown(lora.module)}",
            expected=f"rank {rank}, as r and rank_pattern say",
            where=adapter.where,
            do="restore the config that was saved with the file (a wrong rank means a wrong scale)",
        )
    if math.prod(lora.b.shape[1:]) != rows:
        raise Refused(
            f"factors of {shown(lora.module)} with shapes {lora.a.shape} and {lora.b.shape}",
            expected="b with as many columns as a has rows (a convolution with groups is not supported)",
            where=adapter.name,
            do="leave the module out",
        )
    return Factors(lora.a, lora.b, scale, rank, experts)


def _resolved(adapter: Adapter, lora: Lora) -> tuple[int, float]:
    """Rank and scale; of a module's parameters the patterns may name each, and a file does not say which one it is."""
    targets = adapter.config.get("target_parameters") or []
    leaves = [t.rpartition(".")[2] for t in targets if f".{lora.module}".endswith(f".{t.rpartition('.')[0]}") or "." not in t]
    names = [lora.module] if lora.kind == "embedding" or not leaves else [f"{lora.module}.{leaf}" for leaf in leaves]
    found = {adapter.resolved(name) for name in names}
    if len(found) > 1:
        raise Refused(
            f"{shown(lora.a.key)}: rank_pattern or alpha_pattern tells the parameters of its module apart, its key does not",
            expected="one rank and alpha for all parameters of a module",
            where=adapter.where,
            do="give them the same rank and alpha",
        )
    return found.pop()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's factors go in a file of PEFT's layout: keys, and the axes that a kernel or an expert stack has there."""

    a_key: str
    b_key: str
    a_tail: tuple[int, ...]  # a is stored (rank, *a_tail), b (out, rank, *b_tail)
    b_tail: tuple[int, ...]
    out: int
    experts: int | None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Stored shapes of a and b at that rank."""
        rows = rank * (self.experts or 1)
        return (rows, *self.a_tail), (self.out, rows, *self.b_tail)

    def stored(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The file's two tensors of (a, b), or of those of each expert, all of one rank."""
        if self.experts is None:
            a, b = pairs[0]
        else:
            a = torch.cat([a for a, _ in pairs], 0)
            b = torch.stack([b for _, b in pairs], 2).reshape(self.out, -1)
        a_shape, b_shape = self.shapes(len(pairs[0][0]))
        return {self.a_key: a.reshape(a_shape), self.b_key: b.reshape(b_shape)}


def place_of(lora: Lora, factors: Factors) -> Place:
    a, b = lora.a, lora.b
    return Place(canonical(a.key), canonical(b.key), a.shape[1:], b.shape[2:], b.shape[0], factors.experts)
