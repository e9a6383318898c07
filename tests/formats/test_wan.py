"""Distillations of Wan as they are spread for ComfyUI: factors with biases, norms, modulations."""

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as readers
from safetensors.torch import load_file
from torch import Tensor

import adapterkit
from adapterkit import AdapterkitError
from tests.formats.test_video_clients import assert_loaded
from tests.formats.test_video_files import assert_same_deltas, converted, deltas, products, saved
from tests.formats.video_models import WIDTH, drawn, wan

LAYERS = {  # outputs and inputs
    **{f"blocks.0.{attn}_attn.{x}": (WIDTH, WIDTH) for attn in ("self", "cross") for x in "qkvo"},
    "blocks.0.ffn.0": (24, WIDTH),
    "blocks.0.ffn.2": (WIDTH, 24),
    "text_embedding.0": (WIDTH, 8),
    "time_embedding.2": (WIDTH, WIDTH),
    "time_projection.1": (6 * WIDTH, WIDTH),
    "head.head": (16, WIDTH),
}
NORMS = ("blocks.0.norm3", "blocks.0.self_attn.norm_q", "blocks.0.cross_attn.norm_k")
MODULATION = "diffusion_model.blocks.0.diff_m"


def factors(alpha: float | None = None) -> dict[str, Tensor]:
    """Factors and a bias of every layer, under the keys of such files."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, inputs) in LAYERS.items():
        key = f"diffusion_model.{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{key}.diff_b"] = torch.randn(out, generator=generator)
        if alpha is not None and "blocks" in name:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_biases_are_those_of_diffusers_reader(alpha, tmp_path):
    tensors = factors(alpha)
    own = converted(saved(tensors, tmp_path), "diffusers", tmp_path)
    theirs = readers._convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))
    assert_same_deltas(deltas(own), products(theirs))
    scale = 1 if alpha is None else alpha / 2
    biases = {key: value for key, value in load_file(own).items() if key.endswith(".bias")}
    assert biases.keys() == {key for key in theirs if key.endswith(".bias")}
    for key, bias in biases.items():
        in_blocks = key.startswith("transformer.blocks")
        torch.testing.assert_close(bias * (scale if in_blocks else 1), theirs[key])


def test_diffusers_loads_factors_with_biases(tmp_path):
    path = converted(saved(factors(), tmp_path), "diffusers", tmp_path)
    tensors = load_file(path)
    assert_loaded(drawn(wan()), tensors, products(tensors))


def with_modulation() -> dict[str, Tensor]:
    return factors() | {MODULATION: torch.randn(1, 6, WIDTH)}


def test_modulations_stay_where_the_format_has_them(tmp_path):
    tensors = with_modulation()
    own = load_file(converted(saved(tensors, tmp_path), "comfyui", tmp_path))
    assert torch.equal(own[MODULATION], tensors[MODULATION])


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft", "lycoris"])
def test_modulations_are_refused_elsewhere(to, tmp_path):
    source = saved(with_modulation(), tmp_path)
    out = tmp_path / ("adapter" if to == "peft" else f"{to}.safetensors")
    with pytest.raises(AdapterkitError, match=r"transformer\.blocks\.0\b"):
        adapterkit.convert(source, to=to, out=out)
    assert not out.exists()


def test_norms_stay_where_the_format_has_them(tmp_path):
    norms = {f"diffusion_model.{name}.diff": torch.randn(WIDTH) for name in NORMS}
    source = saved(factors() | norms, tmp_path)
    own = load_file(converted(source, "comfyui", tmp_path))
    assert all(torch.equal(own[key], value) for key, value in norms.items())
    there = load_file(converted(source, "lycoris", tmp_path))
    assert torch.equal(
        there["lora_unet_blocks_0_norm3.w_norm"], norms["diffusion_model.blocks.0.norm3.diff"]
    )
    with pytest.raises(AdapterkitError, match=r"blocks\.0\.norm2"):
        converted(source, "diffusers", tmp_path)


def test_differences_of_zero_are_left_out_where_the_format_has_no_place_for_them(tmp_path):
    keys = [f"diffusion_model.{name}.diff" for name in NORMS] + [MODULATION]
    zeros = {key: torch.zeros(WIDTH) for key in keys[:-1]} | {MODULATION: torch.zeros(1, 6, WIDTH)}
    source, out = saved(factors() | zeros, tmp_path), tmp_path / "out.safetensors"
    receipt = adapterkit.convert(source, to="diffusers", out=out)
    plain = converted(saved(factors(), tmp_path), "diffusers", tmp_path)
    assert load_file(out).keys() == load_file(plain).keys()
    assert any("4 differences of zero are left out" in note for note in receipt.data["notes"])
    source = saved(factors() | zeros | {keys[0]: torch.eye(WIDTH)[3]}, tmp_path)
    with pytest.raises(AdapterkitError, match=r"1 modules: transformer\.blocks\.0\.norm2"):
        converted(source, "diffusers", tmp_path)
    own = load_file(converted(source, "comfyui", tmp_path))
    assert set(keys) <= own.keys()
