"""An output file cut into pieces: runs of untouched bytes, and spans of chunks of changed
tensors."""

from __future__ import annotations

import itertools
import sys
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.hashes import RunningHash, tensor_ends
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.engine.device import Mark
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.lazy import torch
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.plan import Loaded, OutputFile, Step
from adapterkit.core.tasks.metrics import ChangeMetrics, delta_norm
from adapterkit.core.tasks.rows import arithmetic, chunks, elements_of_chunk
from adapterkit.kernels.rows import rows_of_chunk

# chunks that a worker takes at a time: it touches shared state once per span
SPAN = 4
RUN = 4 << 20  # bytes of one piece of an untouched run
DIGITS = 4  # of metrics, which sampled chunks estimate
SAMPLE = 64  # metrics are measured on every 64th chunk of a tensor, the first included


@dataclass
class Piece:
    """A range of bytes of one output file: copied bytes (no step), header bytes, or some chunks of
    a step."""

    shard: OpenShard
    number: int  # in file order
    position: int
    length: int
    source: TensorSpec | None = None
    source_start: int = 0
    data: bytes | None = None
    step: OpenStep | None = None
    chunks: tuple[Chunk, ...] = ()


class Chunk(NamedTuple):
    first: int  # rows [first, last) of the step's grid
    last: int
    sampled: bool


@dataclass
class _CopiedRun:
    """Untouched tensors that follow each other in an input file and in the output: bytes
    [source.start, stop), to `position`."""

    source: TensorSpec  # the first of them
    position: int
    stop: int

    def joins(self, source: TensorSpec, position: int) -> bool:
        """Return whether this tensor continues the run in both files."""
        same = (self.source.folder, self.source.file) == (source.folder, source.file)
        return (
            same
            and self.stop == source.start
            and self.position + self.stop - self.source.start == position
        )


@dataclass
class OpenStep:
    """A step in progress. The first worker loads its edits; they are freed after the last chunk,
    once each worker has waited for its GPU work with them."""

    step: Step
    remaining: int
    edits: list[Loaded] | None = None
    loaded: Mark | None = None  # in the stream of the worker that loaded them
    lock: threading.Lock = field(default_factory=threading.Lock)
    metrics: ChangeMetrics = field(default_factory=ChangeMetrics)

    def load(self, inputs: LocalReader) -> list[Loaded]:
        with self.lock:
            if self.edits is None:
                inputs = replace(inputs, dtype=arithmetic(self.step))
                self.edits = [
                    edit.load(inputs, self.step.source, self.step.grid) for edit in self.step.edits
                ]
                self.metrics.delta = delta_norm(self.edits)
                self.loaded = Mark(inputs.device)
            assert self.loaded is not None
            self.loaded.precede()
            return self.edits

    def done(self, metrics: ChangeMetrics) -> None:
        """Count one span as done; the last one frees the edits."""
        with self.lock:
            self.metrics.add(metrics)
            self.remaining -= 1
            if self.remaining == 0:
                self.edits = None


def largest_piece(files: Iterable[OutputFile], device: torch.device) -> int:
    """Return the bytes of the largest piece of these files."""
    return max((RUN, *(_piece_of(step, device) for file in files for step in file.steps)))


def _piece_of(step: Step, device: torch.device) -> int:
    """Return the bytes of a step's first piece, the largest."""
    if step.copied:
        return RUN
    rows, columns = step.grid
    span = SPAN * rows_of_chunk(columns, elements_of_chunk(device))
    return min(span, rows) * columns * dtypes.BITS[step.dtype] // 8


