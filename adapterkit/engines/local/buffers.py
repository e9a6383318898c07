"""Reusable memory of the workers: bounded, pinned where a GPU copies from and to it."""

import queue
import threading

import torch
from torch import Tensor

from adapterkit.engines.interruptible import POLL_INTERVAL


class Buffer:
    """Reusable memory that grows to the largest piece it has held; pinned where a GPU copies from
    and to it, if there is memory to pin."""

    def __init__(self, pinned: bool):
        self.pinned, self.memory = pinned, torch.empty(0, dtype=torch.uint8)

    def sized(self, size: int) -> memoryview:
        """The first `size` bytes."""
        if len(self.memory) < size:
            self.memory = self._allocated(size)
        return self.memory.numpy().data[:size]

    def _allocated(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # of CUDA: copies of pageable memory are slower, and as right
                self.pinned = False
        return torch.empty(size, dtype=torch.uint8)

    def tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """The first `size` bytes as numbers."""
        return self.memory[:size].view(dtype)


class Scratch:
    """A worker's own memory: chunks' bytes as stored and, on the CPU, the numbers of one in float32
    or float64.

    A GPU's worker reads the next chunk while one is on the GPU, so there it has two rooms for
    bytes. One is read into again when the chunk that it held has come back from the GPU.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type != "cpu"
        self.device, self.ahead = device, int(on_gpu)  # chunks that may be on the GPU meanwhile
        self.stored = [Buffer(pinned=on_gpu) for _ in range(1 + self.ahead)]
        self.numbers: dict[torch.dtype, Tensor] = {}

    def floats(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The chunk's numbers, on the device; its own memory on a GPU."""
        if self.ahead:
            # in this worker's stream, where all that follows waits for it; converted there
            return stored.to(self.device, non_blocking=True).to(dtype)
        count = stored.numel()
        room = self.numbers.get(dtype)
        if room is None or room.numel() < count:
            room = self.numbers[dtype] = torch.empty(count, dtype=dtype)
        return room[:count].view(stored.shape).copy_(stored)


class BufferPool:
    """A few buffers per worker bound the memory. A worker takes one BEFORE its piece, so that the
    piece that the hash waits for always has one: the other way round, later pieces could hold them
    all and wait for it."""

    def __init__(self, count: int, pinned: bool):
        # the one used last is still in cache
        self.free: queue.LifoQueue[Buffer] = queue.LifoQueue()
        for _ in range(count):
            self.free.put(Buffer(pinned))

    def take(self, stopped: threading.Event) -> Buffer | None:
        while not stopped.is_set():
            try:
                return self.free.get(timeout=POLL_INTERVAL)
            except queue.Empty:
                continue
        return None

    def give(self, buffer: Buffer) -> None:
        self.free.put(buffer)
