"""Pipelines of a few tensors, written without diffusers, and adapters for them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 8
QUERY, OUTPUT = "blocks.0.attn.to_q", "blocks.0.attn.to_out.0"
ENCODER = "text_model.encoder.layers.0.self_attn.q_proj"
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
MODULES = {
    "unet": (QUERY, OUTPUT),
    "text_encoder": (ENCODER,),
    "text_encoder_2": (ENCODER,),
    "vae": ("encoder.conv_in",),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(part: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    modules = MODULES.get(part, MODULES["unet"])
    return {
        f"{module}.{leaf}": random(*shape, seed=len(part) + number).to(dtype)
        for number, module in enumerate(modules)
        for leaf, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }


def file_of(part: str, variant: str = "") -> str:
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    return f"{stem}{variant}.safetensors"


def write_pipeline(folder: Path, *more: str, variants: tuple[str, ...] = ("",)) -> Path:
    """A pipeline with the usual parts and these; its weights in some variants."""
    index = {"_class_name": "StableDiffusionPipeline", "image_encoder": [None, None]}
    for part in (*PARTS, *more):
        index[part] = list(PARTS.get(part, PARTS["unet"]))
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": index[part][1]}))
        for variant in variants:
            dtype = torch.float16 if variant == ".fp16" else torch.float32
            save_file(
                weights(part, dtype), folder / part / file_of(part, variant), {"format": "pt"}
            )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{ }\n")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def factors(*modules: str, prefix: str = "", seed: int = 5) -> dict[str, Tensor]:
    tensors = {}
    for number, module in enumerate(modules):
        for place, letter in enumerate("AB"):
            shape = (2, WIDTH) if letter == "A" else (WIDTH, 2)
            key = f"{prefix}{module}.lora_{letter}.weight"
            tensors[key] = random(*shape, seed=seed + 2 * number + place)
    return tensors


def write_peft(folder: Path, *modules: str, seed: int = 5) -> Path:
    """An adapter of one model, without the model's name."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = factors(*modules, prefix="base_model.model.", seed=seed)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def write_lora(file: Path, *parts: str, seed: int = 5) -> Path:
    """An adapter of these parts in one file of diffusers."""
    tensors = {}
    for part in parts:
        modules = MODULES.get(part, MODULES["unet"])
        tensors |= factors(*modules, prefix=f"{part}.", seed=seed)
    save_file(tensors, file, {"format": "pt"})
    return file


def delta(module: str, *modules: str, seed: int = 5) -> Tensor:
    """b @ a of one of the modules of an adapter."""
    tensors = factors(*modules, seed=seed)
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
