"""When `--device auto` takes a card, decided from a plan and what a machine has."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import adapterkit
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan, laid_out
from adapterkit.core.engine.cost import H100, PRICES, Machine, Work
from adapterkit.core.engine.device import LOCAL_RANKS, own_gpu
from adapterkit.core.engine.placement import (
    device_totals,
    fitting,
    least_memory,
    place,
    worker_memory,
)
from adapterkit.core.execute import Engine
from adapterkit.core.plan import Effort, OutputFile, Plan, Step, Task, TaskResult
from adapterkit.core.tasks.edits import AddLowRank, Band, Block, PlacedFactors
from adapterkit.core.tasks.rows import CUDA_ELEMENTS
from adapterkit.core.weights.reader import Reader
from adapterkit.many.workers import worker as rank
from tests.golden import inputs
from tests.support.card import Card, installed

CARD = 80 << 30
ROWS = COLUMNS = 16384


def spec(key: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(
        key, dtype, shape, "model.safetensors", 0, TensorPlan(key, dtype, shape).nbytes
    )


def step(number: int, rank: int) -> Step:
    block = Block(Band(0, ROWS), Band(0, COLUMNS))
    a, b = spec("a", "F32", rank, COLUMNS), spec("b", "F32", ROWS, rank)
    edit = AddLowRank(
        (
            PlacedFactors(
                Factors(module="m", kind="module", a=a, b=b, scale=1.0, rank=rank), (block,)
            ),
        )
    )
    source = spec(f"{number}.weight", "BF16", ROWS, COLUMNS)
    return Step(source.key, "BF16", source.shape, source, (edit,), ROWS)


def merge_of(count: int, rank: int) -> Plan:
    """A merge of so many weights of 268 million elements."""
    steps = tuple(step(number, rank) for number in range(count))
    stored = [TensorPlan(one.key, one.dtype, one.shape) for one in steps]
    return plan_of(OutputFile(laid_out("model.safetensors", stored, {}), steps))


def plan_of(*shards: OutputFile) -> Plan:
    return Plan(
        verb="merge", options={}, folders=(), headers={}, identities={}, shards=shards, files={}
    )


@dataclass(frozen=True)
class Worth(Task):
    """A task with products of so many seconds of a core, and so much memory."""

    seconds: float
    claim: int

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan("x", "F32", (4, 4)),)

    @property
    def effort(self) -> Effort:
        return Effort(flops=self.seconds / PRICES["flops"].core)

    @property
    def memory(self) -> int:
        return self.claim

    def compute(self, inputs: Reader) -> TaskResult:
        raise AssertionError("only planned")


HEAVY = Worth("heavy", 1e4, 1 << 30)


@pytest.mark.parametrize(
    ("count", "rank", "cores", "disk", "card"),
    [
        (1500, 16, 16, 2e9, False),  # 405B: the disk takes 800 s, the cores 190
        (1500, 256, 16, 2e9, False),  # 790 s of cores
        (1500, 800, 16, 2e9, True),  # 2,200 s
        (1500, 256, 16, 20e9, True),  # a disk that is ten times as fast
        (1500, 16, 16, 12e9, False),
        (4, 800, 1, 20e9, True),
        (1, 256, 1, 20e9, False),  # not worth a GPU's start
    ],
)
def test_a_merge_takes_a_card_where_arithmetic_is_longer_than_the_disk(
    count: int, rank: int, cores: int, disk: float, card: bool
):
    plan = merge_of(count, rank)
    assert Work.of(plan).gains(Machine(cores, H100, disk)) is card
    assert not Work.of(plan).gains(Machine(cores, None, disk))


def test_tasks_take_a_gpu_with_enough_memory():
    """For the largest, half as much again, and 1 GB."""
    light, plan = Worth("light", 1, 1 << 20), plan_of(OutputFile.computed("a", (HEAVY,)))
    least = least_memory(plan)
    assert 5 << 29 <= least < (5 << 29) + 4096  # and what small pieces take
    with installed(Card(least + 4096)):  # what `usable` took
        assert place(plan, "auto")[1] == "cuda:0"
        assert place(plan_of(OutputFile.computed("a", (light,))), "auto")[1] == "cpu"
    with installed(Card(least)):
        assert place(plan, "auto")[1] == "cpu"


def test_workers_and_tasks_share_the_free_memory():
    plan = merge_of(2, 16)
    assert fitting(plan, 16, CARD)[0] == 16
    assert 1 <= fitting(plan, 16, 2 << 30)[0] < 16
    assert fitting(plan, 16, 1 << 20)[0] == 1
    assert fitting(plan, 16, 1 << 30)[1] <= 1 << 30


def test_memory_of_a_merge_in_addition_to_the_weights():
    """Page-locked, of each worker: two rooms for what is read and two pieces of four chunks; on the
    GPU the chunks of as many workers, and the factors."""
    plan, chunk = merge_of(2, 16), 2 * CUDA_ELEMENTS
    four, eight = (device_totals(plan, workers) for workers in (4, 8))
    assert four["pinned_memory"] == 4 * (2 * (8 << 20) + 2 * 4 * chunk)
    assert eight["pinned_memory"] == 2 * four["pinned_memory"]
    one, three = (device_totals(plan, workers) for workers in (1, 3))
    assert three["device_memory"] - one["device_memory"] == 2 * worker_memory(plan.shards[0].steps)


@pytest.mark.parametrize(
    ("free", "own", "environment", "name", "device"),
    [
        ((70, 10), None, {}, "auto", "cuda:0"),
        ((10, 70), None, {}, "auto", "cuda:1"),  # not always the first one
        ((80, 80), None, {}, "auto", "cuda:0"),
        ((10, 70), 0, {"LOCAL_RANK": "0"}, "auto", "cuda:0"),  # the other is another process'
        ((80, 80), 1, {"LOCAL_RANK": "1"}, "cuda", "cuda:1"),
        ((80, 80), 1, {"LOCAL_RANK": "3"}, "cuda", "cuda:1"),
        ((80, 80), 1, {"SLURM_LOCALID": "1"}, "cuda", "cuda:1"),
        ((80, 80), 1, {"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "cuda", "cuda:1"),
        ((80, 80), 1, {"LOCAL_RANK": "1"}, "cuda:0", "cuda:0"),
        ((80, 80), 1, {"LOCAL_RANK": "1"}, "cpu", "cpu"),
        ((80, 80), None, {"LOCAL_RANK": "x"}, "cuda", "cuda"),
        ((80,), None, {"LOCAL_RANK": "1"}, "cuda", "cuda"),  # the launcher hides the others
    ],
)
def test_which_of_several_cards(
    free: tuple[int, ...],
    own: int | None,
    environment: dict[str, str],
    name: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
):
    for variable in LOCAL_RANKS:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    plan = plan_of(OutputFile.computed("a", (HEAVY,)))
    with installed(Card(count=len(free))) as card:
        card.taken = {number: 80 - each << 30 for number, each in enumerate(free)}
        assert own_gpu() == own
        assert place(plan, name, own_gpu())[1] == device


def test_a_rank_takes_its_own_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    inputs.create_inputs(Path())
    adapterkit.write_plan("plan.json", "merge", "base", "style", out="out")
    taken: list[str] = []
    real = rank.local

    def local(device: str, workers: int | None) -> Engine:
        taken.append(device)
        return real(device, workers)

    monkeypatch.setattr(rank, "local", local)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with installed(Card(count=4)):
        adapterkit.run("plan.json", device="cuda", worker="0/1")
    assert taken == ["cuda:1"]
