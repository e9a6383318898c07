"""Names and rows of video models and of newer image models, against diffusers' own converters."""

import types
from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from torch import Tensor

from adapterkit.formats.modules.names import names_of
from adapterkit.formats.modules.rows import model_order
from adapterkit.formats.schema import MODEL
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
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_has_one_rule(name):
    architecture, model = MODELS[name]
    names = names_of(architecture, "transformer", MODEL)
    modules = {key.rpartition(".")[0] for key in named_parameters(model())}
    rules = {module: len(names.find_model(module)) for module in modules}
    assert {module: count for module, count in rules.items() if count != 1} == {}


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
        (match,) = names.find_model(module)
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
