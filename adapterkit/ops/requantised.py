"""What becomes of the tensors of a quantised checkpoint: copied, decoded and edited, or decoded, edited and encoded again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.header import Header, TensorSpec
from adapterkit.checkpoint.layout import Stored, grouped, like_base
from adapterkit.engines.local import rounded
from adapterkit.errors import shown
from adapterkit.ops.sizes import short
from adapterkit.plan import Bundle, Computed, Inputs, Made, Shard, Step
from adapterkit.weights.packed import Packed, read_back

ROWS = 1 << 18  # elements of a weight that are worked on at a time
LOST = 0.5  # a share of the delta below which a merge is warned of


@dataclass(frozen=True)
class Copied:
    """One stored tensor, byte for byte."""

    source: TensorSpec
    copied = True  # the plan counts it so

    @property
    def name(self) -> str:
        return self.source.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def most(self) -> tuple[Stored, ...]:
        return (Stored(self.source.key, self.source.dtype, self.source.shape),)

    @property
    def memory(self) -> int:
        return 0

    def make(self, inputs: Inputs) -> Made:
        return Made({self.source.key: self.source}, {})


@dataclass(frozen=True)
class Edited:
    """One float tensor: a step's source, decoded if it is packed, through its edits, rounded once."""

    step: Step

    @property
    def name(self) -> str:
        return self.step.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*stored_parts(self.step.source), *(spec for edit in self.step.edits for spec in edit.reads))

    @property
    def most(self) -> tuple[Stored, ...]:
        return (Stored(self.step.key, self.step.dtype, self.step.shape),)

    @property
    def memory(self) -> int:
        return _memory(self.step, 8)

    def make(self, inputs: Inputs) -> Made:
        weight = inputs.tensor(self.step.source)
        facts: dict[str, Any] = {}
        if self.step.edits:
            weight, facts = _edited(self.step, weight, inputs)
        return Made({self.step.key: rounded(weight, self.step).view(self.step.shape)}, facts)


@dataclass(frozen=True)
class Requantised:
    """One packed weight with edits: decoded, changed in float32, encoded once."""

    step: Step
    packed: Packed

    @property
    def name(self) -> str:
        return self.step.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.packed.parts, *(spec for edit in self.step.edits for spec in edit.reads))

    @property
    def most(self) -> tuple[Stored, ...]:
        return self.packed.most

    @property
    def varies(self) -> tuple[str, ...]:
        return self.packed.varies

    @property
    def memory(self) -> int:
        return _memory(self.step, 20)

    def make(self, inputs: Inputs) -> Made:
        parts = {part.key: part for part in self.packed.parts}
        stored = {key: inputs.stored(part) for key, part in parts.items()}
        before = read_back(self.packed, stored, do="download the checkpoint again")
        after, facts = _edited(self.step, before.clone(), inputs)
        if torch.equal(after, before):
            return Made(parts, facts | {"survived": 1.0})
        tensors = self.packed.renewed(stored, after, self.step.draws)
        facts |= survival(before, after, read_back(self.packed, tensors))
        return Made(tensors, facts)


def survival(before: Tensor, after: Tensor, stored: Tensor) -> dict[str, float]:
    """What a change comes to once it is stored: `survived` ⟨stored - before, Δ⟩ / ‖Δ‖², 1 if it is all there, 0 if nothing moved;
    `requantisation` ‖stored - after‖ / ‖Δ‖, the noise beside it. Δ = after - before."""
    inner = squares = noise = 0.0
    for x, y, z in zip(*(part.reshape(-1).split(ROWS) for part in (before, after, stored)), strict=True):
        delta = y - x
        inner, squares = inner + float(torch.dot(z - x, delta)), squares + float(torch.dot(delta, delta))
        noise += float((z - y).square().sum())
    if not squares:
        return {"survived": 1.0}
    return {"survived": short(inner / squares), "requantisation": short((noise / squares) ** 0.5)}


