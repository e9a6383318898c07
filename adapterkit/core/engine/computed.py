"""Write files of computed tensors: several threads compute the tasks, and each result is written in
the plan's order, at the size it has.

The header gets the space of the largest possible file, so the data's position is known before its
size. The header is written last."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import cast

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.core.engine.buffers import StagingBuffers, keep_staging, staging_of
from adapterkit.core.engine.device import Mark, Streams
from adapterkit.core.engine.file_threads import FileThreads, in_order
from adapterkit.core.engine.interruptible import result_of, signals_deferred
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import Workspace
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.plan import OutputFile, Task, TaskResult
from adapterkit.core.tasks.handoff import HandoffWriter
from adapterkit.core.tasks.metrics import finite_metrics
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.sums import all_finite

BLOCK = 4 << 20


def write_computed(
    file: OutputFile,
    inputs: LocalReader,
    threads: TaskThreads,
    files: FileThreads,
    *,
    hashed: bool,
    progress: Progress,
) -> None:
    """Compute all tasks of a file and write their results; the file is finished while the next one
    is made.

    `Unrecoverable` if a value is not finite."""
    opening = files.ahead(lambda: files.create(file.file, file.size))
    places = _SortedPlaces(file) if file.sizes_are_planned else _AppendedPlaces(file)
    metrics, handoffs = {}, HandoffWriter(files.stage, file)
    with threads.here() as staging:
        results = _results(file, files.stage, inputs, threads, staging, progress)
        for task in file.tasks:  # a zip would hold on to the tensors while the next ones are made
            result = next(results)
            shard = result_of(opening)  # tasks started while it was made
            measured = finite_metrics(result.metrics)
            if measured:
                metrics[task.name] = metrics.get(task.name, {}) | measured
            handoffs.put(result.handoff, staging.blocks)
            for key, tensor in result.tensors.items():
                if isinstance(tensor, TensorSpec):
                    at = places.next(TensorPlan(key, tensor.dtype, tensor.shape))
                    _copy(inputs, tensor, shard, at)
                else:
                    name = dtypes.name_of(tensor.dtype)
                    at = places.next(TensorPlan(key, name, tuple(tensor.shape)))
                    for first, block in staging.blocks(tensor):
                        shard.write(block, at + first)
                    del tensor
            del result
        next(results, None)
    shard = result_of(opening)
    end = partial(_ended, file, shard, places, handoffs, metrics, files.stop if hashed else None)
    files.finish(file.file, shard, end)


def _ended(
    file: OutputFile,
    shard: ShardFile,
    places: _AppendedPlaces | _SortedPlaces,
    handoffs: HandoffWriter,
    metrics: dict[str, dict],
    stop: threading.Event | None,
) -> ShardResult:
    """Write the header of a file whose tensors are complete, and set its size. Without `stop` the
    file has no hash; a set `stop` ends the hash."""
    header_size = len(file.layout.header)
    layout = file.laid_out(places.stored(), header_size)
    if len(layout.header) != header_size:
        _shift(shard, header_size, len(layout.header), layout.size - len(layout.header))
    shard.write(layout.header, 0)
    shard.truncate(layout.size)
    handoffs.close()
    sha, marks = (None, {}) if stop is None else hash_of(shard, layout, stop)
    marks = marks if layout.header else None  # a text has no separate tensors
    return ShardResult(
        file.file,
        layout.size,
        sha,
        marks,
        metrics,
        places.grown,
        len(layout.tensors),
        handoffs.places,
    )


class _AppendedPlaces:
    """Positions of tensors in the order in which they are made."""

    def __init__(self, file: OutputFile):
        self.tensors, self.at, self.grown = [], len(file.layout.header), 0

    def next(self, stored: TensorPlan) -> int:
        self.tensors.append(stored)
        self.at += stored.nbytes
        return self.at - stored.nbytes

    def stored(self) -> list[TensorPlan]:
        return self.tensors


class _SortedPlaces:
    """Positions in the plan's order, for tensors made in any order: the planned one, shifted by the
    differences of size before it."""

    def __init__(self, file: OutputFile):
        self.planned, self.starts = file.layout.tensors, file.layout.starts
        self.number = {stored.key: i for i, stored in enumerate(self.planned)}
        self.variable_size = sorted(self.number[key] for key in file.variable_size)
        # the shift of tensors after the first, the second, ... of them, in bytes
        self.moved = [0]
        self.placed: dict[int, TensorPlan] = {}

    def next(self, stored: TensorPlan) -> int:
        number, known = self.number[stored.key], len(self.moved) - 1
        if known < len(self.variable_size) and number == self.variable_size[known]:
            self.moved.append(self.moved[-1] + stored.nbytes - self.planned[number].nbytes)
        elif stored != self.planned[number] or (
            known < len(self.variable_size) and self.variable_size[known] < number
        ):
            raise AssertionError(
                f"{stored}: planned as {self.planned[number]}, with every variable "
                "size before it made first"
            )
        self.placed[number] = stored
        return self.starts[number] + self.moved[bisect_left(self.variable_size, number)]

    def stored(self) -> list[TensorPlan]:
        return [self.placed[number] for number in sorted(self.placed)]

    @property
    def grown(self) -> int:
        return self.moved[-1]


def _shift(shard: ShardFile, at: int, to: int, size: int) -> None:
    """Move the data, in the rare case that the header's length differs from the estimate."""
    steps = range(0, size, BLOCK)
    for first in steps if to < at else reversed(steps):
        part = memoryview(bytearray(min(BLOCK, size - first)))
        shard.read(part, at + first)
        shard.write(part, to + first)


