"""LoftQ: W ≈ Q + scale·b@a never worse than Q alone, by float64 from the files, a plain loop, and
PEFT's own."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import adapterkit
from adapterkit.bases.quantized.codecs.bnb4 import Bnb4
from adapterkit.bases.quantized.loftq import alternate
from adapterkit.core.errors import Refused
from adapterkit.core.weights.codec import PlainWeight
from tests.support import oracle
from tests.support.loftq import MODELS, originals, products, values
from tests.support.usual import usual

peft = pytest.importorskip("peft")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
F = bnb.functional

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda name: cached_folder(
        f"loftq-{name}",
        lambda folder: oracle.save_base(
            MODELS[name](), folder, "fp32" if name == "gpt2" else "bf16"
        ),
    )


def loftq(base: Path, out: Path, **how) -> dict[str, dict[str, Any]]:
    """The metrics of each weight."""
    metrics = adapterkit.loftq(base, out=out, **how).data["parameters"]
    return {key: metric for key, metric in metrics.items() if "error_after" in metric}


def true_errors(name: str, base: Path, out: Path) -> dict[str, tuple[float, float]]:
    """‖W - Q - scale·b@a‖ / ‖W‖ and ‖W - Q‖ / ‖W‖."""
    weights, packed, deltas = originals(base), values(out / "base"), products(name, out / "adapter")
    return {
        key: (
            float((weights[key] - q - deltas.get(key, 0)).norm() / weights[key].norm()),
            float((weights[key] - q).norm()),
        )
        for key, q in packed.items()
    }


def quantized(kind: str, weight: Tensor, block: int = 64) -> Tensor:
    """bitsandbytes' own values of a weight (out, in)."""
    if kind == "int8":
        codes, scale, _ = F.int8_vectorwise_quant(weight.half())
        return F.int8_vectorwise_dequant(codes, scale).double()
    # whole blocks in one row: no other rows does it decode rightly on CPUs
    flat = weight.float().reshape(1, -1)
    packed, state = F.quantize_4bit(
        flat, blocksize=block, quant_type="nf4", compress_statistics=kind == "double"
    )
    return F.dequantize_4bit(packed, state).view(weight.shape).double()


