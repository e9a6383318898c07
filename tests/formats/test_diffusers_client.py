"""diffusers' own pipelines load what is written, and compute what the source's deltas say.

Deltas are made for the modules of checkpoints and brought to the models' by diffusers' converters
of whole checkpoints, which are linear.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.core.errors import Refused
from tests.support import pipelines

GOLDEN = Path(__file__).parent / "golden"
RESPELLED = GOLDEN / "diffusers" / "respelled"
LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
# rows in another order; and by the last diffusers tells which keys a text encoder has
ALWAYS = ("qkv", "adaLN", "out_proj")
PREFIXES = {
    "sd15": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "sd3": {
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
    },
}


@pytest.fixture(autouse=True)
def released_peft(monkeypatch):
    """transformers 5.24 asks for PEFT 0.22 before it loads an adapter, of which there is none."""
    monkeypatch.setattr(
        "transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__, raising=False
    )


@dataclass(frozen=True)
class Factors:
    """An adapter of one module."""

    a: Tensor  # (r, in, *kernel)
    b: Tensor  # (out, r, *1)
    alpha: float

    @property
    def delta(self) -> Tensor:
        """In float64, of the weight's shape."""
        product = self.b.double().flatten(1) @ self.a.double().flatten(1)
        shape = (len(self.b), *self.a.shape[1:])
        return product.view(shape) * self.alpha / len(self.a)


def model_of(pipe: Any, component: str) -> torch.nn.Module:
    return pipe.components[component]


def file_name(component: str, module: str) -> str:
    """The module's name in files: those of CLIP keep what transformers 5 took away."""
    is_flat = component.startswith("text_encoder") and module.startswith("encoder.layers.")
    return f"text_model.{module}" if is_flat else module


