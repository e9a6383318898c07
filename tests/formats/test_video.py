"""Names and rows of video models and of newer image models, against diffusers' own converters."""

import re
import types
from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from torch import Tensor

from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.adapters.formats.modules.row_permutations import model_order
from adapterkit.adapters.formats.schema import MODEL
from tests.formats.video_models import MODELS, WIDTH, drawn, named_parameters

Tensors = dict[str, Tensor]


def with_sizes(function: Callable, sizes: dict[int, int]) -> Callable:
    """diffusers' converter with the sizes of a tiny model in place of those it has written in."""

    def own(code: types.CodeType) -> types.CodeType:
        constants = [
            own(one)
            if isinstance(one, types.CodeType)
            else sizes.get(one, one)
            if type(one) is int
            else one
            for one in code.co_consts
        ]
        return code.replace(co_consts=tuple(constants))

    return types.FunctionType(own(function.__code__), function.__globals__)


def renamed(convert: Callable, names: dict[str, str]) -> Callable:
    """The converter, of keys whose parts (regexes) are renamed first."""

    def own(checkpoint: Tensors) -> Tensors:
        for pattern, text in names.items():
            checkpoint = {re.sub(pattern, text, key): value for key, value in checkpoint.items()}
        return convert(checkpoint)

    return own


def with_bare(convert: Callable, *bare: str) -> Callable:
    """diffusers' converter, which asks for parameters that no rule names."""
    there = ("register_tokens", "pos_embed.pos_embed", "pos_frequencies")

    def own(checkpoint: Tensors) -> Tensors:
        converted = convert(checkpoint | {key: torch.ones(1) for key in bare})
        is_bare = lambda key: key in there or key.endswith("scale_shift_table")
        return {key: value for key, value in converted.items() if not is_bare(key)}

    return own


def hunyuan_image(checkpoint: Tensors) -> Tensors:
    """diffusers' converter for HunyuanVideo, and what its script for HunyuanImage has besides."""
    convert = single_file_utils.convert_hunyuan_video_transformer_to_diffusers
    names = {
        r"^time_r_in\.mlp\.0\.": "time_guidance_embed.timestep_embedder_r.linear_1.",
        r"^time_r_in\.mlp\.2\.": "time_guidance_embed.timestep_embedder_r.linear_2.",
        r"^byt5_in\.layernorm\.": "context_embedder_2.norm.",
        r"^byt5_in\.fc(\d)\.": r"context_embedder_2.linear_\1.",
    }
    converted = renamed(with_sizes(convert, {3072: WIDTH}), names)(checkpoint)
    return renamed(dict, {r"^time_text_embed\.": "time_guidance_embed."})(converted)


def hunyuan_video15(checkpoint: Tensors) -> Tensors:
    """diffusers' converter for HunyuanVideo, and what its script for HunyuanVideo 1.5 has
    besides."""
    convert = single_file_utils.convert_hunyuan_video_transformer_to_diffusers
    names = {
        r"^time_r_in\.mlp\.0\.": "time_embed.timestep_embedder_r.linear_1.",
        r"^time_r_in\.mlp\.2\.": "time_embed.timestep_embedder_r.linear_2.",
        r"^byt5_in\.layernorm\.": "context_embedder_2.norm.",
        r"^byt5_in\.fc(\d)\.": r"context_embedder_2.linear_\1.",
        r"^vision_in\.proj\.0\.": "image_embedder.norm_in.",
        r"^vision_in\.proj\.1\.": "image_embedder.linear_1.",
        r"^vision_in\.proj\.3\.": "image_embedder.linear_2.",
        r"^vision_in\.proj\.4\.": "image_embedder.norm_out.",
        r"^cond_type_embedding\.": "cond_type_embed.",
        r"\.img_attn_([qkv])\.": r".attn.to_\1.",
        r"\.txt_attn_([qkv])\.": r".attn.add_\1_proj.",
    }
    converted = renamed(with_sizes(convert, {3072: WIDTH}), names)(checkpoint)
    return renamed(dict, {r"^time_text_embed\.": "time_embed."})(converted)


