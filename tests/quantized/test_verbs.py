"""Adapters merged into bitsandbytes' weights: in their format, rounded by one encoding, or as
floats, rounded once."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Interrupted, Refused
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.kernels.quant import blockwise
from adapterkit.kernels.quant import llm_int8 as int8_rows
from tests.support import oracle

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SIZES = {"hidden_size": 128, "intermediate_size": 192}
HOW: dict[str, dict[str, Any]] = {
    "nf4": {"to": "nf4"},
    "fp4": {"to": "fp4", "block_size": 128},
    "double": {"to": "nf4", "double_quant": True},
    "int8": {"to": "int8"},
}
TOUCHED = ["q_proj", "down_proj"]


def gpt2() -> nn.Module:
    """One width that is no multiple of a block."""
    return oracle._model(
        "GPT2LMHeadModel",
        transformers.GPT2Config(vocab_size=80, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: oracle.llama(**SIZES),
    "tied": lambda: oracle.llama(tie=True, **SIZES),
    "gpt2": gpt2,
}


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A model in a format; `None`: as it was."""

    def make(name: str = "llama", kind: str | None = "nf4", **how) -> Path:
        plain = cached_folder(
            "-".join(["verbs", name, *how]),
            lambda folder: oracle.save_base(MODELS[name](), folder, "bf16", **how),
        )
        if kind is None:
            return plain
        quantize = lambda folder: adapterkit.quantize(plain, out=folder / "q", **HOW[kind])
        return cached_folder("-".join(["verbs", name, kind, *how]), quantize) / "q"

    return make


@pytest.fixture
def floats(cached_folder: Callable[..., Path], base) -> Callable[..., Path]:
    """What a quantized model decodes to, in float32."""

    def make(name: str = "llama", kind: str = "nf4") -> Path:
        source = base(name, kind)
        return (
            cached_folder(
                f"verbs-floats-{name}-{kind}",
                lambda f: adapterkit.dequantize(source, out=f / "f", dtype="fp32"),
            )
            / "f"
        )

    return make


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str = "llama", seed: int = 1, **config) -> Path:
        label = f"verbs-lora-{name}-{seed}-{abs(hash(json.dumps(config, sort_keys=True)))}"
        config = {"target_modules": TOUCHED if name != "gpt2" else ["c_attn", "c_fc"]} | config
        config |= {"fan_in_fan_out": True} if name == "gpt2" else {}
        return cached_folder(
            label, lambda folder: oracle.train(MODELS[name](), folder, seed=seed, **config)
        )

    return make


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def values(folder: Path) -> dict[str, Tensor]:
    """Every quantized weight, decoded to float32."""
    tensors = stored(folder)
    specs = quantized_weights(decoded_view(open_checkpoint(open_source(str(folder)))).tensors)
    return {
        spec.key: spec.decode({part.key: tensors[part.key] for part in spec.parts})
        for spec in specs
    }


