"""Every family of image and video models has each proof, or the reason why not: a merged pipeline
is what diffusers makes of base and LoRA, a merged file is read by diffusers' converters, and all
dialects give one file."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_pipeline, single_file_utils
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit
from adapterkit import Refused
from adapterkit.adapters.formats.library import architectures, described, single_file_format
from tests.formats import test_flux, test_video
from tests.formats.video_models import MODELS, named_parameters
from tests.support.one_file import (
    FAMILIES,
    factors_of,
    in_the_file,
    models_of,
    write_adapter,
    write_family,
    write_pipeline,
)
from tests.support.pipeline_files import quiet
from tests.support.usual import usual

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
Tensors = dict[str, Tensor]
Read = Callable[[Tensors], Tensors]
U_NETS = ("sd15", "sd2", "sdxl", "sdxl_refiner")
# whose files have the names of diffusers' model, but for their prefix
PLAIN = ("qwen_image", "kandinsky5", "hidream", "omnigen2")
# of the columns: what has no such proof, and why
REASONS = {
    "file": {
        "ideogram4": "diffusers reads no files of it: keys are those of its reader of LoRAs",
        "ltx2": "its converter is for whole files: names are those of its reader of LoRAs",
        "z_image_original": "ComfyUI's naming is the only one that files have",
        "hunyuan_video_comfyui": "diffusers reads the publisher's naming, which hunyuan_video has",
        "skyreels": "as wan, and two layers whose names diffusers' script has",
        "anima": "cosmos, and a text conditioner that keeps its names",
        "hidream_o1": "diffusers has no such model; files have its names without model.",
        "cogvideox": "diffusers reads no files of it: names are ComfyUI's",
        "cogvideox15": "diffusers reads no files of it: names are ComfyUI's",
    },
    "dialects": {},
}


def is_of_images(name: str) -> bool:
    return bool({"unet", "transformer"} & {*architectures()[name].components})


def included() -> set[str]:
    """Architectures that are parts of others."""
    parts = (one for name in architectures() for one in architectures()[name].components.values())
    return {name for part in parts for name in part.include}


def test_every_family_is_here():
    """All architectures, all that one file may be of; Wan 2.2 is two of Wan's."""
    here = {family.architecture for family in FAMILIES.values()}
    of_images = {*filter(is_of_images, architectures())} - (included() - {*one_file_names()})
    assert of_images - {"wan22"} == here == {*one_file_names()}


def one_file_names() -> tuple[str, ...]:
    return single_file_format().names.architectures


# what each loader of LoRAs in diffusers is for: families with names of other tools, and models of
# which there are files in diffusers' and PEFT's layouts alone, which need no table
LOADERS = {
    "StableDiffusion": ["sd15", "sd2"], "StableDiffusionXL": ["sdxl", "sdxl_refiner"],
    "SD3": ["sd3"], "AuraFlow": ["auraflow"], "Flux": ["flux", "chroma"], "LTXVideo": ["ltx"],
    "LTX2": ["ltx2"], "HunyuanVideo": ["hunyuan_video"], "Lumina2": ["lumina2"],
    "Kandinsky": ["kandinsky5"], "Wan": ["wan", "wan22"], "SkyReelsV2": ["wan"],
    "HiDreamImage": ["hidream"], "QwenImage": ["qwen_image", "qwen_image21"], "Krea2": ["krea2"],
    "ZImage": ["z_image"], "Anima": ["anima"], "Flux2": ["flux2"], "Flux3": ["flux3"],
    "Ideogram4": ["ideogram4"], "ErnieImage": ["ernie_image"], "Cosmos": ["cosmos"],
    "AceStep": ["ace_step"], "MiniMaxH3": ["minimax_h3"], "Mochi1": ["mochi"], "Sana": ["sana"],
    "CogVideoX": ["cogvideox"], "CogView4": [], "Helios": [], "BriaFibo2": [], "Amused": [],
    "RFD4Proteina": [], "": [],
}  # fmt: skip


def test_every_loader_of_diffusers_is_known():
    ending = "LoraLoaderMixin"
    loaders = {name.removesuffix(ending) for name in vars(lora_pipeline) if name.endswith(ending)}
    assert loaders == {*LOADERS}
    assert {name for names in LOADERS.values() for name in names} <= {*architectures()}


# ---- pipelines ---------------------------------------------------------------------------------


def fused(model: nn.Module, adapters: dict[Path, float], part: str) -> Tensors:
    """The weights of a model with adapters as diffusers loads, weighs and fuses them."""
    model, names = copy.deepcopy(model), [f"a{number}" for number in range(len(adapters))]
    with quiet():
        for name, path in zip(names, adapters, strict=True):
            model.load_lora_adapter(load_file(path), prefix=part, adapter_name=name)
        model.set_adapters(names, [*adapters.values()])
        model.fuse_lora(adapter_names=names)
        model.unload_lora()
    return dict(model.state_dict())


def check_pipeline(model: nn.Module, part: str, factors: list[dict], tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base", part, model)
    adapters = {
        write_adapter(own, tmp_path / f"{number}.safetensors"): [0.7, -0.4][number]
        for number, own in enumerate(factors)
    }
    adapterkit.merge(base, adapters, out=tmp_path / "out", verify=True)
    if "HunyuanVideo15" in type(model).__name__:  # smaller than diffusers' own, by a hard 2048
        merged = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
    else:
        with quiet():
            merged = type(model).from_pretrained(tmp_path / "out" / part).state_dict()
    expected, before = fused(model, adapters, part), model.state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-5, msg=key)
    assert any(not torch.equal(merged[key], value) for key, value in before.items())


