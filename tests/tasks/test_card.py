"""No task mixes tensors of a card with tensors of the CPU, and each gives there what it gives here,
on a pretended card."""

from collections.abc import Mapping

import pytest
import torch

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources
from adapterkit.engines.local.reader import LocalReader
from adapterkit.plan import Plan, Task, TaskResult
from tests.support.card import DEVICE, Card, installed
from tests.tasks.test_laws import CLASSES, Handoffs, compute

Case = tuple[Plan, Task, Handoffs]


@pytest.fixture(scope="module")
def cases(wide_plans: dict[str, Plan]) -> dict[type[Task], list[Case]]:
    """For each class one task of each plan that has some, with the handoffs that it reads."""
    found: dict[type[Task], list[Case]] = {}
    for plan in wide_plans.values():
        tasks = [t for shard in plan.shards for t in shard.tasks]
        for task in {type(task): task for task in tasks}.values():
            found.setdefault(type(task), []).append((plan, task, Handoffs(plan, tasks)))
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_task_stays_on_the_card(cls: type[Task], cases: dict, one_thread: None):
    for plan, task, handoffs in cases[cls]:
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