def pixart(checkpoint: Tensors) -> Tensors:
    """What `pixart_to_diffusers` in ComfyUI's comfy/utils.py says."""
    names = {
        r"^csize_embedder\.mlp\.0\.": "adaln_single.emb.resolution_embedder.linear_1.",
        r"^csize_embedder\.mlp\.2\.": "adaln_single.emb.resolution_embedder.linear_2.",
        r"^ar_embedder\.mlp\.0\.": "adaln_single.emb.aspect_ratio_embedder.linear_1.",
        r"^ar_embedder\.mlp\.2\.": "adaln_single.emb.aspect_ratio_embedder.linear_2.",
        r"^t_embedder\.mlp\.0\.": "adaln_single.emb.timestep_embedder.linear_1.",
        r"^t_embedder\.mlp\.2\.": "adaln_single.emb.timestep_embedder.linear_2.",
        r"^t_block\.1\.": "adaln_single.linear.",
        r"^x_embedder\.proj\.": "pos_embed.proj.",
        r"^y_embedder\.y_proj\.fc(\d)\.": r"caption_projection.linear_\1.",
        r"^final_layer\.linear\.": "proj_out.",
        r"^blocks\.": "transformer_blocks.",
        r"\.attn\.proj\.": ".attn1.to_out.0.",
        r"\.cross_attn\.proj\.": ".attn2.to_out.0.",
        r"\.cross_attn\.q_linear\.": ".attn2.to_q.",
        r"\.mlp\.fc1\.": ".ff.net.0.proj.",
        r"\.mlp\.fc2\.": ".ff.net.2.",
    }
    fused = {".attn.qkv.": (".attn1", "qkv"), ".cross_attn.kv_linear.": (".attn2", "kv")}
    converted = {}
    for key, value in renamed(dict, names)(checkpoint).items():
        name = next((name for name in fused if name in key), "")
        attention, parts = fused.get(name, ("", "-"))
        for part, own in zip(parts, value.chunk(len(parts)), strict=True):
            new = key.replace(name, f"{attention}.to_{part}.") if name else key
            converted[new] = own
    return converted


SCALES = r"((?:pre|post|q|k|query_|key_|last\.)norm|txtmlp\.0)\.weight$"

