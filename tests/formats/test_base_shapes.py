"""Factors that do not fit the base that is given are refused, all of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import MultipleErrors, Refused

GOLDEN = Path(__file__).parent / "golden"
STACKED = GOLDEN / "peft-0.18" / "qwen3_moe"
EACH = GOLDEN / "vllm" / "qwen3_moe"
VISION = GOLDEN / "peft" / "qwen2_vl"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def write(home, out, inputs, stored=(6, 4)):
    """An adapter of two modules whose first has these sizes, and a base with weights of `stored`
    and (3, 5)."""
    for name in ("adapter", "base"):
        (home / name).mkdir()
    prefix = "base_model.model.layers"
    factors = {
        f"{prefix}.0.lora_A.weight": torch.ones(2, inputs),
        f"{prefix}.0.lora_B.weight": torch.ones(out, 2),
        f"{prefix}.1.lora_A.weight": torch.ones(2, 5),
        f"{prefix}.1.lora_B.weight": torch.ones(3 if out == 6 else 7, 2),
    }
    save_file(factors, home / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0", "1"]}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    weights = {"layers.0.weight": torch.ones(stored), "layers.1.weight": torch.ones(3, 5)}
    save_file(weights, home / "base" / "model.safetensors")
    (home / "base" / "config.json").write_text("{}")
    return home / "adapter", home / "base"


def test_factors_of_another_base(tmp_path):
    adapter, base = write(tmp_path, 5, 4)
    with pytest.raises(Refused, match=r"weight \(6, 4\)") as caught:
        adapterkit.convert(adapter, to="training-state", base=base, out=tmp_path / "out")
    assert isinstance(caught.value, MultipleErrors) and len(caught.value.errors) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", [(6, 4), (4, 6)], ids=["linear", "transposed"])
def test_factors_that_fit(stored, tmp_path):
    adapter, base = write(tmp_path, 6, 4, stored)
    adapterkit.convert(adapter, to="training-state", base=base, out=tmp_path / "out")


def stacked(home, change):
    """A stack's adapter whose tensors `change` changed, and its base."""
    shutil.copytree(STACKED, home / "adapter")
    file = home / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return home / "adapter", STACKED / "base"


def narrow(tensors):
    tensors[f"{EXPERTS}.lora_A.weight"] = tensors[f"{EXPERTS}.lora_A.weight"][:, 1:]


def of_convolutions(tensors):
    for key in (key for key in list(tensors) if key.startswith(EXPERTS)):
        tensors[key] = tensors[key].unsqueeze(-1)


def of_another_module(tensors):
    for key in [key for key in tensors if "q_proj" in key]:
        tensors[key.replace("q_proj", "k_proj")] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (narrow, r"experts: factors of shapes \(6, 7\)"),
        (of_convolutions, r"experts: factors of shapes \(6, 8, 1\)"),
        (of_another_module, "k_proj: factors .* for a parameter.*no such factors"),
    ],
)
def test_factors_of_no_parameter_of_the_base(change, text, tmp_path):
    adapter, base = stacked(tmp_path, change)
    with pytest.raises(Refused, match=f"(?s){text}"):
        adapterkit.convert(adapter, to="peft-0.18", base=base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_of_its_base(tmp_path):
    adapter, base = stacked(tmp_path, lambda tensors: None)
    adapterkit.convert(adapter, to="peft-0.18", base=base, out=tmp_path / "out")


def test_a_task_that_is_no_text(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(EACH, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"task_type": {"x": 1}}))
    with pytest.raises(Refused, match=r"task_type \{'x': 1\}"):
        adapterkit.convert(adapter, to="peft", base=EACH / "base", out=tmp_path / "out")


def test_underscored_names_of_a_model_are_found_in_a_base_with_other_keys(tmp_path):
    """Qwen2-VL's file has `visual` where the model has `model.visual`."""
    base = VISION / "base"
    other, again = tmp_path / "other.safetensors", tmp_path / "again"
    adapterkit.convert(VISION, to="lycoris-wrapper", base=base, out=other)
    adapterkit.convert(other, to="peft", base=base, out=again)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (VISION, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_underscored_names_that_the_base_does_not_have_are_not_written(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(VISION, adapter, ignore=shutil.ignore_patterns("base"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("q_proj", "qkv_proj"): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(Refused, match="does not have: .*self_attn.qkv_proj"):
        adapterkit.convert(
            adapter, to="lycoris-wrapper", base=VISION / "base", out=tmp_path / "a.safetensors"
        )
