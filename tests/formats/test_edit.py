"""edit: other words about an adapter of each format, the same tensors."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.formats.library import formats
from adapterkit.core.errors import Refused
from tests.support.adapter_samples import all_samples, samples
from tests.support.usual import usual

SAMPLES = [
    sample
    for sample in all_samples()
    if formats()[sample.form].writes and formats()[sample.form].file.container == "safetensors"
    if not sample.is_rewritten
]
WORDS = {"base_id": "org/base", "title": "Dogs", "trigger": "sks dog", "tag": ("dog", "lora")}


def weights(folder):
    (path,) = folder.rglob("*.safetensors")
    return path


def tensors_of(path):
    data = lambda value: value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    digest = lambda value: hashlib.sha256(data(value)).hexdigest()
    return {key: (v.dtype, v.shape, digest(v)) for key, v in load_file(path).items()}


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def source_file(sample):
    return sample.path if sample.path.is_file() else sample.path / formats()[sample.form].file.name


# SGLang's own layout of experts, which only `convert` writes
STACKS = ("sglang/shared", "sglang/stacked")


# an edit copies the bytes of tensors, whatever kinds of modules they are of
@pytest.mark.parametrize(
    "sample",
    usual(SAMPLES, lambda one: one.id in STACKS or one == samples(one.form)[0]),
    ids=lambda sample: sample.id,
)
def test_words_change_and_tensors_do_not(sample, tmp_path):
    try:
        adapterkit.edit(sample.path, **WORDS, metadata={"note": "mine"}, out=tmp_path / "out")
    except Refused as error:
        if sample.id in STACKS:
            assert "is not edited" in str(error)
            return
        # what cannot be read without an option
        with pytest.raises(Refused):
            adapterkit.convert(sample.path, to=sample.form, out=tmp_path / "out")
        return
    out, before = weights(tmp_path / "out"), source_file(sample)
    assert tensors_of(out) == tensors_of(before)
    metadata = metadata_of(out)
    mine = {"note", "ss_sd_model_name", "modelspec.title"}
    kept = {key: value for key, value in metadata_of(before).items() if key not in mine}
    assert metadata["note"] == "mine" and kept.items() <= metadata.items()
    if sample.is_in_peft_layout:
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/base"
        head = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
        card = yaml.safe_load(head)
        assert card["instance_prompt"] == "sks dog" and {"dog", "lora"} <= {*card["tags"]}
    else:
        assert metadata["modelspec.trigger_phrase"] == "sks dog"
        assert metadata["modelspec.tags"] == "dog, lora"


@pytest.mark.parametrize("fold", [False, True])
def test_a_changed_alpha_changes_the_scale(fold, lora, tmp_path):
    config = json.loads((lora / "adapter_config.json").read_text())
    old, new = config["lora_alpha"], 3 * config["lora_alpha"]
    adapterkit.edit(lora, alpha=new, fold=fold, out=tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert edited["lora_alpha"] == new and edited["r"] == config["r"]
    a, b = load_file(weights(lora)), load_file(weights(tmp_path / "out"))
    for key, value in a.items():
        times = old / new if fold and "lora_B" in key else 1
        assert (b[key].double() - value.double() * times).norm() <= 2e-2 * value.double().norm()
    report = adapterkit.diff(lora, tmp_path / "out", tolerance=1e-2)
    assert report["same"] == fold
    if not fold:
        assert {round(row["relative_error"], 3) for row in report["changed"]} == {2.0}


def test_the_alpha_of_a_file_with_an_alpha_for_each_module(tmp_path):
    adapterkit_file = tmp_path / "lora.safetensors"
    down, up = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", ".lora_up.weight"
    tensors = {down: torch.ones(2, 8), down.replace(".lora_down.weight", up): torch.ones(8, 2)}
    tensors[down.replace(".lora_down.weight", ".alpha")] = torch.tensor(2.0)
    save_file(tensors, adapterkit_file, {"ss_title": "x", "ss_base_model_version": "sd_v1"})
    adapterkit.edit(adapterkit_file, alpha=4, out=tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert float(made[down.replace(".lora_down.weight", ".alpha")]) == 4
    assert metadata_of(tmp_path / "out.safetensors")["ss_title"] == "x"
    adapterkit.edit(adapterkit_file, strip_metadata=True, out=tmp_path / "bare.safetensors")
    assert "ss_title" not in metadata_of(tmp_path / "bare.safetensors")
    assert tensors_of(tmp_path / "bare.safetensors") == tensors_of(adapterkit_file)


def test_edits_of_nothing_or_of_wrong_files_are_refused(lora, tmp_path):
    with pytest.raises(Refused, match="nothing to change"):
        adapterkit.edit(lora, out=tmp_path / "out")
    with pytest.raises(Refused, match="in one file"):
        adapterkit.edit(lora, title="x", out=tmp_path / "out.safetensors")
    with pytest.raises(Refused, match="fold"):
        adapterkit.edit(lora, title="x", fold=True, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
