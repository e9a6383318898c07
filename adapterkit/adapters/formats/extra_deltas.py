"""Deltas that are not standard LoRA factors, in a converted adapter: a second file stores their
tensors, and its metadata describe them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.task import ConvertedTensor

MODULES = "modules"  # in its metadata: JSON


@dataclass(frozen=True)
class AddedDelta:
    """A delta for some rows of a parameter of the base."""

    module: AdapterModule  # its name is the base's
    leaves: tuple[str, ...]  # possible names of the parameter; the first existing one counts
    rows: range | None = None  # of the parameter; None: all


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
