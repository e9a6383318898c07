"""The local engine: one machine, threads that read, compute and write chunks, each file in order, on CPU or CUDA.

Every output file is cut into pieces: runs of untouched bytes, and spans of rows of the tensors that change. Workers take the
pieces of a few files in turn; each goes through its span by chunks that fit a core's cache: read, compute in float32 or float64,
round once, write at the chunk's offset. Hashing follows in file order while the bytes are still in cache. Chunks are a pure
function of the shapes, so the number of workers, and a resume in between, change no bit. On CUDA each worker has its own stream,
so copies to and from the card and the arithmetic of different workers overlap.
"""

import itertools
import math
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources, read_exactly
from adapterkit.checkpoint.stage import Stage
from adapterkit.checkpoint.system import cores
from adapterkit.checkpoint.writer import FLUSH, ShardFile
from adapterkit.engines.computed import write_computed
from adapterkit.errors import Failed, Refused, Unrecoverable, shown
from adapterkit.kernels.sums import all_finite
from adapterkit.plan import STACKS, Computed, Loaded, Plan, Progress, Shard, Step
from adapterkit.receipt import ShardResult
from adapterkit.tasks.handoff import HandoffReader
from adapterkit.tasks.rows import arithmetic, chunks, rounded, unrounded
from adapterkit.weights.codec import QuantizedWeight, decode_checked

SPAN = 4  # chunks that a worker takes at a time: what it shares with the others is touched once per span
CUDA_SPAN = 1
RUN = 4 << 20  # bytes of one piece of an untouched run
PATIENCE = 0.1  # seconds between looks at the stop sign
PARTING = 1.0  # seconds that an interrupted job gives its threads
OPEN_SHARDS = 8  # output files in the making: small ones would outrun the fsyncs behind them
LEAST_STACKS = 3  # stacks of experts' factors that are kept however large they are
SAMPLE = 64  # metrics are measured on every 64th chunk of a tensor, the first included


