"""The difference of two pipelines: a folder for each part that differs, and one file of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support.pipeline_files import assert_outputs, loaded, lora_file, with_adapters
from tests.support.plain_pipelines import (
    ENCODER,
    MODULES,
    delta,
    file_of,
    random,
    weights,
    write_pipeline,
)


@pytest.fixture
def sides(tmp_path):
    """A pipeline, and a fine-tune of its unet and its text encoder."""
    base = write_pipeline(tmp_path / "base", "text_encoder_2")
    tuned = write_pipeline(tmp_path / "tuned", "text_encoder_2")
    for part in ("unet", "text_encoder"):
        tensors = weights(part)
        for module in MODULES[part]:
            tensors[f"{module}.weight"] += delta(module, *MODULES[part])
        save_file(tensors, tuned / part / file_of(part), {"format": "pt"})
    return base, tuned


def test_each_part_that_differs_gets_a_folder(sides, tmp_path):
    base, tuned = sides
    receipt = adapterkit.extract(base, tuned, rank=2, out=tmp_path / "lora")
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert names == {"unet", "text_encoder", "README.md", "adapterkit.json"}
    assert any("both: vae, text_encoder_2" in note for note in receipt.data["notes"])
    assert {entry["name"] for entry in receipt.data["recipe"]["inputs"]} == {"base", "tuned"}
    adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "back")
    for part in ("unet", "text_encoder"):
        back, theirs = (load_file(top / part / file_of(part)) for top in (tmp_path / "back", tuned))
        for key, value in theirs.items():
            torch.testing.assert_close(back[key], value, rtol=1e-4, atol=1e-5)
    errors = receipt.data["parameters"]
    assert errors.keys() == {
        f"{part}.{module}" for part in ("unet", "text_encoder") for module in MODULES[part]
    }


def test_different_ranks_in_each_part(sides, tmp_path):
    """Settings of a part are of its own metrics: the same names stand in two parts."""
    base, tuned = sides
    tensors = weights("text_encoder_2")
    tensors[f"{ENCODER}.weight"] += random(8, 1, seed=1) @ random(1, 8, seed=2)
    save_file(tensors, tuned / "text_encoder_2" / file_of("text_encoder_2"), {"format": "pt"})
    adapterkit.extract(base, tuned, energy=0.9999, out=tmp_path / "lora")
    ranks = {
        part: json.loads((tmp_path / "lora" / part / "adapter_config.json").read_text())["r"]
        for part in ("text_encoder", "text_encoder_2")
    }
    assert ranks == {"text_encoder": 2, "text_encoder_2": 1}
    adapterkit.convert(tmp_path / "lora", to="diffusers", out=tmp_path / "lora.safetensors")
    shapes = {key: value.shape for key, value in load_file(tmp_path / "lora.safetensors").items()}
    assert shapes[f"text_encoder.{ENCODER}.lora_A.weight"] == (2, 8)
    assert shapes[f"text_encoder_2.{ENCODER}.lora_A.weight"] == (1, 8)


def test_parts_are_selected_by_their_names(sides, tmp_path):
    base, tuned = sides
    receipt = adapterkit.extract(
        base, tuned, rank=2, include="unet.*|text_encoder_2.*", out=tmp_path / "lora"
    )
    assert receipt.data["parameters"].keys() == {f"unet.{module}" for module in MODULES["unet"]}
    assert "not selected: text_encoder, vae" in receipt.data["notes"]


def refused(base, tuned, tmp_path, **options) -> str:
    with pytest.raises(Refused) as error:
        adapterkit.extract(base, tuned, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_extract_of_equal_or_unsupported_pipelines_is_refused(sides, tmp_path):
    base, tuned = sides
    assert "no part differs" in refused(base, base, tmp_path, rank=2)
    assert "--max-size with pipelines" in refused(base, tuned, tmp_path, max_size="1MB")
    other = write_pipeline(tmp_path / "other")
    assert "text_encoder_2 is a part of one" in refused(base, other, tmp_path, rank=2)
    assert "no selected part" in refused(base, tuned, tmp_path, rank=2, include="vae.*")


def test_the_extracted_file_in_diffusers_equals_the_merge(saved, tmp_path):
    base = saved("sd15")
    file = lora_file(base, tmp_path / "lora.safetensors", ("unet", "text_encoder"))
    adapterkit.merge(base, file, out=tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned", rank=2, out=tmp_path / "folders")
    target = tmp_path / "extracted" / "pytorch_lora_weights.safetensors"
    adapterkit.convert(tmp_path / "folders", to="diffusers", out=target.parent)
    theirs = with_adapters(base, {target: 1.0})
    assert_outputs(theirs, loaded(tmp_path / "tuned"), 1e-4)
