"""Module names of Stable Diffusion 1.x, XL and 3 in every naming, against the models' own modules
and against diffusers' converters."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import adapterkit
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.core.errors import Refused
from adapterkit.verbs.look.formats import detect_format
from tests.support import pipelines

MODELS = {
    ("sd15", "unet"): pipelines.unet_sd15,
    ("sd2", "unet"): pipelines.unet_sd15,
    ("sdxl", "unet"): pipelines.unet_sdxl,
    ("sd3", "transformer"): pipelines.transformer_sd3,
    ("sd15", "text_encoder"): lambda: pipelines.clip(CLIPTextModelWithProjection),
    ("sdxl", "text_encoder_2"): lambda: pipelines.clip(CLIPTextModelWithProjection),
    ("sd3", "text_encoder_3"): pipelines.t5,
}
GOLDEN = Path(__file__).parent / "golden"
# of a text encoder nobody trains the tables of embeddings
EMBEDDINGS = (torch.nn.Embedding,)


def weighted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules with a weight of their own that adapters train."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and not isinstance(module, EMBEDDINGS)
    }


@pytest.mark.parametrize("case", MODELS, ids="-".join)
@pytest.mark.parametrize("style", ["dots", "underscores"])
@pytest.mark.parametrize("naming", ["model", "original"])
def test_every_module_has_one_rule(case, style, naming):
    """And its name in a file stands for that module alone, or for the one that fuses it."""
    names = names_of(*case, naming, style)
    texts: dict[str, list[str]] = {}
    for module in weighted(MODELS[case]()):
        (text,) = {names.text(match) for match in names.find_model(module)} - {None}
        texts.setdefault(text, []).append(module)
    for text, modules in texts.items():
        (match,) = names.find(text)
        assert sorted(names.models(match)) == sorted(modules), text


def numbered(names: Iterable[str]) -> dict[str, torch.Tensor]:
    """A tensor with a number of its own for each name."""
    return {name: torch.full((1,), float(number)) for number, name in enumerate(names)}


@pytest.mark.parametrize(("architecture", "naming"), [("sd15", "model"), ("sdxl", "original")])
def test_kohya_names_are_those_that_diffusers_reads(architecture, naming):
    unet = MODELS[architecture, "unet"]()
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    modules = [name for name, module in unet.named_modules() if isinstance(module, layers)]
    names = names_of(architecture, "unet", naming, "underscores")
    numbers = numbered(modules)
    kohya = {}
    for module, number in numbers.items():
        (match,) = filter(names.text, names.find_model(module))
        for part in ("lora_down", "lora_up"):
            kohya[f"lora_unet_{names.text(match)}.{part}.weight"] = number
    kohya = _maybe_map_sgm_blocks_to_diffusers(kohya, unet.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(kohya)
    converted = convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): number for key, number in converted.items()}
    )
    expected = {f"{module}.lora_A.weight": number for module, number in numbers.items()}
    expected |= {f"{module}.lora_B.weight": number for module, number in numbers.items()}
    assert converted == expected


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_original_names_are_those_of_checkpoints(architecture):
    """Norms too."""
    unet = MODELS[architecture, "unet"]()
    names = names_of(architecture, "unet", "original")
    numbers = numbered(weighted(unet))
    checkpoint = {}
    for module, number in numbers.items():
        (match,) = filter(names.text, names.find_model(module))
        for part in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{names.text(match)}.{part}"] = number
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    weights = {key: value for key, value in converted.items() if key.endswith(".weight")}
    assert weights == {f"{module}.weight": number for module, number in numbers.items()}


def kohya(path: Path, modules: Mapping[str, tuple[int, int]], **metadata: str) -> Path:
    """A file of kohya's for modules of these sizes (out, in)."""
    tensors = {}
    for name, (out, inputs) in modules.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, inputs)
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path, metadata)
    return path


ATTENTION = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"


