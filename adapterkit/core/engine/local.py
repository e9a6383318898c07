"""The local engine: one machine, threads that read, compute and write chunks, each file in order,
on CPU or CUDA.

Every output file is cut into pieces: runs of untouched bytes, and spans of rows of the tensors that
change. Workers take the pieces of a few files in turn; each goes through its span by chunks that
fit a core's cache: read, compute in float32 or float64, round once, write at the chunk's offset.
Hashing follows in file order while the bytes are still in cache. Chunks are a pure function of the
shapes, so the number of workers, and a resume in between, change no bit. On CUDA each worker has
its own stream, so copies to and from the GPU and the arithmetic of different workers overlap.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from adapterkit.core import dtypes
from adapterkit.core.budget import GPU_TASKS
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.buffers import (
    CPU_BUFFERS,
    GPU_BUFFERS,
    Buffer,
    BufferPool,
    StagingBuffers,
    own_staging,
)
from adapterkit.core.engine.computed import TaskThreads, write_computed
from adapterkit.core.engine.device import (
    Mark,
    Streams,
    exact_arithmetic,
    memory_errors,
    pick_device,
)
from adapterkit.core.engine.file_threads import FileThreads, file_threads
from adapterkit.core.engine.interruptible import POLL_INTERVAL, result_of, signals_deferred
from adapterkit.core.engine.partition import Chunk, OpenShard, Piece, largest_piece
from adapterkit.core.engine.placement import fitting
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress, no_progress
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import Workspace
from adapterkit.core.output.writer import FLUSH
from adapterkit.core.plan import Loaded, OutputFile, Plan, Step
from adapterkit.core.system import all_cores, cores
from adapterkit.core.tasks.handoff import HandoffReader
from adapterkit.core.tasks.metrics import ChangeMetrics, change_sums, squares
from adapterkit.core.tasks.rows import arithmetic, rounded, unrounded
from adapterkit.kernels.sums import all_finite

OPEN_SHARDS = 8  # unfinished output files: small ones would outrun their fsyncs


def local(device: str = "auto", workers: int | None = None):
    """Return an engine on this machine: `device` is auto, cpu, cuda or cuda:i; `Refused` if there
    is no such device."""
    where = pick_device(device)

    def engine(
        plan: Plan,
        shards: list[OutputFile],
        stage: Workspace,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        if where.type == "cpu":
            count, budget = workers or cores(), plan.budget
        else:
            free = torch.cuda.mem_get_info(where)[0]
            count, budget = fitting(plan, workers or all_cores(), free)
        tasks = count if where.type == "cpu" else min(count, GPU_TASKS)
        blocks = [shard for shard in shards if shard.is_block and stage.wanted(shard.name)]
        computed = [shard for shard in shards if shard.tasks and not shard.is_block]
        streamed = [shard for shard in shards if not shard.tasks]
        reads = [spec for file in (*computed, *streamed) for spec in file.reads]
        with (
            exact_arithmetic(where),
            memory_errors(where),
            Sources(plan.folders, plan.identities) as sources,
            _torch_threads(workers),
            own_staging(where),
            file_threads(stage, finished) as files,
        ):
            for folder in range(len(plan.folders)):
                names = [spec.file for spec in reads if spec.folder == folder]
                plan.folders[folder].prefetch(list(dict.fromkeys(names)))
            if blocks and (collection := blocks[0].collection):
                collection.collect_blocks(plan, blocks, stage, where, finished, progress)
            written = {key: file.file for file in computed for key in file.handoff_writes}
            # first, because steps may read the handoffs of tasks
            with TaskThreads(where, tasks, budget) as task_threads:
                for file in computed:
                    if not stage.wanted(file.file):
                        continue
                    files.await_ends(_files_read(file, written))
                    inputs = LocalReader(sources, where, handoffs=HandoffReader(stage))
                    done = progress
                    if file.collection is not None:
                        file = file.collection.collected(plan, file, stage, where, progress)
                        done = no_progress
                    write_computed(file, inputs, task_threads, files, hashed=hash, progress=done)
            if streamed:
                files.await_ends(set().union(*(_files_read(file, written) for file in streamed)))
                # on a GPU the largest of all files: its memory is never freed, and serves them too
                largest = largest_piece(streamed if where.type == "cpu" else plan.shards, where)
                _ShardRun(streamed, largest, sources, where, count, hash, files, progress).start()

    return engine


def _files_read(file: OutputFile, written: dict[str, str]) -> set[str]:
    """Return the files whose handoffs this one reads."""
    return {written[key] for key in file.handoff_reads if key in written}


@contextmanager
def _torch_threads(workers: int | None) -> Iterator[None]:
    """Set torch's number of threads, if one is given; the setting also reaches beyond the
    workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(workers or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _ShardRun:
    """One run over some shards: the pieces in order, the workers that take them, the files that are
    created ahead and finished behind."""

    def __init__(self, shards, largest, sources, device, workers, hashed, files, progress):
        self.shards, self.sources, self.device = shards, sources, device
        self.workers, self.hashed, self.progress = workers, hashed, progress
        self.files: FileThreads = files
        self.inputs = LocalReader(sources, device, handoffs=HandoffReader(files.stage))
        self.streams = Streams(device)
        on_gpu = device.type != "cpu"
        self.buffers = BufferPool(
            (GPU_BUFFERS if on_gpu else CPU_BUFFERS) * workers, largest, pinned=on_gpu
        )
        self.lock = threading.Lock()
        # to take the next piece; may wait for files, so it is not the lock for counting
        self.turn = threading.Lock()
        self.slots = threading.Semaphore(max(OPEN_SHARDS, workers) + 1)  # one is created ahead

    def start(self) -> None:
        """Start the threads, which end with those of `files`."""
        pieces = self._pieces()
        with signals_deferred():
            for _ in range(self.workers):
                self.files.start(lambda: self._take_pieces(pieces))

    def _pieces(self) -> Iterator[Piece]:
        """Yield the pieces of a few files in turn, because one core computes a file's hash, in
        order. The next file is created meanwhile: allocating its blocks may be slow."""
        shards, turns = deque(self.shards), deque[Iterator[Piece]]()
        opening: Future[Iterator[Piece]] | None = None
        while shards or opening or turns:
            if (
                opening is None
                and shards
                and self.slots.acquire(timeout=0 if turns else POLL_INTERVAL)
            ):
                shard = shards.popleft()
                opening = self.files.ahead(lambda shard=shard: self._opened(shard))
            is_next = opening is not None and len(turns) < self.workers
            if opening is not None and is_next and (not turns or opening.done()):
                turns.append(result_of(opening))
                opening = None
            elif turns:
                pieces = turns.popleft()
                piece = next(pieces, None)
                if piece is not None:
                    turns.append(pieces)
                    yield piece
            elif self.files.stop.is_set():
                return

    def _opened(self, shard: OutputFile) -> Iterator[Piece]:
        if not self.files.stage.wanted(shard.name):
            self.slots.release()
            return iter(())
        opened = OpenShard(shard, hashed=self.hashed)
        opened.file = self.files.create(shard.name, shard.size)
        pieces = list(opened.pieces(self.device))
        opened.remaining = len(pieces)
        return iter(pieces)

    def _take_pieces(self, pieces: Iterator[Piece]) -> None:
        torch.set_num_threads(1)  # this thread's; the workers are the parallelism
        with self.streams.use(), torch.inference_mode(), own_staging(self.device) as staging:
            while (buffer := self.buffers.take(self.files.stop)) is not None:
                with self.turn:
                    piece = next(pieces, None)
                if piece is None:
                    self.buffers.give(buffer)
                    return
                self._do(piece, buffer, staging)

    def _do(self, piece: Piece, buffer: Buffer, staging: StagingBuffers) -> None:
        shard = piece.shard
        if piece.data is not None:
            shard.file.write(piece.data, 0)
            shard.hash(piece.number, memoryview(piece.data), lambda: self.buffers.give(buffer))
        elif piece.step is None:
            self._copy(piece, buffer)
        else:
            self._compute(piece, buffer, staging)
        self.progress(piece.length)
        with self.lock:
            shard.remaining -= 1
            last = shard.remaining == 0
            start, shard.flushed = (
                shard.flushed,
                max(shard.flushed, piece.position // FLUSH * FLUSH),
            )
        if last:
            ended = self.files.finish(shard.shard.name, shard.file, shard.result)
            ended.add_done_callback(lambda _: self.slots.release())
        elif shard.flushed > start:
            shard.file.start_writeback(start, shard.flushed - start)

    def _copy(self, piece: Piece, buffer: Buffer) -> None:
        source = piece.source
        assert source is not None
        shard = piece.shard
        with self.sources.file(source.folder, source.file) as descriptor:
            inside = shard.file.copy_from(
                descriptor, piece.source_start, piece.position, piece.length
            )
        if inside and shard.digest is None:
            self.buffers.give(buffer)
            return
        view = buffer.view(piece.length)
        self.sources.read_into(source, piece.source_start - source.start, view)
        if not inside:
            shard.file.write(view, piece.position)
        shard.hash(piece.number, view, lambda: self.buffers.give(buffer))

    def _compute(self, piece: Piece, buffer: Buffer, staging: StagingBuffers) -> None:
        open_step, metrics, waiting = piece.step, ChangeMetrics(), deque[ComputedChunk]()
        assert open_step is not None
        step, columns = open_step.step, open_step.step.grid[1]
        edits, inputs = open_step.load(self.inputs), self.inputs.view(arithmetic(step))
        view = buffer.view(piece.length)
        written = buffer.tensor(piece.length, dtypes.torch_dtype(step.dtype)).view(-1, columns)
        width = dtypes.BITS[step.dtype] // 8 * columns

        def rows(chunk: Chunk) -> slice:
            first = piece.chunks[0].first
            return slice(chunk.first - first, chunk.last - first)

        def write(done: ComputedChunk) -> None:
            squares, *sums = done.landed(step)
            metrics.squares.append(squares)
            if sums:
                metrics.sums.append(sums)
                metrics.sampled += done.outgoing.numel()
            start, stop = rows(done.chunk).start * width, rows(done.chunk).stop * width
            piece.shard.file.write(view[start:stop], piece.position + start)

        with self.sources.file(step.source.folder, step.source.file):  # it stays open
            for chunk in piece.chunks:
                shape, outgoing = (chunk.last - chunk.first, columns), written[rows(chunk)]
                into = staging.kept(shape, arithmetic(step))
                w = inputs.rows(step.source, step.grid, chunk.first, chunk.last, into)
                waiting.append(compute_chunk(w, edits, step, chunk, outgoing))
                if len(waiting) > staging.ahead:
                    write(waiting.popleft())
            while waiting:
                write(waiting.popleft())
        open_step.done(metrics)
        piece.shard.hash(piece.number, view, lambda: self.buffers.give(buffer))


@dataclass
class ComputedChunk:
    """A chunk whose arithmetic and copy to the host have begun. On a GPU its result is there once
    it has landed; until then a worker reads and begins the next one."""

    chunk: Chunk
    values: Tensor  # in the dtype of the arithmetic, on the device
    outgoing: Tensor  # rounded, in the host's memory
    sums: list[Tensor]
    mark: Mark

    def landed(self, step: Step) -> list[float]:
        """Wait until `outgoing` is there. Return Σ of the new values squared, and `change_sums` of
        a sampled chunk; `Unrecoverable` if they are not finite."""
        self.mark.wait()
        sums = [float(one) for one in self.sums]
        limit = torch.finfo(self.outgoing.dtype).max
        # implies that no element is above the limit; false for NaN
        if not sums[0] <= limit * limit and not all_finite(self.outgoing):
            raise _not_finite(step, self.values)
        return sums


def compute_chunk(
    w: Tensor, edits: list[Loaded], step: Step, chunk: Chunk, outgoing: Tensor
) -> ComputedChunk:
    """Begin the edits of w, in place, and the copy of the rounded rows to `outgoing`."""
    before = w.clone() if chunk.sampled and edits else None
    for edit in edits:
        edit.apply(w, chunk.first)
    if w.device.type == "cpu" and step.draws is None:
        written = outgoing.copy_(w)
    else:  # rounded on the device: a copy that converts would make one thread wait for the GPU
        written = rounded(w, step, chunk.first * step.grid[1])
        outgoing.copy_(written, non_blocking=True)
    sums = [squares(w)]
    if before is not None:
        exact = unrounded(w, before, edits, chunk.first)
        sums += change_sums(before, exact, written)
    if w.device.type != "cpu":
        together = torch.stack([one.double() for one in sums])
        sums = list(together.to("cpu", non_blocking=True))
    return ComputedChunk(chunk, w, outgoing, sums, Mark(w.device))


def _not_finite(step: Step, values: Tensor) -> Unrecoverable:
    what = "overflows" if all_finite(values) else "is not finite (NaN or infinity)"
    return Unrecoverable(
        f"the merged value {what} in {step.dtype}",
        expected="finite values",
        where=f"{step.source.file}: {shown(step.key)}",
        hint="give --dtype bf16 or fp32, or a smaller weight"
        if what == "overflows"
        else "check the base and the adapters",
        code="AK606",
    )
