"""DeepSeek-V4's checkpoints: FP8 in blocks of 128 x 128, and experts in FP4."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    FineGrainedFP8Config,
)

import adapterkit
from adapterkit.kernels.quant.fp4 import encode_mxfp4
from adapterkit.kernels.quant.fp8 import encode_fp8

BLOCK = (128, 128)
SETTINGS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": list(BLOCK),
}
TARGETS = {
    "attention": {"target_modules": ["q_a_proj", "kv_proj", "q_b_proj", "o_b_proj"]},
    "shared experts": {"target_modules": ["shared_experts.gate_proj", "shared_experts.down_proj"]},
    "experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def stored(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A weight as DeepSeek's files have it, under their names."""
    scale = name.removesuffix("weight") + "scale"
    if ".ffn.experts." in name:
        codes, exponents = encode_mxfp4(weight.float(), rule="up")
        return {
            name: codes.flatten(1).view(torch.int8),
            scale: exponents.view(torch.float8_e8m0fnu),
        }
    if re.search(r"attn\.w|shared_experts", name):
        codes, scales = encode_fp8(weight.float(), BLOCK, rule="power")[:2]
        return {name: codes, scale: scales.to(torch.float8_e8m0fnu)}
    return {name: weight}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    config = DeepseekV4Config(
        vocab_size=128,
        hidden_size=256,
        num_hidden_layers=2,
        moe_intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        q_lora_rank=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        o_groups=2,
        o_lora_rank=128,
        index_n_heads=2,
        index_head_dim=64,
        index_topk=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        name = key.removeprefix("model.").replace("embed_tokens", "embed")
        tensors |= stored(name, weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    settings = {"expert_dtype": "fp4", "quantization_config": SETTINGS}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.fixture(scope="module")
def floats(base: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("deepseek") / "floats"
    adapterkit.dequantize(base, out=out)
    return out


def parameters(folder: Path, **more: object) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return {name: value.detach() for name, value in model.named_parameters()}


def test_dequantized_weights_equal_those_that_transformers_loads(base: Path, floats: Path) -> None:
    ours = parameters(floats)
    theirs = parameters(base, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", TARGETS)
def test_adapters_merge_as_in_peft_and_leave_other_bytes(
    base: Path, floats: Path, case: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **TARGETS[case]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = dict(model.merge_and_unload().named_parameters())

    adapterkit.merge(base, tmp_path / "adapter", out=tmp_path / "32", dequantize=True, dtype="fp32")
    merged = parameters(tmp_path / "32")
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert changed and changed == {n for n in before if not torch.equal(before[n], merged[n])}
    for name in changed:
        delta = expected[name] - before[name]
        assert (merged[name] - expected[name]).norm() <= 1e-5 * delta.norm(), name

    adapterkit.merge(base, tmp_path / "adapter", out=tmp_path / "8", verify=True)
    old, new = (load_file(at / "model.safetensors") for at in (base, tmp_path / "8"))
    written = parameters(tmp_path / "8", quantization_config=FineGrainedFP8Config(dequantize=True))
    is_same = {key: torch.equal(old[key].view(-1), new[key].view(-1)) for key in old}
    assert old.keys() == new.keys()
    assert all(is_same[key] for key in old if ".experts." in key) == (case != "experts")
    assert {n for n in before if not torch.equal(before[n], written[n])} == changed
    for name in changed:  # of FP8 and FP4 to nearest
        error = (written[name] - expected[name]).norm() / expected[name].norm()
        assert error < (0.14 if ".mlp.experts." in name else 0.035), (name, error)
