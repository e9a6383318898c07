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
from concurrent.futures import ThreadPoolExecutor

import torch

from adapterkit import dtypes
from adapterkit.budget import GPU_TASKS
from adapterkit.checkpoint.output.file_result import ShardResult
from adapterkit.checkpoint.output.stage import Workspace
from adapterkit.checkpoint.output.writer import FLUSH
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.system import all_cores, cores
from adapterkit.engines.device import Streams, exact_arithmetic, pick_device
from adapterkit.engines.interruptible import POLL_INTERVAL, Running, signals_deferred
from adapterkit.engines.local.buffers import (
    CPU_BUFFERS,
    GPU_BUFFERS,
    Buffer,
    BufferPool,
    Rooms,
    own_rooms,
)
from adapterkit.engines.local.chunks import ComputedChunk, compute_chunk
from adapterkit.engines.local.computed import TaskThreads, write_computed
from adapterkit.engines.local.pieces import Chunk, OpenShard, Piece, largest_piece
from adapterkit.engines.local.reader import LocalReader
from adapterkit.engines.out_of_memory import memory_errors
from adapterkit.engines.placement import fitting
from adapterkit.options import Progress, no_progress
from adapterkit.plan import OutputFile, Plan
from adapterkit.tasks.handoff import HandoffReader
from adapterkit.tasks.metrics import ChangeMetrics
from adapterkit.tasks.rows import arithmetic

SHUTDOWN_TIMEOUT = 1.0  # seconds that an interrupted job gives its threads
OPEN_SHARDS = 8  # output files in the making: small ones would outrun the fsyncs behind them


def local(device: str = "auto", workers: int | None = None):
    """An engine on this machine: `device` auto, cpu, cuda or cuda:i; `Refused` where there is no
    such device."""
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
        ):
            for folder in range(len(plan.folders)):
                names = [spec.file for spec in reads if spec.folder == folder]
                plan.folders[folder].prefetch(list(dict.fromkeys(names)))
            threads = torch.get_num_threads()  # the workers' own setting reaches the whole process
            try:
                torch.set_num_threads(workers or threads)
                if blocks and (collection := blocks[0].collection):
                    collection.collect_blocks(plan, blocks, stage, where, finished, progress)
                # first: steps may need what tasks hand on
                with TaskThreads(where, tasks, budget) as task_threads:
                    for file in computed:
                        if not stage.wanted(file.file):
                            continue
                        inputs = LocalReader(sources, where, handoffs=HandoffReader(stage))
                        done = progress
                        if file.collection is not None:
                            file = file.collection.collected(plan, file, stage, where, progress)
                            done = no_progress
                        finished(write_computed(file, stage, inputs, task_threads, hash, done))
                if streamed:
                    largest = largest_piece(plan.shards, where)
                    _ShardRun(
                        streamed, largest, stage, sources, where, count, hash, finished, progress
                    ).run()
            finally:
                torch.set_num_threads(threads)

    return engine


