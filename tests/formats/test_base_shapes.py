"""Factors that do not fit the base that is given are refused, all of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit import MultipleErrors, Refused


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
