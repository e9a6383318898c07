"""GPT-OSS's MXFP4 experts: read as transformers loads them, merged, their bytes back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import adapterkit
from tests.support import oracle
from tests.support.formats import loaded, packed_of, same, stored

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
    expected, actual = loaded(gpt_oss, "GptOssForCausalLM"), stored(tmp_path / "plain")
    assert set(expected) == set(actual) and all(same(actual[key], expected[key]) for key in actual)


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
