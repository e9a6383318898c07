"""Which part of a pipeline an adapter goes to, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support.plain_pipelines import (
    ENCODER,
    MODULES,
    OUTPUT,
    PARTS,
    QUERY,
    delta,
    factors,
    file_of,
    weights,
    write_lora,
    write_peft,
    write_pipeline,
)


@pytest.fixture
def base(tmp_path):
    return write_pipeline(tmp_path / "base")


def changes(base, out) -> dict[str, torch.Tensor]:
    """What a merge added to the weights of each part that it changed."""
    found = {}
    for part in sorted(path.name for path in base.iterdir() if (path / "config.json").is_file()):
        before, after = (load_file(top / part / file_of(part)) for top in (base, out))
        for key in before:
            if not torch.equal(before[key], after[key]):
                found[f"{part}.{key}"] = after[key] - before[key]
    return found


def merged(base, adapters, tmp_path, **options) -> dict[str, torch.Tensor]:
    adapterkit.merge(base, adapters, out=tmp_path / "out", **options)
    return changes(base, tmp_path / "out")


def assert_added(found, expected) -> None:
    assert found.keys() == {f"{name}.weight" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"], value, rtol=1e-5, atol=1e-6)


def test_a_folder_for_each_part(base, tmp_path):
    write_peft(tmp_path / "both" / "unet", QUERY)
    write_peft(tmp_path / "both" / "text_encoder", ENCODER, seed=9)
    found = merged(base, {tmp_path / "both": -0.5}, tmp_path)
    expected = {f"unet.{QUERY}": delta(QUERY, QUERY)}
    expected[f"text_encoder.{ENCODER}"] = delta(ENCODER, ENCODER, seed=9)
    assert_added(found, {name: -0.5 * value for name, value in expected.items()})


@pytest.mark.parametrize("part, module", [("unet", QUERY), ("text_encoder", ENCODER)])
def test_an_adapter_of_one_model_goes_to_the_part_with_its_modules(base, part, module, tmp_path):
    found = merged(base, write_peft(tmp_path / "one", module), tmp_path)
    assert_added(found, {f"{part}.{module}": delta(module, module)})


def test_an_adapter_goes_to_the_named_component(tmp_path):
    base = write_pipeline(tmp_path / "base", "transformer", "transformer_2")
    one, other = write_peft(tmp_path / "one", QUERY), write_peft(tmp_path / "other", QUERY, seed=9)
    file = write_lora(tmp_path / "file.safetensors", "transformer", seed=3)
    adapters = [f"transformer:{one}=0.5", (f"transformer_2:{other}", 2), f"transformer_2:{file}"]
    found = merged(base, adapters, tmp_path)
    modules = MODULES["unet"]
    expected = {
        f"transformer.{QUERY}": 0.5 * delta(QUERY, QUERY),
        f"transformer_2.{QUERY}": 2 * delta(QUERY, QUERY, seed=9) + delta(QUERY, *modules, seed=3),
        f"transformer_2.{OUTPUT}": delta(OUTPUT, *modules, seed=3),
    }
    assert_added(found, expected)


def test_modules_are_selected_by_their_part(base, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", "unet", "text_encoder")
    found = merged(base, lora, tmp_path, exclude="text_encoder.*|.*to_out.0")
    assert_added(found, {f"unet.{QUERY}": delta(QUERY, *MODULES["unet"])})
    receipt = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    assert receipt["left_out"] == [
        f"lora.safetensors: {name}" for name in (f"unet.{OUTPUT}", f"text_encoder.{ENCODER}")
    ]
    (tmp_path / "ends").mkdir()
    same = merged(base, lora, tmp_path / "ends", exclude=["text_encoder", "to_out.0"])
    assert same.keys() == found.keys() and all(torch.equal(same[key], found[key]) for key in same)
    with pytest.raises(Refused, match="--include 'text' matches none(?s:.*)--exclude 'vae'"):
        adapterkit.merge(base, lora, out=tmp_path / "none", include="text", exclude="unet,vae")


def refused(base, adapters, tmp_path, **options) -> str:
    with pytest.raises(AdapterkitError) as error:
        adapterkit.merge(base, adapters, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_an_adapter_that_fits_several_parts_is_refused(tmp_path):
    base = write_pipeline(tmp_path / "base", "unet_2")
    text = refused(base, write_peft(tmp_path / "one", QUERY), tmp_path)
    assert "fit unet, unet_2" in text and f"unet:{tmp_path / 'one'}" in text


def test_an_adapter_that_fits_no_part_is_refused(base, tmp_path):
    assert "fits no part" in refused(base, write_peft(tmp_path / "one", "layers.0.q"), tmp_path)


def test_keys_that_a_part_does_not_have_are_refused_with_its_name(base, tmp_path):
    one = write_peft(tmp_path / "one", QUERY, "blocks.7.attn.to_q")
    text = refused(base, one, tmp_path)
    assert "unet: " in text and "blocks.7.attn.to_q" in text
    tensors = factors(QUERY, prefix="unet.") | factors("up.9.q", prefix="text_encoder.")
    save_file(tensors, tmp_path / "lora.safetensors")
    text = refused(base, [one, tmp_path / "lora.safetensors"], tmp_path)
    assert "unet: " in text and "text_encoder: " in text and "up.9.q" in text


@pytest.mark.parametrize("state", ["not in the index", "null", "missing"])
def test_a_part_that_is_not_there_is_refused_where_an_adapter_changes_it(base, state, tmp_path):
    part = {"null": "image_encoder"}.get(state, "text_encoder_2")
    if state == "missing":
        index = json.loads((base / "model_index.json").read_text())
        index[part] = ["transformers", "CLIPTextModel"]
        (base / "model_index.json").write_text(json.dumps(index))
        lora = write_lora(tmp_path / "unet.safetensors", "unet")
        receipt = adapterkit.merge(base, lora, out=tmp_path / "whole")
        assert any(f"missing models: {part}" in warning for warning in receipt.data["warnings"])
    if state == "null":
        write_peft(tmp_path / "lora" / part, QUERY)
        lora = tmp_path / "lora"
    else:
        lora = write_lora(tmp_path / "lora.safetensors", "unet", part)
    assert part in refused(base, lora, tmp_path)


def test_a_part_in_pickles_is_copied_and_not_changed(base, tmp_path):
    torch.save(weights("text_encoder"), base / "text_encoder" / "pytorch_model.bin")
    (base / "text_encoder" / "model.safetensors").unlink()
    lora = write_lora(tmp_path / "lora.safetensors", "unet")
    adapterkit.merge(base, lora, out=tmp_path / "copied")
    copies = [(top / "text_encoder" / "pytorch_model.bin") for top in (base, tmp_path / "copied")]
    assert copies[0].read_bytes() == copies[1].read_bytes()
    both = write_lora(tmp_path / "both.safetensors", "unet", "text_encoder")
    text = refused(base, both, tmp_path)
    assert "text_encoder: " in text and "pickles" in text


def test_a_part_that_is_a_link_is_refused(base, tmp_path):
    shutil.move(base / "vae", tmp_path / "elsewhere")
    (base / "vae").symlink_to(tmp_path / "elsewhere")
    text = refused(base, write_lora(tmp_path / "lora.safetensors", "unet"), tmp_path)
    assert "vae is a link" in text


def test_an_adapter_of_several_parts_for_one_is_refused(base, tmp_path):
    both = write_lora(tmp_path / "both.safetensors", "unet", "text_encoder")
    assert "text_encoder, unet for unet alone" in refused(base, f"unet:{both}", tmp_path)


@pytest.mark.parametrize(
    "options", [{"tokenizer": "base"}, {"original": "x"}, {"changed_type": "q8_0"}]
)
def test_options_of_single_models_are_refused(base, options, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", "unet")
    assert "with a pipeline" in refused(base, lora, tmp_path, **options)


def test_a_damaged_part_is_refused_though_nothing_changes_it(base, tmp_path):
    file = base / "vae" / file_of("vae")
    file.write_bytes(file.read_bytes()[:-4])
    text = refused(base, write_lora(tmp_path / "lora.safetensors", "unet"), tmp_path)
    assert "vae" in text and "cut off" in text


def test_a_folder_without_models_is_refused(base, tmp_path):
    for part in PARTS:
        shutil.rmtree(base / part)
    text = refused(base, write_lora(tmp_path / "lora.safetensors", "unet"), tmp_path)
    assert "no model that is there" in text
