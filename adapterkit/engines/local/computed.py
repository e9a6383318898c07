"""Files of computed tensors: tasks are made by several threads, and written in the plan's order,
each as large as it came out.

The header gets the room of the largest file there can be, so the data's place is known before its
size; it is written last.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.budget import AHEAD
from adapterkit.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.checkpoint.output.file_result import ShardResult
from adapterkit.checkpoint.output.stage import Workspace
from adapterkit.checkpoint.output.writer import ShardFile
from adapterkit.engines.device import Streams
from adapterkit.engines.interruptible import result_of, signals_deferred
from adapterkit.engines.local.buffers import keep_rooms
from adapterkit.errors import Unrecoverable, shown
from adapterkit.kernels.sums import all_finite
from adapterkit.options import Progress
from adapterkit.plan import OutputFile, Task, TaskResult
from adapterkit.tasks.handoff import HandoffWriter
from adapterkit.tasks.metrics import finite_metrics
from adapterkit.tasks.rows import byte_view
from adapterkit.weights.reader import Reader

T = TypeVar("T")
R = TypeVar("R")
BLOCK = 4 << 20


def write_computed(
    file: OutputFile,
    stage: Workspace,
    inputs: Reader,
    threads: "TaskThreads",
    hashed: bool,
    progress: Progress,
) -> ShardResult:
    """Make all tasks of a file and write it; `Unrecoverable` where a value is not finite."""
    shard = ShardFile(stage.path, file.file, file.size, stage.attempt)
    try:
        metrics, handoffs = {}, HandoffWriter(stage, file)
        places = _SortedPlaces(file) if file.sizes_are_planned else _AppendedPlaces(file)
        results = _results(file, stage, inputs, threads, progress)
        for task in file.tasks:  # a zip would hold on to the tensors while the next ones are made
            result = next(results)
            measured = finite_metrics(result.metrics)
            if measured:
                metrics[task.name] = metrics.get(task.name, {}) | measured
            handoffs.put(result.handoff)
            for key, tensor in result.tensors.items():
                if isinstance(tensor, TensorSpec):
                    _copy(
                        inputs,
                        tensor,
                        shard,
                        places.next(TensorPlan(key, tensor.dtype, tensor.shape)),
                    )
                else:
                    at = places.next(
                        TensorPlan(key, dtypes.name_of(tensor.dtype), tuple(tensor.shape))
                    )
                    shard.write(byte_view(tensor), at)
                    del tensor
            del result
        next(results, None)
        room = len(file.layout.header)
        layout = file.laid_out(places.stored(), room)
        if len(layout.header) != room:
            _shift(shard, room, len(layout.header), layout.size - len(layout.header))
        shard.write(layout.header, 0)
        shard.truncate(layout.size)
        handoffs.close()
        sha, marks = hash_of(shard, layout) if hashed else (None, {})
        shard.sync()
        shard.publish()
    except BaseException:
        shard.abandon()
        raise
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
    """Places of tensors that follow each other as they are made."""

    def __init__(self, file: OutputFile):
        self.tensors, self.at, self.grown = [], len(file.layout.header), 0

    def next(self, stored: TensorPlan) -> int:
        self.tensors.append(stored)
        self.at += stored.nbytes
        return self.at - stored.nbytes

    def stored(self) -> list[TensorPlan]:
        return self.tensors


class _SortedPlaces:
    """Places in the order of the plan, whatever order they are made in: each where it was planned,
    moved by what those before it have turned out larger or smaller than guessed."""

    def __init__(self, file: OutputFile):
        self.planned, self.starts = file.layout.tensors, file.layout.starts
        self.number = {stored.key: i for i, stored in enumerate(self.planned)}
        self.variable_size = sorted(self.number[key] for key in file.variable_size)
        # bytes by which what follows the first, the second, ... of them lies elsewhere than planned
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
                f"{stored}: planned as {self.planned[number]}, with all that varies before it made "
                "before"
            )
        self.placed[number] = stored
        return self.starts[number] + self.moved[bisect_left(self.variable_size, number)]

    def stored(self) -> list[TensorPlan]:
        return [self.placed[number] for number in sorted(self.placed)]

    @property
    def grown(self) -> int:
        return self.moved[-1]


def _shift(shard: ShardFile, at: int, to: int, size: int) -> None:
    """Move the data: the header is not as long as it was guessed, which is seldom."""
    steps = range(0, size, BLOCK)
    for first in steps if to < at else reversed(steps):
        part = memoryview(bytearray(min(BLOCK, size - first)))
        shard.read(part, at + first)
        shard.write(part, to + first)


def _copy(inputs: Reader, spec: TensorSpec, shard: ShardFile, at: int) -> None:
    for first in range(spec.start, spec.stop, BLOCK):
        part = replace(
            spec,
            dtype="U8",
            shape=(min(BLOCK, spec.stop - first),),
            start=first,
            stop=min(first + BLOCK, spec.stop),
        )
        shard.write(memoryview(inputs.bytes(part)), at + first - spec.start)


class TaskThreads:
    """The threads that compute the tasks of a run, each with a stream and rooms of its own, as many
    at a time as fit into `budget` bytes of memory."""

    def __init__(self, device: torch.device, workers: int, budget: int):
        self.workers, self.budget, self.streams = workers, budget, Streams(device)
        self.pool = ThreadPoolExecutor(workers, "compute", keep_rooms, (device,))

    def __enter__(self) -> "TaskThreads":
        return self

    def __exit__(self, *_: object) -> None:
        with signals_deferred():
            self.pool.shutdown(wait=False, cancel_futures=True)

    def results(self, tasks: Sequence[Task], inputs: Reader) -> Iterator[TaskResult]:
        """The tasks' results in order, in the host's memory."""

        def compute(task: Task) -> TaskResult:
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            with self.streams.use(), torch.inference_mode():
                return _on_host(_finite(task.compute(inputs)))

        return in_order(
            compute, tasks, self.workers, self.budget, lambda task: task.memory, self.pool
        )


def _results(
    file: OutputFile, stage: Workspace, inputs: Reader, threads: TaskThreads, progress: Progress
) -> Iterator[TaskResult]:
    """The results of a file's tasks, as they are written."""
    results = threads.results(file.tasks, inputs)
    if file.finalize is None:
        for task in file.tasks:
            yield next(results)
            progress(sum(stored.nbytes for stored in task.max_outputs))
        return
    # finalize looks at the metrics of all: until then they wait on the disk
    spill, waiting = _Spill(stage, file), []
    try:
        for task in file.tasks:
            result = next(results)
            waiting.append((spill.put(cast(dict[str, Tensor], result.tensors)), result.metrics))
            del result
            progress(sum(stored.nbytes for stored in task.max_outputs))
        for (where, metrics), change in zip(
            waiting, file.finalize([metrics for _, metrics in waiting]), strict=True
        ):
            yield _finite(change(TaskResult(spill.get(where), metrics)))
    finally:
        spill.close()


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    budget: int = 0,
    cost: Callable[[T], int] = lambda item: 0,
    pool: ThreadPoolExecutor | None = None,
) -> Iterator[R]:
    """function(item) for each, by `workers` threads, in the items' order; some are made ahead of
    the one that is asked for: as many as cost no more than the budget together, the one that was
    given out last included, until the next is asked for."""
    source, waiting = iter(items), deque()
    ahead, in_use = next(source, None), 0
    threads = pool or ThreadPoolExecutor(workers, "compute")

    def submit() -> None:
        nonlocal ahead, in_use
        while (
            ahead is not None
            and len(waiting) < AHEAD * workers
            and (not in_use or in_use + cost(ahead) <= budget)
        ):
            with signals_deferred():
                waiting.append((threads.submit(function, ahead), cost(ahead)))
            in_use += cost(ahead)
            ahead = next(source, None)

    try:
        submit()
        while waiting:
            future, cost_of_result = waiting.popleft()
            result = result_of(future)
            del future
            submit()
            yield result
            del result  # before others start
            in_use -= cost_of_result
            submit()
    finally:
        with signals_deferred():
            for future, _ in waiting:
                future.cancel()
            if pool is None:
                threads.shutdown(wait=False)


