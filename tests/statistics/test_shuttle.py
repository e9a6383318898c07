"""Tensors between the host and a pretended card, while a model runs there layer by layer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import adapterkit
from adapterkit.core.engine.device import Mark
from adapterkit.verbs.stats.model import activations as shuttle
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule
from adapterkit.verbs.stats.model.stored_model import StoredModel
from tests.golden import inputs
from tests.support.card import DEVICE, Card, installed


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(Card()) as card, torch.no_grad():
        yield card


def test_a_table_goes_there_once(card: Card):
    """Until the pass changes it, a unit changes its copy, or nobody has it any more."""
    between, table = shuttle.BatchOffloader(DEVICE), torch.arange(8.0)
    (first, again), copies = between.to_device((table, [table]))
    assert again[0] is first and copies == {id(table): first} and card.transfers == 1
    assert between.to_device(table)[0] is first and card.transfers == 1
    table += 1
    second, _ = between.to_device(table)
    assert second is not first and torch.equal(second.cpu(), table)
    second.zero_()
    third, _ = between.to_device(table)
    assert torch.equal(third.cpu(), table) and between.used == table.nbytes
    del table
    assert not between.used
    with torch.enable_grad():  # a part of a graph
        leaf = torch.ones(4)
        assert between.to_device(leaf)[0] is not between.to_device(leaf)[0]


def test_tables_have_a_limit(card: Card, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shuttle, "TABLES", 40)
    between, tables = shuttle.BatchOffloader(DEVICE), [torch.ones(8), torch.ones(8)]
    for _ in range(2):
        between.to_device(tables)
    assert between.used == 32 and card.transfers == 3


def test_an_output_is_there_once_its_mark_is_passed(card: Card):
    between, waits = shuttle.BatchOffloader(DEVICE), card.waits
    state = torch.full((4,), 3.0, device=DEVICE)
    (one, other), mark = between.to_host((state, state)), Mark(DEVICE)
    assert one is other and card.waits == waits and not torch.equal(one, torch.full((4,), 3.0))
    mark.wait()
    assert torch.equal(one, torch.full((4,), 3.0))
    between.to_device(one)
    assert card.waits == waits + 1  # from page-locked memory
    assert shuttle.BatchOffloader(torch.device("cpu")).to_host(one) is one


def test_weights_and_states_cross_the_bus_as_often_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A unit's weights once, of each pass its state both ways and its tables once; what stays on
    the host is read there. Within a block a unit begins a pass before the last one goes on."""
    monkeypatch.chdir(tmp_path)
    inputs.create_inputs(Path())
    events: list[tuple[str, int]] = []
    begin, end, load = LayerwiseSchedule._begin, LayerwiseSchedule._end, StoredModel.load

    def loading(stored: StoredModel, names, device: torch.device) -> None:
        before = card.transfers
        load(stored, names, device)
        events.append((device.type, card.transfers - before))

    def passing(name: str, real):
        def call(*arguments):
            events.append((name, card.transfers))
            return real(*arguments)

        return call

    monkeypatch.setattr(StoredModel, "load", loading)
    monkeypatch.setattr(LayerwiseSchedule, "_begin", passing("begin", begin))
    monkeypatch.setattr(LayerwiseSchedule, "_end", passing("end", end))
    monkeypatch.setattr("adapterkit.verbs.stats.job.BLOCKS", 2)
    with installed(Card()) as card:
        adapterkit.stats(
            "base32", data="ids.jsonl", targets="q_proj", out="stats.safetensors", batch=1,
            samples=4, length=8, what="mean", device="cuda",
        )  # fmt: skip
    assert not card.races
    names = [name for name, _ in events]
    assert all(count == 0 for name, count in events if name == "cpu") and "cpu" in names
    order = ["begin", "begin", "end", "end"] * 2  # two blocks of two passes
    passes = [(name, count) for name, count in events if name in ("begin", "end")]
    assert [name for name, _ in passes] == order * 2  # two layers
    first, second = (part[-1][1] - part[0][1] for part in (passes[:8], passes[8:]))
    assert second <= 3 * 4 < first  # the state both ways, and tokens of the first of a shape
