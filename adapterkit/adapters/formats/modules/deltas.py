"""Deltas of modules of any kind, computed from their tensors (and the base's weight if needed), and
standard LoRA factors fitted to them as expressions, computed when the output is written.

Equations as LyCORIS 4.1.3 computes them in `forward`. Its `get_merged_weight` applies the scale of
LoHa and LoKr twice, which is a defect.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from adapterkit.adapters.formats.modules.parts import (
    magnitudes,
    matrix_shape,
    product_rank,
    tail_of,
)
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.tensors import Expression, contract
from adapterkit.adapters.kinds.common import ComputedDelta, Delta
from adapterkit.adapters.kinds.loha import hadamard, with_core
from adapterkit.adapters.kinds.lokr import kronecker_svd
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import Reader, TensorReader
from adapterkit.kernels import rotations
from adapterkit.kernels.lowrank import weighted
from adapterkit.kernels.lowrank.algebra import Product, Svd

Values = Mapping[str, Tensor]  # of a module's parts, float64


@dataclass(frozen=True)
class ModuleDelta(ComputedDelta):
    """The delta of one module, (out, in) with a kernel's axes flattened."""

    module: AdapterModule
    weight: StoredParameter | None = None  # of the base; of kinds that depend on it
    others: tuple["ModuleDelta", ...] = ()  # modules that share its norms of inputs

    @property
    def shape(self) -> tuple[int, int]:
        if self.weight is not None:
            out, *trailing_shape = self.weight.weight_shape
            return out, math.prod(trailing_shape)
        return matrix_shape(self.module.kind, self.module.parts)

    @property
    def trailing_shape(self) -> tuple[int, ...] | None:
        """The axes after `out`; None if the parts do not determine them."""
        if self.weight is not None:
            return self.weight.weight_shape[1:]
        return tail_of(self.module.kind, self.module.parts)

    @property
    def rank(self) -> int:
        """Upper bound of the rank."""
        most = min(self.shape)
        if self.is_dense:
            return most
        return min(most, product_rank(self.module.kind, self.module.parts))

    @property
    def is_dense(self) -> bool:
        """True unless it is a product with few columns."""
        return self.module.kind in ("oft", "full") or bool(magnitudes(self.module.parts))

    @property
    def is_product(self) -> bool:
        """True if `value` is a `Product`."""
        if self.module.kind == "loha":
            return not self.is_dense and self.rank < min(self.shape)
        return not self.is_dense and self.module.kind == "lora"

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        parts = (spec for part in self.module.parts.values() for spec in part.reads)
        others = (spec for other in self.others for spec in other.reads)
        weights = self.weight.reads if self.weight else ()
        return tuple(dict.fromkeys((*parts, *weights, *others)))

    def _parts(self, reader: TensorReader) -> dict[str, Tensor]:
        """The parts in float64."""
        return {role: part.value(reader).double() for role, part in self.module.parts.items()}

    @property
    def memory(self) -> int:
        """Bytes that computing its leading triplets takes at most."""
        parts = sum(math.prod(part.shape) for part in self.module.parts.values())
        others = max((other.memory for other in self.others), default=0)
        return 40 * (math.prod(self.shape) + parts) + others

    def value(self, reader: TensorReader) -> Product | Tensor:
        """The delta in float64: a product if its rank is low, else dense."""
        delta, parts, base = self._undecomposed(reader)
        if not (axes := magnitudes(self.module.parts)):
            return delta
        assert base is not None
        added = _dense(delta).reshape(base.shape)
        squares = [one._added_squares(reader) for one in self.others]
        return decomposed(added, parts[axes[0]], axes[0], base, sum(squares))

    def _undecomposed(
        self, reader: TensorReader
    ) -> tuple[Product | Tensor, dict[str, Tensor], Tensor | None]:
        """The delta without magnitudes, the parts, and the base's weight."""
        parts, base = self._parts(reader), None
        if self.weight is not None:
            base = self.weight.matrix(reader).double().reshape(self.weight.weight_shape)
        return BY_KIND[self.module.kind](parts, self.module.scale, base), parts, base

    def _added_squares(self, reader: TensorReader) -> Tensor:
        """Σ (W + delta)² over all outputs, for each input: (1, in, *1)."""
        delta, _, base = self._undecomposed(reader)
        assert base is not None
        return squares_of(base + _dense(delta).reshape(base.shape), "input_magnitude")

    def leading_triplets(
        self, reader: TensorReader, most: int, energy: float | None
    ) -> tuple[Svd, float]:
        """The leading singular triplets, and Σ s² of all; see `Delta`."""
        if self.module.kind == "lokr" and not self.is_dense:
            parts = self._parts(reader)
            return kronecker_svd(*_sides(parts), self.module.scale, most, energy)
        return super().leading_triplets(reader, most, energy)