def local(device: str = "auto", workers: int | None = None):
    """An engine on this machine: `device` auto, cpu, cuda or cuda:i; `Refused` where there is no such device."""
    where = pick_device(device)

    def engine(
        plan: Plan,
        shards: list[Shard | Computed],
        stage: Stage,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        count = workers or cores()
        streamed = [shard for shard in shards if isinstance(shard, Shard)]
        computed = [shard for shard in shards if isinstance(shard, Computed)]
        reads = [step.source for shard in streamed for step in shard.steps]
        reads += [spec for file in computed for task in file.tasks for spec in task.reads]
        with Sources(plan.folders, plan.identities) as sources:
            for folder in range(len(plan.folders)):
                names = [spec.file for spec in reads if spec.folder == folder]
                plan.folders[folder].prefetch(list(dict.fromkeys(names)))
            threads = torch.get_num_threads()  # the workers' own setting reaches the whole process
            try:
                if streamed:
                    _Job(streamed, stage, sources, where, count, hash, finished, progress).run()
                for file in computed:
                    inputs = LocalReader(sources, where, handoffs=HandoffReader(stage))
                    finished(
                        write_computed(file, stage, inputs, count, plan.budget, hash, progress)
                    )
            except (MemoryError, torch.OutOfMemoryError) as error:
                found = f"out of memory: {shown(error)}"
                raise Failed(
                    found, hint="free some memory, or give --device cpu, then --resume"
                ) from error
            finally:
                torch.set_num_threads(threads)

    return engine


def pick_device(name: str) -> torch.device:
    """torch's device for `auto` (CPU: a merge waits for the disk, not for arithmetic), `cpu`, `cuda` or `cuda:i`."""
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda" or count <= (device.index or 0):
        raise Refused(
            f"device {name!r}; {count} CUDA devices here",
            expected="auto, cpu, cuda or cuda:i",
            where="--device",
            hint="use cpu",
        )
    return device


@dataclass
class LocalReader:
    """The `Reader` of a job on this machine: of its open files, and of what earlier files handed on."""

    sources: Sources
    device: torch.device
    dtype: torch.dtype = torch.float32
    handoffs: HandoffReader | None = None
    stacks: "_Stacks" = field(default_factory=lambda: _Stacks())

    def handoff(self, key: str) -> Tensor:
        assert self.handoffs is not None
        return self.handoffs.tensor(key).to(self.device)

    def tensor(self, spec: TensorSpec) -> Tensor:
        if isinstance(spec, QuantizedWeight):
            stored = {part.key: self.stored(part) for part in spec.parts}
            return decode_checked(spec, stored, hint="download the checkpoint again").to(self.dtype)
        stored = self.stored(spec)
        return stored.to(self.dtype)

    def stored(self, spec: TensorSpec) -> Tensor:
        data = self.sources.read(spec)
        if not data:
            return torch.empty(spec.shape, dtype=dtypes.torch_dtype(spec.dtype), device=self.device)
        stored = torch.frombuffer(data, dtype=dtypes.torch_dtype(spec.dtype)).view(spec.shape)
        floats = spec.dtype in dtypes.FLOATS
        if floats and not all_finite(stored):
            raise Unrecoverable(
                "values that are not finite (NaN or infinity)",
                where=f"{self.sources.folders[spec.folder].label}/{spec.file}: {shown(spec.key)}",
                hint="the training run diverged: use an earlier save",
            )
        return stored.to(self.device)

    def bytes(self, spec: TensorSpec) -> bytearray:
        return self.sources.read(spec)

    def shared(self, spec: TensorSpec, cut: Callable[[Tensor], Tensor]) -> Tensor:
        return self.stacks.get(spec, lambda: cut(self.stored(spec)))

    def rows(self, spec: TensorSpec, grid: tuple[int, int], first: int, last: int) -> Tensor:
        width = dtypes.BITS[spec.dtype] // 8 * grid[1]
        data = bytearray((last - first) * width)
        self.sources.read_into(spec, first * width, memoryview(data))
        stored = torch.frombuffer(data, dtype=dtypes.torch_dtype(spec.dtype))
        return stored.view(last - first, grid[1]).to(self.device, self.dtype)

    def blocks(self, spec: TensorSpec, grid: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        for first, last in chunks(grid, self.device):
            yield first, self.rows(spec, grid, first, last)


class _Stacks:
    """What was cut of the stacks of experts' factors that were asked for last; thread-safe.

    Steps that follow each other ask for a few in turn: those of gate and up, and of down, of each adapter."""

    def __init__(self):
        self.lock, self.held = threading.Lock(), OrderedDict[TensorSpec, _Stack]()

    def get(self, spec: TensorSpec, make: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            stack = self.held.setdefault(spec, _Stack())
            self.held.move_to_end(spec)
        with stack.lock:  # others may read other stacks meanwhile
            if stack.value is None:
                stack.value = make()
                if stack.value.is_cuda:
                    torch.cuda.current_stream(
                        stack.value.device
                    ).synchronize()  # other workers have other streams
        with self.lock:
            while len(self.held) > LEAST_STACKS and sum(spec.nbytes for spec in self.held) > STACKS:
                self.held.popitem(last=False)
        return stack.value


@dataclass
class _Stack:
    value: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Piece:
    """Some bytes of one output file: a run of untouched bytes (no step), header bytes, or some chunks of a step."""

    shard: "_OpenShard"
    number: int  # in file order
    position: int
    length: int
    source: TensorSpec | None = None
    source_start: int = 0
    data: bytes | None = None
    step: "_OpenStep | None" = None
    chunks: "tuple[_Chunk, ...]" = ()


class _Chunk(NamedTuple):
    first: int  # rows [first, last) of the step's grid
    last: int
    sampled: bool


@dataclass
class _Run:
    """Untouched tensors that follow each other in an input file and in the output: bytes [source.start, stop), to `position`."""

    source: TensorSpec  # the first of them
    position: int
    stop: int

    def joins(self, source: TensorSpec, position: int) -> bool:
        """Whether this tensor goes on where the run ends, in both files."""
        same = (self.source.folder, self.source.file) == (source.folder, source.file)
        return (
            same
            and self.stop == source.start
            and self.position + self.stop - self.source.start == position
        )


@dataclass
class _OpenStep:
    """A step while its chunks are worked on: its edits are loaded by the first worker and freed after the last chunk."""

    step: Step
    left: int
    edits: list[Loaded] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    metrics: "_Facts" = field(default_factory=lambda: _Facts())

    def load(self, inputs: LocalReader) -> list[Loaded]:
        with self.lock:
            if self.edits is None:
                inputs = replace(inputs, dtype=arithmetic(self.step))
                self.edits = [
                    edit.load(inputs, self.step.source, self.step.grid) for edit in self.step.edits
                ]
                norms = [e.delta_norm for e in self.edits if e.delta_norm is not None]
                self.metrics.delta = math.hypot(*norms) if norms else None
            return self.edits

    def done(self, metrics: "_Facts") -> None:
        """One span less to do; the last one frees the edits."""
        with self.lock:
            self.metrics.add(metrics)
            self.left -= 1
            if self.left == 0:
                self.edits = None


@dataclass
class _Facts:
    """What is measured of one changed tensor."""

    delta: float | None = None
    squares: list[float] = field(default_factory=list)  # per chunk, Σ of the written values squared
    sampled: int = 0
    changed: int = 0  # of the sampled elements, how many differ from the base's
    lost: list[float] = field(default_factory=list)  # per sampled chunk, Σ (rounded - exact)²
    moved: list[float] = field(default_factory=list)  # per sampled chunk, Σ (exact - base)²
    kept: list[float] = field(
        default_factory=list
    )  # per sampled chunk, Σ (rounded - base)(exact - base)

    def add(self, other: "_Facts") -> None:
        self.squares += other.squares
        self.sampled += other.sampled
        self.changed += other.changed
        self.lost += other.lost
        self.moved += other.moved
        self.kept += other.kept

    def measure(self, before: Tensor, exact: Tensor, written: Tensor) -> None:
        """Compare a sampled chunk: the base's values, the exact new ones, and those as they were rounded."""
        rounded = written.to(exact.device, exact.dtype)
        self.sampled += exact.numel()
        self.changed += int((rounded != before).sum())
        self.lost.append(_squares(exact - rounded))
        delta = exact - before
        self.moved.append(_squares(delta))
        self.kept.append(float(torch.dot((rounded - before).view(-1), delta.view(-1))))

    def result(self, step: Step) -> dict:
        # fsum is exact, so the order in which the workers came does not show
        norm, lost, moved = (
            math.sqrt(math.fsum(self.squares)),
            math.fsum(self.lost),
            math.fsum(self.moved),
        )
        metrics: dict = {"adapters": list(step.adapters)} if step.adapters else {}
        if self.delta is not None and norm:
            metrics["delta"] = _short(self.delta / norm)
        if self.sampled:
            metrics["changed"] = _short(self.changed / self.sampled)
        if self.sampled and (
            moved or not self.delta
        ):  # else the delta lies in other rows than those that were sampled
            metrics["rounding"] = _short(math.sqrt(lost / moved)) if moved else 0.0
            metrics["survived"] = _short(math.fsum(self.kept) / moved) if moved else 1.0
        return metrics


def _squares(difference: Tensor) -> float:
    flat = difference.view(-1)
    return float(torch.dot(flat, flat))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


class _OpenShard:
    """An output file in the making: its pieces, its hash in file order, what is left to do."""

    def __init__(self, shard: Shard, stage: Stage, hashed: bool):
        self.shard = shard
        self.file = ShardFile(stage.path, shard.file, shard.layout.size)
        self.digest = RunningHash(tensor_ends(shard.layout)) if hashed else None
        self.steps: list[_OpenStep] = []
        self.lock = threading.Lock()
        self.waiting: dict[int, tuple[memoryview, Callable[[], None]]] = {}
        self.next, self.hashing, self.left = 0, False, 0
        self.flushed = 0

    def pieces(self, device: torch.device) -> Iterator[_Piece]:
        """The file's pieces in order; neighbouring untouched tensors of one input file are one run."""
        number = itertools.count()
        header = self.shard.layout.header
        yield _Piece(self, next(number), 0, len(header), data=header)
        run: _Run | None = None
        for step, at in zip(self.shard.steps, self.shard.layout.starts, strict=True):
            if run is not None and step.copied and run.joins(step.source, at):
                run.stop = step.source.stop
                continue
            yield from self._run(run, number)
            run = _Run(step.source, at, step.source.stop) if step.copied else None
            if not step.copied:
                yield from self._chunks(step, at, number, device)
        yield from self._run(run, number)

    def _run(self, run: "_Run | None", number) -> Iterator[_Piece]:
        if run is None:
            return
        start = run.source.start
        for offset in range(0, run.stop - start, RUN):
            length = min(RUN, run.stop - start - offset)
            yield _Piece(
                self,
                next(number),
                run.position + offset,
                length,
                source=run.source,
                source_start=start + offset,
            )

    def _chunks(self, step: Step, at: int, number, device: torch.device) -> Iterator[_Piece]:
        cut = [
            _Chunk(first, last, i % SAMPLE == 0)
            for i, (first, last) in enumerate(chunks(step.grid, device))
        ]
        span = SPAN if device.type == "cpu" else CUDA_SPAN
        spans = [tuple(cut[i : i + span]) for i in range(0, len(cut), span)]
        open_step = _OpenStep(step, len(spans))
        self.steps.append(open_step)
        width = dtypes.BITS[step.dtype] // 8 * step.grid[1]
        for some in spans:
            first, last = some[0].first, some[-1].last
            yield _Piece(
                self,
                next(number),
                at + first * width,
                (last - first) * width,
                step=open_step,
                chunks=some,
            )

    def hash(self, number: int, view: memoryview, release: Callable[[], None]) -> None:
        """Feed a piece's bytes to the hash in file order; `release` gives the buffer back once they are through."""
        if self.digest is None:
            release()
            return
        with self.lock:
            self.waiting[number] = (view, release)
            if self.hashing:
                return
            self.hashing = True
        while True:
            with self.lock:
                ready = self.waiting.pop(self.next, None)
                if ready is None:
                    self.hashing = False
                    return
                self.next += 1
            self.digest.update(ready[0])
            ready[1]()

    def result(self) -> ShardResult:
        metrics = {s.step.key: s.metrics.result(s.step) for s in self.steps if s.step.edits}
        sha = self.digest.hexdigest() if self.digest else None
        marks = self.digest.marks if self.digest else {}
        return ShardResult(self.shard.file, self.shard.layout.size, sha, marks, metrics)


class _Buffer:
    """Reusable memory that grows to the largest piece it has held; pinned where a GPU copies from and to it."""

    def __init__(self, pinned: bool):
        self.pinned, self.memory = pinned, torch.empty(0, dtype=torch.uint8)

    def sized(self, size: int) -> memoryview:
        """The first `size` bytes."""
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        return self.memory.numpy().data[:size]

    def tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """The first `size` bytes as numbers."""
        return self.memory[:size].view(dtype)


class _Scratch:
    """A worker's own memory for one chunk: its bytes as stored, and its numbers in float32 or float64 on the device."""

    def __init__(self, device: torch.device):
        self.device, self.stored = device, _Buffer(pinned=device.type == "cuda")
        self.numbers: dict[torch.dtype, Tensor] = {}

    def floats(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        count = stored.numel()
        room = self.numbers.get(dtype)
        if room is None or room.numel() < count:
            room = self.numbers[dtype] = torch.empty(count, dtype=dtype, device=self.device)
        # in this worker's stream, where all that follows waits for it
        return room[:count].view(stored.shape).copy_(stored, non_blocking=True)


class _Buffers:
    """A few buffers per worker bound the memory. A worker takes one BEFORE its piece, so that the piece that the hash waits for
    always has one: the other way round, later pieces could hold them all and wait for it."""

    def __init__(self, count: int, pinned: bool):
        self.free: queue.LifoQueue[_Buffer] = (
            queue.LifoQueue()
        )  # the one used last is still in cache
        for _ in range(count):
            self.free.put(_Buffer(pinned))

    def take(self, stopped: threading.Event) -> _Buffer | None:
        while not stopped.is_set():
            try:
                return self.free.get(timeout=PATIENCE)
            except queue.Empty:
                continue
        return None

    def give(self, buffer: _Buffer) -> None:
        self.free.put(buffer)


class _Job:
    """One run over some shards: the pieces in order, workers that take them, files finished behind them."""

    def __init__(self, shards, stage, sources, device, workers, hashed, finished, progress):
        self.shards, self.stage, self.sources, self.device = shards, stage, sources, device
        self.workers, self.hashed, self.finished, self.progress = (
            workers,
            hashed,
            finished,
            progress,
        )
        self.inputs = LocalReader(sources, device)
        self.buffers = _Buffers(4 * workers, pinned=device.type == "cuda")
        self.stop = threading.Event()
        self.problem: BaseException | None = None
        self.open: list[_OpenShard] = []
        self.lock = threading.Lock()
        self.turn = (
            threading.Lock()
        )  # to take the next piece; waits for files to be finished, so not the lock for counting
        self.room = threading.Semaphore(OPEN_SHARDS)
        # not Thread.join: interrupted, it takes a thread that runs for one that has ended (CPython 3.11)
        self.idle, self.working = threading.Event(), 0
        self.finisher = ThreadPoolExecutor(1, "finish")
        self.finishing: list[Future] = []

    def run(self) -> None:
        pieces = self._pieces()
        try:
            for _ in range(self.workers):
                with self.lock:
                    self.working += 1
                threading.Thread(target=self._work, args=(pieces,), daemon=True).start()
            while not self.idle.wait(PATIENCE):  # a wait without a limit would hold back Ctrl-C
                pass
            for future in self.finishing:
                future.result()
        except BaseException as error:
            self.problem = self.problem or error
        finally:
            self.stop.set()
            self._wait()
        for shard in self.open if self.idle.is_set() else ():
            shard.file.abandon()
        if self.problem is not None:
            raise self.problem

    def _wait(self) -> None:
        """Wait for the threads to see the stop sign. Who interrupts does not wait long for what waits for the disk: it is lost
        anyway, as a later run begins those files anew."""
        interrupted = isinstance(self.problem, KeyboardInterrupt)
        self.idle.wait(PARTING if interrupted else None)
        self.finisher.shutdown(wait=not interrupted, cancel_futures=True)

    def _pieces(self) -> Iterator[_Piece]:
        """The pieces of a few files in turn: each file has one hash, in file order, and one core makes it."""
        shards, turns = deque(self.shards), deque[Iterator[_Piece]]()
        while shards or turns:
            while shards and len(turns) < self.workers and self.room.acquire(blocking=False):
                turns.append(self._opened(shards.popleft()))
            if not turns:
                if self.room.acquire(timeout=PATIENCE):
                    turns.append(self._opened(shards.popleft()))
                elif self.stop.is_set():
                    return
                continue
            pieces = turns.popleft()
            piece = next(pieces, None)
            if piece is not None:
                turns.append(pieces)
                yield piece

    def _opened(self, shard: Shard) -> Iterator[_Piece]:
        opened = _OpenShard(shard, self.stage, self.hashed)
        self.open.append(opened)
        pieces = list(opened.pieces(self.device))
        opened.left = len(pieces)
        return iter(pieces)

    def _work(self, pieces: Iterator[_Piece]) -> None:
        try:
            scratch = _Scratch(self.device)
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            stream = (
                torch.cuda.stream(torch.cuda.Stream(self.device))
                if self.device.type == "cuda"
                else nullcontext()
            )
            with stream, torch.inference_mode():
                while (buffer := self.buffers.take(self.stop)) is not None:
                    with self.turn:
                        piece = next(pieces, None)
                    if piece is None:
                        self.buffers.give(buffer)
                        return
                    self._do(piece, buffer, scratch)
        except BaseException as error:
            with self.lock:
                self.problem = self.problem or error
            self.stop.set()
        finally:
            with self.lock:
                self.working -= 1
                if self.working == 0:
                    self.idle.set()

    def _do(self, piece: _Piece, buffer: _Buffer, scratch: _Scratch) -> None:
        shard = piece.shard
        if piece.data is not None:
            shard.file.write(piece.data, 0)
            shard.hash(piece.number, memoryview(piece.data), lambda: self.buffers.give(buffer))
        elif piece.step is None:
            self._copy(piece, buffer)
        else:
            self._compute(piece, buffer, scratch)
        self.progress(piece.length)
        with self.lock:
            shard.left -= 1
            last = shard.left == 0
            start, shard.flushed = (
                shard.flushed,
                max(shard.flushed, piece.position // FLUSH * FLUSH),
            )
            if last:
                self.finishing.append(self.finisher.submit(self._finish, shard))
        if not last and shard.flushed > start:
            shard.file.start_writeback(start, shard.flushed - start)

    def _copy(self, piece: _Piece, buffer: _Buffer) -> None:
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
        view = buffer.sized(piece.length)
        self.sources.read_into(source, piece.source_start - source.start, view)
        if not inside:
            shard.file.write(view, piece.position)
        shard.hash(piece.number, view, lambda: self.buffers.give(buffer))

    def _compute(self, piece: _Piece, buffer: _Buffer, scratch: _Scratch) -> None:
        open_step, metrics, position = piece.step, _Facts(), 0
        assert open_step is not None
        step, source, columns = open_step.step, open_step.step.source, open_step.step.grid[1]
        edits, dtype = open_step.load(self.inputs), arithmetic(step)
        view = buffer.sized(piece.length)
        written = buffer.tensor(piece.length, dtypes.torch_dtype(step.dtype)).view(-1, columns)
        width = dtypes.BITS[source.dtype] // 8 * columns
        with self.sources.file(source.folder, source.file) as descriptor:
            for first, last, sampled in piece.chunks:
                size = (last - first) * width
                read_exactly(
                    descriptor, scratch.stored.sized(size), source.start + first * width, source
                )
                stored = scratch.stored.tensor(size, dtypes.torch_dtype(source.dtype)).view(
                    -1, columns
                )
                w = scratch.floats(stored, dtype)
                before = w.clone() if sampled and edits else None
                for edit in edits:
                    edit.apply(w, first)
                flat = w.view(-1)
                metrics.squares.append(float(torch.dot(flat, flat)))
                outgoing = written[first - piece.chunks[0].first : last - piece.chunks[0].first]
                outgoing.copy_(rounded(w, step, first * columns))
                self._check_finite(metrics.squares[-1], outgoing, step, w)
                if before is not None:
                    metrics.measure(before, unrounded(w, before, edits, first), outgoing)
                end = position + dtypes.size(step.dtype, w.numel())
                piece.shard.file.write(view[position:end], piece.position + position)
                position = end
        open_step.done(metrics)
        piece.shard.hash(piece.number, view, lambda: self.buffers.give(buffer))

    def _check_finite(self, squares: float, outgoing: Tensor, step: Step, w: Tensor) -> None:
        limit = torch.finfo(outgoing.dtype).max
        if squares <= limit * limit:  # then no element is above the limit; false for NaN
            return
        if all_finite(outgoing):
            return
        what = "overflows" if all_finite(w) else "is not finite (NaN or infinity)"
        raise Unrecoverable(
            f"the merged value of {shown(step.key)} {what} in {step.dtype}",
            expected="finite values",
            where=f"{step.source.file}: {shown(step.key)}",
            hint="give --dtype bf16 or fp32, or a smaller weight"
            if what == "overflows"
            else "check the base and the adapters",
        )

    def _finish(self, shard: _OpenShard) -> None:
        if self.stop.is_set():
            return
        try:
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
            raise
