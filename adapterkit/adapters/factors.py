"""The factors of one adapted module, wherever and however a file stores them: as products for arithmetic, and back again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.adapters.keys import factor_keys
from adapterkit.adapters.record import Adapter, Lora, rank_mismatch
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.kernels.lowrank import Product
from adapterkit.weights.reader import TensorReader


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

    def stored(self, inputs: TensorReader) -> tuple[Tensor, Tensor]:
        """a (rank * experts, in) and b (out, rank * experts) as matrices, in the inputs' dtype, without the scale."""
        a, b = inputs.tensor(self.a), inputs.tensor(self.b)
        return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)

    def products(self, inputs: TensorReader) -> list[Product]:
        """scale * b, a in float64: one product, or one for each expert."""
        a, b = self.stored(inputs)
        a, b = a.double(), b.double() * self.scale
        if self.experts is None:
            return [Product(b, a)]
        a, b = a.view(self.experts, self.rank, -1), b.view(-1, self.rank, self.experts)
        return [Product(b[:, :, e], a[e]) for e in range(self.experts)]


TRUNCATED = (
    "pissa",
    "olora",
    "loftq",
)  # inits that take the weight's own factors: no more of them than it has


def rank_and_scale(adapter: Adapter, lora: Lora, leaf: str | None) -> tuple[int, float]:
    """Rank and scale of a factor pair on a module, or on its parameter `leaf`, as config and patterns say.

    PiSSA, OLoRA and LoftQ write min(r, in, out) rows; the scale is that of r.
    """
    rank, scale = adapter.resolved(adapter.pattern_name(lora, leaf))
    init = adapter.config.get("init_lora_weights")
    if (
        isinstance(init, str)
        and init.lower().startswith(TRUNCATED)
        and len(lora.a.shape) == len(lora.b.shape) == 2
    ):
        rank = min(rank, lora.a.shape[1], lora.b.shape[0])
    return rank, scale


def factors_of(adapter: Adapter, lora: Lora, leaf: str | None = None) -> Factors:
    """The factors on a module, or on its parameter `leaf`, with their scale; `Refused` where rank and config disagree, or a
    convolution has groups."""
    rank, scale = rank_and_scale(adapter, lora, leaf)
    rows, experts = lora.a.shape[0], None
    if leaf is not None and rows != rank and rows % rank == 0:
        experts = rows // rank
    elif rows != rank:
        raise rank_mismatch(adapter, lora, rows, rank)
    if math.prod(lora.b.shape[1:]) != rows:
        raise Refused(
            f"factors of {shown(lora.module)} with shapes {lora.a.shape} and {lora.b.shape}",
            expected="b with as many columns as a has rows (a convolution with groups is not supported)",
            where=adapter.label,
            hint="leave the module out",
        )
    return Factors(lora.a, lora.b, scale, rank, experts)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's factors go in a file of PEFT's layout: keys, and the axes that a kernel or an expert stack has there."""

    a_key: str
    b_key: str
    a_tail: tuple[int, ...]  # a is stored (rank, *a_tail), b (out, rank, *b_tail)
    b_tail: tuple[int, ...]
    out: int
    experts: int | None

    @property
    def is_embedding(self) -> bool:
        return self.b_key.endswith("lora_embedding_B")

    @property
    def bias_key(self) -> str:
        """Of the bias that b has with lora_bias."""
        return self.b_key.removesuffix("weight") + "bias"

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


def place_of(lora: Lora, factors: Factors, levels: Mapping[str, int], depth: int = 0) -> Place:
    """Where such factors go in a file whose modules are wrapped `levels` times, under `depth` wrappers of their own module."""
    a_key, b_key = factor_keys(lora.module, levels, depth, lora.kind)
    return Place(a_key, b_key, lora.a.shape[1:], lora.b.shape[2:], lora.b.shape[0], factors.experts)


def place_of_linear(module: str, shape: tuple[int, ...]) -> Place:
    """Where the factors of a linear layer (out, in) go in a file without wrappers of parameters."""
    a_key, b_key = factor_keys(module, {})
    return Place(a_key, b_key, (shape[1],), (), shape[0], None)
