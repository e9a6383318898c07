"""inspect and diff of pipelines."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.verbs.look.tables import inspect_table
from tests.support.plain_pipelines import (
    MODULES,
    PARTS,
    QUERY,
    delta,
    file_of,
    write_lora,
    write_pipeline,
)


@pytest.fixture
def base(tmp_path):
    return write_pipeline(tmp_path / "base")


def test_inspect_reports_each_component(base):
    result = adapterkit.inspect(base)
    assert result["kind"] == "pipeline" and result["readable"] and not result["problems"]
    assert result["parts"].keys() == {*PARTS}
    for name, part in result["parts"].items():
        assert part == adapterkit.inspect(base / name)
        assert part["architecture"]["classes"] == [PARTS[name][1]]
    for key in ("parameters", "bytes"):
        assert result[key] == sum(part[key] for part in result["parts"].values())
    sizes = [part["dtypes"]["F32"]["tensors"] for part in result["parts"].values()]
    assert result["dtypes"]["F32"]["tensors"] == sum(sizes)
    assert f"unet/{file_of('unet')}" in [shard["file"] for shard in result["shards"]]
    table = inspect_table(result)
    assert "pipeline base" in table and "UNet2DConditionModel" in table


def test_inspect_lists_problems_of_each_component(base, tmp_path):
    file = base / "vae" / file_of("vae")
    file.write_bytes(file.read_bytes()[:-4])
    shutil.rmtree(base / "text_encoder")
    result = adapterkit.inspect(base)
    found = [problem["problem"] for problem in result["problems"]]
    assert not result["readable"]
    assert any(text.startswith("vae: ") and "cut off" in text for text in found)
    assert any("names text_encoder" in text for text in found)
    with pytest.raises(Refused, match="a pipeline, no adapter"):
        adapterkit.inspect(base, plot=tmp_path / "plot.html")


def test_diff_names_the_part(base, tmp_path):
    assert adapterkit.diff(base, base)["same"]
    lora = write_lora(tmp_path / "lora.safetensors", "unet")
    adapterkit.merge(base, lora, out=tmp_path / "out")
    result = adapterkit.diff(base, tmp_path / "out")
    assert result["kind"] == "checkpoints" and not result["config"]
    assert {row["name"] for row in result["changed"]} == {
        f"unet.{module}.weight" for module in MODULES["unet"]
    }
    (row,) = (row for row in result["changed"] if QUERY in row["name"])
    weight = load_file(base / "unet" / file_of("unet"))[f"{QUERY}.weight"]
    relative = delta(QUERY, *MODULES["unet"]).norm() / weight.norm()
    assert row["relative_error"] == pytest.approx(float(relative), rel=1e-4)
    assert row["rank"]["needed"] in (1, 2)
    assert result["totals"]["identical"] == result["totals"]["compared"] - 2


def test_diff_reports_components_of_one_side_and_settings(base, tmp_path):
    other = write_pipeline(tmp_path / "other", "transformer")
    index = json.loads((other / "model_index.json").read_text()) | {"_diffusers_version": "9"}
    (other / "model_index.json").write_text(json.dumps(index))
    (other / "unet" / "config.json").write_text('{"_class_name": "Another"}')
    result = adapterkit.diff(base, other)
    assert {row["name"].split(".")[0] for row in result["added"]} == {"transformer"}
    assert not result["removed"] and not result["changed"]
    deciding = {row["name"] for row in result["config"] if row["decides"]}
    assert deciding == {"model_index.json.transformer", "unet._class_name"}
    result = adapterkit.diff(other, base)
    assert {row["name"].split(".")[0] for row in result["removed"]} == {"transformer"}


def test_diff_of_a_damaged_part_is_refused(base, tmp_path):
    other = write_pipeline(tmp_path / "other")
    file = other / "vae" / file_of("vae")
    save_file({"x": torch.ones(2)}, file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(AdapterkitError, match="other/vae"):
        adapterkit.diff(base, other)
