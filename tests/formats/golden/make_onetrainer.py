"""Writes the golden files of OneTrainer by its own savers, of adapters drawn here.

Made with OneTrainer 23df3832 (2026-08-19), torch 2.13.0, safetensors 0.8.0:

    python tests/formats/golden/make_onetrainer.py    # OneTrainer's `modules` importable
"""

import sys
from pathlib import Path

import torch
from modules.model.HunyuanVideoModel import HunyuanVideoModel
from modules.model.ZImageModel import ZImageModel
from modules.modelSaver.hunyuanVideo.HunyuanVideoLoRASaver import HunyuanVideoLoRASaver
from modules.modelSaver.zImage.ZImageLoRASaver import ZImageLoRASaver
from modules.util import git_util
from modules.util.enum.ModelType import ModelType
from modules.util.modelSpec.ModelSpec import ModelSpec

git_util.get_git_branch = lambda: "master"
git_util.get_git_revision = lambda: "23df3832"

RANK, ALPHA, WIDTH = 2, 1.0, 8
# modules as OneTrainer names them while it trains, with their rows in multiples of the width
HUNYUAN = {
    "transformer_blocks.0.attn.to_out.0": 1,
    "transformer_blocks.0.attn.to_add_out": 1,
    "transformer_blocks.0.ff.net.0.proj": 4,
    "transformer_blocks.0.norm1.linear": 6,
    "single_transformer_blocks.0.norm.linear": 3,
    "norm_out.linear": 2,
}
HUNYUAN_FUSED = {
    "transformer_blocks.0.attn.qkv": 3,
    "transformer_blocks.0.attn.added_qkv": 3,
    "context_embedder.token_refiner.refiner_blocks.0.attn.qkv": 3,
    "single_transformer_blocks.0.qkv_mlp": 7,
}
HUNYUAN_SPLIT = {
    "transformer_blocks.0.attn.to_q": 1,
    "transformer_blocks.0.attn.add_k_proj": 1,
    "single_transformer_blocks.0.proj_mlp": 4,
}
CLIP = {"text_model.encoder.layers.0.self_attn.q_proj": 1}
Z_IMAGE = {
    "layers.0.attention.to_q": 1,
    "layers.0.attention.to_out.0": 1,
    "layers.0.feed_forward.w1": 2,
    "noise_refiner.0.attention.to_k": 1,
    "all_final_layer.2-1.linear": 1,
}


def adapter(**components: dict[str, int]) -> dict[str, torch.Tensor]:
    """OneTrainer's state of a LoRA: factors and alpha of each module of each component."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for component, modules in components.items():
        for module, rows in modules.items():
            name = f"{component}.{module}"
            state[f"{name}.alpha"] = torch.tensor(ALPHA)
            state[f"{name}.lora_down.weight"] = torch.randn(RANK, WIDTH, generator=generator)
            state[f"{name}.lora_up.weight"] = torch.randn(rows * WIDTH, RANK, generator=generator)
    return state


def hunyuan_video(**components: dict[str, int]) -> HunyuanVideoModel:
    model = HunyuanVideoModel(ModelType.HUNYUAN_VIDEO)
    model.text_encoder_2 = torch.nn.Module()  # that it is there is all that is asked
    return with_state(model, "hunyuan-video/lora", adapter(**components))


def with_state(model, architecture: str, state: dict[str, torch.Tensor]):
    model.lora_state_dict = state
    model.model_spec = ModelSpec(architecture=architecture)
    model.train_config = None
    return model


def main(folder: Path) -> None:
    def path(format_name: str, name: str) -> str:
        place = folder / format_name
        place.mkdir(parents=True, exist_ok=True)
        return str(place / f"onetrainer_{name}.safetensors")

    saver = HunyuanVideoLoRASaver()
    fused = hunyuan_video(transformer=HUNYUAN | HUNYUAN_FUSED)
    with_text = hunyuan_video(transformer=HUNYUAN | HUNYUAN_FUSED, text_encoder_2=CLIP)
    split = hunyuan_video(transformer=HUNYUAN | HUNYUAN_SPLIT, text_encoder_2=CLIP)
    saver._save_original(fused, path("onetrainer-original", "hunyuan_video"), torch.float32)
    saver._save_kohya(with_text, path("kohya", "hunyuan_video"), torch.float32)
    saver._save_comfy(with_text, path("comfyui", "hunyuan_video"), torch.float32)
    saver._save_diffusers(split, path("diffusers", "hunyuan_video"), torch.float32)
    saver._save_legacy(split, path("onetrainer-legacy", "hunyuan_video"), torch.float32)

    saver = ZImageLoRASaver()
    model = ZImageModel(ModelType.Z_IMAGE)
    with_state(model, "Z-Image/lora", adapter(transformer=Z_IMAGE))
    saver._save_original(model, path("onetrainer-original", "z_image"), torch.float32)
    saver._save_kohya(model, path("kohya", "z_image"), torch.float32)
    saver._save_comfy(model, path("comfyui", "z_image"), torch.float32)
    saver._save_legacy(model, path("onetrainer", "z_image"), torch.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
