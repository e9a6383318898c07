"""Quantizing mixtures of experts: their stacks stay floats, the config says so to the loader, and
the plan to the reader."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear
from transformers.quantizers import AutoHfQuantizer

import adapterkit


def mixture(folder: Path) -> None:
    sizes = {
        "vocab_size": 80,
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_experts": 4,
    }
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=64, num_experts_per_tok=2
    )
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture
def base(cached_folder) -> Path:
    return cached_folder("quantized-mixture", mixture)


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def size(shapes: dict[str, tuple[int, ...]], word: str = "") -> int:
    return sum(torch.Size(shape).numel() for key, shape in shapes.items() if word in key)


@pytest.mark.parametrize("skip", [None, "o_proj"])
def test_the_loader_takes_for_fp8_what_is_fp8(skip, base, tmp_path):
    adapterkit.quantize(base, out=tmp_path / "out", to="fp8", skip=skip)
    written = tensors(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config)
    text = quantizer.quantization_config
    kept = quantizer.get_modules_to_not_convert(
        model, text.modules_to_not_convert, model._keep_in_fp32_modules
    )
    replace_with_fp8_linear(model, kept, quantization_config=text, pre_quantized=True)
    assert not any(isinstance(module, FP8Experts) for module in model.modules())
    linear = {name for name, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert (
        linear
        == {
            key.removesuffix(".weight_scale_inv")
            for key in written
            if key.endswith(".weight_scale_inv")
        }
        != set()
    )


@pytest.mark.parametrize("to", ["fp8", "nf4", "int8"])
def test_the_plan_notes_unquantized_modules_and_why(to, base, tmp_path):
    shapes = tensors(base)
    plan = adapterkit.quantize(base, out=tmp_path / "out", to=to, dry_run=True)
    (note,) = [note for note in plan.notes if "not quantized" in note]
    linear = size(shapes, "_proj.weight") - size(shapes, ".experts.")
    assert note.startswith(f"{1 - linear / size(shapes):.1%} of the base's bytes are not quantized")
    assert (
        f"{size(shapes, '.experts.') / size(shapes):.1%} in 4 stacks of experts" in note
        and "skipped" not in note
    )


def test_skipped_modules_are_noted_too(base, tmp_path):
    shapes = tensors(base)
    plan = adapterkit.quantize(
        base, out=tmp_path / "out", to="nf4", skip=".*q_proj|.*experts.*", dry_run=True
    )
    (note,) = [note for note in plan.notes if "not quantized" in note]
    share = (size(shapes, "q_proj") + size(shapes, ".experts.")) / size(shapes)
    assert f": {share:.1%} in 6 skipped, the rest" in note


def test_a_model_without_experts_has_no_such_note(llama, tmp_path):
    plan = adapterkit.quantize(llama, out=tmp_path / "out", to="nf4", dry_run=True)
    assert not [note for note in plan.notes if "not quantized" in note]
