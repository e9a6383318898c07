"""diff: what two checkpoints, or two adapters, do not have in common. Read by blocks of rows;
nothing large is held whole."""

import math
from collections.abc import Sequence
from typing import Any

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.options import StrPath, checked
from adapterkit.plan import Progress
from adapterkit.planning.converted import adapter_or_file, components_of
from adapterkit.planning.sources import open_source
from adapterkit.reports.compare import ADAPTER_ENERGY, ENERGY, measure
from adapterkit.reports.matching import (
    Matches,
    are_adapters,
    match_adapters,
    match_checkpoints,
    match_components,
)
from adapterkit.reports.pairs import STATES, Result

VERSION = 1


@checked()
def diff(
    a: StrPath,
    b: StrPath,
    *,
    tolerance: float = 0.0,
    rank_for_energy: float | None = None,
    progress: Progress = lambda done: None,
) -> dict[str, Any]:
    """Compare two checkpoints, two adapters or two .safetensors files, by key or by module; returns
    what `--json` prints. Modules of a pipeline's adapters have their component's name in front.

    - `diff`: 1, the version of this document; `kind`: "checkpoints" or "adapters"; `a`, `b`: the
      sources' names and origins
    - `same`: nothing differs by more than `tolerance`, a relative Frobenius error per tensor or
      module, nor a setting that decides
    - `totals`: `compared` and of them `identical` (the same bytes), `equal` (the same values: -0
      and 0, kinds of NaN), `rounded` (one side is the other rounded to its dtype, or a delta
      differs by what float64 arithmetic leaves), `within` the tolerance, `changed`; then `added`
      and `removed`
    - `change`: `norm` ‖A−B‖ and `relative` ‖A−B‖/‖A‖ over all values that differ and were compared
      as numbers, together; null where there are none, or one is not finite
    - `changed`: a list, in A's file order, of `name`, `kind` ("tensor"; in adapters "delta",
      "magnitude", "bias", "replaced", "rows"), `why` ("values", "dtype", "shape"; "rows" where
      `rows_only_a` or `rows_only_b` trained token rows have no partner), `a` and `b` (`dtype` and
      `shape`, or `rank`, `scale`, `shape` and `experts`), and if they can be compared
      `relative_error` ‖A−B‖/‖A‖, `max_abs`, `cosine`, `differing` (the share of elements), `norm`
      ‖A‖, `rank`: {`energy`, `needed`: the smallest rank that keeps this share of ‖A−B‖², null if
      it is above `above`, `estimate`: from a sketch, then never too small}. A number that is not
      finite, or not measured, is null. Integers and fp8 are compared as bytes; where one side alone
      is quantized, its weights are compared as they decode to float32, `dtype` being the format
    - `added`, `removed`: what only B, only A has; `notes`: texts
    - `config`: the settings of config.json, or of adapter_config.json, that differ: `name` (dotted
      inside sub-configs), `change` ("added", "removed", "changed"), `a`, `b` (null too where there
      is none) and `decides`: whether it counts as a difference, whatever the tolerance. Of models
      all count but dtypes (rounded copies are the same), dropouts, initializers and labels; who
      saved the file, and caches and outputs of a run, are not compared. Where transformers knows
      the model, its defaults stand for what one file leaves out. Of adapters those count whose
      effect is not in the deltas (`target_parameters`, `layer_replication`, `ensure_weight_tying`,
      an init that changed the base); rank, alpha and the like count by what they do

    `rank_for_energy` is 0.9 for checkpoints and 0.99 for adapters; 0 suggests no rank. A stack of
    experts (three axes, "expert" in its key) gets one rank for all of them. Raises `Refused` for
    two things that cannot be compared, and for adapters of other types than LoRA: resize makes LoRA
    of them (with their base: without it the flattened kernel of a LoHa or LoKr looks linear).
    """
    sources = open_source(a), open_source(b)
    folders = (adapter_or_file(sources[0]), adapter_or_file(sources[1]))
    matches, read = _match(sources, folders)
    adapters = matches.are_adapters
    default = ADAPTER_ENERGY if adapters else ENERGY
    results = measure(
        matches, read, default if rank_for_energy is None else rank_for_energy, progress
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