def loop(
    kind: str, weight: Tensor, rank: int, iterations: int, block: int = 64
) -> tuple[float, float]:
    """The relative errors of plain quantization and of the best round, all in float64."""
    low, errors = torch.zeros_like(weight), []
    for _ in range(iterations):
        q = quantized(kind, weight - low, block)
        errors += [float((weight - q).norm())] if not errors else []
        u, s, vh = torch.linalg.svd(weight - q, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vh[:rank]
        errors.append(float((weight - q - low).norm()))
    return errors[0] / float(weight.norm()), min(errors) / float(weight.norm())


HOW: dict[str, tuple[dict[str, Any], str]] = {
    "nf4": ({}, "nf4"),
    "double": ({"double_quant": True}, "double"),
    "128": ({"block_size": 128}, "nf4"),
    "int8": ({"bits": 8}, "int8"),
}


@pytest.mark.parametrize(
    ("name", "kind", "rank", "iterations"),
    usual(
        [(n, k, *how) for n in ("llama", "gpt2") for k in HOW for how in ((1, 4), (8, 1), (8, 4))],
        lambda row: row[2:] == (8, 4) or row[:2] in (("llama", "nf4"), ("gpt2", "int8")),
    ),
)
def test_errors_are_those_of_a_plain_loop(
    base, name: str, kind: str, rank: int, iterations: int, tmp_path: Path
) -> None:
    how, form = HOW[kind]
    metrics = loftq(base(name), tmp_path / "out", rank=rank, iterations=iterations, **how)
    errors, weights = true_errors(name, base(name), tmp_path / "out"), originals(base(name))
    assert metrics.keys() == errors.keys() and len(metrics) == {"llama": 7, "gpt2": 4}[name]
    for key, metric in metrics.items():
        weight = weights[key].T if name == "gpt2" else weights[key]
        before, after = loop(form, weight, rank, iterations, how.get("block_size", 64))
        assert metric["error"] == pytest.approx(before, rel=1e-5), key
        assert metric["error_after"] == pytest.approx(errors[key][0], rel=1e-4), key
        # one code that falls on the other side changes what follows
        rounds = 5e-3 if kind != "int8" else 2e-2
        assert metric["error_after"] == pytest.approx(
            after, rel=1e-4 if iterations == 1 else rounds
        ), key
        assert metric["error_after"] < metric["error"]
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_one_round_is_pefts(base, kind: str, rank: int, tmp_path: Path) -> None:
    metrics = loftq(
        base("llama"), tmp_path / "out", rank=rank, bits=8 if kind == "int8" else 4, iterations=1
    )
    theirs = on_cpu(peft.utils.loftq_utils.loftq_init)
    deltas, packed = (
        products("llama", tmp_path / "out" / "adapter"),
        values(tmp_path / "out" / "base"),
    )
    for key, weight in originals(base("llama")).items():
        if key not in metrics:
            continue
        q, a, b = theirs(
            weight.float(), num_bits=8 if kind == "int8" else 4, reduced_rank=rank, num_iter=1
        )
        assert torch.equal(q.double(), packed[key])
        expected = float((weight - q.double() - b.double() @ a.double()).norm() / weight.norm())
        assert metrics[key]["error_after"] == pytest.approx(expected, rel=1e-4)
        ours = float((weight - packed[key] - deltas[key]).norm() / weight.norm())
        assert ours == pytest.approx(expected, rel=1e-4)


def on_cpu(function: Callable) -> Callable:
    """PEFT's function, which asks for CUDA by name."""
    spaces = dict(vars(peft.utils.loftq_utils))
    exec(inspect.getsource(function).replace('"cuda"', '"cpu"'), spaces)
    return spaces[function.__name__]


@pytest.mark.parametrize(
    "how",
    [
        {"alpha": 16},
        {"alpha": 2.5, "rslora": True},
        {"rslora": True},
        {"alpha": 0.5},
        {"dtype": "bf16"},
        {"alpha": 64, "dtype": "fp16"},
    ],
    ids=str,
)
def test_the_scale_is_made_up_for(base, how: dict, tmp_path: Path) -> None:
    plain = loftq(base("llama"), tmp_path / "plain", rank=4)
    scaled = loftq(base("llama"), tmp_path / "scaled", rank=4, **how)
    assert (tmp_path / "plain" / "base" / "model.safetensors").read_bytes() == (
        tmp_path / "scaled" / "base" / "model.safetensors"
    ).read_bytes()
    assert plain == scaled
    one, other = (products("llama", tmp_path / side / "adapter") for side in ("plain", "scaled"))
    limit = {"bf16": 2e-2, "fp16": 2e-3}.get(how.get("dtype", ""), 1e-5)
    for key, delta in one.items():
        assert float((other[key] - delta).norm()) <= limit * float(delta.norm()), key
    config = json.loads((tmp_path / "scaled" / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] == how.get("rslora", False) and config["lora_alpha"] == how.get(
        "alpha", 4
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rank_above_what_a_layer_has(base, bits: int, tmp_path: Path) -> None:
    """Two layers have 64 rows: their factors make up for all that is lost, and end in zeros."""
    loftq(base("llama"), tmp_path / "out", rank=100, alpha=30, bits=bits, iterations=2)
    errors = true_errors("llama", base("llama"), tmp_path / "out")
    for key, (after, _) in errors.items():
        assert after < (1e-5 if "k_proj" in key or "v_proj" in key else 0.03), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_never_worse_than_plain_quantization(base, name: str, tmp_path: Path) -> None:
    for bits in (4, 8):
        adapterkit.quantize(base(name), out=tmp_path / f"q{bits}", to={4: "nf4", 8: "int8"}[bits])
        plain, weights = values(tmp_path / f"q{bits}"), originals(base(name))
        for iterations in (1, 2, 3, 5):
            out = tmp_path / f"{bits}-{iterations}"
            metrics = loftq(base(name), out, rank=2, bits=bits, iterations=iterations)
            for key, (after, _) in true_errors(name, base(name), out).items():
                before = float((weights[key] - plain[key]).norm() / weights[key].norm())
                assert after <= before * (1 + 1e-5) and metrics[key]["error"] == pytest.approx(
                    before, rel=1e-4
                )
                assert 0 <= metrics[key]["iterations"] <= iterations


def test_loftq_keeps_the_best_round() -> None:
    """More rounds are never worse, though a round may be."""
    w = 0.02 * torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    packed = Bnb4.for_encoding("nf4", PlainWeight("x.weight", tuple(w.shape), "F32"), {})
    assert packed is not None
    rounds = [alternate(w, packed, 8, iterations) for iterations in range(1, 13)]
    errors = [actual.after for actual in rounds]
    assert errors == sorted(errors, reverse=True) and errors[0] < rounds[0].before
    assert any(actual.number < iterations for iterations, actual in enumerate(rounds, start=1))
    for actual in rounds:
        assert actual.svd is not None
        rest = w - packed.decode(actual.stored) - (actual.svd.u * actual.svd.s) @ actual.svd.vh
        assert actual.after == pytest.approx(
            float(rest.double().norm() / w.double().norm()), rel=1e-5
        )


def test_targets_and_skip(base, tmp_path: Path) -> None:
    metrics = loftq(
        base("llama"), tmp_path / "out", rank=4, targets="q_proj,down_proj", skip="v_proj"
    )
    assert {key.split(".")[-2] for key in metrics} == {"q_proj", "down_proj"}
    adapterkit.quantize(base("llama"), out=tmp_path / "plain", to="nf4", skip="v_proj")
    ours, plain = (
        load_file(tmp_path / side / "model.safetensors") for side in ("out/base", "plain")
    )
    assert (
        ours.keys() == plain.keys() and "model.layers.0.self_attn.v_proj.weight.absmax" not in ours
    )
    for key, tensor in plain.items():
        if "q_proj" not in key and "down_proj" not in key:
            assert torch.equal(ours[key], tensor), key
    configs = [
        json.loads((tmp_path / side / "config.json").read_text()) for side in ("out/base", "plain")
    ]
    assert configs[0] == configs[1]
    assert len(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")) == 4
    with pytest.raises(Refused, match="--targets 'nothing' matches none"):
        loftq(base("llama"), tmp_path / "no", rank=4, targets="nothing")
    with pytest.raises(Refused, match="--targets"):  # left alone, so it has no factors
        loftq(base("llama"), tmp_path / "no", rank=4, targets="v_proj", skip="v_proj")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_and_peft_load_both(base, name: str, bits: int, tmp_path: Path) -> None:
    loftq(base(name), tmp_path / "out", rank=16, alpha=8, bits=bits)
    adapterkit.quantize(base(name), out=tmp_path / "plain", to={4: "nf4", 8: "int8"}[bits])
    cls = type(MODELS[name]())
    x = torch.arange(24).view(2, 12)
    with oracle.quiet(), torch.no_grad():
        expected = cls.from_pretrained(base(name), dtype=torch.float32)(x).logits
        plain, packed = (
            cls.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
            for folder in (tmp_path / "plain", tmp_path / "out" / "base")
        )
        ours = peft.PeftModel.from_pretrained(packed, tmp_path / "out" / "adapter")
        assert not [k for k, v in ours.named_parameters() if "lora_B" in k and not v.any()]
        errors = [float((model(input_ids=x).logits - expected).norm()) for model in (plain, ours)]
    if bits == 4:
        assert errors[1] < 0.85 * errors[0], errors
    else:  # most of the error is that of its activations
        assert errors[1] < 1.2 * errors[0], errors
    adapterkit.merge(
        tmp_path / "out" / "base",
        [tmp_path / "out" / "adapter"],
        out=tmp_path / "merged",
        dequantize=True,
        dtype="fp32",
    )
    with oracle.quiet(), torch.no_grad():
        merged = cls.from_pretrained(tmp_path / "merged", dtype="auto")(x).logits
    assert float((merged - expected).norm()) < 0.85 * errors[0]


# beside a base that is quantized already


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_the_best_for_a_base_that_stays(base, name: str, to: str, tmp_path: Path) -> None:
    adapterkit.quantize(base(name), out=tmp_path / "q", to=to)
    metrics = loftq(base(name), tmp_path / "out", rank=4, alpha=12, quantized_base=tmp_path / "q")
    weights, packed, deltas = (
        originals(base(name)),
        values(tmp_path / "q"),
        products(name, tmp_path / "out"),
    )
    assert (
        deltas.keys() == packed.keys()
        and not (tmp_path / "out" / "base").exists()
        and len(metrics) == len(packed)
    )
    for key, delta in deltas.items():
        rest = weights[key] - packed[key]
        best = float(torch.linalg.svdvals(rest)[4:].norm())
        assert float((rest - delta).norm()) <= best * (1 + 1e-4), key
        metric = metrics[key.removesuffix(".weight")]
        assert metric["error"] == pytest.approx(float(rest.norm() / weights[key].norm()), rel=1e-4)
        assert metric["error_after"] == pytest.approx(
            float((rest - delta).norm() / weights[key].norm()), rel=1e-4
        )


def test_loftq_equals_peft_on_a_loaded_model(
    base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        peft.utils.loftq_utils, "_loftq_init_new", on_cpu(peft.utils.loftq_utils._loftq_init_new)
    )
    adapterkit.quantize(base("llama"), out=tmp_path / "q", to="nf4", double_quant=True)
    loftq(
        base("llama"),
        tmp_path / "out",
        rank=1,
        quantized_base=tmp_path / "q",
        targets="q_proj,up_proj",
    )
    with oracle.quiet():
        model = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "q", device_map="cpu", dtype=torch.float32
        )
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "up_proj"])
        )
        peft.replace_lora_weights_loftq(model, str(base("llama") / "model.safetensors"))
    weights, packed, deltas = (
        originals(base("llama")),
        values(tmp_path / "q"),
        products("llama", tmp_path / "out"),
    )
    assert len(deltas) == 2
    for key, delta in deltas.items():
        module = model.get_submodule("base_model.model." + key.removesuffix(".weight"))
        theirs = (
            module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        ).detach()
        rest = weights[key] - packed[key]
        assert float((rest - delta).norm()) == pytest.approx(
            float((rest - theirs).norm()), rel=1e-4
        )
        # the values are close together
        assert float((theirs - delta).norm()) <= 0.1 * float(theirs.norm()), key