def exact(floats: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> dict[str, Any]:
    """W + Σ weight·scale·b@a in float64, W what the base decodes to."""
    model = oracle.load(
        json.loads((floats / "config.json").read_text())["architectures"][0], floats
    )
    return oracle.exact(oracle.peft_model(model, *adapters), weights)


def encoded(kind: str, weight: Tensor, turned: bool = False) -> Tensor:
    """What a weight decodes to once it is stored."""
    weight = (weight.T if turned else weight).contiguous()
    how = HOW[kind]
    if kind == "int8":
        value = int8_rows.decode_int8(*int8_rows.quantize_int8(weight))
    else:
        block = how.get("block_size", 64)
        codes, absmax = blockwise.quantize_4bit(weight, how["to"], block)
        if how.get("double_quant"):
            nested = blockwise.quantize_absmax(absmax)
            absmax = blockwise.decode_absmax(
                nested.codes, nested.absmax, blockwise.dynamic_map(), nested.offset
            )
        value = blockwise.decode_4bit(codes, absmax, how["to"], block, weight.numel()).view(
            weight.shape
        )
    return value.T if turned else value


def loaded(folder: Path) -> nn.Module:
    cls = getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    with oracle.quiet():
        model, info = cls.from_pretrained(
            folder, device_map="cpu", dtype="auto", output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def parts_of(key: str, tensors: dict[str, Tensor]) -> set[str]:
    """A weight's own tensors; int8's scale is a sibling of the weight."""
    stem = key.removesuffix("weight")
    return {
        k
        for k in tensors
        if k == key or k.startswith(key + ".") or k in (stem + "SCB", stem + "weight_format")
    }


# in the format


@pytest.mark.parametrize("kind", HOW)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_in_the_format(base, floats, lora, name: str, kind: str, tmp_path: Path) -> None:
    source, adapter = base(name, kind), lora(name)
    receipt = oracle.merge(source, adapter, out=tmp_path / "out")
    expected = exact(floats(name, kind), adapter)
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    touched = set().union(*(parts_of(key, before) for key in expected))
    assert len(expected) == 4 and len(touched) >= 8
    oracle.assert_same(
        {k: t for k, t in after.items() if k not in touched},
        {k: t for k, t in before.items() if k not in touched},
    )
    old, new = values(source), values(tmp_path / "out")
    for key, one in expected.items():
        ideal = encoded(kind, one.value.float(), name == "gpt2")
        # a value may lie on the threshold of two codes
        other = (new[key] - ideal).abs() > 1e-6 * ideal.abs()
        assert float(other.float().mean()) <= 1e-3 or kind == "double", key
        assert float((new[key] - ideal).norm()) <= 2e-3 * float(ideal.norm()), key
        delta, moved = one.value - old[key].double(), new[key].double() - old[key].double()
        metric = receipt.data["parameters"][key]
        assert metric["survived"] == pytest.approx(
            float((moved * delta).sum() / delta.square().sum()), rel=1e-3
        )
        noise = float((new[key].double() - one.value).norm() / delta.norm())
        assert metric["requantization"] == pytest.approx(noise, rel=1e-3)
        assert metric["delta"] == pytest.approx(
            float(delta.norm() / old[key].double().norm()), rel=1e-3
        )
        assert 0.9 < metric["survived"] < 1.1
    assert receipt.data["warnings"] == []
    text = lambda folder: json.loads((folder / "config.json").read_text())
    assert text(source) == text(tmp_path / "out")
    assert (source / "model.safetensors").stat().st_size - (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size in range(-80, 80)
    loaded(tmp_path / "out")
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_bytes_are_those_of_one_encoding_of_the_float32_sum(
    base, lora, kind: str, tmp_path: Path
) -> None:
    """A delta of few bits and rank 1, so that float32 gives the nearest sum in whatever order."""
    adapter = shutil.copytree(lora(r=1, lora_alpha=2), tmp_path / "adapter")
    tensors = {
        k: (t * 16).round() / 64
        for k, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    source = base("llama", kind)
    oracle.merge(source, adapter, out=tmp_path / "out")
    old, new = values(source), stored(tmp_path / "out")
    for name in {k.rpartition(".lora_")[0] for k in tensors}:
        key = f"{name.removeprefix('base_model.model.')}.weight"
        b, a = (tensors[f"{name}.lora_{side}.weight"].double() for side in "BA")
        total = (old[key].double() + 2 * b @ a).float()
        if kind == "int8":
            codes, scale = int8_rows.quantize_int8(total)
            assert torch.equal(new[key.removesuffix("weight") + "SCB"], scale)
        else:
            codes, scale = blockwise.quantize_4bit(
                total, HOW[kind]["to"], HOW[kind].get("block_size", 64)
            )
            assert torch.equal(new[key + ".absmax"], scale)
        assert torch.equal(new[key], codes)


@pytest.mark.parametrize("kind", HOW)
def test_a_delta_below_the_steps_of_the_format_is_warned_of(
    base, lora, kind: str, tmp_path: Path
) -> None:
    receipt = oracle.merge(base("llama", kind), f"{lora()}=1e-4", out=tmp_path / "out")
    shares = [
        metric["survived"] for metric in receipt.data["parameters"].values() if "survived" in metric
    ]
    assert len(shares) == 4 and max(shares) < 0.5
    (warning,) = receipt.data["warnings"]
    assert "4 of 4 modules" in warning and "--dequantize" in warning


@pytest.mark.parametrize("kind", HOW)
def test_nothing_added_is_no_byte_changed(base, lora, kind: str, tmp_path: Path) -> None:
    adapter = shutil.copytree(lora(), tmp_path / "zero")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: t * ("lora_A" in k) for k, t in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    receipt = oracle.merge(base("llama", kind), adapter, out=tmp_path / "out")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base("llama", kind) / file).read_bytes()
    assert not [text for text in receipt.data["warnings"] if "survived" in text]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["double", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_and_several_adapters(
    base, floats, lora, name: str, kind: str, keep: bool, tmp_path: Path
) -> None:
    """Norms are those of the decoded weight, all is added before the one rounding."""
    modules = {
        "llama": [["q_proj"], ["v_proj", "up_proj"], ["up_proj"]],
        "gpt2": [["c_attn"], ["c_fc"], ["c_fc"]],
    }[name]
    adapters = [lora(name, use_dora=True, target_modules=modules[0])]
    adapters += [
        lora(name, seed=2, r=3, use_rslora=True, target_modules=modules[1]),
        lora(name, seed=3, target_modules=modules[2]),
    ]
    weights = (1.0, 0.5, -0.7)
    sources = [f"{adapter}={weight}" for adapter, weight in zip(adapters, weights, strict=True)]
    oracle.merge(base(name, kind), *sources, out=tmp_path / "out", dequantize=not keep)
    expected = exact(floats(name, kind), *adapters, weights=weights)
    assert len(expected) == (6 if name == "llama" else 4)
    new = values(tmp_path / "out") if keep else stored(tmp_path / "out")
    for key, one in expected.items():
        if not keep:
            oracle.assert_rounded(new[key], one, key)
            continue
        ideal = encoded(kind, one.value.float(), name == "gpt2")
        assert float((new[key] - ideal).norm()) <= 2e-3 * float(ideal.norm()), key


# as floats


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("llama", "nf4", None),
        ("llama", "double", "fp16"),
        ("llama", "int8", "fp32"),
        ("gpt2", "fp4", None),
        ("gpt2", "int8", "fp32"),
        ("tied", "int8", None),
    ],
)
def test_dequantized_every_weight_is_rounded_once(
    base, floats, lora, name: str, kind: str, dtype: str | None, tmp_path: Path
) -> None:
    source, adapter = base(name, kind), lora(name)
    receipt = oracle.merge(source, adapter, out=tmp_path / "out", dequantize=True, dtype=dtype)
    assert receipt.data["warnings"] == []
    adapterkit.dequantize(source, out=tmp_path / "plain", dtype=dtype or "bf16")
    expected, untouched = exact(floats(name, kind), adapter), stored(tmp_path / "plain")
    actual = stored(tmp_path / "out")
    assert actual.keys() == untouched.keys()
    wanted = oracle.DTYPES[dtype or "bf16"]
    for key, tensor in actual.items():
        if key in expected:
            assert tensor.dtype == wanted
            oracle.assert_rounded(tensor, expected[key], key)
        else:
            assert torch.equal(tensor, untouched[key].to(tensor.dtype)), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == str(wanted).removeprefix(
        "torch."
    )
    loaded(tmp_path / "out")


# what is not quantized


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_embeddings_and_heads(base, floats, name: str, kind: str, tmp_path: Path) -> None:
    modules = ["embed_tokens", "q_proj"] + (["lm_head"] if name == "llama" else [])
    # trained on the weights as they are stored: PEFT saves a copy of them, which it loads again
    adapter = tmp_path / "adapter"
    oracle.train(MODELS[name]().to(torch.bfloat16), adapter, target_modules=modules)
    oracle.merge(base(name, kind), adapter, out=tmp_path / "out")
    expected, before, after = (
        exact(floats(name, kind), adapter),
        stored(base(name, kind)),
        stored(tmp_path / "out"),
    )
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in expected:
            assert after[key].dtype == torch.bfloat16
            oracle.assert_rounded(after[key], expected[key], key)
    if name == "tied":  # the head stays as it was
        assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    model = loaded(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, after["model.embed_tokens.weight"])
    assert torch.equal(model.get_output_embeddings().weight, after["lm_head.weight"])


def test_fully_trained_modules_and_biases(base, lora, tmp_path: Path) -> None:
    adapter = lora(modules_to_save=["lm_head", "norm"])
    oracle.merge(base(), adapter, out=tmp_path / "llama")
    after, trained = stored(tmp_path / "llama"), load_file(adapter / "adapter_model.safetensors")
    for key in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(after[key], trained[f"base_model.model.{key}"].to(after[key].dtype))
    loaded(tmp_path / "llama")
    adapter = lora("gpt2", bias="all")
    oracle.merge(base("gpt2"), adapter, out=tmp_path / "gpt2")
    after, trained = stored(tmp_path / "gpt2"), load_file(adapter / "adapter_model.safetensors")
    biases = {k: t for k, t in trained.items() if k.endswith("bias")}
    assert len(biases) > 8
    for key, value in biases.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(after[name], value.to(after[name].dtype)), key
    loaded(tmp_path / "gpt2")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fully_trained_quantized_module_becomes_float_with_the_others(
    base, lora, kind: str, tmp_path: Path
) -> None:
    adapter = lora(modules_to_save=["o_proj"])
    trained = load_file(adapter / "adapter_model.safetensors")
    oracle.merge(base("llama", kind), adapter, out=tmp_path / "floats", dequantize=True)
    key = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(
        stored(tmp_path / "floats")[key], trained[f"base_model.model.{key}"].bfloat16()
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fully_trained_quantized_module_is_refused_in_the_format(
    base, lora, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="o_proj"):
        oracle.merge(base("llama", kind), lora(modules_to_save=["o_proj"]), out=tmp_path / "out")


# refusals, interruptions


@pytest.mark.parametrize(
    "option", [{"dtype": "fp16"}, {"max_shard_size": "1MB"}, {"compat": "peft"}], ids=str
)
def test_options_that_need_floats_are_refused(base, lora, option: dict, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--dequantize"):
        oracle.merge(base(), lora(), out=tmp_path / "out", **option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_delta_that_the_format_cannot_hold(base, lora, kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterkitError, match="_proj.*not finite"):
        oracle.merge(base("llama", kind), f"{lora()}=1e39", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("when", [1, 15])
def test_interrupted_and_resumed(base, lora, when: int, keep: bool, tmp_path: Path) -> None:
    source, how = base("llama", "double", max_shard_size="100KB"), {"dequantize": not keep}
    assert len(list(source.glob("*.safetensors"))) > 3
    whole = oracle.merge(source, lora(), out=tmp_path / "whole", **how).data
    calls = iter(range(1000))

    def progress(done: int) -> None:
        if next(calls) == when:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        oracle.merge(source, lora(), out=tmp_path / "out", progress=progress, **how)
    assert not (tmp_path / "out").exists()
    again = oracle.merge(source, lora(), out=tmp_path / "out", resume=True, **how).data
    for path in (tmp_path / "whole").iterdir():
        if path.name != "adapterkit.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert whole["parameters"] == again["parameters"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in stored(tmp_path / "out").values()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    loaded(tmp_path / "out")


# diff


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_diff_of_a_quantized_and_a_plain_one(
    base, floats, name: str, kind: str, tmp_path: Path
) -> None:
    """By the weights that it decodes to, whichever side it is; the formats' settings and scales are
    no differences."""
    packed, plain = base(name, kind), floats(name, kind)
    adapterkit.dequantize(packed, out=tmp_path / "rounded")
    for a, b in ((packed, plain), (plain, packed), (packed, tmp_path / "rounded")):
        actual = adapterkit.diff(a, b)
        assert actual["same"] and not actual["added"] and not actual["removed"], actual
        assert any("quantized" in note for note in actual["notes"])
    tensors, weights = stored(plain), values(packed)
    other = {key: tensor * 1.5 if key in weights else tensor for key, tensor in tensors.items()}
    shutil.copytree(plain, tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    actual = adapterkit.diff(packed, tmp_path / "other")
    assert {row["name"] for row in actual["changed"]} == set(weights) and not actual["same"]
    for row in actual["changed"]:
        assert row["relative_error"] == pytest.approx(0.5, rel=1e-6) and row[
            "cosine"
        ] == pytest.approx(1)
        assert row["a"]["dtype"] in ("bnb4", "bnb8") and row["norm"] == pytest.approx(
            float(weights[row["name"]].norm()), rel=1e-6
        )
    assert adapterkit.diff(packed, tmp_path / "other", tolerance=0.51)["same"]
    assert not adapterkit.diff(packed, packed)["notes"]