class _Spill:
    """A file of the stage that holds tensors until `OutputFile.finalize` has seen all metrics."""

    def __init__(self, stage: Workspace, file: OutputFile):
        name = file.file + ".spill"
        self.file, self.at = ShardFile(stage.path, name, file.size, stage.attempt), 0

    def put(self, tensors: dict[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size, int]]:
        where = []
        for key, tensor in tensors.items():
            data = byte_view(tensor)
            self.file.write(data, self.at)
            where.append((key, tensor.dtype, tensor.shape, self.at))
            self.at += len(data)
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


def _on_host(result: TaskResult) -> TaskResult:
    """The result with all tensors in the host's memory: other threads take them, which have other
    streams."""
    tensors = {k: t.cpu() if isinstance(t, Tensor) else t for k, t in result.tensors.items()}
    handoff = {key: tensor.cpu() for key, tensor in result.handoff.items()}
    return TaskResult(tensors, result.metrics, handoff)


def _finite(result: TaskResult) -> TaskResult:
    """`Unrecoverable` where a tensor holds a value that is not finite."""
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
            )
    return result


def hash_of(shard: ShardFile, layout: ShardLayout) -> tuple[str, dict[str, str]]:
    """The file's sha256 and the marks at its tensors' ends."""
    running, block = RunningHash(tensor_ends(layout)), memoryview(bytearray(BLOCK))
    for at in range(0, layout.size, BLOCK):
        part = block[: min(BLOCK, layout.size - at)]
        shard.read(part, at)
        running.update(part)
    return running.hexdigest(), running.marks
