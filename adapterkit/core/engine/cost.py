"""Estimate the time of a plan on a machine's cores and on its GPU: `--device auto` takes the faster
one. All figures are here; those of GPUs are estimates."""

import math
from dataclasses import dataclass

from adapterkit.core.budget import GPU_TASKS
from adapterkit.core.plan import Collecting, Plan, Step, Task
from adapterkit.core.system import MOST_CORES

GAIN, SECONDS = 1.5, 3.0  # how much faster a GPU must be, and how many seconds it must save
DISK = 3e9  # bytes a second, read and written: one good SSD
BYTE = 0.75e-9  # seconds of a core for a byte of a file: read, converted, rounded, hashed
HOST_BYTE = 0.5e-9  # the same where a GPU converts and rounds
START = 2.0  # seconds until a GPU's libraries are loaded
LAUNCH = 5e-6  # seconds of the host for an operation of a GPU, under the interpreter's lock


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: operations per second in float32 and float64, bytes per second of its memory
    and of its bus."""

    float32: float
    float64: float
    memory: float
    bus: float


CONSUMER = Gpu(15e12, 15e12 / 64, 0.3e12, 11e9)  # also for unknown GPUs
V100 = Gpu(13e12, 6.5e12, 0.8e12, 11e9)
A100 = Gpu(18e12, 9e12, 1.5e12, 22e9)
H100 = Gpu(50e12, 25e12, 2.5e12, 45e9)
GPUS = {(6, 0): V100, (7, 0): V100, (8, 0): A100, (9, 0): H100, (9, 4): H100, (10, 0): H100}


@dataclass(frozen=True)
class Price:
    """The price of one unit of an `Effort`: seconds of a core. On a GPU: bytes of its memory read
    and written, seconds of a core on the host, and operations per piece."""

    core: float = 0.0
    touched: float = 0.0
    host: float = 0.0
    launches: int = 0
    piece: int = 1 << 23


# those of cores as measured for docs/figures.md
PRICES = {
    "encoded": Price(9e-9, touched=160, launches=60),
    "decoded": Price(3e-9, touched=60, launches=10),
    "elected": Price(8e-9, touched=100, launches=20),
    "drawn": Price(5e-9, touched=160, launches=20),
    "flops": Price(1 / 40e9),
    "wide": Price(1 / 16e9),
    "columns": Price(launches=10, piece=1),  # their arithmetic is in the products
    # on a GPU the host computes those of a few hundred rows that one consists of
    "decompositions": Price(host=0.05, launches=500, piece=1),
}


@dataclass(frozen=True)
class Machine:
    """Cores, a usable GPU if there is one, and bytes per second of the disk."""

    cores: int
    gpu: Gpu | None = None
    disk: float = DISK


@dataclass(frozen=True)
class Work:
    """The work of a plan: bytes read and written, those of them that are not copied, the counts of
    what `PRICES` names, operations sent to a GPU, and whether there are tasks, of which a GPU
    computes few at a time."""

    nbytes: float
    changed: float
    counts: dict[str, float]
    launches: int
    has_tasks: bool

    @classmethod
    def of(cls, plan: Plan) -> "Work":
        totals, counts, launches = plan.totals(), dict.fromkeys(PRICES, 0.0), 0
        for part in _parts(plan):
            effort = vars(part.effort)
            for name, price in PRICES.items():
                counts[name] += effort[name]
                launches += math.ceil(effort[name] / price.piece) * price.launches
        nbytes = totals["bytes_read"] + totals["bytes_written"]
        return cls(
            nbytes=nbytes,
            changed=nbytes - 2 * totals["bytes_copied"],
            counts=counts,
            launches=launches,
            has_tasks=any(shard.tasks for shard in plan.shards),
        )

    def gains(self, machine: Machine) -> bool:
        """Return whether the machine's GPU is faster by enough to be worth using."""
        here, there = self.seconds_on_cores(machine), self.seconds_on_gpu(machine)
        return here > GAIN * there and here - there > SECONDS

    def seconds_on_cores(self, machine: Machine) -> float:
        work = self.changed * BYTE + sum(n * PRICES[name].core for name, n in self.counts.items())
        return max(self.nbytes / machine.disk, work / min(MOST_CORES, machine.cores))

    def seconds_on_gpu(self, machine: Machine) -> float:
        gpu = machine.gpu
        if gpu is None:
            return math.inf
        touched = sum(n * PRICES[name].touched for name, n in self.counts.items())
        products = self.counts["flops"] / gpu.float32 + self.counts["wide"] / gpu.float64
        computing = products + touched / gpu.memory
        work = sum(n * PRICES[name].host for name, n in self.counts.items())
        workers = min(GPU_TASKS, machine.cores) if self.has_tasks else machine.cores
        host = (self.changed * HOST_BYTE + work) / workers + self.launches * LAUNCH
        return START + max(self.nbytes / machine.disk, self.changed / gpu.bus, computing, host)


def _parts(plan: Plan) -> list[Step | Task | Collecting]:
    steps = [step for shard in plan.shards for step in shard.steps if not step.copied]
    tasks = [task for shard in plan.shards for task in shard.tasks]
    collections = [shard.collection for shard in plan.shards if shard.collection is not None]
    return [*steps, *tasks, *collections]
