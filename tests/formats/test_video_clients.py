"""Adapters on every linear layer of tiny transformers of each family: through the formats of the
original models' names and back, and into diffusers' models."""

import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as readers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit import Refused
from adapterkit.adapters.formats.library import described
from tests.formats.test_video_files import assert_same_deltas, converted, products, saved
from tests.formats.video_models import MODELS, anima_conditioner, cosmos, drawn
from tests.support.usual import usual

RANK = 2
Tensors = dict[str, Tensor]


def trained(model: nn.Module, folder: Path) -> Path:
    """A file of diffusers with factors of every linear layer, each drawn."""
    path = folder / "trained.safetensors"
    save_file(factors(model, "transformer"), path)
    return path


def factors(model: nn.Module, part: str) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes = {"A": (RANK, module.in_features), "B": (module.out_features, RANK)}
            for factor, size in sizes.items():
                key = f"{part}.{name}.lora_{factor}.weight"
                tensors[key] = torch.randn(size, generator=generator)
    return tensors


class Family(NamedTuple):
    architecture: str
    model: nn.Module
    source: Path

    def there_and_back(self, to: str) -> Path:
        """The source in this format, and that in diffusers' again."""
        home, how = self.source.parent / to, {"architecture": self.architecture}
        back = home / "diffusers.safetensors"
        if not back.exists():
            converted(converted(self.source, to, home, **how), "diffusers", home, **how)
        return back


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], Family]:
    @functools.cache
    def made(name: str) -> Family:
        architecture, build = MODELS[name]
        model = drawn(build())
        return Family(architecture, model, trained(model, tmp_path_factory.mktemp("family")))

    return made


FORMATS = ["comfyui", "kohya", "lycoris-wrapper", "ai-toolkit", "onetrainer-original"]


# one table has a family's names in all formats: by its rows the families share the others
@pytest.mark.parametrize(
    ("name", "to"),
    usual(
        itertools.product(MODELS, FORMATS),
        lambda row: row[1] in ("comfyui", FORMATS[[*MODELS].index(row[0]) % len(FORMATS)]),
    ),
)
def test_every_layer_goes_there_and_back(families, name: str, to: str):
    family = families(name)
    if family.architecture not in described()[to].names.architectures:
        return  # the program has no such model
    own, stored = load_file(family.there_and_back(to)), load_file(family.source)
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], value) for key, value in stored.items())


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_model_has_the_deltas_of_what_is_written(families, name: str):
    family = families(name)
    back = family.there_and_back("comfyui")
    assert_loaded(family.model, load_file(back), products(load_file(family.source)))


def assert_loaded(model: nn.Module, tensors: Tensors, expected: Tensors) -> None:
    """diffusers puts these deltas on the model, and no others."""
    model.load_lora_adapter(tensors, prefix="transformer", adapter_name="test")
    try:
        layers = {
            f"transformer.{name}": module.get_delta_weight("test").double()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    finally:
        model.delete_adapters("test")
        model.unload_lora()
    assert layers.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(layers[name], delta, rtol=1e-4, atol=1e-5)


# diffusers' readers of ComfyUI's names, and the layers that they know
READERS = {
    "krea2": (readers._convert_non_diffusers_krea2_lora_to_diffusers, "."),
    "cosmos": (readers._convert_non_diffusers_anima_lora_to_diffusers, "."),
    "ideogram4": (readers._convert_non_diffusers_ideogram4_lora_to_diffusers, r"\.layers\."),
    "flux3": (readers._convert_non_diffusers_flux3_lora_to_diffusers, "blocks"),
    "minimax_h3": (readers._convert_non_diffusers_minimax_h3_lora_to_diffusers, "."),
}


@pytest.mark.parametrize("name", READERS)
def test_diffusers_reads_the_names_of_comfyui(name, tmp_path):
    architecture, build = MODELS[name]
    reader, known = READERS[name]
    tensors = factors(build(), "transformer")
    own = {key: value for key, value in tensors.items() if re.search(known, key)}
    there = converted(saved(own, tmp_path), "comfyui", tmp_path, architecture=architecture)
    assert_same_deltas(products(reader(load_file(there))), products(own))


@pytest.mark.parametrize(("to", "prefix"), [
    ("comfyui", "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_A"),
    ("ai-toolkit", "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj.lora_A"),
    ("kohya", "lora_unet_llm_adapter_blocks_0_cross_attn_q_proj.lora_down"),
])  # fmt: skip
def test_anima_has_a_conditioner_of_texts(to, prefix, tmp_path):
    own = factors(cosmos(), "transformer") | factors(anima_conditioner(), "text_conditioner")
    there = converted(saved(own, tmp_path), to, tmp_path)
    assert f"{prefix}.weight" in load_file(there)
    back = load_file(converted(there, "diffusers", tmp_path))
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], value) for key, value in own.items())
    if to == "comfyui":
        theirs = readers._convert_non_diffusers_anima_lora_to_diffusers(load_file(there))
        assert_same_deltas(products(theirs), products(own))


