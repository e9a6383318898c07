"""Stochastic rounding: what must hold of it in every format that is written."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Damaged, Refused
from adapterkit.core.system import system
from adapterkit.core.tasks import rows
from adapterkit.kernels.quant.stochastic import Draws, last_place, round_to

pytestmark = pytest.mark.quick

FLOATS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
]
SEEDS = 400


def numbers(source: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes that `dtype` knows, its subnormals too."""
    generator = torch.Generator().manual_seed(0)
    low, high = math.log2(torch.finfo(dtype).tiny) - 6, math.log2(torch.finfo(dtype).max)
    exponents = torch.rand(3000, generator=generator, dtype=torch.float64) * (high - low) + low
    return (torch.exp2(exponents) * torch.randn(3000, generator=generator).sign()).to(source)


@pytest.mark.parametrize(("source", "dtype"), FLOATS)
def test_the_mean_over_seeds_is_the_value_and_each_is_a_neighbor(source, dtype):
    x = numbers(source, dtype)
    step = last_place(x.abs(), dtype).double()
    total = torch.zeros(len(x), dtype=torch.float64)
    for seed in range(SEEDS):
        actual = round_to(x, dtype, Draws.of(seed, "w"))
        # one of the two about it, or itself
        assert ((actual.double() - x.double()).abs() < step).all()
        total += actual.double()
    part = (x.double().abs() / step).frac()
    z = (total / SEEDS - x.double()) / step / (part * (1 - part) / SEEDS).sqrt().clamp(min=1e-3)
    assert z.abs().max() < 6
    assert abs(float(z.mean())) < 5 / len(x) ** 0.5
    # draws of the seeds are independent
    assert 0.9 < float(z[(part > 0.1) & (part < 0.9)].std()) < 1.1


@pytest.mark.parametrize(("source", "dtype"), FLOATS)
def test_representable_values_stay_and_overflow_rounds_to_nearest(source, dtype):
    largest = torch.finfo(dtype).max
    exact = numbers(source, dtype).to(dtype)
    exact = torch.cat([exact, torch.tensor([0.0, -0.0, largest, -largest]).to(dtype)])
    edge = torch.tensor(
        [
            largest * (1 + 2.0**-11),
            -largest * (1 + 2.0**-9),
            largest * 1.5,
            math.inf,
            -math.inf,
            math.nan,
        ]
    ).to(source)
    for seed in range(20):
        again = round_to(exact.to(source), dtype, Draws.of(seed, "w"))
        # zeros with their sign
        assert torch.equal(again.view(torch.uint8), exact.view(torch.uint8))
        assert torch.equal(
            round_to(edge, dtype, Draws.of(seed, "w")).nan_to_num(7.0),
            edge.to(dtype).nan_to_num(7.0),
        )
    below = torch.full((5000,), largest, dtype=source)
    below -= last_place(below, dtype) * 0.25
    assert round_to(below, dtype, Draws.of(0, "w")).isfinite().all()
    tiny = -torch.full((5000,), torch.finfo(dtype).tiny, dtype=source) * 2.0**-12
    assert round_to(tiny, dtype, Draws.of(0, "w")).signbit().all()


def test_draws_are_a_function_of_seed_name_and_position():
    device = torch.device("cpu")
    draws = Draws.of(3, "a.weight")
    for kind in (torch.bfloat16, torch.float16):
        whole = draws.uniform(1000, device, kind)
        pieces = [
            draws.at(first).uniform(min(37, 1000 - first), device, kind)
            for first in range(0, 1000, 37)
        ]
        assert torch.equal(torch.cat(pieces), whole)
        assert whole.min() > 0
        assert whole.max() < 1
    z = draws.key  # splitmix64's finish, in Python's integers
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ z >> shift) * factor) % (1 << 64)
    word = (z ^ z >> 31).to_bytes(8, "little")
    halves = [int.from_bytes(word[i : i + 2], "little", signed=True) for i in range(0, 8, 2)]
    # the same for ever
    assert draws.halves(4, device).tolist() == halves == [-18304, 3871, 3194, 12527]


def test_draws_of_tensors_and_seeds_are_independent():
    count, device = 1 << 16, torch.device("cpu")
    rows = [
        Draws.of(seed, name).uniform(count, device) for seed in (0, 1, 2) for name in ("a", "b")
    ]
    rows += [
        Draws.of(0, "a").at(shift).uniform(count, device) for shift in (1, 2, 3, 1 << 20, 1 << 32)
    ]
    rows = torch.stack(rows).double() - 0.5
    correlations = (rows @ rows.T) / count * 12
    apart = correlations - torch.eye(len(rows), dtype=torch.float64)
    assert apart.abs().max() < 5 / count**0.5
    assert (
        torch.histc(rows[0], 64, -0.5, 0.5).sub(count / 64).square().sum() / (count / 64)
        < 63 + 5 * 126**0.5
    )


# merging


