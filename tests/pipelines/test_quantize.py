"""quantize and dequantize of pipelines, as diffusers reads them."""

import json

import bitsandbytes as bnb
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support.pipeline_files import files_of, lora_file


@pytest.fixture
def without_gpu(monkeypatch):
    """diffusers asks for a GPU, of which bitsandbytes needs none."""
    monkeypatch.setattr(
        BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **more: None
    )


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4") / "out"
    adapterkit.quantize(saved("sd15"), to="nf4", out=folder)
    return folder


def test_the_denoiser_and_the_text_encoders_are_quantized(saved, quantized, tmp_path):
    base = saved("sd15")
    before, after = files_of(base), files_of(quantized)
    changed = {name.split("/")[0] for name in before if before[name] != after.get(name)}
    assert changed == {"unet", "text_encoder", "README.md"}
    for part in ("unet", "text_encoder"):
        config = json.loads(after[f"{part}/config.json"])
        assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    receipt = json.loads(after["adapterkit.json"])
    parts = {name.split(".")[0] for name in receipt["parameters"]}
    assert parts == {"unet", "text_encoder"} and receipt["quantized"] > 50
    assert adapterkit.verify(quantized)["files"] == len(after) - 1
    assert adapterkit.inspect(quantized)["parts"]["unet"]["quantization"]["found"]


def test_diffusers_reads_what_is_decoded_here(quantized, without_gpu, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(quantized / "unet", device_map={"": "cpu"})
    adapterkit.dequantize(quantized, out=tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "unet" / "diffusion_pytorch_model.safetensors")
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    assert len(layers) > 50
    for name, module in layers.items():
        codes, state = module.weight.data.flatten(), module.weight.quant_state
        codes = torch.stack([codes >> 4, codes & 15], 1).flatten().long()
        scales = state.absmax.repeat_interleave(state.blocksize)[: len(codes)]
        weight = (state.code[codes] * scales).view(state.shape)
        torch.testing.assert_close(weight, plain[f"{name}.weight"].float(), msg=name)
    config = json.loads((tmp_path / "plain" / "unet" / "config.json").read_text())
    assert "quantization_config" not in config


def test_an_adapter_is_merged_into_quantized_parts(saved, quantized, tmp_path):
    """Each weight in its part's format."""
    lora = lora_file(saved("sd15"), tmp_path / "lora.safetensors", ("unet", "text_encoder"))
    receipt = adapterkit.merge(quantized, lora, out=tmp_path / "out", verify=True)
    assert receipt.data["verified"]["tensors"] == receipt.data["tensors_changed"]
    before, after = (
        load_file(top / "unet" / "diffusion_pytorch_model.safetensors")
        for top in (quantized, tmp_path / "out")
    )
    assert {key: value.dtype for key, value in before.items()} == {
        key: value.dtype for key, value in after.items()
    }


def test_skip_leaves_out_parts_and_modules(saved, tmp_path):
    base = saved("sd15")
    with pytest.raises(Refused, match="--skip 'attn2' matches none"):
        adapterkit.quantize(base, to="int8", skip="attn2", out=tmp_path / "none")
    skip = r"text_encoder|unet.*attn2.*"
    receipt = adapterkit.quantize(base, to="int8", skip=skip, out=tmp_path / "out").data
    assert {name.split(".")[0] for name in receipt["parameters"]} == {"unet"}
    assert receipt["left_out"] and all("attn2" in name for name in receipt["left_out"])


def test_unsupported_components_and_formats_are_refused(saved, quantized, tmp_path):
    base, out = saved("sd15"), tmp_path / "out"
    with pytest.raises(Refused, match="unet: .*w8a16 of UNet2DConditionModel"):
        adapterkit.quantize(base, to="w8a16", out=out)
    with pytest.raises(Refused, match="no part to quantize"):
        adapterkit.quantize(base, to="nf4", skip="unet|text_encoder", out=out)
    with pytest.raises(Refused, match="unet: "):
        adapterkit.quantize(quantized, to="nf4", out=out)
    with pytest.raises(Refused, match="no quantized weights"):
        adapterkit.dequantize(base, out=out)
    assert not out.exists()