def shapes(architecture: str, pipe: Any, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that adapters train, by the name that kohya's files have with dots."""
    naming = "model" if architecture == "sd15" else "original"
    names = names_of(architecture, component, naming)
    sizes: dict[str, tuple[int, ...]] = {}
    for module, layer in model_of(pipe, component).named_modules():
        if not isinstance(layer, LAYERS) or module == "text_projection":
            continue
        named = names.named(file_name(component, module))
        assert named is not None, module
        out, *tail = layer.weight.shape
        before = sizes.get(named[1], (0,))
        sizes[named[1]] = (before[0] + out, *tail)
    return sizes


@cache
def trained(
    architecture: str, part: int = 1, *, mixed: bool = True
) -> dict[tuple[str, str], Factors]:
    """Factors for every `part`-th module; mixed ranks and alphas, or one for all."""
    generator = torch.Generator().manual_seed(7)
    factors = {}
    for component in PREFIXES[architecture]:
        sizes = shapes(architecture, untouched(architecture), component)
        for number, (name, shape) in enumerate(sizes.items()):
            if number % part and not any(word in name for word in ALWAYS):
                continue
            rank = 2 + number % 2 if mixed else 2
            out, *tail = shape
            ones = [1] * len(tail[1:])
            a = torch.randn(rank, *tail, generator=generator) / 4
            b = torch.randn(out, rank, *ones, generator=generator) / 4
            alpha = (0.5, 1.0, 3.0)[number % 3] if mixed else 1.0
            factors[component, name] = Factors(a, b, alpha)
    return factors


def kohya_file(path: Path, architecture: str, factors: Mapping) -> Path:
    tensors = {}
    for (component, name), one in factors.items():
        key = PREFIXES[architecture][component] + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = one.a
        tensors[f"{key}.lora_up.weight"] = one.b
        tensors[f"{key}.alpha"] = torch.tensor(one.alpha)
    save_file(tensors, path)
    return path


def checkpoint_deltas(
    architecture: str, pipe: Any, component: str, factors: Mapping
) -> dict[str, Tensor]:
    """The deltas of a component by the model's own modules, as diffusers brings a checkpoint's
    weights there."""
    deltas = {name: one.delta for (part, name), one in factors.items() if part == component}
    model = model_of(pipe, component)
    if architecture == "sd15" or component.startswith("text_encoder"):
        flat = not hasattr(model, "text_model") and component.startswith("text_encoder")
        return {name.removeprefix("text_model." * flat): d for name, d in deltas.items()}
    # a whole checkpoint: zeros wherever nothing is trained
    sizes = shapes(architecture, pipe, component)
    names = names_of(architecture, component, "original")
    for module, layer in model.named_modules():
        named = names.named(module)
        if (
            named is not None
            and named[1] not in sizes
            and getattr(layer, "weight", None) is not None
        ):
            sizes[named[1]] = tuple(layer.weight.shape)
    weights = {name: deltas.get(name, torch.zeros(size)) for name, size in sizes.items()}
    checkpoint = {f"{name}.weight": weight for name, weight in weights.items()}
    checkpoint |= {f"{name}.bias": torch.zeros(len(w)) for name, w in weights.items()}
    if component == "unet":
        checkpoint = {f"model.diffusion_model.{key}": w for key, w in checkpoint.items()}
        converted = convert_ldm_unet_checkpoint(checkpoint, dict(pipe.unet.config))
    else:
        converted = convert_sd3_transformer_checkpoint_to_diffusers(
            checkpoint | {"pos_embed": torch.zeros(1)}
        )
    return {
        key.removesuffix(".weight"): weight
        for key, weight in converted.items()
        if key.endswith(".weight") and weight.any()
    }


def expected(architecture: str, factors: Mapping) -> dict[str, Tensor]:
    """Outputs of the pipeline with the deltas added to its weights in float64."""
    pipe = pipelines.PIPELINES[architecture]()
    for component in PREFIXES[architecture]:
        model = model_of(pipe, component).double()
        modules = dict(model.named_modules())
        for name, delta in checkpoint_deltas(architecture, pipe, component, factors).items():
            modules[name].weight.data += delta
    return pipelines.outputs(pipe)


@cache
def loaded(architecture: str, path: Path) -> dict[str, Tensor]:
    """Outputs of the pipeline that has loaded a file."""
    pipe = pipelines.PIPELINES[architecture]()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipelines.outputs(pipe)


def assert_same(results: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Up to the rounding of factors in which scales are folded."""
    assert results.keys() == others.keys()
    for name, result in results.items():
        torch.testing.assert_close(result, others[name], rtol=1e-5, atol=1e-5, msg=name)


@cache
def untouched(architecture: str) -> Any:
    """The pipeline without an adapter, which is only looked at."""
    return pipelines.PIPELINES[architecture]()


@cache
def plain_outputs(architecture: str) -> dict[str, Tensor]:
    return pipelines.outputs(untouched(architecture))


def changed(architecture: str, results: Mapping[str, Tensor]) -> Iterable[str]:
    """The components whose outputs are not the base's."""
    plain = plain_outputs(architecture)
    return {name for name, result in results.items() if (result - plain[name]).abs().max() > 0.01}


SOME = [
    pytest.param("sd15", 9, id="sd15"),
    pytest.param("sdxl", 29, id="sdxl"),
    pytest.param("sd3", 3, id="sd3"),
]
ALL = [
    *SOME,
    pytest.param("sd15", 1, id="sd15-all", marks=pytest.mark.slow),
    pytest.param("sdxl", 1, id="sdxl-all", marks=pytest.mark.slow),
    pytest.param("sd3", 1, id="sd3-all"),
]


@pytest.mark.parametrize("architecture, part", ALL)
def test_a_file_of_kohya_is_loaded_as_diffusers(architecture, part, tmp_path):
    """Mixed ranks and alphas, text encoders, fused modules, halves that are swapped."""
    factors = trained(architecture, part)
    source = kohya_file(tmp_path / "kohya.safetensors", architecture, factors)
    target = tmp_path / "diffusers.safetensors"
    adapterkit.convert(source, to="diffusers", out=target)
    results = loaded(architecture, target)
    assert_same(results, expected(architecture, factors))
    assert changed(architecture, results) == PREFIXES[architecture].keys()


@pytest.mark.parametrize("architecture, part", SOME[:2])
def test_check_takes_a_unet_and_its_text_encoders_that_diffusers_loads(
    architecture, part, tmp_path
):
    """Each part of the adapter is compared with the pipeline's own model, and with no other."""
    factors = trained(architecture, part, mixed=False)
    lora = kohya_file(tmp_path / "kohya.safetensors", architecture, factors)
    untouched(architecture).save_pretrained(tmp_path / "pipe")
    assert changed(architecture, loaded(architecture, lora)) == PREFIXES[architecture].keys()
    document = adapterkit.check(lora, program="diffusers", base=tmp_path / "pipe")
    assert document["takes"] and document["modules"] == len(factors), document["findings"]
    component, name = next(key for key in factors if key[0] == "text_encoder")
    wrong = replace(factors[component, name], a=torch.ones(2, 5))
    kohya_file(lora, architecture, {**factors, (component, name): wrong})
    document = adapterkit.check(lora, program="diffusers", base=tmp_path / "pipe")
    assert not document["takes"] and "self_attn" in str(document["findings"]), document
    unet = adapterkit.check(lora, program="diffusers", base=tmp_path / "pipe" / "unet")
    assert not unet["takes"]


@pytest.mark.parametrize("architecture, part", [one for one in ALL if "sd3" not in str(one.id)])
def test_a_file_of_kohya_that_came_from_diffusers_is_loaded(architecture, part, tmp_path):
    """By diffusers' own converter, which keeps one alpha for all."""
    factors = trained(architecture, part, mixed=False)
    source = kohya_file(tmp_path / "kohya.safetensors", architecture, factors)
    middle, target = tmp_path / "diffusers.safetensors", tmp_path / "again.safetensors"
    adapterkit.convert(source, to="diffusers", out=middle)
    adapterkit.convert(middle, to="kohya", out=target, architecture=architecture)
    assert_same(loaded(architecture, target), expected(architecture, factors))


@pytest.mark.parametrize("name", ["respelled/sd15", "sd15_metadata", "sdxl_dora", "sd3_metadata"])
def test_a_golden_file_is_loaded_after_a_round_trip(name, tmp_path):
    """diffusers -> kohya -> diffusers, as diffusers loads its own file."""
    architecture = name.split("/")[-1].split("_")[0]
    source = GOLDEN / "diffusers" / f"{name}.safetensors"
    middle, target = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    adapterkit.convert(source, to="kohya", out=middle)
    adapterkit.convert(middle, to="diffusers", out=target)
    results = loaded(architecture, target)
    assert_same(results, loaded(architecture, source))
    assert changed(architecture, results)


def test_names_of_diffusers_under_kohyas_keys_become_kohyas(tmp_path):
    source = GOLDEN / "kohya" / "sdxl_diffusers.safetensors"
    middle, target = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    adapterkit.convert(source, to="diffusers", out=middle)
    adapterkit.convert(middle, to="kohya", out=target)
    assert {key.split(".")[0] for key in load_file(target)} == {
        "lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q"
    }
    assert_same(loaded("sdxl", target), loaded("sdxl", source))


def test_dora_of_some_modules_is_refused(tmp_path):
    """PEFT would take it for all of the model, with the base's norms as the others' magnitudes."""
    factors = trained("sd15", 29)
    path = kohya_file(tmp_path / "kohya.safetensors", "sd15", factors)
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("lora_unet"))
    name = key.split(".")[0]
    up = tensors[f"{name}.lora_up.weight"]
    tensors[f"{name}.dora_scale"] = torch.ones(len(up), *(1,) * (up.dim() - 1))
    save_file(tensors, path)
    target = tmp_path / "diffusers.safetensors"
    with pytest.raises(Refused, match="magnitude of lora, in 1 modules"):
        adapterkit.convert(path, to="diffusers", out=target)
    assert not target.exists()


def loaded_bare(path: Path) -> dict[str, Tensor]:
    """Names without a component, as the model itself loads them."""
    pipe = pipelines.sd15()
    pipe.unet.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=None)
    return pipelines.outputs(pipe)


