"""Convert the factors of one adapted module from a file's layout to products, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

from adapterkit.core.adapter.keys import FACTORS, factor_keys
from adapterkit.core.adapter.record import Adapter, Lora, rank_mismatch
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Refused, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank import directions
from adapterkit.kernels.lowrank.algebra import Product, products_of

STORED = tuple(field.name for field in fields(Lora))  # the fields that a file has


@dataclass(frozen=True, kw_only=True)
class Factors(Lora):
    """Stored factors with their scale: delta = scale * b @ a; for a stack, one delta for each
    expert.

    Kernel axes of a convolution are flattened. A stack has a as (experts * rank, in), the expert
    slowest, and b as (out, rank * experts), the expert fastest. `flip`: the rows of the changed
    parameter are the module's inputs, so it changes by (b @ a)ᵀ = aᵀ @ bᵀ."""

    scale: float
    rank: int
    experts: int | None = None
    flip: bool = False
    leaf: str | None = None  # the module's parameter, if it is a target itself
    directions: tuple[float, ...] | None = None  # weights of the singular triplets of each product

    @classmethod
    def of(
        cls,
        lora: Lora,
        scale: float,
        rank: int,
        experts: int | None = None,
        flip: bool = False,
        leaf: str | None = None,
    ) -> "Factors":
        stored = {name: getattr(lora, name) for name in STORED}
        return cls(**stored, scale=scale, rank=rank, experts=experts, flip=flip, leaf=leaf)

    @property
    def reads(self) -> tuple[TensorSpec, TensorSpec]:
        return self.a, self.b

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each product."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    @property
    def count(self) -> int:
        """The number of singular triplets of all its products."""
        return (self.experts or 1) * directions.count(self.shape, self.rank)

    def weighted(self, b: Tensor, a: Tensor, expert: int = 0) -> Tensor:
        """b (out, rank) of an expert's product with the weights of its directions."""
        if self.directions is None:
            return b
        each = directions.count(self.shape, self.rank)
        return directions.weighted_left(b, a, self.directions[expert * each :][:each])

    def stored(self, reader: TensorReader) -> tuple[Tensor, Tensor]:
        """a (rank * experts, in) and b (out, rank * experts) in the reader's dtype, unscaled, as in
        the file."""
        a, b = reader.tensor(self.a), reader.tensor(self.b)
        return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)

    def products(self, reader: TensorReader) -> list[Product]:
        """(scale * b, a) in float64: one product, or one for each expert."""
        a, b = self.stored(reader)
        products = products_of(a.double(), b.double() * self.scale, self.experts or 1)
        return [Product(self.weighted(*each, n), each.right) for n, each in enumerate(products)]


# inits from a decomposition of the weight: their rank is at most the weight's
DECOMPOSING_INITS = ("pissa", "olora", "loftq")


def rank_and_scale(adapter: Adapter, lora: Lora, leaf: str | None) -> tuple[int, float]:
    """Rank and scale by the config for factors of a module, or of its parameter `leaf`.

    PiSSA, OLoRA and LoftQ write min(r, in, out) rows; the scale is that of r.
    """
    rank, scale = adapter.rank_and_scale(adapter.pattern_name(lora, leaf))
    init = adapter.config.get("init_lora_weights")
    if (
        isinstance(init, str)
        and init.lower().startswith(DECOMPOSING_INITS)
        and len(lora.a.shape) == len(lora.b.shape) == 2
    ):
        rank = min(rank, lora.a.shape[1], lora.b.shape[0])
    return rank, scale


def factors_of(adapter: Adapter, lora: Lora, leaf: str | None = None) -> Factors:
    """The factors of a module, or of its parameter `leaf`.

    `Refused` if their rank is not the config's, or a convolution has groups."""
    rank, scale = rank_and_scale(adapter, lora, leaf)
    rows, experts = lora.a.shape[0], None
    if leaf is not None and rows != rank and rows % rank == 0:
        experts = rows // rank
    elif rows != rank:
        raise rank_mismatch(adapter, lora, rows, rank)
    if math.prod(lora.b.shape[1:]) != rows:
        raise Refused(
            f"factors of {shown(lora.module)} with shapes {lora.a.shape} and {lora.b.shape}",
            expected="b with as many columns as a has rows "
            "(a convolution with groups is not supported)",
            where=adapter.label,
            hint="leave the module out",
            code="AK401",
        )
    return Factors.of(lora, scale, rank, experts, leaf=leaf)


@dataclass(frozen=True, slots=True)
class Place:
    """Keys and stored shapes of a module's factors in a file of PEFT's layout."""

    a_key: str
    b_key: str
    a_tail: tuple[int, ...]  # a is stored (rank, *a_tail), b (out, rank, *b_tail)
    b_tail: tuple[int, ...]
    out: int
    experts: int | None

    @classmethod
    def of_weight(
        cls,
        module: str,
        shape: tuple[int, ...],  # of the weight: (out, in, *kernel)
        kind: str = "module",
        experts: int | None = None,
    ) -> "Place":
        """Keys and shapes of new factors for a weight, in a file without nested wrappers."""
        a_tail, b_tail = shape[1:], (1,) * (len(shape) - 2)
        return cls(*factor_keys(module, kind=kind), a_tail, b_tail, shape[0], experts)

    @classmethod
    def of_factors(cls, factors: Factors, levels: Mapping[str, int], depth: int) -> "Place":
        """Keys and shapes of stored factors in a file whose modules are wrapped `levels` times."""
        a_key, b_key = factor_keys(factors.module, levels, depth, factors.kind)
        out, _, *b_tail = factors.b.shape
        return cls(a_key, b_key, factors.a.shape[1:], tuple(b_tail), out, factors.experts)

    @property
    def is_embedding(self) -> bool:
        return self.b_key.endswith(FACTORS["embedding"][1])

    @property
    def is_linear(self) -> bool:
        """True if a linear layer may have them: they are no embedding's, convolution's or
        stack's."""
        return not self.is_embedding and self.experts is None and len(self.a_tail) == 1

    @property
    def bias_key(self) -> str:
        """The key of b's bias, with lora_bias."""
        return self.b_key.removesuffix("weight") + "bias"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Stored shapes of a and b of this rank."""
        rows = rank * (self.experts or 1)
        return (rows, *self.a_tail), (self.out, rows, *self.b_tail)

    def keyed(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Two tensors by key, as in a file."""
        return {self.a_key: a, self.b_key: b}

    def pair(self, tensors: Mapping[str, object]) -> tuple[Tensor, Tensor]:
        """a and b among the tensors that a task has computed."""
        return cast(Tensor, tensors[self.a_key]), cast(Tensor, tensors[self.b_key])

    def stored(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The two stored tensors by key of one (a, b), or of one for each expert, all of one
        rank."""
        if self.experts is None:
            a, b = pairs[0]
        else:
            a = torch.cat([a for a, _ in pairs], 0)
            b = torch.stack([b for _, b in pairs], 2).reshape(self.out, -1)
        a_shape, b_shape = self.shapes(len(pairs[0][0]))
        return self.keyed(a.reshape(a_shape), b.reshape(b_shape))
