"""Reusable buffers of the workers: of bounded size, pinned for copies to and from a GPU."""

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
STAGING_SIZE = 8 << 20  # bytes of a copy to a GPU: less does not fill the bus, more is not faster
CPU_BUFFERS, GPU_BUFFERS = 4, 2  # of each worker, for pieces in progress
STAGING_COUNT = 2  # of a GPU's thread: one is filled while the other is copied
# (position, memory): fills the memory with the bytes from there on
ReadInto = Callable[[int, memoryview], None]


class Buffer:
    """Reusable memory, allocated at its first use; pinned for copies to and from a GPU, if there is
    memory to pin."""

    def __init__(self, size: int, pinned: bool):
        self.size, self.pinned = size, pinned

    @cached_property
    def memory(self) -> Tensor:
        with torch.inference_mode(False):  # so that it can be used outside, too
            if self.pinned:
                with suppress(RuntimeError):  # from CUDA: pageable memory is slower, but works
                    return torch.empty(pinned_size(self.size), dtype=torch.uint8, pin_memory=True)
            return torch.empty(self.size, dtype=torch.uint8)

    @cached_property
    def _bytes(self) -> memoryview:
        return self.memory.numpy().data

    def view(self, size: int) -> memoryview:
        """Return the first `size` bytes."""
        return self._bytes[:size]

    def tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return the first `size` bytes as numbers."""
        return self.memory[:size].view(dtype)


class StagingBuffers:
    """A thread's buffers for stored bytes that become numbers: on a GPU two pinned ones, one being
    filled while the other is copied; on the CPU one that fits a core's cache."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type != "cpu"
        self.ahead = int(self.on_gpu)  # chunks that may be on the GPU while the next one is read
        size, count = (STAGING_SIZE, STAGING_COUNT) if self.on_gpu else (CACHED, 1)
        self.staging = [Buffer(size, pinned=self.on_gpu) for _ in range(count)]
        self.copied: list[Mark | None] = [None] * len(self.staging)
        self.turn = 0
        # those of the last call, and all the memory behind them
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
        """Return numbers stored as `stored`, in `dtype` if given, on the device.

        `look` sees every stored number, in chunks. The result is in `into`, if given, or in new
        memory."""
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
        """Copy bytes to the GPU in this thread's stream, where later work waits for them."""
        made = torch.empty(size, dtype=torch.uint8, device=self.device)
        for first in range(0, size, STAGING_SIZE):
            part = made[first : first + STAGING_SIZE]
            buffer = self._next_buffer()
            read(first, buffer.view(len(part)))
            part.copy_(buffer.tensor(len(part), torch.uint8), non_blocking=True)
            self.copied[self.turn] = Mark(self.device)
        return made

    def blocks(self, tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield (position, bytes) of a tensor of the device in order. The bytes are valid until the
        next ones are requested; the following blocks are copied meanwhile."""
        if tensor.device.type == "cpu":
            yield 0, byte_view(tensor)
            return
        flat, waiting = tensor.contiguous().view(-1).view(torch.uint8), deque()
        for first in range(0, len(flat), STAGING_SIZE):
            part = flat[first : first + STAGING_SIZE]
            buffer = self._next_buffer()
            buffer.tensor(len(part), torch.uint8).copy_(part, non_blocking=True)
            self.copied[self.turn] = mark = Mark(self.device)
            waiting.append((first, buffer.view(len(part)), mark))
            if len(waiting) == len(self.staging):
                yield _landed(*waiting.popleft())
        while waiting:
            yield _landed(*waiting.popleft())

    def _next_buffer(self) -> Buffer:
        """Return the buffer whose copy began first, once it is done."""
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
        width, size, buffer = stored.itemsize, value.numel(), self.staging[0]
        direct = value.dtype == stored
        count = max(1, size) if direct and look is None else CACHED // width
        for first in range(0, size, count):
            part = value[first : first + count] if size > count else value
            if direct:
                there = part
                read(first * width, part.view(torch.uint8).numpy().data)
            else:
                there = buffer.tensor(part.numel() * width, stored)
                read(first * width, buffer.view(part.numel() * width))
            if look is not None:
                look(there)
            if not direct:
                part.copy_(there)

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return memory for numbers that the next call reuses; None on a GPU, which may still work
        on those of the last call."""
        if self.on_gpu:
            return None
        shape, (last, memory) = torch.Size(shape), self.numbers.get(dtype, (None, None))
        if last is not None and last.shape == shape:
            return last
        count = shape.numel()
        if memory is None or memory.numel() < count:
            memory = torch.empty(count, dtype=dtype)
        last = memory[:count].view(shape)
        self.numbers[dtype] = last, memory
        return last


def _landed(first: int, data: memoryview, mark: Mark) -> tuple[int, memoryview]:
    mark.wait()
    return first, data


_own = threading.local()


def keep_staging(device: torch.device) -> StagingBuffers:
    """Give this thread staging buffers for its lifetime."""
    _own.staging = StagingBuffers(device)
    return _own.staging


@contextmanager
def own_staging(device: torch.device) -> Iterator[StagingBuffers]:
    """Give this thread staging buffers until the end of the block."""
    before = getattr(_own, "staging", None)
    try:
        yield keep_staging(device)
    finally:
        _own.staging = before


def staging_of(device: torch.device) -> StagingBuffers:
    """Return this thread's staging buffers; new ones if it has none for the device."""
    staging = getattr(_own, "staging", None)
    return staging if staging is not None and staging.device == device else StagingBuffers(device)


class BufferPool:
    """A few buffers per worker bound the memory. A worker takes a buffer before its piece, so the
    piece that the hash waits for always has one. In the other order, later pieces could take all
    buffers and wait for it."""

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
