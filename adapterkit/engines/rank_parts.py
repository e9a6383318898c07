"""Large files in parts: which file is cut for how many ranks, and how its parts become one file."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from adapterkit.checkpoint.rank_stage import RankStage
from adapterkit.checkpoint.shard_result import ShardResult
from adapterkit.checkpoint.writer import ShardFile
from adapterkit.engines.computed import hash_of
from adapterkit.engines.metrics import TensorMetrics
from adapterkit.engines.pieces import Part, cut, part_name
from adapterkit.plan import Computed, Plan, Shard

LEAST = 64 << 20  # bytes of a file below which it stays whole
BLOCK = 4 << 20


def units(plan: Plan, ranks: int, device: torch.device) -> list[Shard | Computed]:
    """What ranks make: the plan's files, those above a rank's fair share in parts. Files of tasks
    stay whole."""
    share = max(sum(shard.size for shard in plan.shards) / ranks, LEAST)
    found: list[Shard | Computed] = []
    for shard in plan.shards:
        if isinstance(shard, Shard) and shard.size > share:
            found += cut(shard, min(ranks, -int(-shard.size // share)), device)
        else:
            found.append(shard)
    return found


def file_of(unit: Shard | Computed) -> str:
    """The output file that a unit is, or is a part of."""
    return unit.layout.file if isinstance(unit, Part) else unit.file


def tiling(ranges: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]] | None:
    """Some of the ranges, one behind the other from 0 to `size`; None where there are none such.
    Ranks of several numbers may have left several tilings."""
    ways: dict[int, list[tuple[int, int]]] = {0: []}
    for start, stop in sorted(ranges):
        if start in ways and stop not in ways:
            ways[stop] = [*ways[start], (start, stop)]
    return ways.get(size)


def join(
    stage: RankStage, shard: Shard, ranges: Sequence[tuple[int, int]], *, hashed: bool
) -> None:
    """Make a file, and its marker, of its parts, and remove them."""
    began = time.monotonic()
    names = [part_name(shard.file, *edges) for edges in ranges]
    entries = [stage.marker(name) or {} for name in names]
    file = ShardFile(stage.path, shard.file, shard.size, stage.attempt)
    try:
        for name, (start, stop) in zip(names, ranges, strict=True):
            _copy(stage, name, file, start, stop - start)
        sha, marks = hash_of(file, shard.layout) if hashed else (None, {})
        file.sync()
        file.publish()
    except BaseException:
        file.abandon()
        raise
    result = ShardResult(shard.file, shard.size, sha, marks, _metrics(shard, entries))
    seconds = max(entry["seconds"] for entry in entries) + time.monotonic() - began
    same = {key: entries[0][key] for key in ("device", "torch", "host")}
    stage.mark(shard.file, {"shard": vars(result), **same, "seconds": round(seconds, 3)})
    for name in names:
        stage.forget(name)


def _copy(stage: RankStage, name: str, file: ShardFile, at: int, size: int) -> None:
    with (stage.path / name).open("rb") as part:
        if file.copy_from(part.fileno(), 0, at, size):
            return
        for start in range(0, size, BLOCK):
            part.seek(start)
            file.write(part.read(min(BLOCK, size - start)), at + start)


def _metrics(shard: Shard, entries: Sequence[dict[str, Any]]) -> dict[str, dict]:
    """The metrics of a file's tensors, of what its parts measured."""
    whole: dict[str, TensorMetrics] = {}
    for entry in entries:
        for key, raw in entry["shard"]["metrics"].items():
            metrics = whole.setdefault(key, TensorMetrics(delta=raw["delta"]))
            metrics.add(TensorMetrics(**raw))
    return {
        step.key: whole.get(step.key, TensorMetrics()).result(step)
        for step in shard.steps
        if step.edits
    }
