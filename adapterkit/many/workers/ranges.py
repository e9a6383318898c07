"""Cut large files into parts for workers, and join the parts into one file.

The first part becomes the file, the others are appended. The joining process removes each part once
the file has its bytes, so at most one of them is stored twice.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from adapterkit.core.checkpoint.disk import check_folder, storage_errors, sync_folder
from adapterkit.core.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.core.engine.partition import DIGITS, cut
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.writer import ShardFile, part_name, part_of, unfinished_name
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.core.system import system
from adapterkit.core.tasks.metrics import ChangeMetrics
from adapterkit.many.workers.stage import WorkerStage

LEAST = 64 << 20  # bytes of a file below which it stays whole
MOST = 1 << 30  # bytes of a part
BLOCK = 4 << 20


def units(
    shards: Sequence[OutputFile], worker_count: int, device: torch.device
) -> list[OutputFile]:
    """The units of work for workers: files, or parts of files above a worker's fair share. Files of
    tasks stay whole, except those of collected statistics."""
    share, found = _share(shards, worker_count), list[OutputFile]()
    for shard in shards:
        if not shard.tasks and shard.size > share:
            parts = max(
                min(worker_count, math.ceil(shard.size / share)), math.ceil(shard.size / MOST)
            )
            found += cut(shard, parts, device)
        else:
            found += [*shard.block_files(), shard]
    return found


def part_bytes(shards: Sequence[OutputFile], worker_count: int | None = None) -> int:
    """The most bytes that parts take in addition to the files, for this number of workers or any:
    those being joined, and the sums of all blocks."""
    share = LEAST if worker_count is None else _share(shards, worker_count)
    sizes = [shard.size for shard in shards if not shard.tasks and shard.size > share]
    collections = [shard.collection for shard in shards if shard.collection is not None]
    blocks = sum((each.blocks - 1) * each.work for each in collections)
    return min(max(sizes, default=0) // 2, MOST + LEAST) + blocks


def _share(shards: Sequence[OutputFile], worker_count: int) -> float:
    """The size in bytes above which a file is cut."""
    return max(sum(shard.size for shard in shards) / worker_count, LEAST)


def accepts(plan: Plan, *, hashed: bool) -> Callable[[ShardResult], bool]:
    """A check that a result belongs to one of the plan's files, or to a part of one."""
    files = {shard.file: shard for shard in plan.shards}

    def is_of_plan(result: ShardResult) -> bool:
        if result.file in files or (part := part_of(result.file)) is None:
            found = files.get(result.file)
            return found is not None and found.accepts(result, hashed=hashed)
        name, start, stop = part
        file = files.get(name)
        if file is None or not start < stop <= _end_of(file):
            return False
        return replace(file, range=(start, stop)).accepts(result, hashed=hashed)

    return is_of_plan


def _end_of(file: OutputFile) -> int:
    """The end of a file's last part, in bytes or blocks; 0 if it has no parts."""
    if file.collection is not None:
        return file.collection.blocks
    return 0 if file.tasks else file.size


def tiling(ranges: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]] | None:
    """Consecutive ranges from 0 to `size`, chosen from these; None if there are none. Workers of
    several numbers may have left several tilings."""
    ways: dict[int, list[tuple[int, int]]] = {0: []}
    for start, stop in sorted(ranges):
        if start in ways and stop not in ways:
            ways[stop] = [*ways[start], (start, stop)]
    return ways.get(size)


