"""The formats of quantized weights: read as their own tools read them, merged into and written
again, refused where they lie."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import adapterkit
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import AdapterkitError
from adapterkit.planning.sources import open_source
from adapterkit.tasks import edited
from adapterkit.weights.codec import QuantizedWeight, check_writable
from adapterkit.weights.codecs.fp8 import Fp8
from adapterkit.weights.decoded import decoded_view, quantized_weights
from tests.support import format_tools, oracle, quantized_llama
from tests.support.quantized_llama import FORMS, LINEAR, Form, change

TOUCHED = ("q_proj", "down_proj")
WRITABLE = [name for name, form in FORMS.items() if form.writable]
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """The tiny Llama in a format."""
    return lambda name: cached_folder(
        f"formats-{name}", lambda folder: quantized_llama.base(FORMS[name], folder)
    )


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Path:
    config = {"target_modules": list(TOUCHED), "size": 0.3}
    return cached_folder(
        "formats-lora", lambda folder: oracle.train(quantized_llama.llama(), folder, **config)
    )


def packed_of(folder: Path) -> dict[str, QuantizedWeight]:
    return {
        spec.key: spec
        for spec in quantized_weights(
            decoded_view(open_checkpoint(open_source(str(folder)))).tensors
        )
    }


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# as the tools read them


def ct(form: str, weights: dict[str, Any], **more) -> dict[str, Any]:
    return quantized_llama.compressed(form, {"symmetric": True, **weights}, **more)


INT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
BLOCK = {"strategy": "block", "block_structure": list(format_tools.BLOCK)}
GEMM = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
READ = {  # of golden_narrow: the config, and the dtype that the tool reads it in
    "compressed-tensors.fp8-tensor": (
        ct("float-quantized", quantized_llama.FP8 | {"strategy": "tensor"}),
        torch.float32,
    ),
    "compressed-tensors.fp8-channel": (
        ct("float-quantized", quantized_llama.FP8 | {"strategy": "channel"}),
        torch.float32,
    ),
    "compressed-tensors.fp8-block": (
        ct("naive-quantized", quantized_llama.FP8 | BLOCK),
        torch.float32,
    ),
    "compressed-tensors.nvfp4": (ct("nvfp4-pack-quantized", quantized_llama.NV), torch.bfloat16),
    "compressed-tensors.mxfp4": (
        ct("mxfp4-pack-quantized", quantized_llama.FP4 | {"strategy": "group", "group_size": 32}),
        torch.bfloat16,
    ),
    "compressed-tensors.int3": (ct("pack-quantized", INT | {"num_bits": 3}), torch.float32),
    "compressed-tensors.int4": (ct("pack-quantized", INT), torch.float32),
    "compressed-tensors.int8": (ct("pack-quantized", INT | {"num_bits": 8}), torch.float32),
    "compressed-tensors.int4-zero": (
        ct("pack-quantized", INT | {"group_size": 16, "symmetric": False}),
        torch.float32,
    ),
    "compressed-tensors.int8-channel": (ct("int-quantized", CHANNEL), torch.float32),
    "compressed-tensors.int8-zero": (
        ct("int-quantized", CHANNEL | {"symmetric": False}),
        torch.float32,
    ),
    "transformers.float": (
        {"quant_method": "fp8", "weight_block_size": list(format_tools.BLOCK)},
        torch.float32,
    ),
    "transformers.ue8m0": (
        {
            "quant_method": "fp8",
            "weight_block_size": list(format_tools.BLOCK),
            "scale_fmt": "ue8m0",
        },
        torch.float32,
    ),
    "transformers.mxfp4": ({"quant_method": "mxfp4"}, torch.bfloat16),
    **{
        f"gptqmodel.gptq{b}": (
            {"quant_method": "gptq", "bits": b, "group_size": 32, "desc_act": True, "sym": False},
            torch.float16,
        )
        for b in (2, 3, 4, 8)
    },
    "gptqmodel.awq": (GEMM, torch.float16),
    "torchao.int8-symmetric": ({"quant_method": "torchao"}, torch.bfloat16),
    "torchao.int8-asymmetric": ({"quant_method": "torchao"}, torch.bfloat16),
}


def one_weight(folder: Path, name: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """A checkpoint of one module, stored by a tool."""
    mxfp4, torchao = name == "transformers.mxfp4", name.startswith("torchao")
    join = "m.x_" if mxfp4 else "m._weight_" if torchao else "m."
    tensors = {
        join + leaf: part.contiguous()
        for leaf, part in parts.items()
        if not leaf.startswith("decoded")
    }
    metadata = {"format": "pt"}
    if torchao:
        said = {
            "_type": "Int8Tensor",
            "_data": {"block_size": [1, parts["qdata"].shape[1]]},
            "_tensor_data_names": [],
        }
        metadata["m.weight"] = json.dumps(said)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "quantization_config": settings})
    )
    return folder


@pytest.mark.parametrize("name", READ)
def test_read_as_its_tool_does(tool_tensors, name: str, tmp_path: Path) -> None:
    theirs = tool_tensors(name.partition(".")[0])
    settings, dtype = READ[name]
    parts = {
        key.removeprefix(name + "."): value
        for key, value in theirs.items()
        if key.startswith(name + ".")
    }
    versions = (
        {"decoded1": {}, "decoded2": {"checkpoint_format": "gptq_v2"}}
        if "decoded1" in parts
        else {"decoded": {}}
    )
    for expected, more in versions.items():
        folder = one_weight(tmp_path / expected, name, parts, settings | more)
        adapterkit.dequantize(folder, out=tmp_path / f"{expected}-out", dtype="fp32")
        (found,) = stored(tmp_path / f"{expected}-out").values()
        found = found.to(dtype)
        golden = len(theirs["w"]) == 16
        assert torch.equal(format_tools.digest(found) if golden else found, parts[expected])


@pytest.mark.parametrize("kind", ["Float8WeightOnly", "Int8WeightOnly", "IntxWeightOnly"])
def test_files_of_torchao(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 48)).bfloat16()
    options = (
        {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
        if kind == "IntxWeightOnly"
        else {}
    )
    quantization.quantize_(module, getattr(quantization, f"{kind}Config")(**options))
    tensors, metadata = flatten_tensor_state_dict(module.state_dict())
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata | {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "quantization_config": {"quant_method": "torchao"}})
    )
    adapterkit.dequantize(folder, out=tmp_path / "out")
    found = stored(tmp_path / "out")
    assert set(found) == set(module.state_dict())
    for layer in (0, 1):
        assert same(found[f"{layer}.weight"], module[layer].weight.dequantize())


# what comes back, what a merge makes of it


@pytest.mark.parametrize("name", FORMS)
def test_decoded(base: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """As planned: keys and shapes of the plain model, one rounding to its dtype, nothing left that
    says quantized."""
    folder, plain = base(name), dict(quantized_llama.llama().state_dict())
    adapterkit.dequantize(folder, out=tmp_path / "32", dtype="fp32")
    adapterkit.dequantize(folder, out=tmp_path / "16")
    exact, rounded = stored(tmp_path / "32"), stored(tmp_path / "16")
    assert set(exact) == set(rounded) == set(plain)
    for key, weight in plain.items():
        assert exact[key].shape == weight.shape and same(exact[key].bfloat16(), rounded[key])
        assert float((exact[key] - weight.float()).norm() / weight.float().norm()) < (
            FORMS[name].lost or 0.13
        )
    assert not set(FORMS[name].files) & {path.name for path in (tmp_path / "16").iterdir()}
    assert "quantization_config" not in json.loads((tmp_path / "16/config.json").read_text())
    with safe_open(tmp_path / "16/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", WRITABLE)
def test_what_comes_back(base: Callable[[str], Path], name: str) -> None:
    """Of a weight that its own encoder made, every byte; of transformers' fp8, which forms
    1 / (448 / x), all but the scale's last bits."""
    tensors = stored(base(name))
    for spec in packed_of(base(name)).values():
        parts = {part.key: tensors[part.key] for part in spec.parts}
        again = spec.encode_keeping_scales(parts, spec.decode(parts))
        assert list(again) == list(parts) and [stored.key for stored in spec.max_outputs] == list(
            parts
        )
        rough = {key for key in parts if key.endswith("_scale_inv")}
        assert all(same(again[key], parts[key]) for key in parts if key not in rough), spec.key
        assert all(
            torch.allclose(again[key], parts[key], rtol=2.0**-22, atol=0) for key in rough
        ), spec.key


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("indexed", [True, False])
def test_integers_of_any_bytes_come_back(symmetric: bool, indexed: bool, tmp_path: Path) -> None:
    """Whatever made them: old scales win where new ones are not nearer."""
    form = Form(
        quantized_llama.words(4, 32, symmetric, indexed),
        ct("pack-quantized", INT | {"symmetric": symmetric}),
        0,
    )
    quantized_llama.base(form, tmp_path)
    tensors, generator = stored(tmp_path), torch.Generator().manual_seed(0)
    for spec in packed_of(tmp_path).values():
        parts = {part.key: tensors[part.key] for part in spec.parts}
        words, scale = list(parts)[:2]
        parts[words] = torch.randint(-(2**31), 2**31, parts[words].shape, generator=generator).to(
            torch.int32
        )
        parts[scale][0] = 0
        value = spec.decode(parts)
        again = spec.encode_keeping_scales(parts, value)
        assert torch.equal(spec.decode(again), value)
        far = value + 9 * value.abs().max()  # does not fit the old scales
        assert (
            float((spec.decode(spec.encode_keeping_scales(parts, far)) - far).norm() / far.norm())
            < 0.1
        )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", WRITABLE)
