"""Deltas that are not standard LoRA factors, in a converted adapter: a second file stores their
tensors, and its metadata describe them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapterkit.adapters.formats.capabilities import depends_on_base
from adapterkit.adapters.formats.modules.deltas import ModuleDelta
from adapterkit.adapters.formats.modules.parts import matrix_shape
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule
from adapterkit.adapters.formats.modules.tensors import from_spec
from adapterkit.adapters.formats.task import ConvertedTensor
from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.engine.planned_folder import check_added_deltas
from adapterkit.core.weights.parameters import Parameter, StoredParameter

MODULES = "modules"  # in its metadata: JSON


@dataclass(frozen=True)
class AddedDelta:
    """A delta for some rows of a parameter of the base."""

    module: AdapterModule  # its name is the base's
    leaves: tuple[str, ...]  # possible names of the parameter; the first existing one counts
    rows: range | None = None  # of the parameter; None: all

    def on(self, parameter: Parameter, tensors: Mapping[str, TensorSpec]) -> "PlacedDelta | None":
        """This delta on that parameter, stored in these tensors; None if it does not fit."""
        rows = self.rows or range(parameter.shape[0])
        out, inputs = matrix_shape(self.module.kind, self.module.parts)
        fits = out == len(rows) and inputs in (math.prod(parameter.shape[1:]), 0)  # 0: any
        if not (fits and parameter.is_whole):
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
    def folder(self) -> int:
        """The number of the adapter that has it."""
        return next(spec.folder for part in self.delta.module.parts.values() for spec in part.reads)

    @property
    def needs_base(self) -> bool:
        """True if it depends on the base's weight."""
        return self.delta.weight is not None


def written(deltas: Sequence[AddedDelta]) -> tuple[list[ConvertedTensor], dict[str, str]]:
    """The tensors and metadata of the file."""
    tensors, records = [], []
    for number, added in enumerate(deltas):
        module = added.module
        records.append(
            {
                "name": module.name,
                "kind": module.kind,
                "alpha": module.alpha,
                "rank": module.rank,
                "leaves": added.leaves,
                "rows": None if added.rows is None else (added.rows.start, added.rows.stop),
            }
        )
        tensors += [
            ConvertedTensor(f"{number}.{role}", part, part.dtype, module.path)
            for role, part in module.parts.items()
        ]
    return tensors, {MODULES: json.dumps(records)}


def added_deltas(folder: Folder, number: int) -> Iterator[AddedDelta]:
    """The deltas in the extra file of an adapter, the job's input `number`; or none."""
    check_added_deltas(folder)
    if ADDED_DELTAS not in folder.files():
        return
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
        yield AddedDelta(own, tuple(record["leaves"]), rows)
