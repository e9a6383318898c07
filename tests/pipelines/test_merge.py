"""A merge into a pipeline: diffusers loads it, and computes what base and adapters give there."""

import shutil

import pytest
from diffusers import UNet2DConditionModel

import adapterkit
from tests.formats.test_diffusers_client import kohya_file, trained
from tests.support import pipelines
from tests.support.pipeline_files import (
    assert_outputs,
    files_of,
    loaded,
    lora_file,
    quiet,
    with_adapters,
)
from tests.support.usual import usual

PARTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
    "wan22": ("transformer",),
}


@pytest.mark.parametrize("name", usual(PARTS, ("sd15", "flux", "wan22")))
def test_a_merged_pipeline_computes_what_diffusers_does_with_the_adapters(name, saved, tmp_path):
    base, parts = saved(name), PARTS[name]
    files = {
        lora_file(base, tmp_path / "style.safetensors", parts, 1): 0.7,
        lora_file(base, tmp_path / "object.safetensors", parts[:1], 9, rank=3, alpha=1.5): -0.4,
    }
    receipt = adapterkit.merge(base, files, out=tmp_path / "out", verify=True)
    merged, expected = loaded(tmp_path / "out"), with_adapters(base, files)
    assert_outputs(merged, expected)
    plain = pipelines.outputs(loaded(base))
    changed = {
        key
        for key, value in pipelines.outputs(loaded(tmp_path / "out")).items()
        if (value - plain[key]).abs().max() > 1e-3
    }
    assert changed == set(parts)
    # what no adapter touches keeps its bytes
    before, after = files_of(base), files_of(tmp_path / "out")
    touched = {key for key in before if key.endswith(".safetensors") and key.startswith(parts)}
    assert after.keys() == {*before, "adapterkit.json"}
    changed = {key for key in before if after[key] != before[key]}
    assert changed == {"README.md"} | {f for f in touched if f.split("/")[0] in parts}
    assert {one["part"] for one in receipt.data["adapters"]} == set(parts)
    modules = receipt.data["parameters"]
    assert {key.split(".")[0] for key in modules} == set(parts)
    assert receipt.data["verified"]["tensors"] == len(modules)
    checked = adapterkit.verify(tmp_path / "out", base=base, adapters=list(files))
    assert checked["tensors"] == len(modules)


def test_each_transformer_of_wan_gets_its_own(saved, tmp_path):
    """The files that people have name none of the two."""
    base = saved("wan22")
    high, low = (
        lora_file(base, tmp_path / f"{seed}.safetensors", ("transformer",), seed) for seed in (1, 2)
    )
    adapters = [f"transformer:{high}=0.5", f"transformer_2:{low}=2"]
    adapterkit.merge(base, adapters, out=tmp_path / "out")
    expected = with_adapters(base, {high: 0.5})
    with quiet():
        expected.load_lora_weights(
            low.parent, weight_name=low.name, adapter_name="low", load_into_transformer_2=True
        )
        expected.transformer_2.set_adapters("low", 2.0)
    assert_outputs(loaded(tmp_path / "out"), expected)


def test_a_file_of_kohya(saved, tmp_path):
    """Underscored names of the publisher's layers; q, k and v of some in one."""
    base, factors = saved("sdxl_of_ten"), trained("sdxl", 29, mixed=False)
    file = kohya_file(tmp_path / "kohya.safetensors", "sdxl", factors)
    adapterkit.merge(base, {file: 0.7}, out=tmp_path / "out")
    assert_outputs(loaded(tmp_path / "out"), with_adapters(base, {file: 0.7}))


def test_shards_of_a_size_have_the_names_that_diffusers_reads(saved, tmp_path):
    """Those of a part of a pipeline, and of that part alone; with a variant, too."""
    base = saved("sd15")
    lora = lora_file(base, tmp_path / "lora.safetensors", ("unet", "text_encoder"), 1)
    receipt = adapterkit.merge(base, lora, out=tmp_path / "whole", max_shard_size="10KB")
    names = {path.name for path in (tmp_path / "whole" / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert sum(name.startswith("diffusion_pytorch_model-0000") for name in names) > 2
    assert (tmp_path / "whole" / "text_encoder" / "model.safetensors.index.json").is_file()
    assert any("--max-shard-size does not apply to" in note for note in receipt.data["notes"])
    expected = with_adapters(base, {lora: 1.0})
    assert_outputs(loaded(tmp_path / "whole"), expected)
    adapterkit.convert(lora, to="peft", component="unet", out=tmp_path / "unet-lora")
    adapterkit.merge(
        base / "unet", tmp_path / "unet-lora", out=tmp_path / "unet", max_shard_size="10KB"
    )
    shutil.rmtree(tmp_path / "whole" / "unet")
    shutil.copytree(tmp_path / "unet", tmp_path / "whole" / "unet")
    assert_outputs(loaded(tmp_path / "whole"), expected)
    with quiet():
        loaded(base).unet.save_pretrained(tmp_path / "half", variant="fp16")
    out = tmp_path / "half-merged"
    adapterkit.merge(tmp_path / "half", tmp_path / "unet-lora", out=out, max_shard_size="10KB")
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(out, variant="fp16")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(value.equal(merged[key]) for key, value in unet.state_dict().items())


def test_a_pipeline_in_the_cache_of_the_hub(saved, tmp_path, monkeypatch):
    """Its files are links to blobs beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base, snapshot = saved("sd15"), tmp_path / "models--org--sd15" / "snapshots" / "0"
    blobs = tmp_path / "models--org--sd15" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(files_of(base).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{number}")
    lora = lora_file(base, tmp_path / "lora.safetensors", ("unet",), 1)
    adapterkit.merge(snapshot, lora, out=tmp_path / "out")
    adapterkit.merge(base, lora, out=tmp_path / "plain")
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "plain")
    assert {k: v for k, v in ours.items() if "README" not in k and "adapterkit" not in k} == {
        k: v for k, v in theirs.items() if "README" not in k and "adapterkit" not in k
    }
