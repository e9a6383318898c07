"""One module of a combination: its adapters' factors in, new factors out."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.factors import Factors, Place
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Product, Svd
from adapterkit.kernels.truncated import leading
from adapterkit.ops import produced
from adapterkit.plan import Inputs, Made

BLOCK = 1 << 18  # elements of a dense delta that are made at a time


@dataclass(frozen=True)
class Refit:
    """How a result becomes factors: a rank, a share of the energy, the inputs' largest rank, or as it is (exact).

    `clamp`: the factors b = U s and a = Vᵀ are held below this quantile of their elements and their negatives (PEFT's svd_clamp).
    """

    rank: int | None = None
    energy: float | None = None
    largest: bool = False
    clamp: float | None = None

    @property
    def exact(self) -> bool:
        return not (self.rank or self.energy or self.largest or self.clamp)


@dataclass(frozen=True)
class Part:
    """One adapter's share in a module."""

    number: int
    factors: Factors
    weight: float


@dataclass(frozen=True)
class Combined:
    """One module's new factors."""

    name: str
    parts: tuple[Part, ...]
    place: Place
    method: Any
    space: str
    refit: Refit
    dtype: str
    seed: int

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for part in self.parts for spec in (part.factors.a, part.factors.b))

    @property
    def dense(self) -> bool:
        """Whether the method needs the deltas multiplied out."""
        return not hasattr(self.method, "products")

    @property
    def most(self) -> tuple[Stored, ...]:
        return produced.bounds(self.place, self._largest_rank(), self.dtype)

    def _largest_rank(self) -> int:
        ranks = [part.factors.rank for part in self.parts]
        if self.space == "factors":
            return ranks[0]
        shortest = min(self.parts[0].factors.shape)
        whole = shortest if self.dense else min(sum(ranks), shortest)
        return min(whole, max(ranks) if self.refit.largest else self.refit.rank or whole)

    @property
    def memory(self) -> int:
        factors = sum(spec.nbytes for spec in self.reads)
        return 12 * factors + (12 * math.prod(self.parts[0].factors.shape) if self.dense else 0)

    def make(self, inputs: Inputs) -> Made:
        if self.space == "factors":
            return self._on_factors(inputs)
        weights = [part.weight for part in self.parts]
        results, facts = [], []
        for expert, products in enumerate(zip(*(part.factors.products(inputs) for part in self.parts), strict=True)):
            result, found = self._result(products, weights, expert)
            results.append(result)
            facts.append(found | _cosines(products))
        return self._refitted(results, facts)

    def _result(self, products: Sequence[Product], weights: list[float], expert: int) -> tuple[Product | Tensor, dict]:
        """The combined delta, as a product where the method keeps it one, else dense."""
        if not self.dense:
            return self.method.products(products, weights)
        deltas = DenseDeltas([Product(p.left.float(), p.right.float()) for p in products])
        return self.method.merged(deltas, weights, Seeds(self.seed, f"{self.name}/{expert}"))

    def _refitted(self, results: list[Product | Tensor], facts: list[dict]) -> Made:
        shortest = min(self.parts[0].factors.shape)
        products = [result for result in results if isinstance(result, Product)]
        if self.refit.exact and products and products[0].rank <= shortest:
            pairs = [lowrank.balanced(product) for product in products]
            total = sum(lowrank.norm(product) ** 2 for product in products)
            return self._made(pairs, facts, total, total)
        found = [_decomposed(result, self.refit.energy, self._largest_rank()) for result in results]
        if self.refit.energy:
            rank = max(lowrank.rank_for_energy(svd.s, self.refit.energy, total) for svd, total in found)
            rank = min(rank, self._largest_rank())
        else:
            rank = min(self._largest_rank(), *(len(svd.s) for svd, _ in found))
        kept = sum(float(svd.s[:rank].double().square().sum()) for svd, _ in found)
        pairs = [self._factors(svd, rank) for svd, _ in found]
        return self._made(pairs, facts, kept, sum(total for _, total in found))

    def _factors(self, svd: Svd, rank: int) -> tuple[Tensor, Tensor]:
        if self.refit.clamp is None:
            return lowrank.refit(svd, rank)
        a, b = svd.vh[:rank], svd.u[:, :rank] * svd.s[:rank]
        values = torch.cat([b.reshape(-1), a.reshape(-1)])
        # PEFT's quantile of the signed values depends on the signs that the decomposition happens to give
        limit = quantile(torch.cat([values, -values]), self.refit.clamp)
        return a.clamp(-limit, limit), b.clamp(-limit, limit)

    def _on_factors(self, inputs: Inputs) -> Made:
        """PEFT's way: the method acts on the a's with sign(c)√|c| and on the b's with √|c|, c = weight · scale, whatever that
        does to their products."""
        pairs = [part.factors.stored(inputs) for part in self.parts]
        roots = [(math.copysign(abs(c) ** 0.5, c), abs(c) ** 0.5) for c in (p.weight * p.factors.scale for p in self.parts)]
        made = []
        for side in (0, 1):
            matrices, weights = [pair[side] for pair in pairs], [root[side] for root in roots]
            if self.dense:
                made.append(self.method.merged(GivenDeltas(matrices), weights, Seeds(self.seed, f"{self.name}/{'ab'[side]}"))[0])
            else:
                made.append(sum(m * w for m, w in zip(matrices, weights, strict=True)))
        rank = self.parts[0].factors.rank
        dtype = dtypes.torch_dtype(self.dtype)
        a_shape, b_shape = self.place.shapes(rank)
        tensors = {self.place.a_key: made[0].reshape(a_shape).to(dtype), self.place.b_key: made[1].reshape(b_shape).to(dtype)}
        return Made(tensors, {"rank": rank})

    def _made(self, pairs: list[tuple[Tensor, Tensor]], facts: list[dict], kept: float, total: float) -> Made:
        dtype = dtypes.torch_dtype(self.dtype)
        tensors = {key: tensor.to(dtype) for key, tensor in self.place.stored(pairs).items()}
        found: dict[str, Any] = {
            "rank": len(pairs[0][0]),
            "norm": _short(total**0.5),
            "energy": _short(kept / total) if total else 1.0,
        }
        # of a stack of experts: the mean over them
        for key in facts[0]:
            values = [fact[key] for fact in facts]
            found[key] = _mean(values)
        return Made(tensors, found)


