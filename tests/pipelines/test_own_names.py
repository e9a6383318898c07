"""Adapters whose names only the pipeline's own models tell: U-Nets of other sizes than those that
were published, and names that several families have."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import adapterkit
from tests.formats.video_models import MODELS as VIDEO
from tests.support import pipelines
from tests.support.one_file import in_the_file, write_pipeline
from tests.support.usual import usual

FILE = "diffusion_pytorch_model.safetensors"


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def unet(**options):
    """The tiny U-Net of Stable Diffusion 1.x with other settings."""
    config = pipelines.unet_sd15().config.items()
    return UNet2DConditionModel.from_config({k: v for k, v in config if k[0] != "_"} | options)


def kohya(path, shapes, **metadata):
    """Factors by names of kohya; those with a kernel have two axes more."""
    factors, tensors = {}, {}
    for seed, (name, (out, *tail)) in enumerate(shapes.items()):
        a, b = drawn(2, *tail, seed=seed), drawn(out, 2, *[1] * (len(tail) - 1), seed=seed + 999)
        factors[name] = b.flatten(1) @ a.flatten(1)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, metadata or None)
    return factors


def assert_added(base, out, deltas):
    before, after = load_file(base / FILE), load_file(out / FILE)
    for module, delta in deltas.items():
        key = f"{module}.weight"
        torch.testing.assert_close(after[key], before[key] + delta.view(before[key].shape))
    assert sum(not torch.equal(after[key], before[key]) for key in before) == len(deltas)


def test_a_file_of_kohya_for_a_u_net_with_more_blocks_than_any_that_is_known(tmp_path):
    """And for its text encoder, in the same file."""
    model = unet(layers_per_block=4)
    pipe = pipelines.sd15()
    pipe.unet = model
    pipe.save_pretrained(tmp_path / "pipe")
    modules = {n: m for n, m in model.named_modules() if n.endswith(("attn1.to_q", "attn2.to_k"))}
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
    shapes = {own: tuple(modules[name].weight.shape) for own, name in names.items()}
    query = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    (side,) = {m.weight.shape for n, m in pipe.text_encoder.named_modules() if "q_proj" in n}
    lora = tmp_path / "lora.safetensors"
    deltas = kohya(lora, shapes | {query: tuple(side)})
    adapterkit.merge(tmp_path / "pipe", [lora], out=tmp_path / "out")
    of_unet = {name: deltas[own] for own, name in names.items()}
    assert any("attentions.3" in name for name in of_unet)
    assert_added(tmp_path / "pipe" / "unet", tmp_path / "out" / "unet", of_unet)
    weights = [
        load_file(tmp_path / n / "text_encoder" / "model.safetensors") for n in ("pipe", "out")
    ]
    key = next(key for key in weights[0] if key.endswith("layers.0.self_attn.q_proj.weight"))
    torch.testing.assert_close(weights[1][key], weights[0][key] + deltas[query])
    adapterkit.convert(lora, to="diffusers", base=tmp_path / "pipe", out=tmp_path / "d.safetensors")
    adapterkit.merge(tmp_path / "pipe", [tmp_path / "d.safetensors"], out=tmp_path / "by-diffusers")
    assert_added(tmp_path / "pipe" / "unet", tmp_path / "by-diffusers" / "unet", of_unet)


def test_a_lora_of_comfyui_for_z_image_whose_names_lumina_has_too(tmp_path):
    model = VIDEO["z_image"][1]()
    write_pipeline(tmp_path / "pipe", "transformer", model)
    out, inputs = model.get_submodule("layers.0.attention.to_out.0").weight.shape
    a, b = drawn(2, inputs, seed=1), drawn(out, 2, seed=2)
    name = "diffusion_model.layers.0.attention.out"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "lora.safetensors"
    )
    adapterkit.merge(tmp_path / "pipe", [tmp_path / "lora.safetensors"], out=tmp_path / "out")
    deltas = {"layers.0.attention.to_out.0": b @ a}
    assert_added(tmp_path / "pipe" / "transformer", tmp_path / "out" / "transformer", deltas)


@pytest.mark.parametrize(
    ("linear", "is_file"),
    usual(itertools.product([False, True], repeat=2), lambda row: row[0] != row[1]),
)
def test_factors_with_a_kernel_of_one_point_and_without_are_the_same(linear, is_file, tmp_path):
    """proj_in is a linear layer in Stable Diffusion 2.x and a convolution in 1.x."""
    model = unet(use_linear_projection=linear)
    write_pipeline(tmp_path / "pipe", "unet", model)
    save_file(in_the_file("sd2", {"unet": model.state_dict()}), tmp_path / "base.safetensors")
    side = model.mid_block.attentions[0].proj_in.weight.shape[0]
    block = "lora_unet_mid_block_attentions_0_"
    shape = (side, side, *[1] * (2 * linear))  # another one than the base's
    query, base = f"{block}transformer_blocks_0_attn1_to_q", {"ss_base_model_version": "sd_v2"}
    deltas = kohya(
        tmp_path / "a.safetensors", {f"{block}proj_in": shape, query: (side, side)}, **base
    )
    wanted = {"mid_block.attentions.0.proj_in": deltas[f"{block}proj_in"]}
    wanted["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] = deltas[query]
    if is_file:
        out = tmp_path / "out.safetensors"
        adapterkit.merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], out=out)
        state = model.state_dict()
        for module, delta in wanted.items():
            state[f"{module}.weight"] += delta.view(state[f"{module}.weight"].shape)
        after = load_file(out)
        for key, value in in_the_file("sd2", {"unet": state}).items():
            torch.testing.assert_close(after[key], value)
        return
    adapterkit.merge(tmp_path / "pipe", [tmp_path / "a.safetensors"], out=tmp_path / "out")
    assert_added(tmp_path / "pipe" / "unet", tmp_path / "out" / "unet", wanted)
    found = adapterkit.check(tmp_path / "a.safetensors", program="comfyui", base=tmp_path / "pipe")
    assert found["takes"], found
    for_diffusers = tmp_path / "d.safetensors"
    adapterkit.convert(
        tmp_path / "a.safetensors", to="diffusers", base=tmp_path / "pipe", out=for_diffusers
    )
    model.load_lora_adapter(load_file(for_diffusers), prefix="unet")
    own = dict(model.named_modules())
    for module, delta in wanted.items():
        got = own[module].get_delta_weight("default_0")
        torch.testing.assert_close(got.flatten(1), delta)