def join(
    stage: WorkerStage, shard: OutputFile, ranges: Sequence[tuple[int, int]], *, hashed: bool
) -> None:
    """Make a file and its marker from its parts. Each part is removed once the file has its bytes,
    the last one's marker at the end. Resumes a join that was killed."""
    began = time.monotonic()
    names = [part_name(shard.file, *edges) for edges in ranges]
    entries = [entry for name in names if (entry := stage.marker(name))]
    if len(entries) < len(names):
        raise Refused(
            "a range of the file has disappeared",
            expected="parts as workers wrote them",
            where=str(stage.marks / shard.file),
            hint="run the plan again\nadapterkit run PLAN",
            code="AK610",
        )
    metrics = merged_metrics(shard, [entry["shard"]["metrics"] for entry in entries])
    output = JoinedFile(stage.path, shard, hashed=hashed)
    joined = stage.joined(shard.file)
    reached = max((stop for _, stop in ranges if stop <= joined), default=0)
    if not reached:
        output.remove()
        reached = ranges[0][1]
        stage.mark_joined(shard.file, reached)
        output.begin(names[0])
    elif reached < joined:  # of parts that were cut elsewhere
        stage.mark_joined(shard.file, reached)
    output.read(reached)
    for name, (start, stop) in zip(names, ranges, strict=True):
        if start >= reached:
            output.append(name, start, stop)
            stage.mark_joined(shard.file, stop)
        output.drop(name)
    result = ShardResult(shard.file, shard.size, *output.sums(), metrics)
    seconds = max(entry["seconds"] for entry in entries) + time.monotonic() - began
    same = {key: entries[0][key] for key in ("device", "torch", "host")}
    stage.mark(shard.file, {"shard": vars(result), **same, "seconds": round(seconds, 3)})
    output.publish()
    for name in (*names, output.path.name):
        stage.remove(name)


def merged_metrics(shard: OutputFile, tables: Iterable[dict[str, dict]]) -> dict[str, dict]:
    """The metrics of a file's tensors, combined from those of its parts."""
    totals: dict[str, ChangeMetrics] = {}
    for table in tables:
        for key, raw in table.items():
            part = ChangeMetrics(**raw)
            totals.setdefault(key, ChangeMetrics(delta=part.delta)).add(part)
    return {
        step.key: totals.get(step.key, ChangeMetrics()).result(step, digits=DIGITS)
        for step in shard.steps
        if step.edits
    }


class JoinedFile:
    """An output file during its join: `NAME.part`."""

    def __init__(self, folder: Path, shard: OutputFile, *, hashed: bool):
        self.folder, self.file = folder, shard.file
        self.path = folder / unfinished_name(shard.file)
        with storage_errors(self.path):
            check_folder(folder, self.path.parent)
        self.digest = RunningHash(tensor_ends(shard.layout)) if hashed else None

    def remove(self) -> None:
        """Remove the remains of another join."""
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def begin(self, part: str) -> None:
        """Use the first part as the file's beginning."""
        with storage_errors(self.path):
            system.replace(self.folder / part, self.path)
            sync_folder(self.path.parent)

    def read(self, size: int) -> None:
        """Hash the file's beginning."""
        if self.digest is not None:
            for view in _blocks(self.path, size):
                self.digest.update(view)

    def append(self, part: str, start: int, stop: int) -> None:
        """Copy a part to [start, stop), durably; the file is first cut off at `start`."""
        file = ShardFile(self.folder, self.file, stop, kept=start)
        try:
            at = start
            for view in _blocks(self.folder / part, stop - start):
                file.write(view, at)
                file.start_writeback(at, len(view))
                at += len(view)
                if self.digest is not None:
                    self.digest.update(view)
            file.sync()
        except BaseException:
            file.abandon()
            raise

    def drop(self, part: str) -> None:
        """Remove a part whose bytes the file has."""
        path = self.folder / part
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def sums(self) -> tuple[str | None, dict[str, str]]:
        """The whole file's sha256 and the marks at its tensors' ends."""
        if self.digest is None:
            return None, {}
        return self.digest.hexdigest(), self.digest.marks

    def publish(self) -> None:
        """Give the whole file its name."""
        with storage_errors(self.path):
            system.replace(self.path, self.folder / self.file)


def _blocks(path: Path, size: int) -> Iterator[memoryview]:
    """Yield the first bytes of a file; a block is invalid once the next one is yielded."""
    block, left = memoryview(bytearray(min(BLOCK, size))), size
    with storage_errors(path), open(path, "rb", buffering=0) as file:
        while left:
            count = file.readinto(block[: min(BLOCK, left)])
            if not count:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            yield block[:count]
            left -= count
