"""Conversions with a pipeline as the base, and of adapters that have a folder for each part."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.formats.library import described
from adapterkit.core.errors import Refused
from tests.support.pipeline_files import lora_file
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
        words = {"component": "text_encoder_2", "base": base}
        adapterkit.convert(lora, to="peft", out=tmp_path / "out", **words)


def test_folders_of_parts_become_one_file_and_folders_again(tmp_path):
    source = write_lora(tmp_path / "lora.safetensors", "unet", "text_encoder")
    folders = tmp_path / "folders"
    folders.mkdir()
    for part in ("unet", "text_encoder"):
        adapterkit.convert(source, to="peft", component=part, out=folders / part)
    target = tmp_path / "again.safetensors"
    receipt = adapterkit.convert(folders, to="diffusers", out=target)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert len(receipt.data["recipe"]["inputs"]) == 2
    adapterkit.convert(folders, to="peft", component="unet", out=tmp_path / "unet")
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


@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_every_format_with_a_pipeline(name, saved, tmp_path):
    """What is written without it is written with it, and read back; of some families the names are
    told by it alone."""
    base = saved(name)
    lora = lora_file(base, tmp_path / "lora.safetensors", ("transformer",), 1)
    written = {}
    for to, form in described().items():
        is_file = form.layout == "keys" and not form.file.config
        is_file = is_file and form.file.container == "safetensors"
        if not form.writes or form.file.container == "gguf":
            continue
        for base_of in ({}, {"base": base}):
            out = tmp_path / f"{to}{len(base_of)}{'.safetensors' * is_file}"
            with contextlib.suppress(Refused):
                adapterkit.convert(lora, to=to, out=out, **base_of)
                written.setdefault(to, []).append(out)
    assert all(any(str(tmp_path / f"{to}1") in str(p) for p in its) for to, its in written.items())
    assert {"kohya", "comfyui", "lycoris", "peft", "mlx"} <= {*written}
    for to, (*_, file) in written.items():
        back = tmp_path / f"back-{to}.safetensors"
        adapterkit.convert(file, to="diffusers", base=base, out=back)
        assert adapterkit.diff(lora, back, tolerance=1e-5)["same"], to


@pytest.mark.parametrize(
    ("family", "cls", "first"),
    [
        ("ltx", "LTXVideoTransformer3DModel", "proj_in"),
        ("cosmos", "CosmosTransformer3DModel", "patch_embed.proj"),
    ],
)
def test_the_base_determines_the_family_of_shared_names(family, cls, first, tmp_path):
    """Self-attention at the width of LTX and Cosmos."""
    width, part = 2048, tmp_path / "base" / "transformer"
    names = [f"transformer_blocks.0.attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
    lora = {f"transformer.{n}.lora_A.weight": torch.randn(1, width) for n in names}
    lora |= {f"transformer.{n}.lora_B.weight": torch.randn(width, 1) for n in names}
    save_file(lora, tmp_path / "lora.safetensors")
    weights = {f"{n}.weight": torch.zeros(width, width, dtype=torch.float16) for n in names}
    part.mkdir(parents=True)
    weights[f"{first}.weight"] = torch.zeros(width, 4)
    save_file(weights, part / "diffusion_pytorch_model.safetensors")
    (part / "config.json").write_text(json.dumps({"_class_name": cls}))
    index = json.dumps({"_class_name": "X", "transformer": ["diffusers", cls]})
    (tmp_path / "base" / "model_index.json").write_text(index)
    source = tmp_path / "lora.safetensors"
    with pytest.raises(Refused, match="ltx, cosmos"):
        adapterkit.convert(source, to="comfyui", out=tmp_path / "no.safetensors")
    for number, base in enumerate((tmp_path / "base", part)):
        out = tmp_path / f"{number}.safetensors"
        receipt = adapterkit.convert(source, to="comfyui", base=base, out=out)
        assert receipt.data["architecture"] == family
        assert adapterkit.check(source, program="diffusers", base=base)["takes"]
