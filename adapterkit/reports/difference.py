"""diff: what two checkpoints, or two adapters, do not have in common. Read by blocks of rows;
nothing large is held whole."""

import math
from collections.abc import Sequence
from typing import Any

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.planning.inputs.converted_adapter import adapter_or_file, components_of
from adapterkit.planning.inputs.sources import open_source
from adapterkit.reports.compare import ADAPTER_ENERGY, ENERGY, measure
from adapterkit.reports.matching import (
    Matches,
    are_adapters,
    match_adapters,
    match_checkpoints,
    match_components,
)
from adapterkit.reports.pairs import STATES, Result
from adapterkit.verbs.diff import Diff

VERSION = 1


def compare_sources(diff: Diff) -> dict[str, Any]:
    """What `diff` says of two sources."""
    tolerance, rank_for_energy = diff.tolerance, diff.rank_for_energy
    sources = open_source(diff.a), open_source(diff.b)
    folders = (adapter_or_file(sources[0]), adapter_or_file(sources[1]))
    matches, read = _match(sources, folders)
    adapters = matches.are_adapters
    default = ADAPTER_ENERGY if adapters else ENERGY
    results = measure(
        matches, read, default if rank_for_energy is None else rank_for_energy, diff.progress
    )
    for result in results:
        error = result.row.get("relative_error")
        if (
            result.row.get("why") == "values"
            and error is not None
            and tolerance > 0
            and error <= tolerance
        ):
            result.state = "within"
    states = [result.state for result in results]
    totals = {"compared": len(results)} | {state: states.count(state) for state in STATES}
    differs = (
        states.count("changed")
        or matches.added
        or matches.removed
        or any(row["decides"] for row in matches.config)
    )
    return {
        "diff": VERSION,
        "kind": "adapters" if adapters else "checkpoints",
        "a": folders[0].origin,
        "b": folders[1].origin,
        "tolerance": tolerance,
        "same": not differs,
        "totals": totals | {"added": len(matches.added), "removed": len(matches.removed)},
        "change": _whole_change(results),
        "changed": [result.row for result in results if result.state == "changed"],
        "added": matches.added,
        "removed": matches.removed,
        "config": matches.config,
        "notes": matches.notes,
    }


def _match(
    sources: tuple[Folder, Folder], folders: tuple[Folder, Folder]
) -> tuple[Matches, Sequence[Folder]]:
    """What is compared, and the folders of its tensors."""
    if not all(CONFIG in folder.files() for folder in folders):
        sides = [components_of(source) for source in sources]
        if all(sides):
            return match_components(sides)
    matched = match_adapters if are_adapters(folders) else match_checkpoints
    return matched(folders), folders


def _whole_change(results: list["Result"]) -> dict[str, float | None]:
    """Norms of the whole difference."""
    measured = [result.squares for result in results if result.squares is not None]
    error, norm = (
        (math.sqrt(sum(values)) for values in zip(*measured, strict=True))
        if measured
        else (0.0, 0.0)
    )
    good = bool(measured) and math.isfinite(error)
    return {
        "norm": error if good else None,
        "relative": error / norm if good and norm > 0 and math.isfinite(norm) else None,
    }
