"""Every task class keeps what `Task` promises: bounds, reads, determinism, pickle, memory; none
mixes tensors of a GPU with tensors of the CPU."""

import dataclasses
import importlib
import inspect
import math
import pickle
import pkgutil
import tracemalloc
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

import adapterkit.core.tasks
from adapterkit.bases.gguf.weight import GgufWeight
from adapterkit.bases.quantized.loftq import LoftQWeight
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.local import LocalReader
from adapterkit.core.plan import Plan, Task, TaskResult
from adapterkit.core.tasks.common import FactorsTask
from adapterkit.core.tasks.quantize import EncodedStep, EncodedWeight
from adapterkit.core.tasks.rows import RequantizedWeight
from adapterkit.core.weights.codec import stored_parts
from adapterkit.kernels import block_sizes as pieces
from adapterkit.kernels import dense
from adapterkit.verbs.combine.planning.arrow import StackedExperts
from adapterkit.verbs.init.tasks import ResidualWeight
from tests.support.card import DEVICE, Card, installed

# Bytes beyond a claim: blocks of a constant size, in which most tasks work through a weight, and
# which are as large as the layers here; LAPACK's workspace; Python's objects.
SLACK = 1 << 20


def task_classes() -> Iterator[type[Task]]:
    for module in pkgutil.iter_modules(adapterkit.core.tasks.__path__, "adapterkit.core.tasks."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = cls.__module__ == module.name and issubclass(cls, Task)
            if own and not inspect.isabstract(cls):
                yield cls


CLASSES = sorted(task_classes(), key=lambda cls: cls.__name__)


class CheckedSources(Sources):
    """Refuses what a task does not say that it reads."""

    def __init__(self, plan: Plan, allowed: tuple[TensorSpec, ...]):
        super().__init__(plan.folders, plan.identities)
        self.allowed = [part for spec in allowed for part in stored_parts(spec)]

    def check(self, spec: TensorSpec) -> None:
        place = spec.folder, spec.file
        assert any(
            place == (other.folder, other.file)
            and other.start <= spec.start <= spec.stop <= other.stop
            for other in self.allowed
        ), f"reads {spec.key}, which is not in its `reads`"

    def read(self, spec: TensorSpec) -> bytearray:
        self.check(spec)
        return super().read(spec)

    def read_into(self, spec: TensorSpec, offset: int, view: memoryview) -> None:
        self.check(spec)
        super().read_into(spec, offset, view)


class Handoffs(dict[str, Tensor]):
    """What the tasks of a plan hand on, by the tasks that are asked for it."""

    def __init__(self, plan: Plan, tasks: list[Task]):
        super().__init__()
        self.plan, self.tasks = plan, tasks

    def tensor(self, key: str) -> Tensor:
        return self[key].clone()

    def __missing__(self, key: str) -> Tensor:
        task = next(task for task in self.tasks if key in task.handoff_writes)
        self.update(compute(self.plan, task, self).handoff)
        return dict(self)[key]


@dataclasses.dataclass
class CheckedHandoffs:
    """The handoffs that a task says it reads, no others."""

    handoffs: Handoffs | None
    keys: tuple[str, ...]

    def tensor(self, key: str) -> Tensor:
        assert self.handoffs is not None and key in self.keys
        return self.handoffs.tensor(key)


def compute(plan: Plan, task: Task, handoffs: "Handoffs | None" = None) -> TaskResult:
    cpu = torch.device("cpu")
    with CheckedSources(plan, task.reads) as sources, torch.inference_mode():
        checked = CheckedHandoffs(handoffs, task.handoff_reads)
        result = task.compute(LocalReader(sources, cpu, handoffs=checked))
        assert tuple(result.handoff) == task.handoff_writes
        return result


def stored(result: TaskResult) -> dict[str, bytes | TensorSpec]:
    return {
        key: tensor if isinstance(tensor, TensorSpec) else raw(tensor)
        for key, tensor in (result.tensors | result.handoff).items()
    }


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def cases(wide_plans: dict[str, Plan]) -> dict[type[Task], list[tuple[Plan, Task, Handoffs]]]:
    """For each class one task of each plan that has some, with the handoffs that it reads."""
    found: dict[type[Task], list[tuple[Plan, Task, Handoffs]]] = {}
    for plan in wide_plans.values():
        tasks = [t for shard in plan.shards for t in shard.tasks]
        last = {(type(task), getattr(task, "checked", None)): task for task in tasks}
        for (cls, _), task in last.items():
            found.setdefault(cls, []).append((plan, task, Handoffs(plan, tasks)))
    return found


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def own_cases(request: pytest.FixtureRequest, cases: dict, one_thread: None) -> list:
    assert cases.get(request.param), f"no job has a {request.param.__name__}: add one"
    return cases[request.param]


def test_is_a_frozen_dataclass():
    for cls in CLASSES:
        assert dataclasses.is_dataclass(cls), cls
        assert cls.__dataclass_params__.frozen, cls


def test_outputs_are_within_their_bounds(own_cases: list):
    """Keys, dtypes and shapes; sizes are as planned, but of what is of variable size."""
    for plan, task, handoffs in own_cases:
        bounds = {bound.key: bound for bound in task.max_outputs}
        assert len(bounds) == len(task.max_outputs)
        for key, tensor in compute(plan, task, handoffs).tensors.items():
            bound = bounds[key]
            is_spec = isinstance(tensor, TensorSpec)
            assert (tensor.dtype if is_spec else dtypes.name_of(tensor.dtype)) == bound.dtype
            assert len(tensor.shape) == len(bound.shape)
            if not bound.varies:
                assert all(n <= most for n, most in zip(tensor.shape, bound.shape, strict=True))


def test_a_task_reads_only_its_declared_tensors(own_cases: list):
    for plan, task, handoffs in own_cases:
        assert set(task.shared_reads) <= set(task.reads)
        compute(plan, task, handoffs)
        if task.reads and not task.copied:
            with pytest.raises(AssertionError, match="not in its `reads`"):
                compute(plan, _Without(task), handoffs)


class _Without:
    """A task that does not say what it reads."""

    reads = ()

    def __init__(self, task: Task):
        self.compute = task.compute
        self.handoff_reads, self.handoff_writes = task.handoff_reads, task.handoff_writes


def test_computes_the_same_twice_and_after_pickle(own_cases: list):
    for plan, task, handoffs in own_cases:
        copy = pickle.loads(pickle.dumps(task))
        assert copy == task
        first, *others = (compute(plan, each, handoffs) for each in (task, task, copy))
        for other in others:
            assert stored(other) == stored(first)
            assert other.metrics == first.metrics


def test_a_task_takes_no_more_memory_than_it_claims(own_cases: list):
    """The peak of what torch allocates and the peak of Python's own, which are bytes that are
    read."""
    for plan, task, handoffs in own_cases:
        if task.copied:
            assert task.memory == 0
            continue
        compute(plan, task, handoffs)  # what is cached once
        tracemalloc.start()
        compute(plan, task, handoffs)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with torch.profiler.profile(profile_memory=True) as profile:
            compute(plan, task, handoffs)
        assert peak(profile) + python <= task.memory + SLACK, f"{plan.verb}: {task.name}"


def test_a_task_takes_no_more_gpu_memory_than_it_claims(own_cases: list):
    """Of its memory, by the pools of a pretended one, where small tasks have no slack; and of the
    host's time: launches and waits."""
    for plan, task, handoffs in own_cases:
        if not task.copied:
            card = card_after(plan, task, handoffs)
            assert sum(most for _, most in card.pools.values()) <= task.gpu_memory
            launches, waits = budget(task)
            assert card.launches <= launches and card.waits <= waits, f"{plan.verb}: {task.name}"


def card_after(plan: Plan, task: Task, handoffs: Handoffs) -> Card:
    with installed(Card()) as card:
        compute_there(plan, task, handoffs)
    return card


def budget(task: Task) -> tuple[int, int]:
    """Launches and waits of a task whose weight is one piece."""
    compensation = getattr(task, "compensation", None)
    if compensation is not None:
        columns = sum(span.covariance.shape[0] for span in compensation.spans)
        return 300 + 16 * columns, 40
    if isinstance(task, FactorsTask | LoftQWeight | StackedExperts):  # decompositions
        return 1000, 150
    if isinstance(task, EncodedStep):  # a search of scales, whatever its size
        return 400, 40
    step = getattr(getattr(task, "task", task), "step", None)
    if isinstance(getattr(step, "source", None), GgufWeight):
        return 120, 30  # put together by transformers' code, on the host
    return 120, 25


def test_a_budget_fails_where_pieces_are_small(
    cases: dict, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "GPU", 1 << 11)
    for cls in (EncodedWeight, RequantizedWeight, ResidualWeight):
        plan, task, handoffs = cases[cls][0]
        assert card_after(plan, task, handoffs).launches > budget(task)[0]


def peak(profile: torch.profiler.profile) -> int:
    """The most bytes that torch had allocated at a time."""
    results = profile.profiler.kineto_results
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    )
    most = total = 0
    for _, size in events:
        total += size
        most = max(most, total)
    return most