def test_merged_by_slices_of_rows(
    base, lora: Path, name: str, rounding: str, tmp_path: Path, monkeypatch
) -> None:
    """As many as the format allows, or one: the same bytes."""
    for size in (1 << 20, 1):
        monkeypatch.setattr(edited, "SLICE", size)
        adapterkit.merge(base(name), [lora], out=tmp_path / f"{size}", rounding=rounding)
        adapterkit.merge(
            base(name), [lora], out=tmp_path / f"{size}-floats", dequantize=True, rounding=rounding
        )
    for kind in ("", "-floats"):
        assert sha(tmp_path / f"1{kind}") == sha(tmp_path / f"{1 << 20}{kind}")
    slices = {len(list(spec.row_ranges(1))) for spec in packed_of(base(name)).values()}
    assert (max(slices) > 1) == (
        name not in ("fp8-tensor", "modelopt-fp8")
        and "nvfp4" not in name
        and name != "modelopt-file"
    )


@pytest.mark.parametrize("name", WRITABLE)
def test_merge(base: Callable[[str], Path], lora: Path, name: str, tmp_path: Path) -> None:
    folder, form = base(name), FORMS[name]
    adapterkit.dequantize(folder, out=tmp_path / "plain", dtype="fp32")
    before = stored(tmp_path / "plain")
    exact = oracle.exact(
        oracle.peft_model(oracle.load("LlamaForCausalLM", tmp_path / "plain"), lora)
    )
    assert len(exact) == 4

    oracle.merge(folder, lora, out=tmp_path / "floats", dequantize=True)
    oracle.assert_all_rounded(
        stored(tmp_path / "floats"), exact, {k: v.bfloat16() for k, v in before.items()}
    )
    assert not set(form.files) & {path.name for path in (tmp_path / "floats").iterdir()}

    oracle.merge(folder, lora, out=tmp_path / "kept")
    old, new = stored(folder), stored(tmp_path / "kept")
    assert list(old) == list(new)
    touched = {key for key in old if key.split(".")[-2] in TOUCHED}
    assert all(same(old[key], new[key]) for key in set(old) - touched)
    assert all(
        old[key].shape == new[key].shape and old[key].dtype == new[key].dtype for key in touched
    )
    kept = {
        key
        for key in touched
        if key.endswith(("input_scale", "input_global_scale", "weight_shape", "g_idx"))
    }
    assert all(same(old[key], new[key]) for key in kept)
    config = json.loads((tmp_path / "kept/config.json").read_text())
    assert config.get("quantization_config", {}) == form.settings
    adapterkit.dequantize(tmp_path / "kept", out=tmp_path / "kept-32", dtype="fp32")
    after = stored(tmp_path / "kept-32")
    for key, expected in exact.items():
        value = expected.value.double()
        assert float((after[key].double() - value).norm() / value.norm()) < form.lost, key
    metrics = json.loads((tmp_path / "kept/adapterkit.json").read_text())
    assert "survived" in json.dumps(metrics)


