"""Rounding with compensation into quantized formats and into floats: what must hold of it in every
format that is written, against GPTQ in float64, and in merges and quantizations."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Damaged, Refused, Unrecoverable
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.tasks import rows
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels.quant import compensated as kernel
from adapterkit.runtime import collect
from adapterkit.verbs.shared.statistics_file import select_covariances
from tests.support import oracle, quantized_llama, tiny
from tests.support.quantized_llama import FEW, FORMS
from tests.support.usual import usual

VERBS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"to": "nf4"},
    "bnb-nf4-double": {"to": "nf4", "double_quant": True},
    "bnb-fp4": {"to": "fp4", "block_size": 128},
    "bnb-int8": {"to": "int8"},
    "w4a16": {"to": "w4a16"},
    "w8a16": {"to": "w8a16"},
    "mxfp4-by-quantize": {"to": "mxfp4"},
}
NAMES = [*(name for name, form in FORMS.items() if form.writable), *VERBS]
FOUR_BITS = [
    name
    for name in NAMES
    if any(word in name for word in ("int4", "fp4", "nf4", "w4", "file")) and name != "fp8"
]
TOUCHED = ["q_proj", "down_proj"]
FILE = "model.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    """A weight, how a format writes it with rounding to nearest, and a covariance."""

    name: str
    record: QuantizedWeight
    weight: Tensor
    plain: dict[str, Tensor]
    c: Tensor

    @property
    def nearest(self) -> Tensor:
        return self.record.decode(self.plain)

    def rounded(self, c: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        rounder = self.record.column_rounder(self.plain)
        return kernel.round_weight(weight, kernel.factorize(c), rounder)

    def lost(self, value: Tensor) -> float:
        return kernel.output_norm(value - self.weight, self.c) / kernel.output_norm(
            self.weight, self.c
        )


def correlated(width: int, seed: int = 0) -> Tensor:
    """E[x xᵀ] of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, width // 3, generator=generator)
    x = x @ torch.randn(width // 3, width, generator=generator)
    x += 0.5 * torch.randn(400, width, generator=generator)
    return x.T @ x / len(x)


@pytest.fixture
def folder(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """A tiny Llama in a format; "plain": in bf16."""

    def build(name: str, folder: Path) -> None:
        if name in FORMS:
            quantized_llama.base(FORMS[name], folder / "packed")
            return
        original = folder / ("packed" if name == "plain" else "plain")
        quantized_llama.llama().save_pretrained(original)
        if name in VERBS:
            adapterkit.quantize(original, out=folder / "packed", **VERBS[name])

    return lambda name: (
        cached_folder(f"compensated-{name}", lambda folder: build(name, folder)) / "packed"
    )


MERGED = {"plain", "bnb-nf4", "int8-zero", "nvfp4", "fp8", "mlx4"}
SOME = FEW | {"bnb-nf4", "bnb-int8", "gpt-oss"}


of_every_form = pytest.mark.parametrize("case", NAMES, indirect=True)


# the order of columns and their errors do not know the codec
@pytest.fixture(params=usual(NAMES, SOME))
def case(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> Case:
    path = folder(request.param)
    base = decoded_view(open_checkpoint(open_source(str(path))))
    record = next(spec for spec in quantized_weights(base.tensors) if "down" in spec.key)
    tensors = load_file(path / FILE)
    stored = {part.key: tensors[part.key] for part in record.parts}
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(record.shape, generator=generator) * record.decode(stored).std()
    plain = record.encode_keeping_scales(stored, weight)
    return Case(request.param, record, weight, plain, correlated(record.shape[1]))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(bits(one[key]), bits(other[key])) for key in one
    )


# kernels and formats


def gptq(weight: Tensor, c: Tensor, round_column: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Column after column, in float64, with the inverse of what is left of C."""
    w, q = weight.double(), torch.empty_like(weight)
    h = c.double() + 0.01 * c.double().diagonal().mean() * torch.eye(len(c))
    left = torch.argsort(c.diagonal(), descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        column, *left = left
        q[:, column] = round_column(w[:, column].float(), column)
        error = (w[:, column] - q[:, column]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0, 1:]
    return q


def test_compensated_rounding_equals_gptq(case: Case) -> None:
    expected = gptq(case.weight, case.c, case.record.column_rounder(case.plain))
    actual = case.rounded(case.c)
    # float32 sums: an element at a boundary takes the rest of its row with it
    assert (actual == expected).float().mean() > 0.98
    assert abs(case.lost(actual) / case.lost(expected) - 1) < 0.01


def test_outputs_lose_less_than_with_rounding_to_nearest(case: Case) -> None:
    ratio = case.lost(case.rounded(case.c)) / case.lost(case.nearest)
    assert ratio < (0.6 if case.name in FOUR_BITS else 0.8)


def test_scales_are_those_of_plain_encoding(case: Case) -> None:
    value = case.rounded(case.c)
    tensors = case.record.encode_rounded(case.plain, value)
    codes = case.record.parts[0].key
    assert torch.equal(case.record.decode(tensors), value)
    assert not torch.equal(bits(tensors[codes]), bits(case.plain[codes]))
    assert same(*({k: v for k, v in t.items() if k != codes} for t in (tensors, case.plain)))


@of_every_form
def test_without_correlations_it_is_rounding_to_nearest(case: Case) -> None:
    value = case.rounded(torch.diag(torch.rand(len(case.c)) + 0.5))
    tensors = case.record.encode_rounded(case.plain, value)
    if getattr(case.record, "double", False):
        # bitsandbytes takes the nearest of the scales before these are quantized
        assert (value - case.weight).norm() <= (case.nearest - case.weight).norm()
    else:
        assert torch.equal(value, case.nearest)
        if case.name != "bnb-fp4":  # it has two codes for 0
            assert same(tensors, case.plain)


@of_every_form
def test_representable_weights_stay(case: Case) -> None:
    assert torch.equal(case.rounded(case.c, case.nearest), case.nearest)
    again = case.record.encode_rounded(case.plain, case.nearest)
    assert torch.equal(case.record.decode(again), case.nearest)


def test_the_same_twice_and_without_a_look_at_other_rows(case: Case) -> None:
    value, other = case.rounded(case.c), case.weight.clone()
    assert torch.equal(value, case.rounded(case.c))
    other[3:] = case.weight[3:].flip(1)
    rows = case.rounded(case.c, other)[:3]
    assert (rows == value[:3]).all()


def test_values_before_rounding_follow_from_the_result(case: Case) -> None:
    factor, value = kernel.factorize(case.c), case.rounded(case.c)
    before = kernel.unrounded(case.weight.double(), value.double(), factor)
    rounder = case.record.column_rounder(case.plain)
    again = torch.stack([rounder(w.float().contiguous(), i) for i, w in enumerate(before.T)], 1)
    assert (again == value).float().mean() > 0.999
    # e = (W - Q) r, so the loss with damping is the sum of the squares
    c = case.c.double() / case.c.double().diagonal().mean()
    damped = c + kernel.DAMPING * torch.eye(len(c))
    error = case.weight.double() - value.double()
    expected = (error @ damped * error).sum()
    steps = ((before - value.double())[:, factor.order] * factor.r.diagonal()).square().sum()
    assert torch.isclose(steps, expected, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_widths_around_a_block(width: int) -> None:
    c = correlated(max(width, 3))[:width, :width]
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(2))
    rounder = lambda w, column: (w * 4).round() / 4
    actual = kernel.round_weight(weight, kernel.factorize(c), rounder)
    expected = gptq(weight, c, rounder)
    assert (actual == expected).float().mean() > 0.97
    assert torch.equal((actual * 4).round(), actual * 4)


def test_inputs_that_are_always_0() -> None:
    c = correlated(48)
    c[:, 5:9] = c[5:9] = 0
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    actual = kernel.round_weight(weight, kernel.factorize(c), lambda w, column: w.round())
    assert torch.equal(actual[:, 5:9], weight[:, 5:9].round())


# merging and quantizing


@pytest.fixture
def stats(cached_folder: Callable[..., Path]) -> Path:
    """Covariances of all linear layers of the tiny Llama."""

    def build(folder: Path) -> None:
        model = quantized_llama.llama()
        tokens = torch.randint(80, (24, 32), generator=torch.Generator().manual_seed(3))
        collect(model, lambda: model(tokens), out=folder / "stats.safetensors")

    return cached_folder("compensated-stats", build) / "stats.safetensors"


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Path:
    train = lambda folder: oracle.train(
        quantized_llama.llama(), folder, size=0.3, target_modules=TOUCHED
    )
    return cached_folder("compensated-lora", train)


@pytest.fixture
def named(stats: Path) -> dict[str, Tensor]:
    """The covariance of each module."""
    file = open_checkpoint(open_source(str(stats)))
    modules = {f"model.layers.{i}.self_attn.q_proj": 64 for i in (0, 1)}
    modules |= {f"model.layers.{i}.mlp.down_proj": 96 for i in (0, 1)}
    tensors = load_file(stats)
    return {name: tensors[s.key] for name, s in select_covariances(file, modules).items()}


@pytest.mark.parametrize("name", usual(["plain", *NAMES], MERGED))
def test_a_merge_reports_the_loss_of_outputs(
    folder, stats: Path, lora: Path, named: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    base, options = folder(name), {"rounding": "compensated", "stats": stats, "verify": True}
    receipt = adapterkit.merge(base, [lora], out=tmp_path / "out", **options)
    assert receipt.data["verified"]["tensors"] == 4
    exact, nearest = tmp_path / "exact", tmp_path / "nearest"
    floats = {} if name == "plain" else {"dequantize": True}
    adapterkit.merge(base, [lora], out=exact, dtype="fp32", **floats)
    adapterkit.merge(base, [lora], out=nearest)
    values = [decoded(path) for path in (exact, tmp_path / "out", nearest)]
    for module, c in named.items():
        key = f"{module}.weight"
        metric = receipt.data["parameters"][key]
        w, q, plain = (value[key].double() for value in values)
        c = c.double()
        size, *lost = ((m @ c * m).sum().sqrt() for m in (w, q - w, plain - w))
        assert metric["output_error"] == pytest.approx(float(lost[0] / size), rel=1e-3)
        assert metric["unweighted_output_error"] == pytest.approx(float(lost[1] / size), rel=1e-2)
        assert metric["output_error"] < metric["unweighted_output_error"]
        assert 0.9 < metric["survived"] < 1.1
    again = adapterkit.verify(tmp_path / "out", base=base, adapters=[lora], stats=stats)
    assert again["tensors"] == 4 and again["rows"] == 256
    before, after = load_file(base / FILE), load_file(tmp_path / "out" / FILE)
    touched = [key for key in before if any(word in key for word in TOUCHED)]
    assert same(*({k: t[k] for k in before if k not in touched} for t in (before, after)))


def decoded(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint as float32."""
    base, tensors = decoded_view(open_checkpoint(open_source(str(path)))), load_file(path / FILE)
    return {
        key: spec.decode({part.key: tensors[part.key] for part in spec.parts})
        if isinstance(spec, QuantizedWeight)
        else tensors[key].float()
        for key, spec in base.tensors.items()
    }


@pytest.mark.parametrize("name", ["plain", "bnb-nf4-double", "int4", "fp8"])
def test_slices_and_a_resharded_output_do_not_matter(
    folder, stats: Path, lora: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rounding": "compensated", "stats": stats}
    adapterkit.merge(folder(name), [lora], out=tmp_path / "one", **options)
    monkeypatch.setattr(rows, "SLICE", 1 << 9)
    more = {"max_shard_size": "20KB"} if name == "plain" else {}
    adapterkit.merge(folder(name), [lora], out=tmp_path / "two", **options, **more)
    both = [
        {
            k: v
            for file in (tmp_path / out).glob("*.safetensors")
            for k, v in load_file(file).items()
        }
        for out in ("one", "two")
    ]
    assert same(*both)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_decoded_weights_are_compensated_too(
    folder, stats: Path, lora: Path, dtype: str, tmp_path: Path
) -> None:
    receipt = adapterkit.merge(
        folder("bnb-nf4"),
        [lora],
        out=tmp_path / "out",
        dequantize=True,
        dtype=dtype,
        rounding="compensated",
        stats=stats,
        verify=True,
    )
    metrics = [m for m in receipt.data["parameters"].values() if "output_error" in m]
    assert len(metrics) == 4
    assert all(m["output_error"] < m["unweighted_output_error"] < 0.01 for m in metrics)


def test_a_float32_result_is_not_rounded(folder, stats: Path, lora: Path, tmp_path: Path) -> None:
    adapterkit.merge(folder("plain"), [lora], out=tmp_path / "plain", dtype="fp32")
    options = {"rounding": "compensated", "stats": stats}
    adapterkit.merge(folder("plain"), [lora], out=tmp_path / "out", dtype="fp32", **options)
    assert same(load_file(tmp_path / "out" / FILE), load_file(tmp_path / "plain" / FILE))


@pytest.mark.parametrize("name", [name for name in VERBS if "double" not in name])
def test_quantize_with_compensation_lowers_the_output_error(
    folder, stats: Path, name: str, tmp_path: Path, named: dict[str, Tensor]
) -> None:
    options = {"rounding": "compensated", "stats": stats}
    receipt = adapterkit.quantize(folder("plain"), out=tmp_path / "out", **VERBS[name], **options)
    original, q = load_file(folder("plain") / FILE), decoded(tmp_path / "out")
    metrics = receipt.data["parameters"]
    assert len(metrics) == 14
    for metric in metrics.values():
        assert metric["output_error"] < metric["unweighted_output_error"]
    for module, c in named.items():
        w = original[f"{module}.weight"].float()
        lost = kernel.output_norm(q[f"{module}.weight"] - w, c) / kernel.output_norm(w, c)
        assert metrics[f"{module}.weight"]["output_error"] == pytest.approx(lost, rel=1e-4)
    plain, packed = load_file(folder(name) / FILE), load_file(tmp_path / "out" / FILE)
    assert plain.keys() == packed.keys()
    for key in plain:
        codes = key.endswith(("weight", "weight_packed"))
        assert codes or torch.equal(bits(plain[key]), bits(packed[key])), key


def test_a_small_delta_survives_in_the_outputs(folder, stats: Path, tmp_path: Path) -> None:
    """A delta far below a step of the format: nearest loses it and says so."""
    oracle.train(quantized_llama.llama(), tmp_path / "lora", size=0.006, target_modules=TOUCHED)
    options = {"rounding": "compensated", "stats": stats}
    base, loras = folder("bnb-nf4"), [tmp_path / "lora"]
    nearest = adapterkit.merge(base, loras, out=tmp_path / "nearest").data
    receipt = adapterkit.merge(base, loras, out=tmp_path / "out", **options).data
    assert any("survived" in text for text in nearest["warnings"])
    assert not any("survived" in text for text in receipt["warnings"] + receipt["notes"])


def test_several_layers_in_one_stored_tensor(tmp_path: Path) -> None:
    """gate, q, k and v in one, gate and up in one, each with the covariance of its own inputs."""
    model = tiny.model("hrm_text").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    covariances = {
        f"{name}.covariance": correlated(layer.in_features, seed)
        for seed, (name, layer) in enumerate(layers.items())
    }
    save_file(covariances, tmp_path / "stats.safetensors")
    lora = tmp_path / "lora"
    oracle.train(model, lora, target_modules=["q_proj", "v_proj", "gate_proj"])
    merge = lambda out, **options: (
        adapterkit.merge(tmp_path / "base", [lora], out=tmp_path / out, **options),
        load_file(tmp_path / out / FILE),
    )
    _, exact = merge("exact", dtype="fp32")
    stats = {"rounding": "compensated", "stats": tmp_path / "stats.safetensors"}
    receipt, actual = merge("out", verify=True, **stats)
    before = load_file(tmp_path / "base" / FILE)
    prefix, rounder = "model.L_module.layers.0", kernel.float_rounder(torch.bfloat16)
    for key, parts in {
        "attn.gqkv_proj": ["self_attn.gate_proj", "self_attn.q_proj", None, "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", None],
    }.items():
        key = f"{prefix}.{key}.weight"
        tensors = (each[key].chunk(len(parts)) for each in (exact, actual, before))
        for name, w, q, old in zip(parts, *tensors, strict=True):
            if name is None:
                assert torch.equal(q, old)
                continue
            factor = kernel.factorize(covariances[f"{prefix}.{name}.covariance"])
            expected = kernel.round_weight(w, factor, rounder)
            assert (q.float() == expected).float().mean() > 0.98
        metric = receipt.data["parameters"][key]
        assert metric["output_error"] < 0.6 * metric["unweighted_output_error"]


def test_gpt2_keeps_inputs_first(cached_folder, tmp_path: Path) -> None:
    """Conv1D's weight is (in, out): in floats, in nf4, and in a merge into each."""
    base = cached_folder(
        "compensated-gpt2", lambda folder: oracle.save_base(oracle.gpt2(), folder, "bf16")
    )
    model = oracle.load(oracle.gpt2, base).float()
    tokens = torch.randint(60, (24, 16), generator=torch.Generator().manual_seed(3))
    stats = tmp_path / "stats.safetensors"
    collect(model, lambda: model(tokens), out=stats)
    oracle.train(oracle.gpt2(), tmp_path / "lora", target_modules=["c_attn", "c_proj", "c_fc"])
    options = {"rounding": "compensated", "stats": stats}
    adapterkit.quantize(base, out=tmp_path / "nf4", to="nf4", **options)
    for packed in (base, tmp_path / "nf4"):
        receipt = adapterkit.merge(
            packed,
            [tmp_path / "lora"],
            out=tmp_path / "out",
            overwrite=True,
            verify=True,
            **options,
        )
        metrics = [m for m in receipt.data["parameters"].values() if "output_error" in m]
        assert len(metrics) == receipt.data["verified"]["tensors"] >= 4
        assert all(m["output_error"] < m["unweighted_output_error"] for m in metrics)


# what is refused


def swapped(weight: Tensor, factor: kernel.Factor, round_column: Any) -> Tensor:
    """Two values at each other's places."""
    value = RIGHT(weight, factor, round_column)
    value[5, [7, 11]] = value[5, [11, 7]]
    return value


def uncompensated(weight: Tensor, factor: kernel.Factor, round_column: Any) -> Tensor:
    """Rounding to nearest."""
    unit = torch.eye(len(factor.r), dtype=torch.float64)
    return RIGHT(weight, factor._replace(r=unit), round_column)


RIGHT = kernel.round_weight


@pytest.mark.parametrize("name", ["plain", "bnb-nf4", "int8", "nvfp4"])
@pytest.mark.parametrize("wrong", [swapped, uncompensated])
def test_verify_finds_wrong_values(
    folder, stats, lora, wrong: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong is swapped and name == "nvfp4":
        return  # the values are none of the other's group
    monkeypatch.setattr(kernel, "round_weight", wrong)
    options = {"rounding": "compensated", "stats": stats}
    adapterkit.merge(folder(name), [lora], out=tmp_path / "out", **options)
    monkeypatch.undo()
    with pytest.raises(Damaged, match=r"row \d+, column \d+"):
        adapterkit.verify(tmp_path / "out", base=folder(name), adapters=[lora], stats=stats)


HOSTILE = {
    "missing": (lambda c: None, Refused, "down_proj.covariance"),
    "of another model": (lambda c: torch.eye(7), Damaged, r"\(7, 7\)"),
    "integers": (lambda c: c.long(), Damaged, "I64"),
}
BROKEN = {
    "NaN": (lambda c: c * torch.nan, "not finite"),
    "zeros": (lambda c: c * 0, "zeros"),
    "not symmetric": (lambda c: c.triu(), "not symmetric"),
    "indefinite": (lambda c: c - 0.2 * c.diagonal().mean() * torch.eye(len(c)), "semidefinite"),
}


def changed(stats: Path, folder: Path, change: Callable[[Tensor], Tensor | None]) -> Path:
    """The file with other covariances of the layers that the adapter has."""
    tensors, out = load_file(stats), folder / "changed.safetensors"
    for key in [key for key in tensors if key.endswith("down_proj.covariance")]:
        value = change(tensors.pop(key))
        tensors |= {} if value is None else {key: value.contiguous()}
    save_file(tensors, out, open_checkpoint(open_source(str(stats))).shards[stats.name].metadata)
    return out


@pytest.mark.parametrize("name", HOSTILE)
def test_statistics_of_another_model(folder, stats, lora, name: str, tmp_path: Path) -> None:
    change, error, text = HOSTILE[name]
    options = {"rounding": "compensated", "stats": changed(stats, tmp_path, change)}
    for run in (
        lambda out: adapterkit.merge(folder("plain"), [lora], out=out, **options),
        lambda out: adapterkit.merge(folder("bnb-nf4"), [lora], out=out, **options),
        lambda out: adapterkit.quantize(folder("plain"), out=out, to="nf4", **options),
    ):
        with pytest.raises(AdapterkitError, match=text) as caught:
            run(tmp_path / "out")
        assert isinstance(caught.value, error) or str(caught.value).count("covariance") >= 2
        assert str(caught.value).count("down_proj") >= 2  # both layers are named
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BROKEN)
def test_statistics_that_are_none(folder, stats, lora, name: str, tmp_path: Path) -> None:
    change, text = BROKEN[name]
    options = {"rounding": "compensated", "stats": changed(stats, tmp_path, change)}
    with pytest.raises(Unrecoverable, match=text):
        adapterkit.merge(folder("bnb-nf4"), [lora], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together(folder, stats, lora, tmp_path: Path) -> None:
    for options, text in [
        ({"rounding": "compensated"}, "--stats FILE"),
        ({"stats": stats}, "--rounding compensated"),
        ({"rounding": "stochastic", "stats": stats}, "--rounding compensated"),
        ({"rounding": "compensated", "stats": stats, "seed": 3}, "--seed is given"),
        ({"rounding": "compensated", "stats": stats, "compat": "peft"}, "--compat is given"),
    ]:
        with pytest.raises(Refused, match=text):
            adapterkit.merge(folder("plain"), [lora], out=tmp_path / "out", **options)
    for options in ({"rounding": "compensated"}, {"stats": stats}, {"rounding": "stochastic"}):
        with pytest.raises(Refused):
            adapterkit.quantize(folder("plain"), out=tmp_path / "out", to="nf4", **options)
    assert not (tmp_path / "out").exists()
