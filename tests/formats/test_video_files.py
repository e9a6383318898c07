"""Files of the trainers of video models and newer image models: the same deltas as diffusers' own
readers make of them, the same bytes when written again, and what diffusers' models make of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as readers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit import AdapterkitError
from tests.formats.test_video import with_sizes
from tests.formats.video_models import WIDTH

GOLDEN = Path(__file__).parent / "golden"
Tensors = dict[str, Tensor]


def converted(source: Path, to: str, folder: Path, **options) -> Path:
    folder.mkdir(exist_ok=True)
    out = folder / f"{to}.safetensors"
    adapterkit.convert(source, to=to, out=out, overwrite=True, hash="none", **options)
    return out


def saved(tensors: Tensors, folder: Path, **metadata: str) -> Path:
    path = folder / "source.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def deltas(path: Path) -> Tensors:
    """scale · b @ a of every module of a file of diffusers, in float64; scales as PEFT takes them
    from the metadata."""
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    found = {}
    for module, (a, b) in factors(load_file(path)).items():
        component, _, name = module.partition(".")
        own = {key.partition(".")[2]: v for key, v in settings.items() if key.startswith(component)}
        alpha = own.get("lora_alpha", len(a))
        for pattern, value in own.get("alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
        found[module] = alpha / len(a) * b @ a
    return found


def factors(tensors: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {m: (tensors[m + ends[0]].double(), tensors[m + ends[1]].double()) for m in modules}


def products(tensors: Tensors) -> Tensors:
    """b @ a of every module."""
    return {module: b @ a for module, (a, b) in factors(tensors).items()}


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
    assert_same_deltas(deltas(own), products(READERS[name](load_file(source))))


# files whose scales are where their format writes them
EXACT = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in GOLDEN.glob("*/*.safetensors")
    if path.stem.startswith(("musubi", "onetrainer", "wan22"))
    and not (path.parent.name == "comfyui" and path.stem.startswith("onetrainer"))
    and path.parent.name != "lycoris"
)


@pytest.mark.parametrize("name", EXACT)
def test_written_again_a_file_is_the_same(name, tmp_path):
    source = GOLDEN / f"{name}.safetensors"
    tensors = load_file(source)
    own = load_file(converted(source, Path(name).parent.name, tmp_path))
    assert own.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert own[key].dtype == tensor.dtype and torch.equal(own[key], tensor)


def test_onetrainers_formats_hold_the_same_adapter(tmp_path):
    """One state of training, saved by OneTrainer in each of its formats."""
    fused = [f"{one}/onetrainer_hunyuan_video" for one in ("onetrainer-original", "comfyui")]
    split = [f"{one}/onetrainer_hunyuan_video" for one in ("diffusers", "onetrainer-legacy")]
    plain = [
        f"{one}/onetrainer_z_image"
        for one in ("onetrainer", "onetrainer-original", "kohya", "comfyui")
    ]
    for names in (fused, split, plain):
        same = [
            deltas(converted(GOLDEN / f"{name}.safetensors", "diffusers", tmp_path))
            for name in names
        ]
        for some in same[1:]:
            shared = {module: same[0][module] for module in some if module in same[0]}
            assert shared.keys() >= same[0].keys() - TEXT
            assert_same_deltas(shared, {module: some[module] for module in shared})


TEXT = {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"}


def test_the_last_layer_of_hunyuan_video_has_scale_and_shift_swapped(tmp_path):
    source = GOLDEN / "onetrainer-original/onetrainer_hunyuan_video.safetensors"
    own = load_file(converted(source, "diffusers", tmp_path))
    stored = load_file(source)["final_layer.adaLN_modulation.1.lora_B.weight"]
    shift, scale = stored.chunk(2)
    assert torch.equal(own["transformer.norm_out.linear.lora_B.weight"], torch.cat([scale, shift]))


def test_fused_attention_of_z_image_is_split_at_the_rank_that_it_was_trained_with(tmp_path):
    fused, split = (
        converted(GOLDEN / f"kohya/musubi_z_image{end}.safetensors", "diffusers", tmp_path / end)
        for end in ("_fused", "")
    )
    shapes = [{k: v.shape for k, v in load_file(path).items()} for path in (fused, split)]
    assert shapes[0] == shapes[1]
    assert_same_deltas(deltas(fused), deltas(split))


def test_blocks_are_recognized_by_their_numbers_not_by_their_count(tmp_path):
    """diffusers' reader of musubi-tuner's Wan files counts them, and fails on some blocks alone."""
    tensors = {
        key.replace("blocks_0_", "blocks_7_"): value
        for key, value in load_file(GOLDEN / "kohya/musubi_wan_t2v.safetensors").items()
    }
    with pytest.raises(KeyError):
        readers._convert_musubi_wan_lora_to_diffusers(dict(tensors))
    own = load_file(converted(saved(tensors, tmp_path), "diffusers", tmp_path))
    assert all(key.startswith("transformer.blocks.7.") for key in own)
    assert len(own) == 2 * len(tensors) // 3


def test_both_transformers_of_wan_22(tmp_path):
    source = GOLDEN / "diffusers/wan22.safetensors"
    with pytest.raises(AdapterkitError, match="transformer, transformer_2"):
        converted(source, "comfyui", tmp_path)
    tensors = load_file(source)
    for name, alpha in (("transformer", 2.0), ("transformer_2", 1.0)):
        own = load_file(converted(source, "comfyui", tmp_path, component=name))
        a, b = (own[f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight"] for x in "AB")
        stored = [tensors[f"{name}.blocks.0.attn1.to_q.lora_{x}.weight"] for x in "AB"]
        torch.testing.assert_close(b @ a, alpha * stored[1] @ stored[0])