def low_rank(parts: Values, scale: float, base: Tensor | None) -> Product:
    """scale · b @ a; with a core a[m, i, kernel] = Σ_n mid[m, n, kernel] a[n, i]."""
    a, b = parts["a"], parts["b"].flatten(1)
    if "mid" in parts:
        a = contract(parts["mid"], a)
    return Product(b * scale, a.flatten(1))


def hadamard_product(parts: Values, scale: float, base: Tensor | None) -> Product | Tensor:
    """scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), each with its core if it has one."""
    first, second = (
        _factors(parts[f"w{i}_a"], parts[f"w{i}_b"], parts.get(f"t{i}")) for i in (1, 2)
    )
    return hadamard(first, second, scale)


def kronecker_product(parts: Values, scale: float, base: Tensor | None) -> Tensor:
    """scale · w1 ⊗ w2, dense."""
    one, two = (
        side[0].flatten(1) if len(side) == 1 else torch.matmul(*_factors(*side))
        for side in _sides(parts)
    )
    return torch.kron(one.contiguous(), two.contiguous()) * scale


def rotation(parts: Values, scale: float, base: Tensor | None) -> Tensor:
    """rescale · R W - W: a rotation of the outputs, in blocks or in stages of a butterfly.

    A block is (I + Q)⁻¹ (I - Q) with one stage, (I + Q) (I - Q)⁻¹ in a butterfly. Q = B - Bᵀ is
    scaled down to the norm scale · out if it is larger, because alpha is the constraint.
    """
    assert base is not None
    q = parts["blocks"] - parts["blocks"].mT
    norm = float(torch.linalg.vector_norm(q))
    if 0 < scale * len(base) < norm:
        q = q * (scale * len(base) / norm)
    rows = base.flatten(1)
    if q.dim() == 3:
        blocks = rows.view(len(q), q.shape[-1], -1)
        added = (rotations.less_identity(q, None) @ blocks).view(rows.shape)
    else:
        added = butterfly(rotations.less_identity(-q.flatten(0, 1), None).view(q.shape), rows)
    if "rescale" not in parts:
        return added
    rescale = parts["rescale"].reshape(-1, 1)
    return rescale * added + (rescale - 1) * rows


def butterfly(
    stages: Tensor,  # (m, blocks, b, b): R - I of each
    rows: Tensor,  # (out, in)
) -> Tensor:
    """R_m ... R_1 W - W; stage i mixes rows that are 2^i · b / 2 apart."""
    result = rows
    half = stages.shape[-1] // 2
    for number, stage in enumerate(stages):
        stride = 2**number * half
        # rows as (group, 2, stride) in the order (group, stride, 2), cut into blocks of b
        mixed = result.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
        blocks = mixed.unflatten(0, (-1, stage.shape[-1]))
        mixed = (blocks + stage @ blocks).flatten(0, 1)
        result = mixed.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return result - rows


def difference(parts: Values, scale: float, base: Tensor | None) -> Tensor:
    """The stored difference."""
    return parts["diff"].flatten(1)


