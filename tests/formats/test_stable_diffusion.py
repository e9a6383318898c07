"""Module names of Stable Diffusion 1.x, XL and 3 in every naming, against the models' own modules
and against diffusers' converters."""

from collections.abc import Iterable

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from transformers import CLIPTextModelWithProjection

from adapterkit.formats.names import names_of
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
        (match,) = names.find_model(module)
        text = names.text(match)
        assert text is not None, module
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
        (match,) = names.find_model(module)
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
        (match,) = names.find_model(module)
        for part in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{names.text(match)}.{part}"] = number
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    weights = {key: value for key, value in converted.items() if key.endswith(".weight")}
    assert weights == {f"{module}.weight": number for module, number in numbers.items()}