# of a model: the naming of the original one, and diffusers' converter of its checkpoints
CONVERTERS = {
    "wan t2v": ("original", single_file_utils.convert_wan_transformer_to_diffusers),
    "wan i2v": ("original", single_file_utils.convert_wan_transformer_to_diffusers),
    "wan vace": ("original", single_file_utils.convert_wan_transformer_to_diffusers),
    "z_image": ("comfyui", single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers),
    "hunyuan_video": (
        "original",
        with_sizes(single_file_utils.convert_hunyuan_video_transformer_to_diffusers, {3072: WIDTH}),
    ),
    "ltx": ("original", single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers),
    "lumina2": (
        "original",
        with_sizes(single_file_utils.convert_lumina2_to_diffusers, {2304: 24, 768: 8}),
    ),
    "krea2": (
        "original",
        renamed(
            single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers,
            {SCALES: r"\1.scale"},
        ),
    ),
    "ernie_image": (
        "model",
        single_file_utils.convert_ernie_image_transformer_checkpoint_to_diffusers,
    ),
    "cosmos": ("original", single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers),
    "auraflow": (
        "original",
        with_bare(
            single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers,
            "register_tokens",
            "positional_encoding",
        ),
    ),
    "hunyuan_video15": ("original", hunyuan_video15),
    "qwen_image21": (
        "comfyui",
        single_file_utils.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    ),
    "minimax_h3": (
        "original",
        lambda tensors: single_file_utils.convert_minimax_h3_transformer_checkpoint_to_diffusers(
            tensors, {}
        ),
    ),
    # what its script and its reader of LoRAs say
    "ace_step": (
        "original",
        renamed(
            dict,
            {
                r"\.([qkv])_proj\.": r".to_\1.",
                r"\.o_proj\.": ".to_out.0.",
                r"\.([qk])_norm\.": r".norm_\1.",
                r"^proj_(in|out)\.1\.": r"proj_\1_conv.",
            },
        ),
    ),
    "mochi": (
        "original",
        with_bare(
            single_file_utils.convert_mochi_transformer_checkpoint_to_diffusers, "pos_frequencies"
        ),
    ),
    "sana": (
        "original",
        with_bare(
            single_file_utils.convert_sana_transformer_to_diffusers,
            "pos_embed",
            "y_embedder.y_embedding",
            "blocks.0.scale_shift_table",
            "final_layer.scale_shift_table",
        ),
    ),
    "cosmos25": ("original", single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers),
    "hunyuan_image": ("original", hunyuan_image),
    "pixart": ("original", pixart),
    "flux3": (
        "original",
        renamed(
            single_file_utils.convert_flux3_transformer_checkpoint_to_diffusers,
            {SCALES: r"\1.scale"},
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_has_one_rule(name):
    architecture, model = MODELS[name]
    """In each naming that the family has."""
    modules = {key.rpartition(".")[0] for key in named_parameters(model())}
    rules = names_of(architecture, "transformer", MODEL).rules
    for naming in {key for rule in rules for key in rule.namings} or {MODEL}:
        names = names_of(architecture, "transformer", naming)
        found = {module: list(filter(names.text, names.find_model(module))) for module in modules}
        assert {module: len(some) for module, some in found.items() if len(some) != 1} == {}


@pytest.mark.parametrize("name", CONVERTERS)
def test_names_and_rows_are_those_of_diffusers_converter(name):
    architecture, model = MODELS[name]
    naming, convert = CONVERTERS[name]
    parameters = named_parameters(drawn(model()))
    back = convert(original_checkpoint(architecture, naming, parameters))
    assert back.keys() == parameters.keys()
    assert [key for key, value in parameters.items() if not torch.equal(back[key], value)] == []


def original_checkpoint(architecture: str, naming: str, parameters: Tensors) -> Tensors:
    """The parameters under the names of the original model, fused by the architecture's rules."""
    names = names_of(architecture, "transformer", naming)
    groups: dict[str, dict[int, Tensor]] = {}
    steps: dict[str, tuple[str, ...]] = {}
    for key, value in parameters.items():
        module, _, leaf = key.rpartition(".")
        (match,) = filter(names.text, names.find_model(module))
        text = f"{names.text(match)}.{leaf}"
        groups.setdefault(text, {})[match.part] = value
        steps[text] = match.rule.steps.get(naming, ())
    checkpoint = {}
    for text, parts in groups.items():
        joined = torch.cat([parts[index] for index in sorted(parts)])
        order = list(model_order(steps[text], len(joined), None, text))
        checkpoint[text] = torch.empty_like(joined)
        checkpoint[text][order] = joined
    return checkpoint


def test_ltx2_has_the_names_of_diffusers_lora_converter():
    architecture, model = MODELS["ltx2"]
    modules = {key.rpartition(".")[0] for key in named_parameters(model())}
    names = names_of(architecture, "transformer", "original")
    originals = {m: names.text(names.find_model(m)[0]) for m in modules}
    keys = {f"diffusion_model.{text}.lora_A.weight": module for module, text in originals.items()}
    state = {key: torch.tensor(index) for index, key in enumerate(keys)}
    back = lora_conversion_utils._convert_non_diffusers_ltx2_lora_to_diffusers(dict(state))
    wanted = {f"transformer.{module}.lora_A.weight": state[key] for key, module in keys.items()}
    assert back == wanted