# refusals


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 4, "bits": 3}, "--bits"),
        ({"rank": 4, "bits": 8, "double_quant": True}, "--double-quant"),
        ({"rank": 4, "bits": 8, "block_size": 64}, "--block-size"),
        ({"rank": 4, "block_size": 63}, "--block-size 63"),
        ({"rank": 4, "iterations": 0}, "--iterations 0"),
        ({"rank": 4, "alpha": 0}, "--alpha 0"),
        ({"rank": 4, "alpha": float("nan")}, "--alpha nan"),
        ({"rank": 4, "targets": "("}, "--targets"),
        ({"rank": 4, "skip": "("}, "--skip"),
        ({"rank": 4, "dtype": "int8"}, "--dtype"),
    ],
    ids=str,
)
def test_options_that_are_refused(base, how: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=text):
        adapterkit.loftq(base("llama"), out=tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


def test_models_that_are_refused(base, tmp_path: Path) -> None:
    adapterkit.quantize(base("llama"), out=tmp_path / "q", to="nf4")
    with pytest.raises(Refused, match="quantized"):
        adapterkit.loftq(tmp_path / "q", out=tmp_path / "out", rank=4)
    with pytest.raises(Refused, match="quantized"):
        adapterkit.loftq(
            tmp_path / "q", out=tmp_path / "out", rank=4, quantized_base=tmp_path / "q"
        )
    with pytest.raises(Refused, match="no quantized weights"):
        adapterkit.loftq(base("llama"), out=tmp_path / "out", rank=4, quantized_base=base("llama"))
    with pytest.raises(Refused, match="the same weights") as caught:
        adapterkit.loftq(base("bert"), out=tmp_path / "out", rank=4, quantized_base=tmp_path / "q")
    actual = " ".join(error.problem for error in caught.value.errors)
    assert all(f"layers.0.{name}" in actual for name in ("self_attn.q_proj", "mlp.down_proj"))
    other = oracle.llama(num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    oracle.save_base(other, tmp_path / "wider", "bf16")
    with pytest.raises(Refused, match=r"\(128, 192\) quantized, \(128, 256\)"):
        adapterkit.loftq(
            tmp_path / "wider", out=tmp_path / "out", rank=4, quantized_base=tmp_path / "q"
        )
    unknown = oracle.edit_config(
        base("llama"), tmp_path / "unknown", model_type="no_such_model", architectures=["NoSuch"]
    )
    with pytest.raises(Refused, match="transformers does not know"):
        adapterkit.loftq(unknown, out=tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "q")


def test_weights_of_nothing(base, tmp_path: Path) -> None:
    """Zeros are quantized without loss; their factors are zeros."""
    from safetensors.torch import save_file

    zero = shutil.copytree(base("llama"), tmp_path / "zero")
    tensors = load_file(zero / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    save_file(
        tensors | {key: torch.zeros_like(tensors[key])},
        zero / "model.safetensors",
        {"format": "pt"},
    )
    for bits in (4, 8):
        metrics = loftq(zero, tmp_path / f"{bits}", rank=4, bits=bits)
        assert metrics[key]["error"] == metrics[key]["error_after"] == 0
        assert not products("llama", tmp_path / f"{bits}" / "adapter")[key].any()
