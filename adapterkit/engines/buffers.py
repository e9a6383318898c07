"""Reusable memory of the workers: bounded, pinned where a GPU copies from and to it."""

import queue
import threading

import torch
from torch import Tensor

from adapterkit.engines.waiting import POLL_INTERVAL


class Buffer:
    """Reusable memory that grows to the largest piece it has held; pinned where a GPU copies from
    and to it."""

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


class Scratch:
    """A worker's own memory for one chunk: its bytes as stored, and its numbers in float32 or
    float64 on the device."""

    def __init__(self, device: torch.device):
        self.device, self.stored = device, Buffer(pinned=device.type == "cuda")
        self.numbers: dict[torch.dtype, Tensor] = {}

    def floats(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        count = stored.numel()
        room = self.numbers.get(dtype)
        if room is None or room.numel() < count:
            room = self.numbers[dtype] = torch.empty(count, dtype=dtype, device=self.device)
        # in this worker's stream, where all that follows waits for it
        return room[:count].view(stored.shape).copy_(stored, non_blocking=True)


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
