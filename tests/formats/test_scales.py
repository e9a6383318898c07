"""Scales at the ends of what a file can say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.declared import whole


def write_peft(folder, alpha):
    folder.mkdir()
    prefix = "base_model.model.transformer_blocks.0.attn.to_out.0"
    factors = {
        f"{prefix}.lora_A.weight": torch.ones(2, 4),
        f"{prefix}.lora_B.weight": torch.ones(4, 2),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["to_out.0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_scale_of_zero_is_in_b(tmp_path):
    """Trainers take an alpha of 0 for the rank."""
    source, out = write_peft(tmp_path / "source", 0), tmp_path / "out.safetensors"
    adapterkit.convert(source, to="kohya", architecture="flux", out=out)
    written = load_file(out)
    (alpha,) = (value for key, value in written.items() if key.endswith(".alpha"))
    (b,) = (value for key, value in written.items() if key.endswith(".lora_up.weight"))
    assert alpha == 2 and not b.any()


@pytest.mark.parametrize(
    "alpha, kind", [(1e300, float), (2.0**60, float), (7.0, int), (0.5, float)]
)
def test_numbers_of_a_config(alpha, kind):
    """An integer of 300 digits is none that a strict reader takes."""
    assert type(whole(alpha)) is kind and whole(alpha) == alpha
