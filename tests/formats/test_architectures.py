"""Architectures that share names are told apart by rows, widths, numbers of blocks and metadata;
where all of them give the same output, none has to be chosen."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Refused

Shapes = dict[str, tuple[int, int]]  # module -> rows, inputs
MODELS = {  # width, rows of the gated or plain layer, inputs of the next, double and single blocks
    "flux": (3072, 4, 4, 19, 38),
    "klein-4b": (3072, 6, 3, 5, 20),
    "klein-9b": (4096, 6, 3, 8, 24),
    "flux2-dev": (6144, 6, 3, 8, 48),
}


def blocks(
    model: str, parts: Iterable[str], double: Iterable[int], single: Iterable[int]
) -> Shapes:
    """Modules of these blocks in the names of Black Forest Labs' code."""
    width, rows, inputs, *_ = MODELS[model]
    own = {
        "qkv": ("attn.qkv", 3 * width, width),
        "proj": ("attn.proj", width, width),
        "mlp.0": ("mlp.0", rows * width, width),
        "mlp.2": ("mlp.2", width, inputs * width),
        "linear1": ("linear1", (3 + rows) * width, width),
        "linear2": ("linear2", width, (1 + inputs) * width),
    }
    shapes = {}
    for part in parts:
        name, *shape = own[part]
        if part.startswith("linear"):
            shapes |= {f"single_blocks.{n}.{name}": tuple(shape) for n in single}
        else:
            shapes |= {f"double_blocks.{n}.img_{name}": tuple(shape) for n in double}
    return shapes


def saved(shapes: Shapes, path: Path, *, kohya: bool, metadata: Any = None) -> Path:
    tensors = {}
    for name, (out, inputs) in shapes.items():
        a, b = torch.ones(1, inputs).half(), torch.ones(out, 1).half()
        if kohya:
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
        else:
            key = "diffusion_model." + name
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(tensors, path, metadata)
    return path


def chosen(path: Path, to: str) -> str:
    plan = adapterkit.convert(path, to=to, out=path.with_name("out.safetensors"), dry_run=True)
    return plan.decisions["architecture"]


PARTS = ["mlp.0", "mlp.2", "linear1", "linear2"]


