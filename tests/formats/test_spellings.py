"""Spellings of keys that trainers write beside a format's own: the same deltas, as the clients that
take them find them."""

import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as loras
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from tests.support.adapter_samples import GOLDEN, comparable, contents_of, deltas


def products(tensors: dict[str, Tensor], prefix: str = "transformer.") -> dict[str, Tensor]:
    """b @ a by module, of keys as diffusers has them."""
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    return {
        name.removeprefix(prefix): tensors[name + ends[1]].double()
        @ tensors[name + ends[0]].double()
        for name in names
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.linalg.norm(ours[name] - value) < 1e-6 * torch.linalg.norm(value)
        for name, value in theirs.items()
    )


def factors(names: list[str], alpha: float, ends: tuple[str, str]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for name in names:
        tensors[f"{name}.{ends[0]}"], tensors[f"{name}.{ends[1]}"] = (
            torch.randn(4, 12),
            torch.randn(12, 4),
        )
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


DOWN = ("lora_down.weight", "lora_up.weight")


def of_source(tmp_path: Path) -> dict[str, Tensor]:
    """b @ a with the scale, as adapterkit reads the file."""
    return {
        name.split(":")[1]: value.b @ value.a
        for name, value in deltas(contents_of(tmp_path / "in.safetensors")).items()
        if value.a is not None and value.b is not None
    }


def test_qwen_image_lightning_s_bare_names(tmp_path):
    """lora_down and alpha without a prefix."""
    names = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "add_k_proj", "to_out.0")]
    tensors = factors([*names, "transformer_blocks.1.img_mlp.net.2"], 2.0, DOWN)
    save_file(tensors, tmp_path / "in.safetensors")
    theirs = loras._convert_non_diffusers_qwen_lora_to_diffusers(dict(tensors))
    assert same(of_source(tmp_path), products(theirs))
    assert contents_of(tmp_path / "in.safetensors").components == ("transformer",)
    adapterkit.convert(tmp_path / "in.safetensors", to="diffusers", out=tmp_path / "out")


def test_videox_fun_s_dot_after_the_prefix(tmp_path):
    """lora_unet__blocks_0_..., of Wan."""
    names = [f"lora_unet__blocks_0_{n}" for n in ("self_attn_q", "cross_attn_v", "ffn_0")]
    tensors = factors(names, 2.0, DOWN)
    save_file(tensors, tmp_path / "in.safetensors")
    plain = {key.replace("unet__", "unet_"): value for key, value in tensors.items()}
    theirs = {
        "blocks.0.attn1.to_q": "lora_unet_blocks_0_self_attn_q",
        "blocks.0.attn2.to_v": "lora_unet_blocks_0_cross_attn_v",
        "blocks.0.ffn.net.0.proj": "lora_unet_blocks_0_ffn_0",
    }
    want = {
        name: plain[f"{key}.{DOWN[1]}"].double() @ plain[f"{key}.{DOWN[0]}"].double() / 2
        for name, key in theirs.items()
    }
    assert same(of_source(tmp_path), want)
    adapterkit.convert(tmp_path / "in.safetensors", to="kohya", out=tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == plain.keys()


def test_an_adapter_s_name_in_diffusers_keys(tmp_path):
    """lora_A.default.weight, as PEFT's modules have it."""
    names = [f"transformer.transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k")]
    tensors = factors(names, 0.0, ("lora_A.default.weight", "lora_B.default.weight"))
    save_file(tensors, tmp_path / "in.safetensors")
    plain = {key.replace(".default", ""): value for key, value in tensors.items()}
    assert same(of_source(tmp_path), products(plain))
    adapterkit.convert(tmp_path / "in.safetensors", to="diffusers", out=tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors").keys() == plain.keys()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_stable_diffusion_under_the_prefix_of_comfyui(name, tmp_path):
    """diffusion_model. and the names of the first publication; text encoders by theirs."""
    source, out = GOLDEN / f"kohya/{name}.safetensors", tmp_path / "comfyui.safetensors"
    adapterkit.convert(source, to="comfyui", out=out, hash="none")
    keys = {key.partition(".")[0] for key in load_file(out)}
    assert keys <= {"diffusion_model", "text_encoders"}
    before, after = (deltas(contents_of(path, architecture=name)) for path in (source, out))
    assert before.keys() == after.keys() and comparable(before, after)
    assert all(value.difference(after[key]) < 1e-2 for key, value in before.items())
    begins = {"sd3": "joint_blocks"}.get(name, "(input|middle|output)_blocks?")
    assert any(re.match(rf"diffusion_model\.{begins}\.", key) for key in load_file(out))
