"""Merge deltas that are not standard LoRA factors: from the second file of a converted adapter to
an edit of a stored tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from adapterkit.adapters.formats.capabilities import depends_on_base
from adapterkit.adapters.formats.extra_deltas import MODULES, AddedDelta
from adapterkit.adapters.formats.modules.deltas import ModuleDelta
from adapterkit.adapters.formats.modules.parts import magnitudes, matrix_shape
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule
from adapterkit.adapters.formats.modules.tensors import from_spec
from adapterkit.adapters.kinds.merging import only_whole, read_rows
from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.planned_folder import check_added_deltas
from adapterkit.core.errors import Problems
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.merge.job import MergeState
from adapterkit.core.plan import Loaded, RowEdit
from adapterkit.core.tasks.edits import Band
from adapterkit.core.weights.parameters import Parameter, StoredParameter
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels import rows as kernel
from adapterkit.kernels.lowrank.algebra import Product


@dataclass(frozen=True)
class MergedDelta(AddedDelta):
    """Such a delta for a merge."""

    @property
    def target(self) -> str:
        """The base's module."""
        return self.module.name

    def add_to(self, state: MergeState, adapter: Adapter) -> None:
        """Add this delta to a merge's changes, or the reason why it cannot be added to its errors.
        Raises `Refused` for weights of its directions."""
        module = self.module.name
        weight = state.weight(adapter, module)
        if not state.changes_module(adapter, module):
            state.skip(adapter, module)
            return
        names = [f"{module}.{leaf}" if leaf else module for leaf in self.leaves]
        parameter = next(filter(None, map(state.names.parameter, names)), None)
        if parameter is None:
            state.errors.append(state.unknown_error(adapter, self.module.path, names[0]))
            return
        placed = self.on(parameter, state.base.tensors)
        if placed is None:
            shapes = [part.shape for part in self.module.parts.values()]
            state.errors.append(state.shape_error(adapter, module, shapes, parameter.shape))
            return
        if placed.needs_base and weight != 1.0:
            state.errors.append(only_whole(adapter, self.module.kind, module, weight))
            return
        change = state.change(parameter)
        change.deltas.append((placed, weight))
        change.weights[adapter.number] = weight
        change.adapters.append(adapter.name)

    def on(self, parameter: Parameter, tensors: Mapping[str, TensorSpec]) -> PlacedDelta | None:
        """This delta on that parameter, stored in these tensors; None if it does not fit."""
        rows = self.rows or range(parameter.shape[0])
        out, inputs = matrix_shape(self.module.kind, self.module.parts)
        fits = out == len(rows) and inputs in (math.prod(parameter.shape[1:]), 0)  # 0: any
        if not (fits and parameter.is_full_tensor):
            return None
        weight = None
        if depends_on_base(self.module):
            weight = StoredParameter.of(parameter, tensors).rows(rows.start, rows.stop)
        return PlacedDelta(ModuleDelta(self.module, weight), rows)


@dataclass(frozen=True)
class PlacedDelta:
    """A delta, and the rows of a parameter that it is added to."""

    delta: ModuleDelta
    rows: range

    @property
    def folders(self) -> list[int]:
        """The number of the adapter that has it."""
        parts = self.delta.module.parts.values()
        return [next(spec.folder for part in parts for spec in part.reads)]

    @property
    def kind(self) -> str:
        """Its name in messages."""
        return "DoRA" if magnitudes(self.delta.module.parts) else self.delta.module.kind.upper()

    @property
    def needs_base(self) -> bool:
        """True if it depends on the base's weight."""
        return self.delta.weight is not None

    def edit(self, weight: float) -> AddDelta:
        """The edit of the stored tensor."""
        return AddDelta(self.delta, weight, Band(self.rows.start, self.rows.stop))


@dataclass(frozen=True, slots=True)
class AddDelta(RowEdit):
    """w += scale * delta, of any kind that does not depend on w, on these rows of the grid."""

    delta: ModuleDelta
    scale: float
    rows: Band

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.delta.reads

    @property
    def is_dense(self) -> bool:
        return not self.delta.is_product

    @property
    def memory(self) -> int:
        return self.delta.memory if self.is_dense else 40 * self.delta.rank * sum(self.delta.shape)

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        value = self.delta.value(inputs.view(None))  # float64
        dtype = inputs.dtype
        if isinstance(value, Product):
            left, right = (value.left * self.scale).to(dtype), value.right.to(dtype)
            add = lambda part, here: kernel.add_low_rank(part, left[here], right)
            norm = kernel.low_rank_norm(left, right)
        else:
            dense = (value.reshape(-1, grid[1]) * self.scale).to(dtype)
            add = lambda part, here: part.add_(dense[here])
            norm = float(torch.linalg.vector_norm(dense.double()))

        def apply(w: Tensor, first: int) -> None:
            for part, here in self.rows.overlap(w, first):
                add(part, here)

        return Loaded(apply, norm)


def with_others(
    adapter: Adapter, scan: Checkpoint, is_typed: bool
) -> tuple[Adapter, Checkpoint, bool]:
    """A scanned adapter with its changes that are no factors: those in its second file, or all of a
    type that a merge reads. `Refused` with all problems of such a type."""
    other = read_rows(adapter.folder, adapter.number, scan.config)
    if other is not None:
        return other, replace(scan, errors=Problems()), True
    if ADDED_DELTAS in adapter.folder.files():
        deltas = tuple(added_deltas(adapter.folder, adapter.number))
        adapter = replace(adapter, others=deltas)
    return adapter, scan, is_typed


def added_deltas(folder: Folder, number: int) -> Iterator[MergedDelta]:
    """The deltas in the extra file of an adapter, the job's input `number`."""
    check_added_deltas(folder)
    header = read_header(folder, ADDED_DELTAS, number)
    parts: dict[str, dict] = {}
    for spec in header.tensors:
        place, _, role = spec.key.partition(".")
        parts.setdefault(place, {})[role] = from_spec(spec)
    for place, record in enumerate(json.loads(header.metadata[MODULES])):
        own = AdapterModule(
            LANGUAGE,
            record["name"],
            record["kind"],
            parts[str(place)],
            record["alpha"],
            record["rank"],
        )
        rows = None if record["rows"] is None else range(*record["rows"])
        yield MergedDelta(own, tuple(record["leaves"]), rows)