MOD_Y = "diffusion_model.blocks.47.mod_y"
DECODER = "model.language_model.layers.0.self_attn.q_proj"
REFINER = "ref_image_refiner.0.attn.to_q"
BLOCK = "transformer_blocks.0."
# keys that the programs have: of sd-scripts, musubi-tuner, ComfyUI, ai-toolkit, OneTrainer
KEYS = [
    ("krea2", "transformer_blocks.0.attn.to_gate", "comfyui", "diffusion_model.blocks.0.attn.gate"),
    ("krea2", "text_fusion.projector", "kohya", "lora_unet_txtfusion_projector"),
    ("krea2", "img_in", "onetrainer-original", "first"),
    ("anima", "patch_embed.proj", "kohya", "lora_unet_x_embedder_proj_1"),
    ("anima", "proj_out", "onetrainer-original", "net.final_layer.linear"),
    ("ernie_image", "layers.0.mlp.up_proj", "ai-toolkit", "diffusion_model.layers.0.mlp.up_proj"),
    ("ernie_image", "text_proj", "onetrainer-original", "text_proj"),
    ("auraflow", "norm_out.linear", "comfyui", "diffusion_model.modF.1"),
    (
        "hunyuan_image",
        "transformer_blocks.0.ff.net.0.proj",
        "kohya",
        "lora_unet_double_blocks_0_img_mlp_fc1",
    ),
    (
        "hunyuan_image",
        "transformer_blocks.0.ff.net.0.proj",
        "comfyui",
        "diffusion_model.double_blocks.0.img_mlp.0",
    ),
    (
        "kandinsky5",
        "visual_transformer_blocks.0.cross_attention.to_query",
        "kohya",
        "lora_unet_visual_transformer_blocks_0_cross_attention_to_query",
    ),
    (
        "ideogram4",
        "layers.0.attention.to_out.0",
        "ai-toolkit",
        "diffusion_model.layers.0.attention.o",
    ),
    (
        "pixart",
        "transformer_blocks.0.attn2.to_out.0",
        "onetrainer-original",
        "blocks.0.cross_attn.proj",
    ),
    (
        "hunyuan_video15",
        "transformer_blocks.0.attn.add_q_proj",
        "kohya",
        "lora_unet_double_blocks_0_txt_attn_q",
    ),
    (
        "hunyuan_video15",
        "transformer_blocks.0.ff.net.0.proj",
        "comfyui",
        "diffusion_model.double_blocks.0.img_mlp.0",
    ),
    (
        "qwen_image21",
        "transformer_blocks.0.attn.to_out.0",
        "comfyui",
        "diffusion_model.transformer_blocks.0.attn.to_out.0",
    ),
    ("minimax_h3", "proj_out", "kohya", "lora_unet_final_layer_video_out"),
    (
        "ace_step",
        "layers.0.cross_attn.to_out.0",
        "comfyui",
        "diffusion_model.decoder.layers.0.cross_attn.o_proj",
    ),
    ("mochi", "transformer_blocks.47.norm1_context.linear_1", "comfyui", MOD_Y),
    ("sana", "time_embed.linear", "comfyui", "diffusion_model.t_block.1"),
    # musubi-tuner names modules of the whole model, ai-toolkit and ComfyUI those inside model.
    ("hidream_o1", DECODER, "kohya", "lora_unet_model_language_model_layers_0_self_attn_q_proj"),
    (
        "hidream_o1",
        DECODER,
        "ai-toolkit",
        "diffusion_model.language_model.layers.0.self_attn.q_proj",
    ),
    ("hidream_o1", "model.x_embedder.proj1", "comfyui", "diffusion_model.x_embedder.proj1"),
    ("omnigen2", REFINER, "ai-toolkit", f"diffusion_model.{REFINER}"),
    ("omnigen2", REFINER, "comfyui", f"diffusion_model.{REFINER}"),
    # VideoX-Fun's, and ComfyUI's
    ("cogvideox", BLOCK + "attn1.to_q", "kohya", "lora_unet_transformer_blocks_0_attn1_to_q"),
    ("cogvideox", BLOCK + "attn1.to_q", "comfyui", "diffusion_model.blocks.0.q"),
    ("cogvideox", BLOCK + "attn1.to_out.0", "comfyui", "diffusion_model.blocks.0.attn_out"),
    ("cogvideox", BLOCK + "ff.net.0.proj", "comfyui", "diffusion_model.blocks.0.ff_proj"),
    ("cogvideox", BLOCK + "norm1.linear", "comfyui", "diffusion_model.blocks.0.norm1.linear"),
    ("cogvideox", "ofs_embedding.linear_1", "comfyui", "diffusion_model.ofs_embedding_linear_1"),
    ("pixart", "adaln_single.linear", "onetrainer-legacy", "lora_transformer_adaln_single_linear"),
]


