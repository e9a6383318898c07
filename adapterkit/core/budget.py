"""The memory that a job takes on the local engine."""

from collections import deque
from collections.abc import Iterable

BUFFERS = 32_000_000  # bytes of one worker's buffers
# tasks at a time on a GPU: more would wait for it, each with memory of its own
GPU_TASKS = 3
AHEAD = 2  # tasks for each worker that may wait to be written
STACKS = 1 << 30  # bytes of shared stacks of experts' factors


def factors_memory(sizes: Iterable[int], stacks: int, workers: int) -> int:
    """Return the bytes of the factors in memory at once: those of the largest steps, one for each
    worker, one of them while it is read, and the stacks that are kept."""
    largest = sorted(sizes)[-2 * workers :]
    return 2 * sum(largest) + 2 * sum(largest[-1:]) + min(STACKS, stacks)


def most_together(claims: Iterable[int], budget: int, workers: int) -> int:
    """Return the most bytes of a file's tasks that are in memory at once: those made ahead, and the
    one that is written."""
    most, in_use, window = 0, 0, deque[int]()
    for claim in claims:
        window.append(claim)
        in_use += claim
        while len(window) > AHEAD * workers + 1 or (len(window) > 1 and in_use > budget):
            in_use -= window.popleft()
        most = max(most, in_use)
    return most


def pinned_size(size: int) -> int:
    """Return the bytes of page-locked memory for `size` bytes: torch rounds up to a power of 2, and
    keeps what was pinned once."""
    return 1 << (size - 1).bit_length() if size else 0
