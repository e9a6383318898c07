"""Files of the trainers of video models and newer image models: the same deltas as diffusers' own
readers make of them, the same bytes when written again, and what diffusers' models make of them."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as readers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit import AdapterkitError
from tests.formats import video_models
from tests.formats.test_video import with_sizes
from tests.formats.video_models import WIDTH, drawn

GOLDEN = Path(__file__).parent / "golden"
Tensors = dict[str, Tensor]


def converted(source: Path, to: str, folder: Path, **options) -> Tensors:
    out = folder / f"{to}.safetensors"
    adapterkit.convert(source, to=to, out=out, overwrite=True, hash="none", **options)
    return load_file(out)


def saved(tensors: Tensors, folder: Path, **metadata: str) -> Path:
    path = folder / "source.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def deltas(tensors: Tensors) -> Tensors:
    """scale · b @ a of every module of a file with dotted names, in float64."""
    found = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        b = tensors[f"{module}.lora_B.weight"].double()
        scale = tensors.get(f"{module}.alpha", torch.tensor(len(a))).double() / len(a)
        found[module.removeprefix("transformer.")] = scale * b @ a.double()
    return found


def assert_same_deltas(some: Tensors, others: Tensors) -> None:
    assert some.keys() == others.keys()
    for module, delta in some.items():
        torch.testing.assert_close(delta, others[module], rtol=1e-6, atol=1e-6)


# a golden file and diffusers' own reader of it
READERS = {
    "kohya/musubi_wan_t2v": readers._convert_musubi_wan_lora_to_diffusers,
    "kohya/musubi_wan_i2v": readers._convert_musubi_wan_lora_to_diffusers,
    "kohya/musubi_qwen_image": readers._convert_non_diffusers_qwen_lora_to_diffusers,
    "kohya/musubi_z_image": readers._convert_non_diffusers_z_image_lora_to_diffusers,
    "kohya/onetrainer_z_image": readers._convert_non_diffusers_z_image_lora_to_diffusers,
    "comfyui/musubi_wan_i2v": readers._convert_non_diffusers_wan_lora_to_diffusers,
    "comfyui/musubi_qwen_image": readers._convert_non_diffusers_qwen_lora_to_diffusers,
    "comfyui/musubi_z_image": readers._convert_non_diffusers_z_image_lora_to_diffusers,
    "comfyui/onetrainer_z_image": readers._convert_non_diffusers_z_image_lora_to_diffusers,
    "comfyui/musubi_hunyuan_video": with_sizes(
        readers._convert_hunyuan_video_lora_to_diffusers, {3072: WIDTH}
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_the_delta_is_that_of_diffusers_reader(name, tmp_path):
    source = GOLDEN / f"{name}.safetensors"
    own = converted(source, "diffusers", tmp_path)
    assert_same_deltas(deltas(own), deltas(READERS[name](load_file(source))))