@pytest.mark.parametrize("name", ["bare", "prefixed", "sd15_training"])
def test_an_older_file_is_loaded_as_a_new_one(name, tmp_path):
    """Of files that mix old and new keys, diffusers drops the old without a word; the same adapter
    is there in new keys."""
    source, target = GOLDEN / "diffusers-old" / f"{name}.safetensors", tmp_path / "new.safetensors"
    adapterkit.convert(source, to="diffusers", out=target)
    results = loaded("sd15", target)
    old = {
        "bare": lambda: loaded_bare(source),
        "prefixed": lambda: loaded("sd15", source),
        "sd15_training": lambda: loaded("sd15", RESPELLED / "sd15.safetensors"),
    }
    assert_same(results, old[name]())
    assert "unet" in changed("sd15", results)


def test_one_component_is_loaded_by_peft(tmp_path):
    factors = trained("sdxl", 29)
    source = kohya_file(tmp_path / "kohya.safetensors", "sdxl", factors)
    adapterkit.convert(source, to="peft", out=tmp_path / "peft", component="unet")
    pipe = pipelines.sdxl()
    pipe.unet = PeftModel.from_pretrained(pipe.unet, str(tmp_path / "peft")).base_model.model
    assert_same(
        {"unet": pipelines.outputs(pipe)["unet"]}, {"unet": expected("sdxl", factors)["unet"]}
    )