def decomposed(
    added: Tensor,  # (out, in, *kernel): the delta
    magnitude: Tensor,
    role: str,  # "magnitude" (out,) or "input_magnitude" (in,)
    base: Tensor,  # (out, in, *kernel)
    more: Tensor | float = 0.0,  # squares that the norms have besides
) -> Tensor:
    """m · (W + delta) / ‖W + delta‖ - W; norms of output rows, or of inputs over all outputs."""
    norm = (squares_of(base + added, role) + more).sqrt()
    ratio = magnitude.reshape(norm.shape) / norm
    return (base * (ratio - 1) + added * ratio).flatten(1)


def squares_of(weight: Tensor, role: str) -> Tensor:
    """Σ w² over all axes except that of the outputs, or of the inputs; axes kept."""
    over = tuple(axis for axis in range(weight.dim()) if axis != (role == "input_magnitude"))
    return weight.square().sum(over, keepdim=True)


def _dense(delta: Product | Tensor) -> Tensor:
    return delta.dense() if isinstance(delta, Product) else delta


def _sides(parts: Values) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of w1 and of w2: one, two, or two with a core."""

    def side(name: str, core: str) -> tuple[Tensor, ...]:
        if name in parts:
            return (parts[name],)
        names = (f"{name}_a", f"{name}_b", core)
        return tuple(parts[one] for one in names if one in parts)

    return side("w1", "t1"), side("w2", "t2")


def _factors(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (a, b.flatten(1)) if core is None else with_core(a, b, core)


BY_KIND: Mapping[str, Callable[[Values, float, Tensor | None], Product | Tensor]] = {
    "lora": low_rank,
    "loha": hadamard_product,
    "lokr": kronecker_product,
    "oft": rotation,
    "full": difference,
}


@dataclass(frozen=True)
class Fit:
    """b @ a, the best approximation of a delta with this rank; a and b have equal norms."""

    name: str  # the module's, for the receipt
    delta: Delta
    trailing_shape: tuple[int, ...]  # the weight's axes after `out`
    rank: int  # at most the delta's

    def factors(self, reader: Reader) -> "FitResult":
        """a (rank, *tail) and b (out, rank, *1) in float64, ‖delta‖ and ‖delta - b @ a‖."""
        decomposition = weighted.Decomposition(
            *self.delta.leading_triplets(reader, self.rank, None)
        )
        a, b = decomposition.factors(self.rank)
        total, lost = decomposition.total, 0.0
        if self.rank < min(
            self.delta.rank, *self.delta.shape
        ):  # else all singular values are there
            lost = total - float(decomposition.svd.s[: self.rank].double().square().sum())
        a, b = a.reshape(self.shape("a")), b.reshape(self.shape("b"))
        return FitResult({"a": a, "b": b}, total**0.5, max(lost, 0.0) ** 0.5)

    def shape(self, role: str) -> tuple[int, ...]:
        ones = (1,) * (len(self.trailing_shape) - 1)
        return (
            (self.rank, *self.trailing_shape)
            if role == "a"
            else (self.delta.shape[0], self.rank, *ones)
        )

    @property
    def parts(self) -> dict[str, Expression]:
        """Its factors as expressions."""
        return {
            role: Fitted(shape=self.shape(role), dtype="F32", fit=self, role=role) for role in "ab"
        }


class FitResult(NamedTuple):
    """The factors of a fit, and its error."""

    parts: Mapping[str, Tensor]  # a, b
    norm: float
    lost: float


@dataclass(frozen=True)
class FitReader:
    """Reads stored tensors, and computes each fit once."""

    reader: Reader
    fits: dict[int, FitResult] = field(default_factory=dict)

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.reader.view(None).tensor(spec)

    def factors(self, fit: Fit) -> FitResult:
        if id(fit) not in self.fits:
            self.fits[id(fit)] = fit.factors(self.reader)
        return self.fits[id(fit)]


@dataclass(frozen=True, kw_only=True)
class Fitted(Expression):
    """One factor of a fit, in float64 until it is written."""

    fit: Fit
    role: str  # a or b

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.fit.delta.reads

    @property
    def known_early(self) -> bool:
        return False

    def value(self, reader: TensorReader) -> Tensor:
        assert isinstance(reader, FitReader)
        return reader.factors(self.fit).parts[self.role]
