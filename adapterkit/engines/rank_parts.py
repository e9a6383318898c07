"""Large files in parts: which file is cut for how many ranks, and how its parts become one file."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from adapterkit.checkpoint.rank_stage import RankStage, part_of
from adapterkit.checkpoint.shard_result import ShardResult, are_metrics
from adapterkit.checkpoint.writer import ShardFile
from adapterkit.engines.computed import hash_of
from adapterkit.engines.metrics import TensorMetrics
from adapterkit.engines.pieces import Part, cut, part_name
from adapterkit.errors import Refused
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


def accepts(plan: Plan, *, hashed: bool) -> Callable[[ShardResult], bool]:
    """Whether a result that was read can be of one of the plan's files, or of a part of one."""
    files = {shard.file: shard for shard in plan.shards}

    def unit(name: str) -> Shard | Computed | None:
        if name in files or (part := part_of(name)) is None:
            return files.get(name)
        file, start, stop = part
        shard = files.get(file)
        if not isinstance(shard, Shard) or not start < stop <= shard.size:
            return None
        return Part(shard.layout, shard.steps, start, stop)

    def is_of_plan(result: ShardResult) -> bool:
        found = unit(result.file)
        return found is not None and found.accepts(result, hashed=hashed)

    return is_of_plan


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
    entries = [entry for name in names if (entry := stage.marker(name))]
    if len(entries) < len(names):
        raise _unfit(stage, shard, "a part has gone")
    metrics = _metrics(shard, entries)
    if not are_metrics(metrics):
        raise _unfit(stage, shard, "what its parts measured does not fit together")
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
    result = ShardResult(shard.file, shard.size, sha, marks, metrics)
    seconds = max(entry["seconds"] for entry in entries) + time.monotonic() - began
    same = {key: entries[0][key] for key in ("device", "torch", "host")}
    stage.mark(shard.file, {"shard": vars(result), **same, "seconds": round(seconds, 3)})
    for name in names:
        stage.forget(name)


def _unfit(stage: RankStage, shard: Shard, problem: str) -> Refused:
    return Refused(
        problem,
        expected="parts as ranks wrote them",
        where=str(stage.marks / shard.file),
        hint=f"remove the markers {shard.file}@*.json there, then `adapterkit run` the plan again",
    )


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
            part = TensorMetrics(**raw)
            whole.setdefault(key, TensorMetrics(delta=part.delta)).add(part)
    return {
        step.key: whole.get(step.key, TensorMetrics()).result(step)
        for step in shard.steps
        if step.edits
    }
