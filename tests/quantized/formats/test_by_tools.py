"""Quantized formats read as their own tools and transformers read them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterkit
from tests.support import format_tools, oracle, quantized_llama
from tests.support.formats import BLOCK, CHANNEL, GEMM, INT, ct, loaded, one_weight, same, stored
from tests.support.quantized_llama import FORMS, Form

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
    **{
        f"hqq.{name}": ({"quant_method": "hqq"}, torch.float32)
        for name in ("8-1-16", "4-0-32", "4-1-64", "3-0-32", "3-1-16", "2-1-16", "1-0-8")
    },
    "torchao.int8-symmetric": ({"quant_method": "torchao"}, torch.bfloat16),
    "torchao.int8-asymmetric": ({"quant_method": "torchao"}, torch.bfloat16),
}


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
        (actual,) = stored(tmp_path / f"{expected}-out").values()
        actual = actual.to(dtype)
        golden = len(theirs["w"]) == 16
        assert torch.equal(format_tools.digest(actual) if golden else actual, parts[expected])


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
    actual = stored(tmp_path / "out")
    assert set(actual) == set(module.state_dict())
    for layer in (0, 1):
        assert same(actual[f"{layer}.weight"], module[layer].weight.dequantize())


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
    if name == "fp8-rows":
        pytest.skip("vLLM reads scales of rows without a second axis, transformers does not")
    adapterkit.dequantize(base(name), out=tmp_path / "plain")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(
            base(name), dtype="auto", quantization_config=config
        )
    actual, expected = dict(model.named_parameters()), stored(tmp_path / "plain")
    for key, weight in expected.items():
        assert same(actual[key].detach().to(weight.dtype), weight), key


GPTQ = quantized_llama.GPTQ
LOADED = {name: form for name, form in FORMS.items() if name.startswith(("gptq", "awq"))} | {
    "gptq3": Form(quantized_llama.gptq(3, 1), GPTQ | {"bits": 3}, 0.3),
    "gptq2-v2": Form(
        quantized_llama.gptq(2, 2, symmetric=True),
        GPTQ | {"bits": 2, "sym": True, "checkpoint_format": "gptq_v2"},
        0.7,
    ),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", LOADED)
def test_merged_gptq_in_transformers(lora: Path, name: str, rounding: str, tmp_path: Path) -> None:
    """GPTQModel's kernels for CPUs compute with it what is decoded here, in 16 bits."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    quantized_llama.base(LOADED[name], tmp_path / "base")
    oracle.merge(tmp_path / "base", lora, out=tmp_path / "kept", rounding=rounding, verify=True)
    adapterkit.dequantize(tmp_path / "kept", out=tmp_path / "plain", dtype="fp32")
    logits, ids = [], torch.randint(80, (2, 12), generator=torch.Generator().manual_seed(0))
    for folder in ("kept", "plain"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, dtype=torch.float32, device_map="cpu"
            )
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    assert float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()) < 1e-2
