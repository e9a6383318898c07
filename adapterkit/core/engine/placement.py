"""Which device a plan runs on, and what it takes there."""

import math
from dataclasses import replace

from adapterkit.core.budget import GPU_TASKS, pinned_size
from adapterkit.core.engine.buffers import GPU_BUFFERS, ROOM, ROOMS
from adapterkit.core.engine.cost import CONSUMER, GPUS, H100, Machine, Work
from adapterkit.core.engine.device import gpu_count, is_cpu, kind, pick_device, probe_gpu_memory
from adapterkit.core.engine.partition import largest_piece
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch
from adapterkit.core.plan import Placement, Plan, Step, Task
from adapterkit.core.system import all_cores
from adapterkit.core.tasks.rows import CUDA_ELEMENTS

CONTEXT, SLACK = 1 << 30, 1.5  # bytes of CUDA and its libraries; what allocators keep of a task
IDLE = 0.9  # of a GPU's memory is free: no other one is looked at, as each takes a context
# bytes of a worker for each element of a chunk, twice in float64: two chunks that are under way, of
# which one is measured
CHUNK_BYTES = 60
USABLE = 0.8  # of a GPU's free memory: the rest is the allocator's and the libraries'


def place(plan: Plan, name: str, own: int | None = None) -> tuple[Plan, str]:
    """The plan with the device that it runs on and what it takes there, and that device's name;
    `Refused` where there is no such device. `auto`: see `Work.gains`. `own`: the GPU of this
    process, where several of a machine share its GPUs."""
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
    """The device that a plan is best off on, and notes on GPUs that cannot be used: of those that
    can and have room for it, the one with most memory free."""
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
    """Bytes of a GPU's memory that a plan does not run without: those of its largest task, of one
    worker, or of a layer whose inputs are summed."""
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
    """The most bytes of the GPU's memory that the plan takes, and of page-locked memory of this
    machine."""
    steps = _changed(plan)
    factors = plan.factors_memory(steps, workers)
    streamed = workers * worker_memory(steps) + factors if steps else 0
    at_a_time = min(GPU_TASKS, workers)
    pinned = (at_a_time + 1) * ROOMS * ROOM  # of those that compute, and of the one that writes
    if not all(shard.tasks for shard in plan.shards):
        piece = pinned_size(largest_piece(plan.shards, torch.device("cuda")))
        pinned = max(pinned, workers * ROOMS * ROOM) + workers * GPU_BUFFERS * piece
    return {
        "device_memory": max(streamed, plan.tasks_memory(at_a_time, gpu=True), _collected(plan)),
        "pinned_memory": pinned,
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
    each, room = worker_memory(steps), usable - plan.factors_memory(steps, workers)
    return max(1, min(workers, room // each if each else workers)), min(plan.budget, usable)
