"""Tiny image and video models in one file, in the names of their publishers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.adapters.formats.modules.row_permutations import model_order
from tests.formats.test_flux import MODELS as FLUX
from tests.formats.video_models import MODELS as VIDEO
from tests.formats.video_models import ace_step, anima_conditioner, cosmos
from tests.support import pipelines

Tensors = dict[str, Tensor]
DENOISER = "model.diffusion_model."
# leaves that rules do not name, and names that transformers 5 took away
CLIP = "text_model."


@dataclass(frozen=True)
class Family:
    """An architecture, its parts as models, and the naming and prefix of each in the file."""

    architecture: str
    parts: Mapping[str, tuple[Callable[[], nn.Module], str, str]]


def _denoiser(architecture: str, model: Callable[[], nn.Module], naming: str) -> Family:
    part = "unet" if architecture.startswith("sd") and architecture != "sd3" else "transformer"
    return Family(architecture, {part: (model, naming, DENOISER)})


def _clip(projected: bool = False, size: int = 8) -> Callable[[], nn.Module]:
    kind = pipelines.CLIPTextModelWithProjection if projected else pipelines.CLIPTextModel
    return lambda: pipelines.clip(kind, size)


NAMINGS = {  # of files that have others than their publisher's
    "cogvideox": "comfyui",
    "ernie_image": "model",
    "hidream": "model",
    "hunyuan_video15": "comfyui",
    "qwen_image21": "comfyui",
    "hunyuan_image": "comfyui",
    "kandinsky5": "model",
    "omnigen2": "model",
    "qwen_image": "model",
    "z_image": "comfyui",
}
FAMILIES: dict[str, Family] = {
    "sd15": Family(
        "sd15",
        {
            "unet": (pipelines.unet_sd15, "original", DENOISER),
            "text_encoder": (_clip(size=12), "original", "cond_stage_model.transformer."),
        },
    ),
    "sd2": Family(
        "sd2",
        {
            "unet": (pipelines.unet_sd15, "original", DENOISER),
            "text_encoder": (_clip(size=12), "openclip", "cond_stage_model.model."),
        },
    ),
    "sdxl": Family(
        "sdxl",
        {
            "unet": (lambda: pipelines.unet_sdxl(2), "original", DENOISER),
            "text_encoder": (_clip(), "original", "conditioner.embedders.0.transformer."),
            "text_encoder_2": (_clip(True), "openclip", "conditioner.embedders.1.model."),
        },
    ),
    "sdxl_refiner": Family(
        "sdxl_refiner",
        {
            "unet": (pipelines.unet_sdxl_refiner, "original", DENOISER),
            "text_encoder_2": (_clip(True), "openclip", "conditioner.embedders.0.model."),
        },
    ),
    "sd3": Family(
        "sd3",
        {
            "transformer": (pipelines.transformer_sd3, "original", DENOISER),
            "text_encoder": (_clip(True), "original", "text_encoders.clip_l.transformer."),
            "text_encoder_2": (_clip(True), "original", "text_encoders.clip_g.transformer."),
            "text_encoder_3": (pipelines.t5, "original", "text_encoders.t5xxl.transformer."),
        },
    ),
    **{name: _denoiser(name, model, "original") for name, model in FLUX.items()},
    **{
        name.replace(" ", "_"): _denoiser(architecture, model, naming)
        for name, (architecture, model) in VIDEO.items()
        for naming in [NAMINGS.get(architecture, "original")]
        if architecture != "ace_step"
    },
    "ace_step": Family("ace_step", {"transformer": (ace_step, "original", f"{DENOISER}decoder.")}),
    "anima": Family(
        "anima",
        {
            "transformer": (cosmos, "original", "net."),
            "text_conditioner": (anima_conditioner, "original", "net.llm_adapter."),
        },
    ),
    "hunyuan_video_comfyui": _denoiser("hunyuan_video", VIDEO["hunyuan_video"][1], "comfyui"),
}


@cache
def models_of(family: str) -> dict[str, nn.Module]:
    """The parts of a family, with drawn weights in float32."""
    torch.manual_seed(0)
    models = {}
    for part, (make, _, _) in FAMILIES[family].parts.items():
        model = models[part] = make().float().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return models


def state_of(model: nn.Module) -> Tensors:
    """The model's tensors; those of CLIP as files name them."""
    state = dict(model.state_dict())
    is_flat = any(key.startswith("encoder.layers.") for key in state)
    return {CLIP * is_flat + key: value for key, value in state.items()}


