"""Plain factors of a delta of another kind, as expressions: computed when the output is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from adapterkit.adapters.kinds.common import Delta
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.formats.modules.tensors import Expression
from adapterkit.kernels.lowrank.weighted import Decomposition
from adapterkit.weights.reader import Reader, TensorReader


@dataclass(frozen=True)
class Fit:
    """b @ a, the best approximation of a delta of that rank, the norms of both alike."""

    name: str  # the module's, for the receipt
    delta: Delta
    tail: tuple[int, ...]  # the weight's axes after `out`
    rank: int  # at most the delta's

    def factors(self, reader: Reader) -> "FitResult":
        """a (rank, *tail) and b (out, rank, *1) in float64, ‖delta‖ and ‖delta - b @ a‖."""
        decomposition = Decomposition(*self.delta.leading_triplets(reader, self.rank, None))
        a, b = decomposition.factors(self.rank)
        total, lost = decomposition.total, 0.0
        if self.rank < min(
            self.delta.rank, *self.delta.shape
        ):  # else all singular values are there
            lost = total - float(decomposition.svd.s[: self.rank].double().square().sum())
        a, b = a.reshape(self.shape("a")), b.reshape(self.shape("b"))
        return FitResult({"a": a, "b": b}, total**0.5, max(lost, 0.0) ** 0.5)

    def shape(self, role: str) -> tuple[int, ...]:
        ones = (1,) * (len(self.tail) - 1)
        return (self.rank, *self.tail) if role == "a" else (self.delta.shape[0], self.rank, *ones)

    @property
    def parts(self) -> dict[str, Expression]:
        """Its factors as expressions."""
        return {
            role: Fitted(shape=self.shape(role), dtype="F32", fit=self, role=role) for role in "ab"
        }


class FitResult(NamedTuple):
    """What a fit gives."""

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


def fits_of(expression: Expression) -> list[Fit]:
    """The fits whose factors an expression is made of, each once."""
    fits = {id(one.fit): one.fit for one in expression if isinstance(one, Fitted)}
    return list(fits.values())
