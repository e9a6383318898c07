"""Conversions with a pipeline as the base, and of adapters that have a folder for each part."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import Refused
from tests.support.plain_pipelines import (
    MODULES,
    QUERY,
    WIDTH,
    write_lora,
    write_peft,
    write_pipeline,
)


def write_dora(folder, *modules):
    write_peft(folder, *modules)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "adapter_model.safetensors")
    for module in modules:
        key = f"base_model.model.{module}.lora_magnitude_vector"
        weights[key] = torch.arange(1.0, WIDTH + 1)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_the_base_is_the_part_that_the_adapter_is_for(part, tmp_path):
    """DoRA as plain factors: they depend on the weights."""
    base = write_pipeline(tmp_path / "base")
    source = write_dora(tmp_path / "dora", *MODULES[part])
    for name, folder in (("whole", base), ("part", base / part)):
        adapterkit.convert(source, to="mlx", rank=4, base=folder, out=tmp_path / name)
    one, other = (load_file(tmp_path / name / "adapters.safetensors") for name in ("whole", "part"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_part_that_the_pipeline_does_not_have_is_refused(tmp_path):
    base = write_pipeline(tmp_path / "base")
    lora = write_lora(tmp_path / "lora.safetensors", "transformer")
    with pytest.raises(Refused, match="transformer: the pipeline has none"):
        adapterkit.convert(lora, to="peft", base=base, out=tmp_path / "out")
    with pytest.raises(Refused, match="text_encoder_2: the pipeline has none"):
        words = {"prefix_only": "text_encoder_2", "base": base}
        adapterkit.convert(lora, to="peft", out=tmp_path / "out", **words)


def test_folders_of_parts_become_one_file_and_folders_again(tmp_path):
    source = write_lora(tmp_path / "lora.safetensors", "unet", "text_encoder")
    folders = tmp_path / "folders"
    folders.mkdir()
    for part in ("unet", "text_encoder"):
        adapterkit.convert(source, to="peft", prefix_only=part, out=folders / part)
    target = tmp_path / "again.safetensors"
    receipt = adapterkit.convert(folders, to="diffusers", out=target)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert len(receipt.data["recipe"]["inputs"]) == 2
    adapterkit.convert(folders, to="peft", prefix_only="unet", out=tmp_path / "unet")
    names = "adapter_model.safetensors"
    one, other = load_file(tmp_path / "unet" / names), load_file(folders / "unet" / names)
    assert one.keys() == other.keys() and any(QUERY in key for key in one)


def test_a_damaged_folder_of_a_part_is_refused(tmp_path):
    for part in ("unet", "text_encoder"):
        write_peft(tmp_path / "lora" / part, *MODULES[part])
    file = tmp_path / "lora" / "unet" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"stray": torch.ones(2)}, file)
    with pytest.raises(Refused, match="stray"):
        adapterkit.convert(tmp_path / "lora", to="diffusers", out=tmp_path / "out.safetensors")
