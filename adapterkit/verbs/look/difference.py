"""diff: compare two checkpoints, or two adapters, by blocks of rows, without reading a large tensor
whole."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Interrupted
from adapterkit.core.inputs.adapter_door import adapter_or_file
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.lazy import torch
from adapterkit.core.options import Progress, expect
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import stored_parts
from adapterkit.verbs.look.matching import Matches, are_adapters, match_adapters, match_checkpoints
from adapterkit.verbs.look.pairs import STATES, Pair, Result, stored_specs
from adapterkit.verbs.look.records.diff import Diff

VERSION = 1
ENERGY, ADAPTER_ENERGY = 0.9, 0.99  # shares that the suggested ranks keep
WORKERS = 2


def compare_sources(diff: Diff) -> Json:
    """The document of `diff` on two sources."""
    tolerance, energy = diff.tolerance, diff.rank_for_energy
    sources = open_source(diff.a), open_source(diff.b)
    folders = (adapter_or_file(sources[0]), adapter_or_file(sources[1]))
    if len({", " in folder.origin.get("component", "") for folder in folders}) > 1:  # one of parts
        one, other = (adapter_or_file(source, with_parts=True) for source in sources)
        folders = (one, other)
    matches, read = _match(sources, folders)
    adapters = matches.are_adapters
    if energy is None:
        energy = ADAPTER_ENERGY if adapters else ENERGY
    results = measure(matches, read, energy, diff.progress)
    for result in results:
        error = result.row.get("relative_error")
        is_near = error is not None and tolerance > 0 and error <= tolerance
        if is_near and result.row["why"] == "values":
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
    """The pairs to compare, and the folders of their tensors."""
    is_adapter = all(CONFIG in folder.files() for folder in folders)
    one, other = map(kind_of, sources)
    if not is_adapter and type(one) is type(other) and (own := one.own("diff")):
        return own(sources)
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


def measure(
    matches: Matches, folders: Sequence[Folder], energy: float, progress: Progress
) -> list[Result]:
    """The results in the order of the pairs, on two threads."""
    threads = torch.get_num_threads()
    specs = [
        () if _are_one(pair, folders) else stored_specs(pair.a) + stored_specs(pair.b)
        for pair in matches.pairs
    ]
    total = sum(spec.nbytes for pair in specs for spec in pair)
    expect(progress, total)
    for number, folder in enumerate(folders):
        here = (spec for pair in specs for spec in pair if spec.folder == number)
        files = dict.fromkeys(part.file for spec in here for part in stored_parts(spec))
        folder.prefetch(list(files))
    with StoppedSources(tuple(folders), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None, finite=False)

        def compare(pair: Pair, stored: tuple[TensorSpec, ...]) -> Result:
            if not stored:
                return Result("identical")
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            with torch.inference_mode():
                result = pair.compare(reader, energy)
            progress(sum(spec.nbytes for spec in stored))
            return result

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                return list(pool.map(compare, matches.pairs, specs))
            finally:
                sources.stop()
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)


class StoppedSources(Sources):
    """Open files that are no longer read once they are stopped."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True

    def read_into(self, spec: TensorSpec, offset: int, buffer: memoryview) -> None:
        if self.stopped:
            raise Interrupted("stopped")
        super().read_into(spec, offset, buffer)


def _are_one(pair: Pair, folders: Sequence[Folder]) -> bool:
    """True if both tensors have the same bytes in files of one sha256, as the Hub lists it."""
    a, b = pair.a, pair.b
    if not (type(a) is TensorSpec and type(b) is TensorSpec):
        return False
    listed = folders[a.folder].hashes.get(a.file)
    same = (a.start, a.stop, a.dtype, a.shape) == (b.start, b.stop, b.dtype, b.shape)
    return same and listed is not None and listed == folders[b.folder].hashes.get(b.file)
