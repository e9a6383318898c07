"""Products of float32 in what is computed besides forwards, and devices without float64."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.engine.device import precisions
from adapterkit.core.registry import members
from adapterkit.runtime import attach, collect
from adapterkit.runtime.training import collection
from adapterkit.verbs.stats.sums import Sum
from tests.golden import inputs
from tests.support.card import PRODUCTS, WORKSPACE, Card, installed
from tests.support.live import llama, tokens

pytestmark = pytest.mark.skipif(not precisions(), reason="torch before 2.9 has one setting")
COMPUTED = [name for name, init in members("inits").items() if init.needs]
TARGETS = ["q_proj", "down_proj"]


class Precisions(TorchDispatchMode):
    """Notes how products of float32 may be made, at each."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS and any(
            isinstance(x, Tensor) and x.dtype == torch.float32 for x in args
        ):
            self.seen.setdefault(name, set()).update(part.fp32_precision for part in precisions())
        return func(*args, **kwargs or {})


@contextmanager
def only_float32() -> Iterator[None]:
    """All products of float32 inside are in float32, though the process allows others, as it does
    after. (Some inits have products of float64 alone.)"""
    torch.set_float32_matmul_precision("medium")
    mode = Precisions()
    try:
        with mode:
            yield
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(one == {"ieee"} for one in mode.seen.values()), mode.seen


def run_model(model: nn.Module) -> Callable[[], object]:
    def run() -> None:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()

    return run


@pytest.fixture(scope="module")
def stats() -> dict[str, Tensor]:
    model = llama()
    return collect(model, run_model(model), what="covariance,pca,gradient", targets=TARGETS)


def attached(name: str, stats: dict[str, Tensor]) -> nn.Module:
    model = llama()
    needs = set(members("inits")[name].needs) - {"weight"}
    attach(model, LoraConfig(2, 4, TARGETS, init=name), stats=stats if needs else None)
    return model


@pytest.mark.parametrize("name", [*COMPUTED, "dora"])
def test_products_of_inits(name: str, stats: dict[str, Tensor]):
    with only_float32():
        if name == "dora":
            attach(llama(), LoraConfig(2, 4, TARGETS, dora=True))
        else:
            attached(name, stats)


@pytest.mark.parametrize("dora", [False, True])
def test_products_of_merges(dora: bool):
    adapters = attach(llama(), LoraConfig(2, 4, TARGETS, dora=dora, init=False))
    with only_float32():
        adapters.merge()


def test_products_of_a_report():
    adapters = attach(llama(), LoraConfig(2, 4, TARGETS, init=False))
    with only_float32():
        adapters.report()


def test_products_of_sums():
    """Of a live model, whose own forward is as its user has set it."""
    x = torch.randn(3, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 2)})
    seen: list[str] = []

    def run() -> None:
        model["a"](x)
        seen.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")
    mode = Precisions()
    try:
        with mode:
            collect(model, run, targets=["a"])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mode.seen["addmm_"] == {"ieee"} and seen == ["medium"]
    assert mode.seen.keys() - {"addmm_"}  # the model's


def test_products_of_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    inputs.create_inputs(Path())
    options = {"data": "ids.jsonl", "samples": 2, "targets": "q_proj", "what": "covariance,pca"}
    with only_float32():
        adapterkit.stats("base32", out="stats.safetensors", **options)


def moved(model: nn.Module, device: str = "mps") -> nn.Module:
    """The same on a pretended card."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = nn.Parameter(parameter.detach().to(device), requires_grad=False)
                module._parameters[name] = there
    return model


@pytest.mark.parametrize("name", COMPUTED)
def test_devices_without_float64_initialize_on_the_host(name: str, stats: dict[str, Tensor]):
    expected = dict(attached(name, stats).named_parameters())
    with installed(Card(kind="mps")), torch.no_grad():
        needs = set(members("inits")[name].needs) - {"weight"}
        adapters = attach(
            moved(llama()), LoraConfig(2, 4, TARGETS, init=name), stats=stats if needs else None
        )
        for path, parameter in adapters.model.named_parameters():
            assert parameter.device.type == "mps"
            torch.testing.assert_close(parameter.cpu(), expected[path].detach())
        adapters.report()


@pytest.mark.parametrize(
    ("memory", "on_host", "warns"), [(1 << 30, False, False), (WORKSPACE + (8 << 20), True, True)]
)
def test_sums_of_a_live_model_on_a_card(memory: int, on_host: bool, warns: bool, monkeypatch):
    """Totals are there while there is room; a run that may find none at all is told before."""
    monkeypatch.setattr(collection, "SUMMED", 16384)  # widths are of toys
    model, what = llama(), "covariance,mean"

    def run() -> None:
        with torch.no_grad():
            for seed in range(2):
                model(input_ids=tokens(100, 12, seed).to(model.lm_head.weight.device))

    expected = collect(model, run, what=what, targets=TARGETS)
    totals: list[Tensor] = []
    close = Sum._add_panels

    def add_panels(one: Sum, panels: list[Tensor]) -> None:
        close(one, panels)
        totals.extend(one.total)

    monkeypatch.setattr(Sum, "_add_panels", add_panels)
    with installed(Card(memory)) as card, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = collect(moved(model, "cuda"), run, what=what, targets=TARGETS)
    assert not card.races
    assert {total.device.type for total in totals} == {"cpu" if on_host else "cuda"}
    assert any("GB of cuda:0" in str(one.message) for one in said) == warns
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