def test_stays_on_the_gpu_and_gives_there_what_it_gives_here(
    own_cases: list, monkeypatch: pytest.MonkeyPatch
):
    """On a pretended one, on which tensors of both never meet; by one way to a QR, on which signs
    depend."""
    monkeypatch.setattr(dense, "THIN", math.inf)
    for plan, task, handoffs in own_cases:
        here = compute(plan, task, handoffs)
        with installed(Card()) as card:
            there = compute_there(plan, task, handoffs)
        assert not card.races, f"{plan.verb}: {task.name}"
        assert_close(there.tensors, here.tensors)
        assert_close(there.handoff, here.handoff)


def compute_there(plan: Plan, task: Task, handoffs: Handoffs) -> TaskResult:
    with Sources(plan.folders, plan.identities) as sources, torch.inference_mode():
        reader = LocalReader(sources, DEVICE, handoffs=handoffs)
        return task.compute(reader)


def assert_close(there: Mapping, here: Mapping) -> None:
    """The same keys, dtypes and shapes, and values but for the order of sums: chunks have other
    heights on a card."""
    assert there.keys() == here.keys()
    for key, expected in here.items():
        actual = there[key]
        if isinstance(expected, TensorSpec):
            assert actual == expected
            continue
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if expected.dtype in (torch.uint8, torch.int8, torch.int32):
            off = actual.cpu().int() != expected.int()
            assert off.float().mean() < 0.02, key  # codes at a rounding's edge
        else:
            torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=0.02, atol=2e-3)