@pytest.mark.parametrize("name", WRITABLE)
def test_nothing_added_is_nothing_changed(
    base: Callable[[str], Path], cached_folder, name: str, tmp_path: Path
) -> None:
    config = {"target_modules": list(LINEAR), "size": 0.0}
    zeros = cached_folder(
        "formats-zeros", lambda folder: oracle.train(quantized_llama.llama(), folder, **config)
    )
    oracle.merge(base(name), zeros, out=tmp_path / "out")
    old, new = stored(base(name)), stored(tmp_path / "out")
    assert set(old) == set(new) and all(same(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", [name for name in FORMS if not FORMS[name].writable])
def test_read_only(
    base: Callable[[str], Path], lora: Path, cached_folder, name: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterkitError, match="cannot be written again") as caught:
        oracle.merge(base(name), lora, out=tmp_path / "no")
    assert "--dequantize" in str(caught.value)
    oracle.merge(base(name), lora, out=tmp_path / "floats", dequantize=True)
    head = cached_folder(
        "formats-head",
        lambda folder: oracle.train(quantized_llama.llama(), folder, target_modules=["lm_head"]),
    )
    oracle.merge(base(name), head, out=tmp_path / "head")  # touches nothing that is quantized
    old, new = stored(base(name)), stored(tmp_path / "head")
    assert {key for key in old if not same(old[key], new[key])} == {"lm_head.weight"}


# as transformers loads them


def loaded(folder: Path, name: str = "LlamaForCausalLM") -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ), info
    return model.state_dict()


@pytest.mark.parametrize("kept", [False, True])
def test_fp8_in_transformers(
    base: Callable[[str], Path], lora: Path, kept: bool, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    folder = base("fp8")
    if kept:
        oracle.merge(folder, lora, out=tmp_path / "kept")
        folder = tmp_path / "kept"
    adapterkit.dequantize(folder, out=tmp_path / "plain")
    oracle.assert_same(loaded(folder), stored(tmp_path / "plain"))


@pytest.mark.parametrize(
    "name", [n for n in FORMS if FORMS[n].settings.get("quant_method") == "compressed-tensors"]
)
def test_compressed_tensors_in_transformers(
    base: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    if name == "int4-g_idx":
        pytest.skip("compressed-tensors 0.20 reads g_idx no more")
    adapterkit.dequantize(base(name), out=tmp_path / "plain")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(
            base(name), dtype="auto", quantization_config=config
        )
    found, expected = dict(model.named_parameters()), stored(tmp_path / "plain")
    for key, weight in expected.items():
        assert same(found[key].detach().to(weight.dtype), weight), key


# GPT-OSS


@pytest.fixture
def gpt_oss(cached_folder: Callable[..., Path]) -> Path:
    """Experts in MXFP4, their codes at random."""

    def build(folder: Path) -> None:
        sizes = {
            "vocab_size": 80,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "head_dim": 16,
        }
        experts = {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts)).to(
            torch.bfloat16
        )
        model.save_pretrained(folder)
        tensors, generator = stored(folder), torch.Generator().manual_seed(3)
        for key in [
            key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]:
            count, width, out = tensors.pop(key).shape
            blocks = torch.randint(
                256, (count, out, width // 32, 16), generator=generator, dtype=torch.uint8
            )
            tensors[key + "_blocks"] = blocks
            tensors[key + "_scales"] = torch.randint(
                118, 124, blocks.shape[:-1], generator=generator, dtype=torch.uint8
            )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["lm_head"],
        }
        (folder / "config.json").write_text(json.dumps(config))

    return cached_folder("formats-gpt-oss", build)


@pytest.fixture
def expert_lora(cached_folder: Callable[..., Path], gpt_oss: Path) -> Path:
    config = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }

    def build(folder: Path) -> None:
        with oracle.quiet():
            model = transformers.GptOssForCausalLM.from_pretrained(gpt_oss, dtype="auto")
        model.config.quantization_config = None
        model.hf_quantizer, model.is_quantized = None, False
        oracle.train(model, folder, size=0.2, **config)

    return cached_folder("formats-gpt-oss-lora", build)


def test_gpt_oss_as_transformers_loads_it(gpt_oss: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    adapterkit.dequantize(gpt_oss, out=tmp_path / "plain")
    expected, found = loaded(gpt_oss, "GptOssForCausalLM"), stored(tmp_path / "plain")
    assert set(expected) == set(found) and all(same(found[key], expected[key]) for key in found)


def test_gpt_oss_merged(gpt_oss: Path, expert_lora: Path, tmp_path: Path) -> None:
    adapterkit.dequantize(gpt_oss, out=tmp_path / "plain", dtype="fp32")
    oracle.merge(tmp_path / "plain", expert_lora, out=tmp_path / "of-plain", dtype="bf16")
    oracle.merge(gpt_oss, expert_lora, out=tmp_path / "floats", dequantize=True, verify=True)
    floats = stored(tmp_path / "floats")
    oracle.assert_same(floats, stored(tmp_path / "of-plain"))
    oracle.merge(gpt_oss, expert_lora, out=tmp_path / "kept", verify=True)
    old, new = stored(gpt_oss), stored(tmp_path / "kept")
    changed = {key for key in old if not same(old[key], new[key])}
    experts = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert {key.removesuffix("_blocks").removesuffix("_scales") for key in changed} - {
        "model.layers.0.self_attn.q_proj.weight"
    } == experts
    merged = loaded(tmp_path / "kept", "GptOssForCausalLM")
    for key in floats:
        limit = 0.16 if key in experts else 0
        assert float((merged[key].double() - floats[key].double()).norm()) <= limit * float(
            floats[key].double().norm()
        ), key


def test_mxfp4_bytes_come_back(gpt_oss: Path) -> None:
    """Scales where the largest code is 4 or 6, values always."""
    tensors = stored(gpt_oss)
    for spec in packed_of(gpt_oss).values():
        parts = {part.key: tensors[part.key] for part in spec.parts}
        value = spec.decode(parts)
        assert value.shape == spec.shape
        again = spec.encode_keeping_scales(parts, value)
        assert torch.equal(spec.decode(again), value)
        codes, scales = list(parts)
        largest = torch.maximum(parts[codes] & 7, parts[codes] >> 4 & 7).amax(-1)
        stable = largest >= 6
        assert bool(stable.any()) and torch.equal(again[scales][stable], parts[scales][stable])
        assert torch.equal(again[codes][stable], parts[codes][stable])


# lies and other layouts

Q = "model.layers.0.self_attn.q_proj."
LIES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    # of a format: tensors changed, settings changed, what the refusal says
    "scale missing": ("int4", {Q + "weight_scale": None}, None, "without .weight_scale"),
    "shape missing": ("int4", {Q + "weight_shape": None}, None, "without .weight_shape"),
    "shape lies": ("int4", {Q + "weight_shape": torch.tensor([64, 96])}, None, "sizes that agree"),
    "negative shape": (
        "int4",
        {Q + "weight_shape": torch.tensor([64, -64])},
        None,
        "sizes that agree",
    ),
    "rows lie": ("int4", {Q + "weight_shape": torch.tensor([32, 64])}, None, "sizes that agree"),
    "NaN scale": (
        "int4",
        {Q + "weight_scale": torch.full((64, 2), float("nan")).bfloat16()},
        None,
        "NaN or infinite",
    ),
    "infinite scale": (
        "int8",
        {Q + "weight_scale": torch.full((64, 1), float("inf"))},
        None,
        "NaN or infinite",
    ),
    "integer scale": ("int4", {Q + "weight_scale": torch.ones(64, 2).int()}, None, "I32 scales"),
    "too few scales": (
        "int4",
        {Q + "weight_scale": torch.ones(64, 1).bfloat16()},
        None,
        r"scales \(64, 1\)",
    ),
    "scales of rows": (
        "fp8-channel",
        {Q + "weight_scale": torch.ones(32, 1)},
        None,
        r"scales \(32, 1\)",
    ),
    "zeros missing": (
        "int4-zero",
        {Q + "weight_zero_point": None},
        None,
        "without .weight_zero_point",
    ),
    "zeros of a symmetric weight": (
        "int4",
        {Q + "weight_zero_point": torch.ones(8, 2).int()},
        None,
        "symmetric, with",
    ),
    "zeros too few": (
        "int4-zero",
        {Q + "weight_zero_point": torch.ones(7, 2).int()},
        None,
        r"I32 \(7, 2\)",
    ),
    "g_idx beyond": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.full((64,), 2).int()},
        None,
        "out of range",
    ),
    "g_idx negative": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.arange(64).int() // 32 - 1},
        None,
        "out of range",
    ),
    "g_idx short": (
        "int4-g_idx",
        {Q + "weight_g_idx": torch.zeros(63).int()},
        None,
        r"I32 \(63,\)",
    ),
    "twice": ("int4", {Q + "weight": torch.ones(64, 64).bfloat16()}, None, "each weight once"),
    "two formats": ("int4", {Q + "qweight": torch.ones(8, 64).int()}, None, "beside weights of"),
    "codes alone": ("fp8-tensor", {Q + "weight_scale": None}, None, "without .weight_scale"),
    "E5M2": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).to(torch.float8_e5m2)},
        None,
        "F8_E5M2",
    ),
    "codes of another": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).to(torch.int8)},
        None,
        "format float-quantized",
    ),
    "floats with a scale": (
        "fp8-tensor",
        {Q + "weight": torch.ones(64, 64).bfloat16()},
        None,
        "BF16 codes",
    ),
    "no divisor": (
        "nvfp4",
        {Q + "weight_global_scale": None},
        None,
        "without .weight_global_scale",
    ),
    "divisor 0": ("nvfp4", {Q + "weight_global_scale": torch.zeros(1)}, None, "not above 0"),
    "many divisors": ("nvfp4", {Q + "weight_global_scale": torch.ones(2)}, None, "one F32"),
    "E4M3 NaN": (
        "nvfp4",
        {Q + "weight_scale": torch.full((64, 4), 127).byte().view(torch.float8_e4m3fn)},
        None,
        "NaN or",
    ),
    "E8M0 NaN": ("mxfp4", {Q + "weight_scale": torch.full((64, 2), 255).byte()}, None, "NaN or"),
    "bits 0": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 0}}}},
        "0 bits",
    ),
    "bits 99": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 99}}}},
        "99 bits",
    ),
    "bits true": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": True}}}},
        "bits that",
    ),
    "bits lie": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"num_bits": 8}}}},
        "of 8 bits",
    ),
    "group 48": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"group_size": 48}}}},
        "divide",
    ),
    "group 0": (
        "int4",
        {},
        {"config_groups": {"a": {"targets": ["Linear"], "weights": INT | {"group_size": 0}}}},
        "divide",
    ),
    "no groups": ("int4", {}, {"config_groups": {}}, "config_groups"),
    "a preset": ("int4", {}, {"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
    "not compressed": ("int4", {}, {"quantization_status": "frozen"}, "quantization_status frozen"),
    "no status": ("int4", {}, {"quantization_status": None}, "quantization_status None"),
    "another format": ("int4", {}, {"format": "int-quantized"}, "format int-quantized"),
    "marlin": ("int4", {}, {"format": "marlin-24"}, "format marlin-24"),
    "sparse": (
        "int4",
        {},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse-24-bitmask",
    ),
    "rotated": ("int4", {}, {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
    "modelopt without": ("modelopt-nvfp4", {Q + "weight_scale_2": None}, None, "without _scale_2"),
    "modelopt shape": (
        "modelopt-nvfp4",
        {Q + "weight_scale": torch.ones(64, 3).to(torch.float8_e4m3fn)},
        None,
        r"\(64, 3\)",
    ),
    "modelopt factor": (
        "modelopt-nvfp4",
        {Q + "weight_scale_2": torch.tensor(float("nan"))},
        None,
        "NaN or infinite",
    ),
    "modelopt AWQ": (
        "modelopt-nvfp4",
        {Q + "pre_quant_scale": torch.ones(64)},
        None,
        "pre_quant_scale",
    ),
    "modelopt unknown": ("modelopt-nvfp4", {}, {"quant_algo": "W4A8_AWQ"}, "quant_algo W4A8_AWQ"),
    "fp8 pairs": ("fp8", {Q + "weight": torch.ones(64, 32).to(torch.int8)}, None, "pairs of FP4"),
    "fp8 scales lie": ("fp8", {Q + "weight_scale_inv": torch.ones(2, 3)}, None, r"\(2, 3\)"),
    "fp8 scales alone": ("fp8", {Q + "weight_scale_inv": None}, None, "without _scale_inv"),
    "fp8 other names": (
        "fp8",
        {Q + "weight_scale_inv": None, Q + "scale": torch.ones(2, 2)},
        None,
        "with its scales in",
    ),
    "fp8 blocks": ("fp8", {}, {"weight_block_size": [0, 32]}, "blocks"),
    "gptq marlin": ("gptq4", {}, {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
    "gptq planar": ("gptq4", {}, {"checkpoint_format": "gptq_p"}, "checkpoint_format gptq_p"),
    "gptq is marlin": ("gptq4", {}, {"is_marlin_format": True}, "marlin"),
    "gptq int64": ("gptq4", {}, {"pack_dtype": "int64"}, "pack_dtype int64"),
    "gptq bits": ("gptq4", {}, {"bits": 5}, "bits 5"),
    "gptq bits lie": ("gptq4", {}, {"bits": 8}, "words of 8 bits"),
    "gptq groups": ("gptq4", {}, {"group_size": 16}, "2 groups of 64"),
    "gptq g_idx": ("gptq4", {Q + "g_idx": torch.full((64,), 9).int()}, None, "groups out of range"),
    "gptq zeros": ("gptq4", {Q + "qzeros": None}, None, "without .qzeros"),
    "gptq NaN": (
        "gptq4",
        {Q + "scales": torch.full((2, 64), float("nan")).half()},
        None,
        "NaN or infinite",
    ),
    "awq gemv": ("awq", {}, {"version": "gemv"}, "version gemv"),
    "awq marlin": ("awq", {}, {"version": "marlin"}, "version marlin"),
    "awq 8 bits": ("awq", {}, {"bits": 8}, "bits 8"),
    "awq zeros": ("awq", {Q + "qzeros": None}, None, "without .qzeros"),
    "awq groups": ("awq", {}, {"group_size": 16}, "groups that divide"),
    "unknown": ("int8", {}, {"quant_method": "aqlm"}, "aqlm"),
    "another's": ("int4", {}, {"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(base: Callable[[str], Path], lie: str, tmp_path: Path) -> None:
    name, tensors, settings, text = LIES[lie]
    shutil.copytree(base(name), tmp_path / "base")
    change(tmp_path / "base", tensors, settings)
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method", ["aqlm", "hqq", "quanto", "eetq", "vptq", "spqr", "fbgemm_fp8", "quark", "auto-round"]
)
def test_unknown_methods_are_named(
    base: Callable[[str], Path], method: str, tmp_path: Path
) -> None:
    shutil.copytree(base("fp8-channel"), tmp_path / "base")
    change(tmp_path / "base", {}, {"quant_method": method})
    with pytest.raises(AdapterkitError, match=method):
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")


def test_all_lies_at_once(base: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(base("int4"), tmp_path / "base")
    k = "model.layers.1.self_attn.k_proj."
    change(
        tmp_path / "base",
        {Q + "weight_scale": torch.ones(64, 1).bfloat16(), k + "weight_shape": None},
    )
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert Q + "weight" in str(caught.value) and k[:-1] in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "MXTensor", "NVFP4Tensor"]
)
def test_layouts_of_torchao_are_named(kind: str, tmp_path: Path) -> None:
    def renamed(key: str, parts: quantized_llama.Parts) -> dict[str, str]:
        return {
            key: quantized_llama.said_of("Int4Tensor")(key, parts)[key].replace("Int4Tensor", kind)
        }

    quantized_llama.base(replace(FORMS["torchao-Int4Tensor"], metadata=renamed), tmp_path / "base")
    with pytest.raises(AdapterkitError, match=f"torchao's {kind}"):
        adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")


def test_scales_of_zero_are_legal(base: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(base("int8"), tmp_path / "base")
    change(tmp_path / "base", {Q + "weight_scale": torch.zeros(64, 1)})
    adapterkit.dequantize(tmp_path / "base", out=tmp_path / "out")
    assert not stored(tmp_path / "out")[Q + "weight"].any()


# configs with several groups, tensors beside the weight, several files


def test_mixed_precision(tmp_path: Path) -> None:
    """Each module by the group that names it: by its name, a pattern, its class."""
    groups = {
        "a": {"targets": ["Linear"], "weights": INT, "format": "pack-quantized"},
        "b": {
            "targets": ["re:.*down_proj$"],
            "weights": quantized_llama.FP8 | {"strategy": "channel"},
            "format": "float-quantized",
        },
        "c": {
            "targets": [Q[:-1]],
            "weights": CHANNEL | {"symmetric": False},
            "format": "int-quantized",
        },
    }
    settings = quantized_llama.compressed("mixed-precision", {}) | {"config_groups": groups}
    quantized_llama.llama().save_pretrained(tmp_path)
    plain = stored(tmp_path)
    makers = {
        "down_proj": quantized_llama.fp8("channel"),
        Q + "weight": quantized_llama.int8(False),
    }
    tensors = {}
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        maker = makers.get(key) or makers.get(module.rpartition(".")[2])
        maker = maker or (
            quantized_llama.words(4, 32) if module.rpartition(".")[2] in LINEAR else None
        )
        tensors |= (
            {module + end: part for end, part in maker(weight.float()).items()}
            if maker
            else {key: weight}
        )
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    change(tmp_path, {}, settings)
    kinds = {key: (spec.kind, spec.bits) for key, spec in packed_of(tmp_path).items()}  # pyright: ignore[reportAttributeAccessIssue]
    assert kinds[Q + "weight"] == ("int8", 8) and kinds["model.layers.1.mlp.down_proj.weight"] == (
        "fp8",
        8,
    )
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == ("words", 4) and len(kinds) == 14
    groups["b"]["targets"] = ["Linear"]
    change(tmp_path, {}, settings)
    with pytest.raises(AdapterkitError, match="2 of the config's groups fit"):
        packed_of(tmp_path)
    groups["b"]["targets"] = ["re:(a+)+("]
    change(tmp_path, {}, settings)
    with pytest.raises(AdapterkitError, match="pattern"):
        packed_of(tmp_path)


def test_what_lies_beside(base: Callable[[str], Path], lora: Path, tmp_path: Path) -> None:
    """Scales of inputs and of the cache are kept with the format, and go with it."""
    shutil.copytree(base("fp8-channel"), tmp_path / "base")
    cache = {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in (0, 1) for x in "kv"}
    change(tmp_path / "base", cache)
    oracle.merge(tmp_path / "base", lora, out=tmp_path / "kept")
    assert set(cache) <= set(stored(tmp_path / "kept"))
    oracle.merge(tmp_path / "base", lora, out=tmp_path / "floats", dequantize=True)
    assert set(stored(tmp_path / "floats")) == set(quantized_llama.llama().state_dict())


def test_parts_in_several_files(base: Callable[[str], Path], lora: Path, tmp_path: Path) -> None:
    """Codes in one file, scales in another."""
    tensors = stored(base("int4"))
    shutil.copytree(base("int4"), tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: names[key.endswith("weight_scale")] for key in tensors}
    for name in names:
        save_file(
            {k: v for k, v in tensors.items() if where[k] == name},
            tmp_path / "base" / name,
            {"format": "pt"},
        )
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    for dequantize in (False, True):
        oracle.merge(base("int4"), lora, out=tmp_path / f"one{dequantize}", dequantize=dequantize)
        oracle.merge(
            tmp_path / "base", lora, out=tmp_path / f"two{dequantize}", dequantize=dequantize
        )
        oracle.assert_same(
            oracle.stored(tmp_path / f"two{dequantize}"),
            oracle.stored(tmp_path / f"one{dequantize}"),
        )
        index = json.loads((tmp_path / f"two{dequantize}/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(oracle.stored(tmp_path / f"two{dequantize}"))
    adapterkit.dequantize(tmp_path / "base", out=tmp_path / "plain")
    assert set(oracle.stored(tmp_path / "plain")) == set(quantized_llama.llama().state_dict())


def test_nvfp4_keeps_the_scale_that_layers_share(base: Callable[[str], Path]) -> None:
    """As long as the largest value fits it; then a new one."""
    for name, leaf in (("nvfp4", "weight_global_scale"), ("modelopt-nvfp4", "weight_scale_2")):
        tensors = stored(base(name))
        spec = packed_of(base(name))[Q + "weight"]
        parts = {part.key: tensors[part.key] for part in spec.parts}
        value = spec.decode(parts)
        assert same(spec.encode_keeping_scales(parts, value / 2)[Q + leaf], parts[Q + leaf])
        larger = spec.encode_keeping_scales(parts, value * 2)
        assert not same(larger[Q + leaf], parts[Q + leaf])
        assert torch.allclose(spec.decode(larger), value * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "writable"), [((4, 6), True), ((1, 4, 6), True), ((3, 4, 6), False)]
)
def test_one_fp8_scale_of_a_stack_is_read_only(shape, writable):
    """Encoding gives a scale to each expert, which the stored one cannot hold."""
    place = {"file": "f", "start": 0, "stop": 0, "folder": 0}
    codes, scale = (
        TensorSpec(key=key, dtype=d, shape=s, **place)
        for key, d, s in [("w", "F8_E4M3", shape), ("s", "F32", (1,))]
    )
    weight = Fp8(
        key="w", dtype="BF16", shape=shape, parts=(codes, scale), block=(4, 6), power=False, **place
    )
    assert bool(weight.read_only) is not writable
    assert bool(check_writable([weight], "base")) is not writable
