"""Reusable memory of the workers: bounded, pinned where a GPU copies from and to it."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from adapterkit.core.budget import pinned_size
from adapterkit.core.engine.device import Mark
from adapterkit.core.engine.interruptible import POLL_INTERVAL
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.tasks.rows import byte_view

CACHED = 1 << 20  # bytes that are read, looked at and converted while they are in a core's cache
ROOM = 8 << 20  # bytes of a copy to a GPU: less does not fill the bus, more is no faster
CPU_BUFFERS, GPU_BUFFERS = 4, 2  # of each worker, for pieces that are on their way
ROOMS = 2  # of a GPU's thread: one is read into while the other is copied
# (position, memory): fills the memory with the bytes from there on
ReadInto = Callable[[int, memoryview], None]


class Buffer:
    """Reusable memory, all of it from the first use on; pinned where a GPU copies from and to it,
    if there is memory to pin."""

    def __init__(self, size: int, pinned: bool):
        self.size, self.pinned = size, pinned

    @cached_property
    def memory(self) -> Tensor:
        with torch.inference_mode(False):  # for use in it and outside
            if self.pinned:
                with suppress(RuntimeError):  # of CUDA: pageable memory is slower, and as right
                    return torch.empty(pinned_size(self.size), dtype=torch.uint8, pin_memory=True)
            return torch.empty(self.size, dtype=torch.uint8)

    @cached_property
    def _bytes(self) -> memoryview:
        return self.memory.numpy().data

    def view(self, size: int) -> memoryview:
        """The first `size` bytes."""
        return self._bytes[:size]

    def tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """The first `size` bytes as numbers."""
        return self.memory[:size].view(dtype)


class StagingBuffers:
    """A thread's own memory for stored bytes on their way to numbers: on a GPU two pinned rooms, of
    which one is read into while the other is copied; on the CPU one that fits a core's cache."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type != "cpu"
        self.ahead = int(self.on_gpu)  # chunks that may be on the GPU while the next one is read
        size, count = (ROOM, ROOMS) if self.on_gpu else (CACHED, 1)
        self.staging = [Buffer(size, pinned=self.on_gpu) for _ in range(count)]
        self.copied: list[Mark | None] = [None] * len(self.staging)
        self.turn = 0
        # those of the last call, and all that there is room for
        self.numbers: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def load(
        self,
        read: ReadInto,
        stored: torch.dtype,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        look: Callable[[Tensor], None] | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """The numbers that are stored as `stored`, in `dtype` or as they are, on the device.

        `look` sees all of them as they are stored, in parts. They are `into`, if that is given, or
        memory of their own.
        """
        if self.on_gpu:
            value = self._copied(read, math.prod(shape) * stored.itemsize)
            value = value.view(stored).view(torch.Size(shape))
            if look is not None:
                look(value)
            return value.to(dtype or stored)  # converted there: fewer bytes go to the GPU
        value = torch.empty(shape, dtype=dtype or stored) if into is None else into
        self._read(read, stored, value.view(-1), look)
        return value

    def _copied(self, read: ReadInto, size: int) -> Tensor:
        """Bytes on the GPU, in this thread's stream, where all that follows waits for them."""
        made = torch.empty(size, dtype=torch.uint8, device=self.device)
        for first in range(0, size, ROOM):
            part = made[first : first + ROOM]
            room = self._free_room()
            read(first, room.view(len(part)))
            part.copy_(room.tensor(len(part), torch.uint8), non_blocking=True)
            self.copied[self.turn] = Mark(self.device)
        return made

    def blocks(self, tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
        """(position, bytes) of a tensor of the device in order, for use until the next ones are
        asked for: while they are, those behind them are copied."""
        if tensor.device.type == "cpu":
            yield 0, byte_view(tensor)
            return
        flat, waiting = tensor.contiguous().view(-1).view(torch.uint8), deque()
        for first in range(0, len(flat), ROOM):
            part = flat[first : first + ROOM]
            room = self._free_room()
            room.tensor(len(part), torch.uint8).copy_(part, non_blocking=True)
            self.copied[self.turn] = mark = Mark(self.device)
            waiting.append((first, room.view(len(part)), mark))
            if len(waiting) == len(self.staging):
                yield _landed(*waiting.popleft())
        while waiting:
            yield _landed(*waiting.popleft())

    def _free_room(self) -> Buffer:
        """The room that was copied longest ago."""
        self.turn = (self.turn + 1) % len(self.staging)
        mark = self.copied[self.turn]
        if mark is not None:
            mark.wait()
        return self.staging[self.turn]

    def _read(
        self,
        read: ReadInto,
        stored: torch.dtype,
        value: Tensor,
        look: Callable[[Tensor], None] | None,
    ) -> None:
        width, size, room = stored.itemsize, value.numel(), self.staging[0]
        direct = value.dtype == stored
        count = max(1, size) if direct and look is None else CACHED // width
        for first in range(0, size, count):
            part = value[first : first + count] if size > count else value
            if direct:
                there = part
                read(first * width, part.view(torch.uint8).numpy().data)
            else:
                there = room.tensor(part.numel() * width, stored)
                read(first * width, room.view(part.numel() * width))
            if look is not None:
                look(there)
            if not direct:
                part.copy_(there)

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Memory for numbers that the next call gives again; None on a GPU, which may still be at
        those of the call before."""
        if self.on_gpu:
            return None
        shape, (last, room) = torch.Size(shape), self.numbers.get(dtype, (None, None))
        if last is not None and last.shape == shape:
            return last
        count = shape.numel()
        if room is None or room.numel() < count:
            room = torch.empty(count, dtype=dtype)
        last = room[:count].view(shape)
        self.numbers[dtype] = last, room
        return last


def _landed(first: int, data: memoryview, mark: Mark) -> tuple[int, memoryview]:
    mark.wait()
    return first, data


_own = threading.local()


def keep_staging(device: torch.device) -> StagingBuffers:
    """Rooms that this thread keeps as long as it lives."""
    _own.staging = StagingBuffers(device)
    return _own.staging


@contextmanager
def own_staging(device: torch.device) -> Iterator[StagingBuffers]:
    """Rooms that this thread keeps until the end of the block."""
    before = getattr(_own, "staging", None)
    try:
        yield keep_staging(device)
    finally:
        _own.staging = before


def staging_of(device: torch.device) -> StagingBuffers:
    """Those that this thread keeps; else some for once."""
    staging = getattr(_own, "staging", None)
    return staging if staging is not None and staging.device == device else StagingBuffers(device)


class BufferPool:
    """A few buffers per worker bound the memory. A worker takes one BEFORE its piece, so that the
    piece that the hash waits for always has one: the other way round, later pieces could hold them
    all and wait for it."""

    def __init__(self, count: int, size: int, pinned: bool):
        # the one used last is still in cache
        self.free: queue.LifoQueue[Buffer] = queue.LifoQueue()
        for _ in range(count):
            self.free.put(Buffer(size, pinned))

    def take(self, stopped: threading.Event) -> Buffer | None:
        while not stopped.is_set():
            try:
                return self.free.get(timeout=POLL_INTERVAL)
            except queue.Empty:
                continue
        return None

    def give(self, buffer: Buffer) -> None:
        self.free.put(buffer)
