"""Stochastic rounding into quantized formats: what must hold of it in every format that is
written."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterkit
from adapterkit.bases.quantized.codecs.mxfp4 import Mxfp4
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.dtypes import torch_dtype
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.tasks import rows
from adapterkit.core.weights.codec import PlainWeight, QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels.quant import grid
from adapterkit.kernels.quant.stochastic import Draws
from tests.support import quantized_llama
from tests.support.quantized_llama import FEW, FORMS
from tests.support.usual import usual

SEEDS = 150
VERBS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"to": "nf4"},
    "bnb-nf4-double": {"to": "nf4", "double_quant": True},
    "bnb-fp4": {"to": "fp4", "block_size": 32},
    "bnb-int8": {"to": "int8"},
}
NAMES = [*(name for name, form in FORMS.items() if form.writable), *VERBS, "gpt-oss"]


@dataclass
class Case:
    """A stored weight and what it decodes to."""

    record: QuantizedWeight
    stored: dict[str, Tensor]

    @property
    def value(self) -> Tensor:
        return self.record.decode(self.stored)

    def drawn(self, weight: Tensor, seed: int = 0) -> dict[str, Tensor]:
        return self.record.encode_keeping_scales(
            self.stored, weight.clone(), Draws.of(seed, self.record.key)
        )

    def decoded(self, weight: Tensor, seed: int) -> Tensor:
        return self.record.decode(self.drawn(weight, seed))


@pytest.fixture(params=NAMES)
def case(request, cached_folder: Callable[..., Path]) -> Case:
    name = request.param
    if name == "gpt-oss":
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 64, 48, generator=generator)
        record = Mxfp4.for_encoding(
            "mxfp4", PlainWeight("experts.down_proj", tuple(weight.shape), "BF16"), {}
        )
        assert record is not None
        return Case(record, record.encode(weight))

    folder = checkpoint(name, cached_folder)
    record = next(
        spec
        for spec in quantized_weights(
            decoded_view(open_checkpoint(open_source(str(folder)))).tensors
        )
        if "down" in spec.key
    )
    tensors = load_file(folder / "model.safetensors")
    return Case(record, {part.key: tensors[part.key] for part in record.parts})


def checkpoint(name: str, cached_folder: Callable[..., Path]) -> Path:
    def build(folder: Path) -> None:
        if name in VERBS:
            quantized_llama.llama().save_pretrained(folder / "plain")
            adapterkit.quantize(folder / "plain", out=folder / "packed", **VERBS[name])
        else:
            quantized_llama.base(FORMS[name], folder / "packed")

    return cached_folder(f"rounding-{name}", build) / "packed"


def shrunk(value: Tensor) -> tuple[Tensor, Tensor]:
    """The weight with every second element nearer to 0, so that no scale is too small; and which
    those are."""
    generator = torch.Generator().manual_seed(1)
    moved = torch.rand(value.shape, generator=generator) < 0.5
    return torch.where(
        moved, value * (1 - 0.4 * torch.rand(value.shape, generator=generator)), value
    ), moved


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(bits(one[key]), bits(other[key])) for key in one
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def test_representable_weights_stay_byte_for_byte(case):
    for seed in range(10):
        assert same(case.drawn(case.value, seed), case.stored)


def test_scales_and_what_does_not_move_stay(case):
    weight, moved = shrunk(case.value)
    first, second = case.drawn(weight, 1), case.drawn(weight, 2)
    codes = case.record.parts[0].key
    for parts in (first, second):
        assert same(
            {k: v for k, v in parts.items() if k != codes},
            {k: v for k, v in case.stored.items() if k != codes},
        )
        assert torch.equal(bits(case.record.decode(parts))[:0], bits(case.value)[:0])
        assert torch.equal(bits(case.record.decode(parts)[~moved]), bits(case.value[~moved]))
    assert not torch.equal(bits(first[codes]), bits(second[codes]))  # seeds differ


# one form of each codec draws for all forms of it
of_each_codec = pytest.mark.parametrize(
    "case", usual(NAMES, FEW | {"bnb-nf4", "bnb-int8", "gpt-oss"}), indirect=True
)


@of_each_codec
def test_the_mean_over_seeds_is_the_value_between_two_neighboring_codes(case):
    weight, _ = shrunk(case.value)
    low, high, total, squares = (
        weight + torch.inf,
        weight - torch.inf,
        torch.zeros(weight.shape, dtype=torch.float64),
        0.0,
    )
    for seed in range(SEEDS):
        actual = case.decoded(weight, seed)
        low, high = torch.minimum(low, actual), torch.maximum(high, actual)
        total += actual.double()
        squares += (actual.double() - weight.double()).square()
        assert ((actual == low) | (actual == high)).all() or seed < 20  # two values and no third
    # the rest has drawn one side only
    assert ((low <= weight) & (weight <= high)).float().mean() > 0.9
    error = total / SEEDS - weight.double()
    variance = squares / SEEDS**2
    generator = torch.Generator().manual_seed(2)
    for direction in (
        weight - case.value,
        torch.randn(weight.shape, generator=generator),
        torch.ones_like(weight),
        weight.sign(),
    ):
        z = float((error * direction).sum() / (variance * direction.double().square()).sum().sqrt())
        assert abs(z) < 5
    both = low < high
    assert (error.abs() <= (high - low).double() * 0.25)[both].all()
    middle = torch.where(both, low + (high - low) * 0.37, weight)
    for seed in range(5):
        actual = case.decoded(middle, seed)
        assert ((actual == low) | (actual == high))[both].all()  # no code between them


def test_scales_below_zero(case):
    scale = case.record.parts[1].key
    # of powers of 2, or codes of scales: none is below 0
    if case.stored[scale].dtype == torch.uint8:
        assert (
            "mxfp4" in case.record.name
            or case.record.name == "mlx"
            or getattr(case.record, "double", False)
            or getattr(case.record, "power", False)
            or case.record.parts[0].dtype == "U8"
        )
        return
    case.stored[scale] = -case.stored[scale].float()
    case.stored[scale] = case.stored[scale].to(torch_dtype(case.record.parts[1].dtype))
    assert same(case.drawn(case.value), case.stored)
    delta = -0.03 * case.value  # so little that the side on which the other code lies shows
    moved = (
        torch.stack([case.decoded(case.value + delta, seed) for seed in range(20)]).mean(0)
        - case.value
    )
    assert 0.8 < float((moved * delta).sum() / delta.square().sum()) < 1.2


def test_a_value_beyond_the_largest_code_stays_there_or_gets_a_new_scale(case):
    slightly, much = case.value.clone(), case.value.clone()
    spot = case.value.abs().flatten().argmax()
    slightly.view(-1)[spot] *= 1.0001
    much.view(-1)[spot] *= 3
    actual = case.decoded(slightly, 0)
    assert float((actual - case.value).norm()) <= float(case.value.abs().max()) * 0.4
    actual = case.decoded(much, 0)
    assert float(actual.view(-1)[spot] / much.view(-1)[spot]) > 0.9
    larger = case.decoded(case.value * 5, 0)
    assert float((larger - case.value * 5).norm() / (case.value * 5).norm()) < 0.25


@of_each_codec
def test_pieces_do_not_matter(case, monkeypatch):
    weight, _ = shrunk(case.value)
    weight.view(-1)[7] *= 3
    whole = case.drawn(weight)
    for size in ("PIECE", "LARGE_PIECE"):
        monkeypatch.setattr(grid, size, 192)
    assert same(case.drawn(weight), whole)


def test_rows_by_themselves(case):
    """What is drawn for some rows is what is drawn for them in the whole weight."""
    weight, _ = shrunk(case.value)
    record, draws, whole = case.record, Draws.of(0, case.record.key), case.drawn(weight)
    cut = 32  # rows; of the experts' stack of an expert, which is stored transposed
    if isinstance(record, Mxfp4):
        part, stored = record.rows(case.stored, 64 + cut, 128)
        actual = part.encode_keeping_scales(stored, weight[1, cut:], draws.at((64 + cut) * 48))
        blocks = record.parts[0].key
        assert torch.equal(actual[blocks], whole[blocks][1, :, 1:])
        return
    codes, scale = (part.key for part in record.parts[:2])
    height = getattr(record, "block", 1)
    alone = record.name in ("bnb8", "fp8") or (
        record.name == "compressed-tensors" and height[0] in (1, 32)
    )
    if (
        not alone
        or case.stored[scale].shape[0] not in (64, 2)
        or any(part.key.endswith("zero_point") for part in record.parts)
    ):
        return  # rows need each other there
    per = len(weight) // len(case.stored[scale])
    stored = case.stored | {
        codes: case.stored[codes][cut:],
        scale: case.stored[scale][cut // per :],
    }
    parts = tuple(replace(part, shape=tuple(stored[part.key].shape)) for part in record.parts)
    lower = replace(record, shape=(len(weight) - cut, weight.shape[1]), parts=parts)
    assert torch.equal(
        bits(
            lower.encode_keeping_scales(stored, weight[cut:], draws.at(cut * weight.shape[1]))[
                codes
            ]
        ),
        bits(whole[codes][cut:]),
    )


# merging


@pytest.fixture(
    params=["bnb-nf4-double", "bnb-fp4", "bnb-int8", "fp8", "int4", "int4-zero", "nvfp4", "mxfp4"]
)
def inputs(request, cached_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """A quantized base, and an adapter whose delta is small beside its steps."""
    from tests.support import oracle

    name = request.param
    size = 0.004 if "8" in name else 0.02
    train = lambda folder: oracle.train(
        quantized_llama.llama(), folder, target_modules=["q_proj", "down_proj"], size=size
    )
    return checkpoint(name, cached_folder), cached_folder(f"rounding-lora-{size}", train)


def test_a_merge_keeps_the_delta_the_scales_and_the_other_modules(inputs, tmp_path, monkeypatch):
    base, lora = inputs
    outs = {}
    for rounding, seed, workers in [
        ("nearest", 0, 2),
        ("stochastic", 0, 1),
        ("stochastic", 0, 4),
        ("stochastic", 1, 2),
    ]:
        out = tmp_path / f"{rounding}-{seed}-{workers}"
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=workers: set(range(n)))
        monkeypatch.setattr(rows, "SLICE", 2048 // workers)
        receipt = adapterkit.merge(base, [lora], out=out, rounding=rounding, seed=seed, verify=True)
        outs[rounding, seed, workers] = out / "model.safetensors"
        survived = [metric["survived"] for metric in receipt.data["parameters"].values()]
        if rounding == "stochastic":
            assert all(0.8 < share < 1.2 for share in survived), survived
            assert not any("--rounding" in text for text in receipt.data["warnings"])
    assert outs["stochastic", 0, 1].read_bytes() == outs["stochastic", 0, 4].read_bytes()
    before, after = load_file(base / "model.safetensors"), load_file(outs["stochastic", 0, 1])
    assert not same(after, load_file(outs["stochastic", 1, 2]))
    changed = [
        spec
        for spec in quantized_weights(decoded_view(open_checkpoint(open_source(str(base)))).tensors)
        if touched(spec.key)
    ]
    codes = {spec.parts[0].key for spec in changed}
    scales = {part.key for spec in changed for part in spec.parts[1:]}
    for key in before.keys() - codes - scales:
        assert torch.equal(bits(before[key]), bits(after[key]))
    for key in scales:  # a block may have a new one, few have
        assert (bits(before[key]) == bits(after[key])).float().mean() > 0.75, key
    assert len(codes) == 4


def touched(key: str) -> bool:
    return "q_proj" in key or "down_proj" in key


def test_a_merge_into_decoded_weights_reports_the_kept_share(cached_folder, tmp_path, monkeypatch):
    from tests.support import oracle

    train = lambda folder: oracle.train(
        quantized_llama.llama(), folder, target_modules=["q_proj", "down_proj"], size=5e-3
    )
    base, lora = checkpoint("bnb-nf4", cached_folder), cached_folder("rounding-lora-0.005", train)
    actual = []
    for rounding, size in (("nearest", 1 << 20), ("stochastic", 1 << 20), ("stochastic", 1024)):
        out = tmp_path / f"{rounding}-{size}"
        monkeypatch.setattr(rows, "SLICE", size)
        receipt = adapterkit.merge(
            base, [lora], out=out, dequantize=True, dtype="bf16", rounding=rounding, verify=True
        )
        metrics = [metric for key, metric in receipt.data["parameters"].items() if touched(key)]
        assert len(metrics) == 4
        actual.append([metric["survived"] for metric in metrics])
        assert all(0 < metric["rounding"] < 1 for metric in metrics), metrics
    # decoded values are none of bf16, so rounding to nearest loses nothing on average either
    assert all(0.9 < share < 1.1 for share in [*actual[0], *actual[1]]), actual
    assert actual[0] != actual[1] == actual[2]
    assert (tmp_path / f"stochastic-{1 << 20}" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()