def lost(facts: dict[str, dict]) -> list[str]:
    """A warning where requantisation swallowed most of what was merged."""
    shares = {key: fact["survived"] for key, fact in facts.items() if "survived" in fact and "rounding" not in fact}
    bad = sorted((share, key) for key, share in shares.items() if share < LOST)
    if not bad:
        return []
    share, key = bad[0]
    return [
        f"WARNING: in {len(bad)} of {len(shares)} modules less than half of the change survived requantisation (least: {share:.0%} "
        f"of {shown(key)}): give --rounding stochastic, or merge with --dequantize, or into the 16-bit original with --base16"
    ]


def stored_parts(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """The stored tensors that hold a tensor."""
    return spec.parts if isinstance(spec, Packed) else (spec,)


def shard_of(name: str, steps: Sequence[Step], header: Header, keep: bool) -> Shard | Computed:
    """One output file of these steps, packed weights in their format (`keep`) or as floats; streamed where nothing is decoded."""
    if keep and not any(isinstance(step.source, Packed) and step.edits for step in steps):
        plain = [part for step in steps for part in _parts(step)]
        by_key = {step.key: step for step in plain}
        order = {spec.key: spec.start for spec in header.tensors}
        plain.sort(key=lambda step: order.get(step.key, header.tensors[-1].stop))
        layout = like_base(name, [Stored(step.key, step.dtype, step.shape) for step in plain], header)
        return Shard(layout, tuple(by_key[stored.key] for stored in layout.tensors))
    bundles = sorted((bundle for step in steps for bundle in _bundles(step, keep)), key=lambda bundle: bundle.name)
    metadata = header.metadata if keep else {"format": header.metadata.get("format", "pt")}  # torchao says there what tensors are
    return Computed(name, tuple(bundles), metadata or {"format": "pt"}, by_width=True)


def shards_of_size(steps: Sequence[Step], limit: int) -> tuple[Computed, ...]:
    """Files of at most `limit` bytes of these steps, packed weights as floats."""
    bundles = [bundle for step in steps for bundle in _bundles(step, keep=False)]
    files = grouped(bundles, [sum(stored.nbytes for stored in bundle.most) for bundle in bundles], limit)
    return tuple(Computed(name, tuple(group), by_width=True) for name, group in files.items())


def _parts(step: Step) -> list[Step]:
    if not isinstance(step.source, Packed):
        return [step]
    return [Step(part.key, part.dtype, part.shape, part) for part in step.source.parts]


def _bundles(step: Step, keep: bool) -> list[Bundle]:
    packed = step.source
    if not isinstance(packed, Packed):
        return [Copied(packed)] if step.copied and step.key == packed.key else [Edited(step)]
    if not keep:
        return [Edited(step)]
    if step.edits:
        return [Requantised(step, packed)]
    return [Copied(part) for part in packed.parts]


def _memory(step: Step, bytes_each: int) -> int:
    return bytes_each * math.prod(step.shape) + 4 * sum(spec.nbytes for edit in step.edits for spec in edit.reads)


def _edited(step: Step, weight: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Any]]:
    """The weight (float32, changed in place) after the step's edits, and what was added to it."""
    rows, columns = step.grid
    grid = weight.reshape(rows, columns)
    edits = [edit.load(_Held(inputs, grid), step.source, step.grid) for edit in step.edits]
    size = float(grid.norm())
    for first in range(0, rows, max(1, ROWS // max(columns, 1))):
        block = grid[first : first + max(1, ROWS // max(columns, 1))]
        for edit in edits:
            edit.apply(block, first)
    norms = [edit.delta_norm for edit in edits if edit.delta_norm is not None]
    facts: dict[str, Any] = {"adapters": list(step.adapters)} if step.adapters else {}
    if norms and size:
        facts["delta"] = short(math.hypot(*norms) / size)
    return grid.view(weight.shape), facts


class _Held:
    """What an edit reads while it loads, the weight that is edited being at hand."""

    dtype = torch.float32

    def __init__(self, inputs: Inputs, grid: Tensor):
        self.inputs, self.grid, self.device = inputs, grid, grid.device

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.inputs.tensor(spec)

    def blocks(self, source: TensorSpec, grid: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        step = max(1, ROWS // max(grid[1], 1))
        for first in range(0, grid[0], step):
            yield first, self.grid[first : first + step].clone()
