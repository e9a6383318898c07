"""DoRA of other tools: norms of a weight's outputs, or of its inputs, against the tools' own
modules and their equation."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.verbs.look.formats import detect_format

RANK = 3
FUSED = {  # modules of the original model -> those of diffusers'
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{p}" for p in "qkv"],
    "single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
}


pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def weight_of(flux: Path, modules: list[str]) -> Tensor:
    weights = load_file(flux / "diffusion_pytorch_model.safetensors")
    return torch.cat([weights[f"{name}.weight"] for name in modules])


def decomposed(kind: type, weight: Tensor, *, outputs: bool) -> nn.Module:
    """A module of LyCORIS on this weight, with all its parameters random."""
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    own = kind("m", layer, 1.0, RANK, 2.0, weight_decompose=True, wd_on_out=outputs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in own.named_parameters():
            if not name.startswith("org"):
                one.copy_(torch.rand(one.shape, generator=generator) + 0.5 * (name != "dora_scale"))
    return own


def effect(module: nn.Module, inputs: int) -> Tensor:
    """The weight that its forward multiplies by."""
    with torch.no_grad():
        return module(torch.eye(inputs)).T.double()


def saved(modules: dict[str, nn.Module], path: Path, prefix: str = "lora_unet_") -> Path:
    tensors = {}
    for name, module in modules.items():
        for key, value in module.custom_state_dict().items():
            tensors[f"{prefix}{name}.{key}"] = value.detach().clone().contiguous()
    save_file(tensors, path, {"ss_base_model_version": "flux1"})
    return path


@pytest.mark.parametrize(("kind", "outputs"), [
    (LoConModule, False), (LohaModule, False), (LohaModule, True),
])  # fmt: skip
def test_norms_of_fused_modules_are_those_of_the_fused_weight(kind, outputs, flux, tmp_path):
    """As plain factors of full rank of each part, on diffusers' model."""
    modules = {
        name: decomposed(kind, weight_of(flux, parts), outputs=outputs)
        for name, parts in FUSED.items()
    }
    source = saved(modules, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    adapterkit.convert(source, to="diffusers", out=out, rank=100, base=flux, hash="none",
                       architecture="flux", dtype="fp32")  # fmt: skip
    factors = load_file(out)
    for name, parts in FUSED.items():
        weight = weight_of(flux, parts).double()
        want = effect(modules[name], weight.shape[1]) - weight
        got = torch.cat(
            [
                factors[f"transformer.{part}.lora_B.weight"].double()
                @ factors[f"transformer.{part}.lora_A.weight"].double()
                for part in parts
            ]
        )
        assert torch.linalg.norm(got - want) < 1e-5 * torch.linalg.norm(want)


def test_norms_of_the_whole_s_inputs_stay_with_the_whole(flux, tmp_path):
    """Between names that fuse alike nothing changes; for other modules they are refused."""
    modules = {
        name: decomposed(LoConModule, weight_of(flux, parts), outputs=False)
        for name, parts in FUSED.items()
    }
    source = saved(modules, tmp_path / "in.safetensors")
    comfyui, back = tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors"
    adapterkit.convert(source, to="comfyui", out=comfyui, hash="none", architecture="flux")
    adapterkit.convert(comfyui, to="lycoris", out=back, hash="none", architecture="flux")
    old, new = load_file(source), load_file(back)
    for key in old:
        if key.endswith("dora_scale"):
            assert torch.equal(old[key], new[key])
    with pytest.raises(Refused, match="norms of inputs that are taken over") as caught:
        adapterkit.convert(source, to="lycoris-wrapper", out=tmp_path / "refused.safetensors",
                           architecture="flux")  # fmt: skip
    assert "proj_mlp" in str(caught.value) and "to_q" in str(caught.value)


def test_own_norms_of_inputs_are_not_fused(flux, tmp_path):
    """Equal ones neither: over three weights they would be others."""
    parts = FUSED["double_blocks_0_img_attn_qkv"]
    modules = {
        f"transformer_blocks_0_attn_to_{part}": decomposed(
            LoConModule, weight_of(flux, [name]), outputs=False
        )
        for part, name in zip("qkv", parts, strict=True)
    }
    source = saved(modules, tmp_path / "in.safetensors", "lycoris_")
    with pytest.raises(Refused, match="norms of inputs that are taken over"):
        adapterkit.convert(source, to="lycoris", out=tmp_path / "out.safetensors",
                           architecture="flux")  # fmt: skip


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize(("form", "key"), [
    ("onetrainer", "transformer.transformer_blocks.0.attn.to_out.0.{}"),
    ("onetrainer-legacy", "lora_transformer_transformer_blocks_0_attn_to_out_0.{}"),
    ("onetrainer-original", "double_blocks.0.img_attn.proj.{}"),
])  # fmt: skip
def test_onetrainer_s_norms_are_those_of_their_shape(form, key, outputs, flux, tmp_path):
    """Its equation W' = m · (W + b@a · alpha / r) / ‖W + b@a · alpha / r‖, by default over the
    outputs: m is (1, in) then. A square weight, which the shapes of factors do not tell."""
    weight = weight_of(flux, ["transformer_blocks.0.attn.to_out.0"])
    size = len(weight)
    assert weight.shape == (size, size)
    torch.manual_seed(2)
    down, up = torch.randn(RANK, size), torch.randn(size, RANK)
    m = torch.rand((size, 1) if outputs else (1, size)) + 0.5
    names = ("lora_A.weight", "lora_B.weight") if form.endswith("original") else (
        "lora_down.weight", "lora_up.weight")  # fmt: skip
    tensors = dict(zip(map(key.format, names), (down, up), strict=True))
    tensors |= {key.format("alpha"): torch.tensor(2.0), key.format("dora_scale"): m}
    save_file(tensors, tmp_path / "in.safetensors")
    assert detect_format(tmp_path / "in.safetensors")["format"] == form
    added = weight.double() + up.double() @ down.double() * 2 / RANK
    want = m * added / added.norm(dim=int(outputs), keepdim=True) - weight
    adapterkit.convert(
        tmp_path / "in.safetensors", to="bfl", out=tmp_path / "out.safetensors", rank=size,
        base=flux, architecture="flux", dtype="fp32", hash="none",
    )  # fmt: skip
    (a, b) = (load_file(tmp_path / "out.safetensors")[f"double_blocks.0.img_attn.proj.{end}"]
              for end in ("lora_A.weight", "lora_B.weight"))  # fmt: skip
    assert torch.linalg.norm(b.double() @ a.double() - want) < 1e-5 * torch.linalg.norm(want)
    back = tmp_path / "back.safetensors"
    adapterkit.convert(tmp_path / "in.safetensors", to=form, out=back, architecture="flux")
    new = load_file(back)
    assert all(torch.equal(value, new[name]) for name, value in tensors.items())