def usual_layers(factors: dict, every: int) -> dict:
    """Of layers that PEFT merges: not of convolutions in groups, and of volumes of one point, which
    it takes for images."""
    fits = lambda name, a: "conv_depth" not in name and tuple(a.shape[2:]) != (1, 1, 1)
    return dict([(name, pair) for name, pair in factors.items() if fits(name, pair[0])][::every])


@pytest.mark.parametrize("family", usual(FAMILIES, ("sdxl_refiner", "hunyuan_video15", "sana")))
def test_a_merged_pipeline_has_the_weights_that_diffusers_fuses(family: str, tmp_path: Path):
    part, model = next(iter(models_of(family).items()))
    own = {name: pair for name, pair in factors_of(family).items() if name.startswith(f"{part}.")}
    others = {name: pair for name, pair in factors_of(family, rank=3).items() if name in own}
    both = [usual_layers(own, 1), usual_layers(others, 3)]
    check_pipeline(model, part, both, tmp_path)


def cogview4() -> nn.Module:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
    )


def test_a_model_that_needs_no_table(tmp_path: Path):
    """Its adapters are of diffusers alone: their names are the model's."""
    torch.manual_seed(0)
    model, factors = cogview4().float().eval(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            a = torch.randn(2, layer.in_features) / 4
            factors[f"transformer.{name}"] = a, torch.randn(layer.out_features, 2) / 4
    check_pipeline(model, "transformer", [factors], tmp_path)


# ---- files -------------------------------------------------------------------------------------


def readers() -> dict[str, Read]:
    """diffusers' converters of files, by family, for models of these sizes."""
    found: dict[str, Read] = {}
    for name, (_, convert) in test_video.CONVERTERS.items():
        found[name.replace(" ", "_")] = convert
    for name, convert in test_flux.CONVERTERS.items():
        found[name] = test_video.renamed(test_flux.small(convert), {SCALES: r"\1.scale"})
    found["sd3"] = test_video.with_bare(
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers, "pos_embed"
    )
    # in ComfyUI's naming of the file
    for name in ("hunyuan_image", "hunyuan_video15"):
        found.pop(name)
    return found | dict.fromkeys(PLAIN, dict)


SCALES = r"((?:query|key)_norm|norms\.\d)\.weight$"
COMFYUI = {
    "hunyuan_image": "files have ComfyUI's naming, which is not diffusers' script's",
    "hunyuan_video15": "files have ComfyUI's naming, which is not diffusers' script's",
}


def test_every_family_has_its_files_read_or_a_reason():
    proven = {*U_NETS, *readers()} | {*REASONS["file"]} | {*COMFYUI}
    assert {*FAMILIES} <= proven


@pytest.mark.parametrize(
    "family",
    usual(
        [name for name in FAMILIES if name in {*U_NETS, *readers()}],
        ("sdxl_refiner", "sd3", "flux", "qwen_image21"),
    ),
)
def test_a_merged_file_is_read_by_diffusers(family: str, tmp_path: Path):
    part, model = next(iter(models_of(family).items()))
    own = {name: pair for name, pair in factors_of(family).items() if name.startswith(f"{part}.")}
    base = write_family(family, tmp_path / "base.safetensors")
    adapter = write_adapter(own, tmp_path / "lora.safetensors")
    adapterkit.merge(base, {adapter: 0.5}, out=tmp_path / "out.safetensors")
    expected = named_parameters(model)
    for name, (a, b) in own.items():
        key = f"{name.partition('.')[2]}.weight"
        product = b.double().flatten(1) @ a.double().flatten(1)
        whole = expected[key].double() + 0.5 * product.view(expected[key].shape)
        expected[key] = whole.float()
    if family in U_NETS:
        model.save_config(tmp_path / "config")
        with quiet():
            read = UNet2DConditionModel.from_single_file(
                str(tmp_path / "out.safetensors"), config=str(tmp_path / "config")
            ).state_dict()
    else:
        prefix = FAMILIES[family].parts[part][2]
        names = in_the_file(family, {part: named_parameters(model)})
        merged = load_file(tmp_path / "out.safetensors")
        read = readers()[family]({key.removeprefix(prefix): merged[key] for key in names})
    assert expected.keys() <= read.keys()
    for key, value in expected.items():
        torch.testing.assert_close(read[key].float(), value, rtol=1e-5, atol=1e-5, msg=key)


# ---- dialects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", usual(FAMILIES, ("ace_step", "sd15")))
def test_all_dialects_give_one_file(family: str, tmp_path: Path):
    """Those that can hold the adapter: at least diffusers', PEFT's and one of another tool."""
    part = next(iter(models_of(family)))
    base = write_family(family, tmp_path / "base.safetensors")
    linear = {
        name: pair
        for name, pair in factors_of(family).items()
        if name.startswith(f"{part}.") and pair[0].dim() == 2
    }
    lora, files = write_adapter(linear, tmp_path / "lora.safetensors"), {}
    architecture = FAMILIES[family].architecture
    for name, form in described().items():
        if not form.writes:
            continue
        adapter = tmp_path / f"{name}{'.safetensors' * (form.layout == 'keys')}"
        try:
            adapterkit.convert(lora, to=name, out=adapter, architecture=architecture)
        except Refused:
            continue
        out = tmp_path / f"{name}-merged.safetensors"
        adapterkit.merge(base, [adapter], out=out)
        files[name] = load_file(out)
    first, *others = files.values()
    assert {"diffusers", "peft"} < {*files}, {*files}
    for tensors in others:
        assert all(torch.equal(value, first[key]) for key, value in tensors.items())


def test_families_of_the_tests_are_those_of_the_models():
    assert {name.replace(" ", "_") for name in MODELS} <= {*FAMILIES}
