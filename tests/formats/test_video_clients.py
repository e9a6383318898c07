"""Adapters on every linear layer of tiny transformers of each family: through the formats of the
original models' names and back, and into diffusers' models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.formats.library import described
from tests.formats.test_video_files import converted, products
from tests.formats.video_models import MODELS, drawn

RANK = 2
Tensors = dict[str, Tensor]


def trained(model: nn.Module, folder: Path) -> Path:
    """A file of diffusers with factors of every linear layer, each drawn."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sizes = {"A": (RANK, module.in_features), "B": (module.out_features, RANK)}
            for factor, size in sizes.items():
                key = f"transformer.{name}.lora_{factor}.weight"
                tensors[key] = torch.randn(size, generator=generator)
    path = folder / "trained.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(params=MODELS, scope="module")
def family(request, tmp_path_factory) -> tuple[str, nn.Module, Path]:
    architecture, build = MODELS[request.param]
    model = drawn(build())
    return architecture, model, trained(model, tmp_path_factory.mktemp("family"))


FORMATS = ["comfyui", "kohya", "lycoris-wrapper", "ai-toolkit", "onetrainer-original"]


@pytest.mark.parametrize("to", FORMATS)
def test_every_layer_goes_there_and_back(family, to, tmp_path):
    architecture, _, source = family
    if architecture not in described()[to].names.architectures:
        return  # the program has no such model
    there = converted(source, to, tmp_path, architecture=architecture)
    back = converted(there, "diffusers", tmp_path, architecture=architecture)
    own, stored = load_file(back), load_file(source)
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], value) for key, value in stored.items())


def test_diffusers_model_has_the_deltas_of_what_is_written(family, tmp_path):
    architecture, model, source = family
    there = converted(source, "comfyui", tmp_path, architecture=architecture)
    back = converted(there, "diffusers", tmp_path, architecture=architecture)
    assert_loaded(model, load_file(back), products(load_file(source)))


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