def cut(shard: OutputFile, parts: int, device: torch.device) -> list[OutputFile]:
    """Cut an output file, between pieces, into at most that many ranges of about the same size."""
    starts = [piece.position for piece in OpenShard(shard, hashed=False).pieces(device)]
    wanted = [shard.size * number // parts for number in range(1, parts)]
    places = [starts[i] for i in (bisect_left(starts, at) for at in wanted) if i < len(starts)]
    edges = sorted({0, *places, shard.size})
    return [replace(shard, range=edge) for edge in itertools.pairwise(edges)]


class OpenShard:
    """An unfinished output file: its pieces, its hash in file order, and its remaining pieces."""

    file: ShardFile

    def __init__(self, shard: OutputFile, *, hashed: bool):
        self.shard = shard
        hashed = hashed and shard.range is None
        self.digest = RunningHash(tensor_ends(shard.layout)) if hashed else None
        self.steps: list[OpenStep] = []
        self.lock = threading.Lock()
        self.waiting: dict[int, tuple[memoryview, Callable[[], None]]] = {}
        self.next, self.hashing, self.remaining = 0, False, 0
        self.flushed = 0

    def pieces(self, device: torch.device) -> Iterator[Piece]:
        """Yield the pieces in order, at their positions in the file or in its range."""
        if self.shard.range is None:
            yield from self._pieces(device)
            return
        start, stop = self.shard.range
        to_the_end = stop == self.shard.layout.size
        inside = [
            piece
            for piece in self._pieces(device, start, stop)
            if start <= piece.position and (piece.position < stop or to_the_end)
        ]
        spans = Counter(id(piece.step) for piece in inside)
        self.steps = [step for step in self.steps if id(step) in spans]
        for step in self.steps:
            step.remaining = spans[id(step)]
        for number, piece in enumerate(inside):
            yield replace(piece, number=number, position=piece.position - start)

    def _pieces(
        self, device: torch.device, start: int = 0, stop: int = sys.maxsize
    ) -> Iterator[Piece]:
        """Yield the pieces of the whole file, except tensors and runs that are nowhere near [start,
        stop); neighboring untouched tensors of one input file are one run."""
        number = itertools.count()
        header = self.shard.layout.header
        yield Piece(self, next(number), 0, len(header), data=header)
        run: _CopiedRun | None = None
        layout = self.shard.layout
        for step, stored, at in zip(self.shard.steps, layout.tensors, layout.starts, strict=True):
            if run is not None and step.copied and run.joins(step.source, at):
                run.stop = step.source.stop
                continue
            yield from self._run(run, number, start, stop)
            run = _CopiedRun(step.source, at, step.source.stop) if step.copied else None
            if not step.copied and start <= at + stored.nbytes and at < stop:
                yield from self._chunks(step, at, number, device)
        yield from self._run(run, number, start, stop)

    def _run(self, run: _CopiedRun | None, number, start: int, stop: int) -> Iterator[Piece]:
        if run is None:
            return
        size = run.stop - run.source.start
        first = max(0, start - run.position) // RUN * RUN
        for offset in range(first, min(size, stop - run.position), RUN):
            yield Piece(
                self,
                next(number),
                run.position + offset,
                min(RUN, size - offset),
                source=run.source,
                source_start=run.source.start + offset,
            )

    def _chunks(self, step: Step, at: int, number, device: torch.device) -> Iterator[Piece]:
        cut = [
            Chunk(first, last, i % SAMPLE == 0)
            for i, (first, last) in enumerate(chunks(step.grid, device))
        ]
        spans = [tuple(cut[i : i + SPAN]) for i in range(0, len(cut), SPAN)]
        open_step = OpenStep(step, len(spans))
        self.steps.append(open_step)
        width = dtypes.BITS[step.dtype] // 8 * step.grid[1]
        for some in spans:
            first, last = some[0].first, some[-1].last
            yield Piece(
                self,
                next(number),
                at + first * width,
                (last - first) * width,
                step=open_step,
                chunks=some,
            )

    def hash(self, number: int, view: memoryview, release: Callable[[], None]) -> None:
        """Feed a piece's bytes to the hash in file order; `release` returns the buffer after
        that."""
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
        changed = [each for each in self.steps if each.step.edits]
        if self.shard.range is not None:  # its metrics continue in the other ranges
            raw = {each.step.key: vars(each.metrics) for each in changed}
            return ShardResult(self.shard.name, self.shard.size, None, {}, raw)
        metrics = {
            s.step.key: s.metrics.result(s.step, digits=DIGITS) for s in self.steps if s.step.edits
        }
        sha = self.digest.hexdigest() if self.digest else None
        marks = self.digest.marks if self.digest else {}
        return ShardResult(self.shard.file, self.shard.layout.size, sha, marks, metrics)