@pytest.mark.parametrize(
    ("modules", "metadata", "architectures"),
    [
        ({f"{ATTENTION}2_to_k": (1280, 768)}, {}, ["sd15"]),
        ({f"{ATTENTION}2_to_k": (1280, 1024)}, {}, ["sd2"]),
        ({f"{ATTENTION}2_to_k": (1280, 2048)}, {}, ["sdxl"]),
        ({f"{ATTENTION}1_to_k": (1280, 1280)}, {}, ["sd15", "sd2", "sdxl"]),
        ({f"{ATTENTION}1_to_k": (8, 8)}, {"ss_base_model_version": "sd_v1"}, ["sd15"]),
        ({f"{ATTENTION}1_to_k": (8, 8)}, {"ss_base_model_version": "sd_v2_v"}, ["sd2"]),
        ({f"{ATTENTION}1_to_k": (8, 8)}, {"ss_base_model_version": "sdxl_base_v1-0"}, ["sdxl"]),
        ({f"lora_te_{TEXT}": (768, 768)}, {}, ["sd15"]),
        ({f"lora_te_{TEXT}": (1024, 1024)}, {}, ["sd2"]),
        ({"lora_te_encoder_layers_0_mlp_fc1": (8, 8)}, {}, ["sd15", "sd2"]),
        ({f"{ATTENTION.replace('blocks_0', 'blocks_9')}1_to_q": (8, 8)}, {}, ["sdxl"]),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in": (8, 8)}, {}, ["sd15", "sd2"]),
        ({"lora_unet_input_blocks_4_1_proj_in": (8, 8)}, {}, ["sdxl"]),
        ({f"lora_te2_{TEXT}": (8, 8), f"{ATTENTION}1_to_k": (8, 8)}, {}, ["sdxl"]),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (24, 8)}, {}, ["sd3"]),
    ],
)
def test_the_architecture_is_detected(modules, metadata, architectures, tmp_path):
    """By names, else by sizes and metadata; several where the names are the same in all."""
    told = detect_format(kohya(tmp_path / "a.safetensors", modules, **metadata))
    assert (told["format"], told["architectures"]) == ("kohya", architectures)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def test_metadata_say_what_is_in_the_file(tmp_path):
    """What was said of the training is carried along, the base's hash and the trainer's rank too;
    from another format ranks are counted again; hashes of the file are gone."""
    modules = {f"{ATTENTION}2_to_k": (8, 2048), f"lora_te1_{TEXT}": (8, 8)}
    said = {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_hash": "a"}
    said |= {"ss_network_dim": "64", "ss_network_alpha": "32"}
    hashes = {"sshs_model_hash": "c", "sshs_legacy_hash": "d", "modelspec.hash_sha256": "e"}
    source = kohya(tmp_path / "a.safetensors", modules, **said, **hashes, note="b")
    again, other = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    adapterkit.convert(source, to="kohya", out=again)
    receipt = adapterkit.convert(source, to="diffusers", out=other)
    sizes = {"ss_network_dim": "2", "ss_network_alpha": "1.0"}
    words = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    words |= {"ss_network_module": "networks.lora"}
    assert metadata_of(again) == words | said
    assert metadata_of(other).keys() == {"format", "lora_adapter_metadata"}
    assert any("lora_adapter_metadata" in note for note in receipt.data["notes"])
    back = tmp_path / "d.safetensors"
    adapterkit.convert(other, to="kohya", out=back)
    assert metadata_of(back) == words | sizes


def test_metadata_are_silent_where_architectures_differ(tmp_path):
    source = kohya(tmp_path / "a.safetensors", {"lora_te_encoder_layers_0_mlp_fc1": (8, 8)})
    adapterkit.convert(source, to="kohya", out=tmp_path / "b.safetensors")
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"
    assert key in load_file(tmp_path / "b.safetensors")
    metadata = metadata_of(tmp_path / "b.safetensors")
    assert metadata.keys() == {"ss_network_module", "ss_network_dim", "ss_network_alpha"}


def test_ambiguous_names_are_refused(tmp_path):
    """Names that SD 1.x and SDXL have are written apart by kohya."""
    source = kohya(tmp_path / "a.safetensors", {f"{ATTENTION}1_to_k": (8, 8)})
    middle = tmp_path / "b.safetensors"
    adapterkit.convert(source, to="diffusers", out=middle)
    with pytest.raises(Refused, match="modules of sd15, sd2, sdxl") as refusal:
        adapterkit.convert(middle, to="kohya", out=tmp_path / "c.safetensors")
    assert "--architecture" in str(refusal.value)
    adapterkit.convert(middle, to="kohya", out=tmp_path / "c.safetensors", architecture="sdxl")
    assert all("middle_block_1" in key for key in load_file(tmp_path / "c.safetensors"))


def test_an_older_file_of_diffusers_may_be_a_pickle(tmp_path):
    path = GOLDEN / "diffusers-old" / "bare.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_lora_weights.bin")
    out, same = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    adapterkit.convert(
        tmp_path / "pytorch_lora_weights.bin", to="diffusers", out=out, allow_pickle=True
    )
    adapterkit.convert(path, to="diffusers", out=same)
    assert out.read_bytes() == same.read_bytes()
    assert len(load_file(out)) == len(load_file(path))
