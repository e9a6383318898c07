"""Choose the device of a plan, and compute the memory that the plan takes there."""

import math
from dataclasses import replace

from adapterkit.core.budget import GPU_TASKS, pinned_size
from adapterkit.core.engine.buffers import GPU_BUFFERS, STAGING_COUNT, STAGING_SIZE
from adapterkit.core.engine.cost import CONSUMER, GPUS, H100, Machine, Work
from adapterkit.core.engine.device import gpu_count, is_cpu, kind, pick_device, probe_gpu_memory
from adapterkit.core.engine.partition import largest_piece
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch
from adapterkit.core.plan import Placement, Plan, Step, Task
from adapterkit.core.system import all_cores
from adapterkit.core.tasks.rows import CUDA_ELEMENTS

CONTEXT, SLACK = 1 << 30, 1.5  # bytes of CUDA and its libraries; overhead of allocators
IDLE = 0.9  # share of free memory at which no other GPU is probed, because each takes a context
# bytes of a worker for each element of a chunk, twice in float64: two chunks in progress, one of
# them measured
CHUNK_BYTES = 60
USABLE = 0.8  # share of a GPU's free memory: the rest is for allocator and libraries


def place(plan: Plan, name: str, own: int | None = None) -> tuple[Plan, str]:
    """Return the plan with its device and its memory there, and the device's name; `Refused` if
    there is no such device. For `auto` see `Work.gains`. `own`: the GPU of this process, if several
    processes share a machine's GPUs."""
    if is_cpu(name):
        return plan, "cpu"
    if name == "auto":
        name, notes = _auto(plan, own)
        plan = replace(plan, notes=(*plan.notes, *notes))
    elif name == "cuda" and own is not None:
        name = f"cuda:{own}"
    if name == "cpu":
        return plan, name
    on = kind(pick_device(name))
    return replace(plan, placement=Placement(on, device_totals(plan, all_cores()))), name


def _auto(plan: Plan, own: int | None) -> tuple[str, list[str]]:
    """Return the best device for a plan, and notes on GPUs that cannot be used. Among the GPUs with
    enough memory it is the one with most memory free."""
    work = Work.of(plan)
    if not work.gains(Machine(all_cores(), H100)):
        return "cpu", []  # before CUDA is started
    free, notes = {}, []
    for number in range(gpu_count()) if own is None else [own]:
        device = torch.device("cuda", number)
        try:
            free[device], total = probe_gpu_memory(device)
        except Refused as error:
            notes.append(f"{error.problem}; {error.hint}")
            continue
        if free[device] > IDLE * total:
            break
    best = max(free, key=lambda device: free[device], default=None)
    if best is None or free[best] < least_memory(plan):
        return "cpu", notes
    gpu = GPUS.get(torch.cuda.get_device_capability(best), CONSUMER)
    return str(best) if work.gains(Machine(all_cores(), gpu)) else "cpu", notes


def least_memory(plan: Plan) -> int:
    """Return the bytes of GPU memory that a plan needs at least: for its largest task, for one
    worker, or for a layer whose inputs are summed."""
    steps = _changed(plan)
    streamed = worker_memory(steps) + plan.factors_memory(steps, 1) if steps else 0
    largest = max((task.gpu_memory for task in tasks_of(plan)), default=0)
    return CONTEXT + int(SLACK * max(streamed, largest, _collected(plan)))


def _collected(plan: Plan) -> int:
    collections = (shard.collection for shard in plan.shards)
    return max((each.device_memory for each in collections if each is not None), default=0)


def tasks_of(plan: Plan) -> list[Task]:
    return [task for shard in plan.shards for task in shard.tasks]


def _changed(plan: Plan) -> list[Step]:
    return [step for shard in plan.shards for step in shard.steps if not step.copied]


def device_totals(plan: Plan, workers: int) -> dict[str, int]:
    """Return the most GPU memory that the plan takes, and the most page-locked memory of this
    machine."""
    steps = _changed(plan)
    factors = plan.factors_memory(steps, workers)
    streamed = workers * worker_memory(steps) + factors if steps else 0
    at_a_time = min(GPU_TASKS, workers)
    pinned = (at_a_time + 1) * STAGING_COUNT * STAGING_SIZE
    if not all(shard.tasks for shard in plan.shards):
        piece = pinned_size(largest_piece(plan.shards, torch.device("cuda")))
        pinned = max(pinned, workers * STAGING_COUNT * STAGING_SIZE) + workers * GPU_BUFFERS * piece
    return {
        "device_memory": max(streamed, plan.tasks_memory(at_a_time, gpu=True), _collected(plan)),
        "pinned_memory": pinned,
    }


def worker_memory(steps: list[Step]) -> int:
    """Return the bytes on the GPU for the chunks of one worker."""
    return max(
        ((CHUNK_BYTES << step.wide) * min(CUDA_ELEMENTS, math.prod(step.shape)) for step in steps),
        default=0,
    )


def fitting(plan: Plan, workers: int, free: int) -> tuple[int, int]:
    """Return how many workers fit into a GPU with that many free bytes, at least one, and the bytes
    for tasks together."""
    steps, usable = _changed(plan), int(USABLE * free)
    each, left = worker_memory(steps), usable - plan.factors_memory(steps, workers)
    return max(1, min(workers, left // each if each else workers)), min(plan.budget, usable)