@pytest.mark.parametrize(("architecture", "module", "to", "key"), KEYS)
def test_keys_are_those_of_the_programs(architecture, module, to, key, tmp_path):
    own = {f"transformer.{module}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    there = load_file(converted(saved(own, tmp_path), to, tmp_path, architecture=architecture))
    assert {key} == {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", one) for one in there}


@pytest.mark.parametrize(("key", "module"), [
    ("lora_unet__transformer_blocks_0_attn1_to_q.lora_down", BLOCK + "attn1.to_q"), # VideoX-Fun
    ("lora_unet_blocks_0_q.lora_down", BLOCK + "attn1.to_q"),
    ("lora_unet_language_model_layers_0_self_attn_q_proj.lora_down", DECODER),
    (f"diffusion_model.{DECODER}.lora_A", DECODER), # an older ai-toolkit
    (f"lycoris_{REFINER.replace('.', '_')}.lora_down", REFINER),
])  # fmt: skip
def test_keys_in_another_spelling_of_the_programs_are_read(key, module, tmp_path):
    pairs = {"down": "up", "A": "B"}
    other = re.sub(r"(?<=lora_)\w+$", lambda found: pairs[found[0]], key)
    own = {f"{key}.weight": torch.ones(2, 6), f"{other}.weight": torch.ones(6, 2)}
    back = load_file(converted(saved(own, tmp_path), "diffusers", tmp_path))
    assert {*back} == {f"transformer.{module}.lora_{x}.weight" for x in "AB"}


def test_an_adapter_of_qwen3_vl_is_of_hidream_o1_only_if_you_say_so(tmp_path):
    """PEFT's names of both are the same."""
    sizes, folder = {"lora_A": (RANK, 6), "lora_B": (6, RANK)}, tmp_path / "peft"
    folder.mkdir()
    pair = {f"base_model.model.{DECODER}.{x}.weight": torch.ones(n) for x, n in sizes.items()}
    save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="of a language model(.|\n)*--architecture hidream_o1"):
        converted(folder, "comfyui", tmp_path)
    there = load_file(converted(folder, "comfyui", tmp_path, architecture="hidream_o1"))
    inner = DECODER.removeprefix("model.")
    assert {*there} == {f"diffusion_model.{inner}.lora_{x}.weight" for x in "AB"}
