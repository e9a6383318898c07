"""Which device a plan runs on, and what it takes there."""

import math
from dataclasses import dataclass, replace

import torch

from adapterkit import dtypes
from adapterkit.checkpoint.system import cores
from adapterkit.engines.device import kind, pick_device
from adapterkit.engines.local.pieces import RUN, SPAN
from adapterkit.errors import Refused
from adapterkit.plan import Placement, Plan, Step, Task
from adapterkit.tasks.rows import CUDA_ELEMENTS

LEAST_FREE = 8 << 30  # bytes of a GPU's memory below which it is left to others
GAIN, SECONDS = 0.5, 10.0  # of the disk's time, and in all: what a GPU has to save a merge
SECONDS_EACH = 1.5e-9  # of one core for a changed byte: read, converted, rounded, hashed
FLOPS = 40e9  # of one core, in float32
GPU_BUFFERS = 2  # of each worker, for pieces that are on their way
# bytes of a worker for each element of a chunk, twice in float64: two chunks that are under way, of
# which one is measured
CHUNK_BYTES = 60
USABLE = 0.8  # of a GPU's free memory: the rest is the allocator's and the libraries'


@dataclass(frozen=True)
class Capacity:
    """What a machine has: cores, bytes a second of its disk, free bytes on its GPU (0: none)."""

    cores: int
    gpu: int = 0
    disk: float = 2e9


def place(plan: Plan, name: str) -> tuple[Plan, str]:
    """The plan with the device that it runs on and what it takes there, and that device's name;
    `Refused` where there is no such device. `auto`: see `prefers_gpu`."""
    if name == "auto":
        name = "cuda" if torch.cuda.device_count() and _has_use(plan) else "cpu"
    device = pick_device(name)
    if device.type == "cpu":
        return plan, name
    return replace(plan, placement=Placement(kind(device), device_totals(plan, cores()))), name


def _has_use(plan: Plan) -> bool:
    if not prefers_gpu(plan, Capacity(cores(), LEAST_FREE)):
        return False  # before CUDA is started
    try:
        device = pick_device("cuda")
    except Refused:
        return False
    return prefers_gpu(plan, Capacity(cores(), torch.cuda.mem_get_info(device)[0]))


def prefers_gpu(plan: Plan, capacity: Capacity) -> bool:
    """Whether a plan is better off on a GPU: with tasks that are much arithmetic; else where the
    arithmetic would take half as long again as the disk, and ten seconds longer."""
    tasks = tasks_of(plan)
    if capacity.gpu < LEAST_FREE:
        return False
    if any(task.prefers_gpu for task in tasks):
        return max(task.memory for task in tasks) <= USABLE * capacity.gpu
    totals = plan.totals()
    disk = (totals["bytes_read"] + totals["bytes_written"]) / capacity.disk
    flops = sum(edit.flops for step in _changed(plan) for edit in step.edits)
    one_core = totals["bytes_changed"] * SECONDS_EACH + flops / FLOPS
    return one_core / capacity.cores - disk > max(GAIN * disk, SECONDS)


def tasks_of(plan: Plan) -> list[Task]:
    return [task for shard in plan.shards for task in shard.tasks]


def _changed(plan: Plan) -> list[Step]:
    return [step for shard in plan.shards for step in shard.steps if not step.copied]


def device_totals(plan: Plan, workers: int) -> dict[str, int]:
    """The most bytes of the GPU's memory that the plan takes, and of page-locked memory of this
    machine."""
    steps = _changed(plan)
    streamed = workers * worker_memory(steps) + plan.factors_memory(steps) if steps else 0
    widths = [max(dtypes.BITS[s.dtype], dtypes.BITS[s.source.dtype]) // 8 for s in steps]
    elements = max((math.prod(step.shape) for step in steps), default=0)
    width = max(widths, default=1)
    chunk, piece = (width * min(n * CUDA_ELEMENTS, elements) for n in (1, SPAN))
    pinned = workers * (2 * chunk + GPU_BUFFERS * max(piece, RUN))
    any_streamed = not all(shard.tasks for shard in plan.shards)
    return {
        "device_memory": max(streamed, plan.tasks_memory()),
        "pinned_memory": pinned if any_streamed else 0,
    }


def worker_memory(steps: list[Step]) -> int:
    """Bytes on the GPU for the chunks of one worker."""
    return max(
        ((CHUNK_BYTES << step.wide) * min(CUDA_ELEMENTS, math.prod(step.shape)) for step in steps),
        default=0,
    )


def fitting(plan: Plan, workers: int, free: int) -> tuple[int, int]:
    """How many of the workers a GPU with that many free bytes has room for, at least one, and the
    bytes for tasks together."""
    steps, usable = _changed(plan), int(USABLE * free)
    each, room = worker_memory(steps), usable - plan.factors_memory(steps)
    return max(1, min(workers, room // each if each else workers)), min(plan.budget, usable)