class _ShardRun:
    """One run over some shards: the pieces in order, workers that take them, files finished behind
    them."""

    def __init__(
        self, shards, largest, stage, sources, device, workers, hashed, finished, progress
    ):
        self.shards, self.stage, self.sources, self.device = shards, stage, sources, device
        self.workers, self.hashed, self.finished, self.progress = (
            workers,
            hashed,
            finished,
            progress,
        )
        self.inputs = LocalReader(sources, device, handoffs=HandoffReader(stage))
        self.streams = Streams(device)
        on_gpu = device.type != "cpu"
        self.buffers = BufferPool(
            (GPU_BUFFERS if on_gpu else CPU_BUFFERS) * workers, largest, pinned=on_gpu
        )
        self.stop = threading.Event()
        self.problem: BaseException | None = None
        self.open: list[OpenShard] = []
        self.lock = threading.Lock()
        # to take the next piece; waits for files to be finished, so not the lock for counting
        self.turn = threading.Lock()
        self.room = threading.Semaphore(max(OPEN_SHARDS, workers))
        self.running = Running(workers)  # workers, and files whose last piece is written
        self.finisher = ThreadPoolExecutor(1, "finish")

    def run(self) -> None:
        pieces = self._pieces()
        try:
            self._start(pieces)
            while not self.running.wait(POLL_INTERVAL):
                pass
        except BaseException as error:
            self.problem = self.problem or error
        finally:
            self.stop.set()
            ended = self._wait()
        for shard in self.open if ended else ():
            shard.file.abandon()
        if self.problem is not None:
            raise self.problem

    def _start(self, pieces: Iterator[Piece]) -> None:
        with signals_deferred():
            for number in range(self.workers):
                try:
                    threading.Thread(target=self._work, args=(pieces,), daemon=True).start()
                except RuntimeError:  # the system allows no more threads
                    for _ in range(number, self.workers):
                        self.running.finish()
                    raise

    def _wait(self) -> bool:
        """Wait for the threads to see the stop sign; whether they did. Who interrupts does not wait
        long for what waits for the disk: it is lost anyway, as a later run begins those files
        anew."""
        interrupted = isinstance(self.problem, KeyboardInterrupt)
        ended = self.running.wait(SHUTDOWN_TIMEOUT)
        while not ended and not interrupted:
            ended = self.running.wait(POLL_INTERVAL)
        with signals_deferred():
            self.finisher.shutdown(wait=False)
        return ended

    def _pieces(self) -> Iterator[Piece]:
        """The pieces of a few files in turn: each file has one hash, in file order, and one core
        makes it."""
        shards, turns = deque(self.shards), deque[Iterator[Piece]]()
        while shards or turns:
            while shards and len(turns) < self.workers and self.room.acquire(blocking=False):
                turns.append(self._opened(shards.popleft()))
            if not turns:
                if self.room.acquire(timeout=POLL_INTERVAL):
                    turns.append(self._opened(shards.popleft()))
                elif self.stop.is_set():
                    return
                continue
            pieces = turns.popleft()
            piece = next(pieces, None)
            if piece is not None:
                turns.append(pieces)
                yield piece

    def _opened(self, shard: OutputFile) -> Iterator[Piece]:
        if not self.stage.wanted(shard.name):
            self.room.release()
            return iter(())
        opened = OpenShard(shard, hashed=self.hashed)
        opened.create(self.stage)
        self.open.append(opened)
        pieces = list(opened.pieces(self.device))
        opened.remaining = len(pieces)
        return iter(pieces)

    def _work(self, pieces: Iterator[Piece]) -> None:
        try:
            self._take_pieces(pieces)
        except BaseException as error:
            with self.lock:
                self.problem = self.problem or error
            self.stop.set()
        finally:
            # no tensor is left to this thread: the process may end now, which a thread that frees
            # one would not outlive quietly
            self.running.finish()

    def _take_pieces(self, pieces: Iterator[Piece]) -> None:
        torch.set_num_threads(1)  # this thread's; the workers are the parallelism
        with self.streams.use(), torch.inference_mode(), own_rooms(self.device) as rooms:
            while (buffer := self.buffers.take(self.stop)) is not None:
                with self.turn:
                    piece = next(pieces, None)
                if piece is None:
                    self.buffers.give(buffer)
                    return
                self._do(piece, buffer, rooms)

    def _do(self, piece: Piece, buffer: Buffer, rooms: Rooms) -> None:
        shard = piece.shard
        if piece.data is not None:
            shard.file.write(piece.data, 0)
            shard.hash(piece.number, memoryview(piece.data), lambda: self.buffers.give(buffer))
        elif piece.step is None:
            self._copy(piece, buffer)
        else:
            self._compute(piece, buffer, rooms)
        self.progress(piece.length)
        with self.lock:
            shard.remaining -= 1
            last = shard.remaining == 0
            start, shard.flushed = (
                shard.flushed,
                max(shard.flushed, piece.position // FLUSH * FLUSH),
            )
            if last:
                self.running.start()
                self.finisher.submit(self._finish, shard)
        if not last and shard.flushed > start:
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

    def _compute(self, piece: Piece, buffer: Buffer, rooms: Rooms) -> None:
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
                room = rooms.kept(shape, arithmetic(step))
                w = inputs.rows(step.source, step.grid, chunk.first, chunk.last, room)
                waiting.append(compute_chunk(w, edits, step, chunk, outgoing))
                if len(waiting) > rooms.ahead:
                    write(waiting.popleft())
            while waiting:
                write(waiting.popleft())
        open_step.done(metrics)
        piece.shard.hash(piece.number, view, lambda: self.buffers.give(buffer))

    def _finish(self, shard: OpenShard) -> None:
        try:
            if self.stop.is_set():
                return
            shard.file.sync()
            if self.stop.is_set():
                return  # a later run may be at work on that name already
            shard.file.publish()
            self.open.remove(shard)
            self.finished(shard.result())
            self.room.release()
        except BaseException as error:
            self.problem = self.problem or error
            self.stop.set()
        finally:
            self.running.finish()