def in_the_file(family: str, states: Mapping[str, Tensors]) -> Tensors:
    """The parts' tensors as one file has them: renamed, fused, rows in its order. Tensors that no
    rule names keep their own names."""
    one, tensors = FAMILIES[family], Tensors()
    for part, state in states.items():
        _, naming, prefix = one.parts[part]
        tensors |= _renamed(one.architecture, part, naming, prefix, state)
    return tensors


def _renamed(architecture: str, part: str, naming: str, prefix: str, state: Tensors) -> Tensors:
    names = names_of(architecture, part, naming)
    groups: dict[str, dict[int, Tensor]] = {}
    steps: dict[str, tuple[str, ...]] = {}
    widths: dict[str, int] = {}  # by module: inputs
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        match = next(filter(names.text, names.find_model(module)), None)
        if match is None:
            groups[prefix + key] = {0: value}
            continue
        text = f"{prefix}{names.text(match)}.{leaf}"
        if module == "text_projection" and naming == "openclip":  # a matrix (in, out) of its own
            groups[text.removesuffix(".weight")] = {0: value.T}
            continue
        text = text.replace(".in_proj.", ".in_proj_") if naming == "openclip" else text
        groups.setdefault(text, {})[match.part] = value
        steps[text] = match.rule.steps.get(naming, ())
        if value.dim() > 1:
            widths[text.rpartition(".")[0]] = value.shape[1]
    tensors = {}
    for text, parts in groups.items():
        joined = torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        if text in steps and joined.dim():
            inputs = widths.get(text.rpartition(".")[0], 1)
            order = list(model_order(steps[text], len(joined), None, text, inputs))
            placed = torch.empty_like(joined)
            placed[order] = joined
            joined = placed
        tensors[text] = joined.clone().contiguous()
    return tensors


def write_family(family: str, path: Path, **metadata: str) -> Path:
    """The file of a family."""
    states = {part: state_of(model) for part, model in models_of(family).items()}
    save_file(in_the_file(family, states), path, metadata=metadata or None)
    return path


def write_pipeline(folder: Path, part: str, model: nn.Module) -> Path:
    """A pipeline of one model."""
    model.save_pretrained(folder / part)
    index = {"_class_name": "DiffusionPipeline", part: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def factors_of(family: str, *, rank: int = 2, every: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Drawn factors a and b of every `every`-th layer, by part and module."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for part, model in models_of(family).items():
        layers = [
            (name, layer)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
        ]
        for name, layer in layers[::every]:
            if name.startswith("encoder.layers."):
                name = CLIP + name
            out, *tail = layer.weight.shape
            ones = [1] * len(tail[1:])
            a = torch.randn(rank, *tail, generator=generator) / 4
            b = torch.randn(out, rank, *ones, generator=generator) / 4
            factors[f"{part}.{name}"] = (a, b)
    return factors


def write_adapter(factors: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> Path:
    """A LoRA of diffusers."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, path)
    return path


def expected(
    family: str, factors: Mapping[str, tuple[Tensor, Tensor]], weight: float = 1.0
) -> Tensors:
    """The file's tensors with the products added to the models' weights, in float64."""
    states = {}
    for part, model in models_of(family).items():
        state = states[part] = {key: value.double() for key, value in state_of(model).items()}
        for name, (a, b) in factors.items():
            own, _, module = name.partition(".")
            if own == part:
                product = b.double().flatten(1) @ a.double().flatten(1)
                key = f"{module}.weight"
                state[key] = state[key] + weight * product.view(state[key].shape)
    return in_the_file(family, states)