class DenseDeltas:
    """Deltas of one module, rows made from float32 factors whenever they are asked for."""

    def __init__(self, products: Sequence[Product]):
        self.products = products
        self.shape, self.count = (products[0].left.shape[0], products[0].right.shape[1]), len(products)

    def blocks(self) -> Iterator[tuple[int, int]]:
        return blocks(self.shape)

    def rows(self, which: int, first: int, last: int) -> Tensor:
        product = self.products[which]
        return product.left[first:last] @ product.right


class GivenDeltas:
    """The same over matrices that are there."""

    def __init__(self, matrices: Sequence[Tensor]):
        self.matrices, self.count = matrices, len(matrices)
        self.shape = (matrices[0].shape[0], matrices[0].shape[1])

    def blocks(self) -> Iterator[tuple[int, int]]:
        return blocks(self.shape)

    def rows(self, which: int, first: int, last: int) -> Tensor:
        return self.matrices[which][first:last].clone()


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of each block of a matrix."""
    step = max(1, BLOCK // max(shape[1], 1))
    return ((first, min(first + step, shape[0])) for first in range(0, shape[0], step))


class Seeds:
    """Random numbers for each delta of one module, from the run's seed and the module's name."""

    def __init__(self, seed: int, name: str):
        self.seed, self.name = seed, name

    def __call__(self, which: int) -> torch.Generator:
        text = f"{self.seed}\0{self.name}\0{which}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        return torch.Generator().manual_seed(number >> 1)


def quantile(values: Tensor, share: float) -> float:
    """The quantile with linear interpolation, of any number of values (torch.quantile stops at 16 million)."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    first = float(values.kthvalue(low + 1).values)
    second = float(values.kthvalue(min(low + 2, len(values))).values)
    return first + (second - first) * (at - low)


def _decomposed(result: Product | Tensor, energy: float | None, most: int) -> tuple[Svd, float]:
    """The leading singular triplets of a delta, and Σ s² over all of them."""
    if isinstance(result, Product):
        svd = lowrank.svd(result)
        return svd, float(svd.s.square().sum())
    return leading(result, most, energy)


def _cosines(products: Sequence[Product]) -> dict[str, list[float]]:
    """Cosines between the inputs' deltas, row by row of the triangle above the diagonal."""
    table = lowrank.gram(products)
    norms = table.diagonal().clamp_min(0).sqrt()
    pairs = itertools.combinations(range(len(products)), 2)
    return {"cosines": [float(table[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] else 0.0 for i, j in pairs]}


def _mean(values: list) -> Any:
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return _short(math.fsum(values) / len(values))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