def _copy(inputs: LocalReader, spec: TensorSpec, shard: ShardFile, at: int) -> None:
    """Copy stored bytes, inside the kernel if possible, else through a reused buffer."""
    with inputs.sources.file(spec.folder, spec.file) as descriptor:
        if shard.copy_from(descriptor, spec.start, at, spec.nbytes):
            return
    block = memoryview(bytearray(min(BLOCK, spec.nbytes)))
    for first in range(0, spec.nbytes, BLOCK):
        part = block[: spec.nbytes - first]
        inputs.sources.read_into(spec, first, part)
        shard.write(part, at + first)


class TaskThreads:
    """The threads that compute the tasks of a run, each with a stream and staging buffers of its
    own. Tasks that run at once fit into `budget` bytes of memory."""

    def __init__(self, device: torch.device, workers: int, budget: int):
        self.device, self.workers, self.budget = device, workers, budget
        self.streams = Streams(device)
        self.pool = ThreadPoolExecutor(workers, "compute", keep_staging, (device,))

    def __enter__(self) -> TaskThreads:
        return self

    def __exit__(self, *_: object) -> None:
        with signals_deferred():
            self.pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def here(self) -> Iterator[StagingBuffers]:
        """Give this thread, which writes the results, a stream and staging buffers."""
        with self.streams.use(), torch.inference_mode():
            yield staging_of(self.device)

    def results(self, tasks: Sequence[Task], inputs: Reader) -> Iterator[TaskResult]:
        """Yield the tasks' results in order, on the device; this thread's stream waits for each."""

        def compute(task: Task) -> tuple[TaskResult, Mark]:
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            with self.streams.use(), torch.inference_mode():
                return _finite(task.compute(inputs)), Mark(self.device)

        def memory(task: Task) -> int:
            return task.memory if self.device.type == "cpu" else task.gpu_memory

        for result, mark in in_order(compute, tasks, self.workers, self.budget, memory, self.pool):
            mark.precede()
            yield result
            del result


def _results(
    file: OutputFile,
    stage: Workspace,
    inputs: Reader,
    threads: TaskThreads,
    staging: StagingBuffers,
    progress: Progress,
) -> Iterator[TaskResult]:
    """Yield the results of a file's tasks as they are written."""
    results = threads.results(file.tasks, inputs)
    if file.finalize is None:
        for task in file.tasks:
            yield next(results)
            progress(sum(stored.nbytes for stored in task.max_outputs))
        return
    # finalize reads the metrics of all tasks: until then the tensors wait on disk
    spill, waiting = _Spill(stage, file), []
    try:
        for task in file.tasks:
            result = next(results)
            tensors = cast(dict[str, Tensor], result.tensors)
            waiting.append((spill.put(tensors, staging), result.metrics))
            del tensors
            del result
            progress(sum(stored.nbytes for stored in task.max_outputs))
        for (where, metrics), change in zip(
            waiting, file.finalize([metrics for _, metrics in waiting]), strict=True
        ):
            yield _finite(change(TaskResult(spill.get(where), metrics)))
    finally:
        spill.close()


class _Spill:
    """A file of the stage that holds tensors until `OutputFile.finalize` has seen all metrics."""

    def __init__(self, stage: Workspace, file: OutputFile):
        name = file.file + ".spill"
        self.file, self.at = ShardFile(stage.path, name, file.size, stage.attempt), 0

    def put(
        self, tensors: dict[str, Tensor], staging: StagingBuffers
    ) -> list[tuple[str, torch.dtype, torch.Size, int]]:
        where = []
        for key, tensor in tensors.items():
            where.append((key, tensor.dtype, tensor.shape, self.at))
            for first, block in staging.blocks(tensor):
                self.file.write(block, self.at + first)
            self.at += tensor.nbytes
        return where

    def get(self, where: list[tuple[str, torch.dtype, torch.Size, int]]) -> dict[str, Tensor]:
        tensors = {}
        for key, dtype, shape, at in where:
            data = bytearray(shape.numel() * dtype.itemsize)
            self.file.read(memoryview(data), at)
            tensors[key] = (
                torch.frombuffer(data, dtype=dtype).view(shape)
                if data
                else torch.empty(shape, dtype=dtype)
            )
        return tensors

    def close(self) -> None:
        self.file.abandon()
        self.file.path.unlink(missing_ok=True)


def _finite(result: TaskResult) -> TaskResult:
    """Return the result; `Unrecoverable` if a tensor has a value that is not finite."""
    for key, tensor in result.tensors.items():
        if isinstance(tensor, TensorSpec) or not tensor.is_floating_point() or tensor.itemsize == 1:
            continue
        if not all_finite(tensor):
            raise Unrecoverable(
                f"values of {shown(key)} are not finite in "
                f"{str(tensor.dtype).removeprefix('torch.')}",
                expected="finite values",
                where=shown(key),
                hint="give --dtype fp32, or smaller weights",
                code="AK606",
            )
    return result


def hash_of(
    shard: ShardFile, layout: ShardLayout, stop: threading.Event
) -> tuple[str, dict[str, str]]:
    """Return the file's sha256 and the marks at its tensors' ends; useless after `stop`."""
    running, block = RunningHash(tensor_ends(layout)), memoryview(bytearray(BLOCK))
    for at in range(0, layout.size, BLOCK):
        if stop.is_set():
            break
        part = block[: layout.size - at]
        shard.read(part, at)
        running.update(part)
    return running.hexdigest(), running.marks
