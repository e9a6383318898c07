"""Tasks that every verb uses: a tensor taken over byte for byte, a sum of tensors."""

import math
from dataclasses import dataclass

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.adapters.keys import canonical
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.plan import TaskResult
from adapterkit.weights.reader import Reader

BLOCK = 1 << 20  # elements that are summed at a time


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an input, byte for byte."""

    source: TensorSpec
    key: str
    prefix: str = ""  # of its name in the receipt

    @property
    def name(self) -> str:
        return self.prefix + self.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, self.source.dtype, self.source.shape),)

    @property
    def memory(self) -> int:
        return 2 * self.source.nbytes

    def compute(self, inputs: Reader) -> TaskResult:
        import torch

        data, dtype = inputs.bytes(self.source), dtypes.torch_dtype(self.source.dtype)
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return TaskResult({self.key: tensor.view(self.source.shape)}, {"taken": True})


def taken(source: TensorSpec, prefix: str = "") -> AdapterTensor:
    """A tensor of an adapter, under PEFT's own key for it."""
    return AdapterTensor(source, canonical(source.key), prefix)


@dataclass(frozen=True)
class SummedTensor:
    """One tensor that is a sum of others: Σ scale · value, in float64, rounded once. Biases of b are, and averages of trained
    values."""

    name: str
    key: str
    terms: tuple[tuple[TensorSpec, float], ...]  # none: zeros
    dtype: str
    shape: tuple[int, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec, _ in self.terms)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, self.dtype, self.shape),)

    @property
    def memory(self) -> int:
        return 12 * sum(math.prod(spec.shape) for spec in self.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        import torch

        values = [(inputs.tensor(spec).view(-1), scale) for spec, scale in self.terms]
        out = torch.empty(self.shape, dtype=dtypes.torch_dtype(self.dtype))
        for first in range(0, out.numel(), BLOCK):
            here = slice(first, first + BLOCK)
            out.view(-1)[here] = sum(value[here].double() * scale for value, scale in values)
        return TaskResult({self.key: out}, {})


def bounds(place: Place, rank: int, dtype: str) -> tuple[Stored, ...]:
    """What a module's factors take at most."""
    a, b = place.shapes(rank)
    return Stored(place.a_key, dtype, a), Stored(place.b_key, dtype, b)


def short(value: float) -> float:
    """Rounded to six significant digits."""
    return float(f"{value:.6g}")
