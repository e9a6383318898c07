"""Rows of an output, computed again from its inputs in float64 and held against what was written.

Floats must be the rounded exact value, codes and scales what their format's encoder gives for it. Where the exact value lies so
near to a boundary that float32 arithmetic may have put it on the other side, either is right.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.engines.local import Inputs, rounded
from adapterkit.errors import shown
from adapterkit.ops.requantised import Copied, Edited, Requantised
from adapterkit.plan import Plan, Shard, Step
from adapterkit.weights.packed import Packed, read_back

CHUNK = 1 << 18  # elements that are float64 at a time
SLACK = 2.0**-20  # of a row's largest magnitude: what float32 arithmetic may be wrong by


class Check(NamedTuple):
    """What came of one tensor: how many rows were recomputed, and the first value that is wrong."""

    rows: int
    wrong: str | None = None


def changed(plan: Plan) -> Iterator["Floats | Codes"]:
    """A check of every tensor that a plan does not copy."""
    for shard in plan.shards:
        if isinstance(shard, Shard):
            yield from (Floats(step) for step in shard.steps if not step.copied)
            continue
        for bundle in shard.bundles:
            if isinstance(bundle, Edited):
                yield Floats(bundle.step)
            elif isinstance(bundle, Requantised):
                yield Codes(bundle.step, bundle.packed)
            elif not isinstance(bundle, Copied):
                raise TypeError(f"{shown(bundle.name)}: no check of a {type(bundle).__name__}")


@dataclass(frozen=True)
class Floats:
    """A tensor of floats: its first row, the last, and one between."""

    step: Step
    expected = "W + Σ weight·scale·b@a, rounded"

    def run(self, inputs: Inputs, written: Inputs, specs: dict[str, TensorSpec]) -> Check:
        """`inputs`: the plan's, in float64; `written`: the output's; `specs`: its tensors by key."""
        step, origin = self.step, _Origin(self.step, inputs)
        sample = sorted({0, origin.height // 2, origin.height - 1}) if math.prod(step.shape) else []
        for row in sample:
            exact = origin.edited(row, row + 1)
            found = written.rows(specs[step.key], (origin.height, origin.width), row, row + 1)
            # rounding never swaps two values, whatever it draws: what float32 may have made of the exact one lies between these two
            slack, position = exact.abs().amax() * SLACK, row * origin.width
            low, high = (rounded(exact + by, step, position).double() for by in (-slack, slack))
            bad = ~((low <= found) & (found <= high))
            if bool(bad.any()):
                return Check(len(sample), _difference(bad, found, rounded(exact, step, position), row))
        return Check(len(sample))


@dataclass(frozen=True)
class Codes:
    """A weight in a quantised format: all of it, as its scales may depend on all of it."""

    step: Step
    packed: Packed
    expected = "W + Σ weight·scale·b@a, encoded"

    def run(self, inputs: Inputs, written: Inputs, specs: dict[str, TensorSpec]) -> Check:
        """`inputs`: the plan's, in float64; `written`: the output's; `specs`: its tensors by key."""
        packed, origin = self.packed, _Origin(self.step, inputs)
        before = origin.parts
        after = {part.key: written.stored(specs[part.key]) for part in packed.parts}
        exact, slack = torch.empty(origin.height, origin.width), torch.empty(origin.height, 1)
        for first in range(0, origin.height, origin.chunk):
            block = origin.edited(first, min(first + origin.chunk, origin.height))
            exact[first : first + len(block)] = block
            slack[first : first + len(block)] = block.abs().amax(1, keepdim=True) * SLACK
        found = read_back(packed, after).view(exact.shape)
        if torch.equal(found, origin.decoded) and bool(((exact - found).abs() <= slack).all()):
            return Check(origin.height)  # what does not change keeps its bytes
        wanted = self._encoded(exact, before)
        other = [key for key, part in wanted.items() if part is before[key] and not torch.equal(part, after[key])]
        if other:
            return Check(origin.height, f"{shown(other[0])} is not the base's, though it does not depend on the weight's values")
        value = read_back(packed, wanted).view(exact.shape)
        low, high = value - slack, value + slack
        bad = ~((low <= found) & (found <= high))
        if bool(bad.any()):  # of codes near a boundary: an encoder never swaps two values either
            for by in (-slack, slack):
                beside = read_back(packed, self._encoded(exact + by, before)).view(exact.shape)
                low, high = torch.minimum(low, beside - slack), torch.maximum(high, beside + slack)
            bad = ~((low <= found) & (found <= high))
        return Check(origin.height, _difference(bad, found, value, 0) if bool(bad.any()) else None)

    def _encoded(self, weight: Tensor, before: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.packed.renewed(before, weight.view(self.packed.shape), self.step.draws)


def _difference(bad: Tensor, found: Tensor, wanted: Tensor, row: int) -> str:
    """The first of the bad values; `row`: of the first row in the tensor."""
    at, column = divmod(int(bad.flatten().nonzero()[0]), bad.shape[1])
    return f"row {row + at}, column {column}: {float(found[at, column])!r}, not {float(wanted[at, column])!r}"


class _Origin:
    """The rows that a step starts from, in float64, and through its edits, which read them while they load."""

    dtype = torch.float64

    def __init__(self, step: Step, inputs: Inputs):
        self.step, self.inputs, self.device = step, inputs, inputs.device
        shape = step.shape or (1,)
        self.height, self.width = step.grid if step.edits else (math.prod(shape[:-1]), shape[-1])
        self.chunk = max(1, CHUNK // max(self.width, 1))

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """What holds a packed weight, by key."""
        assert isinstance(self.step.source, Packed)
        return {part.key: self.inputs.stored(part) for part in self.step.source.parts}

    @cached_property
    def decoded(self) -> Tensor:  # (height, width) float32
        assert isinstance(self.step.source, Packed)
        return read_back(self.step.source, self.parts, do="download the checkpoint again").view(self.height, self.width)

    def rows(self, first: int, last: int) -> Tensor:
        if isinstance(self.step.source, Packed):
            return self.decoded[first:last].double()
        return self.inputs.rows(self.step.source, (self.height, self.width), first, last)

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.inputs.tensor(spec)

    def stored(self, spec: TensorSpec) -> Tensor:
        return self.inputs.stored(spec)

    def kept(self, spec: TensorSpec, cut: Callable[[Tensor], Tensor]) -> Tensor:
        return self.inputs.kept(spec, cut)

    def blocks(self, source: TensorSpec, grid: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.height, self.chunk):
            yield first, self.rows(first, min(first + self.chunk, self.height))

    @cached_property
    def edits(self):
        return [edit.load(self, self.step.source, (self.height, self.width)) for edit in self.step.edits]

    def edited(self, first: int, last: int) -> Tensor:
        rows = self.rows(first, last)
        for edit in self.edits:
            edit.apply(rows, first)
        return rows
