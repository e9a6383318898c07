"""Files of computed tensors: bundles are made by several threads, and written in the plan's order, each as large as it came out.

The header gets the room of the largest file there can be, so the data's place is known before its size; it is written last.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.layout import Stored, laid_out
from adapterkit.checkpoint.writer import ShardFile, Stage
from adapterkit.errors import Spoiled, shown
from adapterkit.plan import Bundle, Computed, Inputs, Made, Progress, ShardResult

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = 0.1  # seconds between looks for Ctrl-C
AHEAD = 2  # bundles per worker that may wait to be written
BLOCK = 4 << 20


def write_computed(file: Computed, stage: Stage, inputs: Inputs, workers: int, hashed: bool, progress: Progress) -> ShardResult:
    """Make all bundles of a file and write it; `Spoiled` where a value is not finite."""
    shard = ShardFile(stage.path, file.file, file.size)
    try:
        room, facts, stored = len(file.layout.header), {}, []
        at = room
        for bundle, made in zip(file.bundles, _made(file, stage, inputs, workers, progress), strict=True):
            facts[bundle.name] = made.facts
            for key, tensor in made.tensors.items():
                data = _checked(key, tensor)
                shard.write(data, at)
                at += len(data)
                stored.append(Stored(key, dtypes.name_of(tensor.dtype), tuple(tensor.shape)))
        layout = laid_out(file.file, stored, file.metadata, ordered=True, header_size=room)
        shard.write(layout.header, 0)
        shard.cut(at)
        sha, marks = _hashes(shard, layout.tensors, at) if hashed else (None, {})
        shard.sync()
        shard.publish()
    except BaseException:
        shard.abandon()
        raise
    return ShardResult(file.file, at, sha, marks, facts)


def _made(file: Computed, stage: Stage, inputs: Inputs, workers: int, progress: Progress) -> Iterator[Made]:
    """The bundles' results in order."""

    def make(bundle: Bundle) -> Made:
        torch.set_num_threads(1)  # this thread's; the workers are the parallelism
        with torch.inference_mode():
            return bundle.make(inputs)

    results = _in_order(make, file.bundles, workers)
    if file.settle is None:
        for bundle, made in zip(file.bundles, results, strict=True):
            yield made
            progress(sum(stored.nbytes for stored in bundle.most))
        return
    # what becomes of each depends on all: they wait on the disk
    spill, kept = _Spill(stage, file), []
    try:
        for bundle, made in zip(file.bundles, results, strict=True):
            kept.append((spill.put(made.tensors), made.facts))
            progress(sum(stored.nbytes for stored in bundle.most))
        for (where, facts), change in zip(kept, file.settle([facts for _, facts in kept]), strict=True):
            yield change(Made(spill.get(where), facts))
    finally:
        spill.close()


def _in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) for each, by `workers` threads, in the items' order; a few are made ahead of the one that is asked for."""
    source, waiting = iter(items), deque()
    pool = ThreadPoolExecutor(workers, "compute")
    try:
        waiting.extend(pool.submit(function, item) for item in itertools.islice(source, AHEAD * workers))
        while waiting:
            future = waiting.popleft()
            while True:
                try:
                    result = future.result(PATIENCE)  # a wait without a limit would hold back Ctrl-C
                    break
                except NotYet:
                    if future.done():
                        raise
            waiting.extend(pool.submit(function, item) for item in itertools.islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Spill:
    """A file of the stage that holds tensors until it is settled what becomes of them."""

    def __init__(self, stage: Stage, file: Computed):
        self.file, self.at = ShardFile(stage.path, file.file + ".spill", file.size), 0

    def put(self, tensors: dict[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size, int]]:
        where = []
        for key, tensor in tensors.items():
            data = _bytes(tensor)
            self.file.write(data, self.at)
            where.append((key, tensor.dtype, tensor.shape, self.at))
            self.at += len(data)
        return where

    def get(self, where: list[tuple[str, torch.dtype, torch.Size, int]]) -> dict[str, Tensor]:
        found = {}
        for key, dtype, shape, at in where:
            data = bytearray(shape.numel() * dtype.itemsize)
            self.file.read(memoryview(data), at)
            found[key] = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        return found

    def close(self) -> None:
        self.file.abandon()
        self.file.path.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _checked(key: str, tensor: Tensor) -> memoryview:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise Spoiled(
            f"values of {shown(key)} that are not finite in {str(tensor.dtype).removeprefix('torch.')}",
            expected="finite values",
            where=shown(key),
            do="give --dtype fp32, or smaller weights",
        )
    return _bytes(tensor)


def _hashes(shard: ShardFile, tensors: tuple[Stored, ...], size: int) -> tuple[str, dict[str, str]]:
    """The file's sha256, and the first digits of that of its bytes up to each tensor's end."""
    digest, marks, at = hashlib.sha256(), {}, 0
    block = memoryview(bytearray(BLOCK))
    end = size - sum(tensor.nbytes for tensor in tensors)
    for key, length in [("", end), *((tensor.key, tensor.nbytes) for tensor in tensors)]:
        stop = at + length
        while at < stop:
            part = block[: min(BLOCK, stop - at)]
            shard.read(part, at)
            digest.update(part)
            at += len(part)
        if key:
            marks[key] = digest.copy().hexdigest()[:16]
    return digest.hexdigest(), marks