@pytest.mark.parametrize("kohya", [True, False], ids=["kohya", "comfyui"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", MODELS)
def test_two_blocks_distinguish_flux_from_flux2(model, part, kohya, tmp_path):
    path = saved(blocks(model, [part], (0, 1), (0, 1)), tmp_path / "in.safetensors", kohya=kohya)
    assert chosen(path, "diffusers") == ("flux" if model == "flux" else "flux2")


@pytest.mark.parametrize("part", ["qkv", "proj"])
@pytest.mark.parametrize("model", MODELS)
def test_attention_is_detected_by_the_width_and_the_number_of_blocks(model, part, tmp_path):
    _, _, _, double, single = MODELS[model]
    count = 2 if model in ("klein-9b", "flux2-dev") else double
    path = saved(blocks(model, [part], range(count), range(single)), tmp_path / "in.safetensors",
                 kohya=True)  # fmt: skip
    assert chosen(path, "bfl") == ("flux" if model == "flux" else "flux2")


@pytest.mark.parametrize(("key", "value", "architecture"), [
    ("ss_base_model_version", "flux_2_klein_4b", "flux2"),  # as musubi-tuner writes them
    ("modelspec.architecture", "Flux.2-klein-4b/lora", "flux2"),
    ("ss_base_model_version", "flux_kontext", "flux"),
    ("modelspec.architecture", "Flux.1-dev/lora", "flux"),  # OneTrainer too
    ("modelspec.architecture", "Flux.2/lora", "flux2"),
    ("modelspec.architecture", "Chroma1/lora", "chroma"),
    ("ss_base_model_version", "flux1", "flux"),
])  # fmt: skip
def test_metadata_decides_if_shapes_do_not(key, value, architecture, tmp_path):
    shapes = blocks("flux", ["qkv", "proj"], (0, 1), ())
    path = saved(shapes, tmp_path / "in.safetensors", kohya=True, metadata={key: value})
    assert chosen(path, "ai-toolkit") == architecture


def test_rows_count_more_than_metadata(tmp_path):
    """Which a merge of several files may have kept of another."""
    path = saved(blocks("klein-4b", ["linear1"], (), (0,)), tmp_path / "in.safetensors",
                 kohya=True, metadata={"ss_base_model_version": "flux1"})  # fmt: skip
    assert chosen(path, "diffusers") == "flux2"


@pytest.mark.parametrize("kohya", [True, False], ids=["kohya", "comfyui"])
def test_a_file_of_several_architectures_keeps_its_names_within_a_format(kohya, tmp_path):
    """Flux.1, Chroma and HunyuanVideo have them, HunyuanVideo by another column of its rules."""
    form = "kohya" if kohya else "comfyui"
    shapes = blocks("flux", ["qkv", "proj", *PARTS], (0, 1), (0, 1))
    path = saved(shapes, tmp_path / "in.safetensors", kohya=kohya)
    adapterkit.convert(path, to=form, out=tmp_path / "out.safetensors", hash="none")
    assert load_file(path).keys() == load_file(tmp_path / "out.safetensors").keys()
    with pytest.raises(Refused, match="modules of flux, chroma"):  # whose files differ there
        chosen(path, "ai-toolkit")


IMAGE = {  # width, rows of qkv, rows of w1
    "z_image": (3840, 3 * 3840, 10240),
    "lumina2": (2304, 3840, 9216),
}


@pytest.mark.parametrize("kohya", [True, False], ids=["kohya", "comfyui"])
@pytest.mark.parametrize("part", ["attention.qkv", "feed_forward.w1", "feed_forward.w2"])
@pytest.mark.parametrize("architecture", IMAGE)
def test_rows_tell_z_image_from_lumina2(architecture, part, kohya, tmp_path):
    width, qkv, hidden = IMAGE[architecture]
    shape = {"qkv": (qkv, width), "w1": (hidden, width), "w2": (width, hidden)}[
        part.rpartition(".")[2]
    ]
    path = saved({f"layers.0.{part}": shape}, tmp_path / "in.safetensors", kohya=kohya)
    assert chosen(path, "diffusers") == architecture


@pytest.mark.parametrize(("name", "rows", "width", "architecture"), [
    ("double_blocks.0.img_mlp.fc1", 4, 3584, "hunyuan_image"),
    ("double_blocks.0.img_mlp.fc1", 4, 3072, "hunyuan_video"),
    ("single_blocks.0.linear1", 7, 3584, "hunyuan_image"),
    ("layers.0.attention.qkv", 3, 4608, "ideogram4"),
    ("layers.0.attention.qkv", 3, 3840, "z_image"),
])  # fmt: skip
def test_the_width_distinguishes_families_with_the_same_names(
    name, rows, width, architecture, tmp_path
):
    path = saved({name: (rows * width, width)}, tmp_path / "in.safetensors", kohya=True)
    assert chosen(path, "diffusers") == architecture


@pytest.mark.parametrize(("inputs", "architecture"), [(1024, "cosmos"), (2048, "ltx")])
def test_the_width_of_texts_distinguishes_cosmos_from_ltx(inputs, architecture, tmp_path):
    """In diffusers' names, which both have for attention."""
    layers = {"attn1.to_q": 2048, "attn2.to_k": inputs, "attn2.to_v": inputs}
    tensors = {}
    for layer, width in layers.items():
        key = f"transformer.transformer_blocks.0.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.ones(1, width).half()
        tensors[f"{key}.lora_B.weight"] = torch.ones(2048, 1).half()
    save_file(tensors, tmp_path / "in.safetensors")
    assert chosen(tmp_path / "in.safetensors", "comfyui") == architecture
    for key in [key for key in tensors if "attn2" in key]:
        del tensors[key]
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(Refused, match="ltx, .*cosmos"):
        chosen(tmp_path / "in.safetensors", "comfyui")


@pytest.mark.parametrize(("layer", "shape", "architecture"), [
    ("layers.0.attn.to_q", (2520, 2520), "omnigen2"),
    ("layers.0.attn.to_q", (2304, 2304), "lumina2"),
    ("layers.0.feed_forward.linear_1", (10240, 2520), "omnigen2"),
    ("layers.0.feed_forward.linear_1", (9216, 2304), "lumina2"),
    ("transformer_blocks.0.attn1.to_q", (1920, 1920), "cogvideox"),
    ("transformer_blocks.41.attn1.to_q", (3072, 3072), "cogvideox"),
    ("transformer_blocks.47.attn1.to_q", (3072, 3072), "mochi"),
])  # fmt: skip
def test_diffusers_names_of_several_families_are_told_apart(layer, shape, architecture, tmp_path):
    (rows, inputs), key = shape, f"transformer.{layer}"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(1, inputs).half(),
        f"{key}.lora_B.weight": torch.ones(rows, 1).half(),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    assert chosen(tmp_path / "in.safetensors", "comfyui") == architecture
