"""A merge into a pipeline: diffusers loads it, and computes what base and adapters give there."""

import pytest

import adapterkit
from tests.support import pipelines
from tests.support.pipeline_files import assert_outputs, files_of, loaded, lora_file, with_adapters

PARTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
    "wan22": ("transformer",),
}


@pytest.mark.parametrize("name", PARTS)
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