def job(folder, dtype=torch.bfloat16, rows=700, columns=513, size=3e-4):
    """A delta far below the steps of 16 bits."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    a, b = torch.randn(8, columns) * size, torch.randn(rows, 8)
    for name in ("base", "adapter"):
        (folder / name).mkdir(parents=True)
    save_file(
        {
            "x.weight": weight,
            "y.weight": weight.clone(),
            "z.weight": weight.to(torch.float32, copy=True),
        },
        folder / "base" / "model.safetensors",
    )
    factors = {
        f"base_model.model.{m}.lora_{n}.weight": f.clone()
        for m in ("x", "y")
        for n, f in (("A", a), ("B", b))
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}), "utf-8"
    )
    return weight, b.double() @ a.double()


def merge(folder, out, **options):
    receipt = adapterkit.merge(folder / "base", [folder / "adapter"], out=folder / out, **options)
    return load_file(folder / out / "model.safetensors"), receipt.data["parameters"]["x.weight"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_merge_keeps_the_delta_that_rounding_to_nearest_swallows(dtype, tmp_path):
    weight, delta = job(tmp_path)
    options = {"dtype": dtype, "verify": True}
    plain, lost = merge(tmp_path, "nearest", **options)
    drawn, kept = merge(tmp_path, "stochastic", rounding="stochastic", **options)
    for actual, metric in ((plain["x.weight"], lost), (drawn["x.weight"], kept)):
        moved = actual.double() - weight.double()
        assert float((moved * delta).sum() / delta.square().sum()) == pytest.approx(
            metric["survived"], abs=0.1
        )
    assert abs(kept["survived"] - 1) < 0.05
    assert dtype == "fp16" or lost["survived"] < 0.7
    assert not torch.equal(drawn["x.weight"], drawn["y.weight"])  # each tensor has its own draws
    assert torch.equal(plain["z.weight"], drawn["z.weight"])  # cast, not changed: to nearest


def test_same_seed_same_bytes_whatever_the_chunks_and_workers(tmp_path, monkeypatch):
    job(tmp_path)
    actual = {}
    for seed, elements, workers in [
        (0, 1 << 18, 1),
        (0, 1 << 18, 4),
        (0, 1 << 12, 4),
        (1, 1 << 18, 4),
    ]:
        monkeypatch.setattr(rows, "ELEMENTS", elements)
        monkeypatch.setattr(system, "processors", lambda n=workers: n)
        merge(tmp_path, "out", rounding="stochastic", seed=seed, overwrite=True)
        actual[seed, elements, workers] = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len({data for (seed, *_), data in actual.items() if seed == 0}) == 1
    assert len(set(actual.values())) == 2


def test_verify_draws_again_and_sees_another_seed(tmp_path):
    job(tmp_path)
    for seed in (0, 1):
        merge(tmp_path, f"out-{seed}", rounding="stochastic", seed=seed, hash="none")
    inputs = {"base": tmp_path / "base", "adapters": [tmp_path / "adapter"]}
    assert adapterkit.verify(tmp_path / "out-1", **inputs)["tensors"] == 2
    (tmp_path / "out-1" / "model.safetensors").write_bytes(
        (tmp_path / "out-0" / "model.safetensors").read_bytes()
    )
    with pytest.raises(Damaged, match="x.weight"):
        adapterkit.verify(tmp_path / "out-1", **inputs)


def test_options_that_contradict_are_refused(tmp_path):
    job(tmp_path)
    for options, text in [
        ({"seed": 3}, "--rounding stochastic"),
        ({"rounding": "up"}, "nearest, stochastic or compensated"),
        ({"rounding": "stochastic", "compat": "peft"}, "--compat"),
    ]:
        with pytest.raises(Refused, match=text):
            merge(tmp_path, "out", **options)


def test_float32_weights_are_the_same_either_way(tmp_path):
    job(tmp_path, torch.float32)
    plain, _ = merge(tmp_path, "nearest")
    drawn, metrics = merge(tmp_path, "stochastic", rounding="stochastic", verify=True)
    assert torch.equal(plain["x.weight"], drawn["x.weight"])
    assert metrics["survived"] == 1


def test_a_merge_that_loses_most_of_the_delta_warns(tmp_path):
    job(tmp_path, size=5e-5)
    for options, warned in [
        ({}, True),
        ({"rounding": "stochastic"}, False),
        ({"dtype": "fp32"}, False),
    ]:
        out = tmp_path / "out"
        receipt = adapterkit.merge(
            tmp_path / "base", [tmp_path / "adapter"], out=out, overwrite=True, **options
        )
        warnings = receipt.data["warnings"]
        assert bool(warnings) == warned, options
        if warned:
            assert "2 of 2 tensors less than 80 %" in warnings[0]
            assert "% lost" in warnings[0]
            assert "--rounding stochastic" in warnings[0]
            assert "--dtype fp32" in warnings[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_pefts_roundings_on_the_way_count_as_losses(dtype, tmp_path):
    """PEFT rounds to the base's dtype before anything is written, in float32 too."""
    weight, delta = job(tmp_path, size=5e-5)
    receipt = adapterkit.merge(
        tmp_path / "base", [tmp_path / "adapter"], out=tmp_path / "out", dtype=dtype, compat="peft"
    )
    written, metrics = (
        load_file(tmp_path / "out" / "model.safetensors"),
        receipt.data["parameters"]["x.weight"],
    )
    moved = written["x.weight"].double() - weight.double()
    noise = float((moved - delta).norm() / delta.norm())
    assert metrics["survived"] == pytest.approx(
        float((moved * delta).sum() / delta.square().sum()), abs=0.1
    )
    assert metrics["rounding"] == pytest.approx(noise, abs=0.1)
    assert metrics["survived"] < 0.5
    assert any(
        text.startswith("in 2 of 2") and "remove --compat peft" in text
        for text in receipt.data["warnings"]
    )
