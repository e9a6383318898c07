"""Writes the golden files of musubi-tuner by its own networks and converters, on tiny models.

Made with musubi-tuner 30c658c (2026-06-24), torch 2.13.0, safetensors 0.8.0:

    python tests/formats/golden/make_musubi.py    # musubi_tuner importable

musubi-tuner wants a GPU when it is imported; its networks do not.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch

torch.cuda.current_device = lambda: 0  # default arguments of modules that are not used here

# E402: what follows is imported after that line, without which it asks for a GPU

from diffusers import HunyuanVideoTransformer3DModel  # noqa: E402
from musubi_tuner import convert_lora  # noqa: E402
from musubi_tuner.hunyuan_model.models import HYVideoDiffusionTransformer  # noqa: E402
from musubi_tuner.networks import (  # noqa: E402
    convert_z_image_lora_to_comfy,
    loha,
    lokr,
    lora,
    lora_framepack,
    lora_qwen_image,
    lora_wan,
    lora_zimage,
)
from musubi_tuner.qwen_image.qwen_image_model import QwenImageTransformer2DModel  # noqa: E402
from musubi_tuner.wan.modules.model import WanModel  # noqa: E402
from musubi_tuner.zimage.zimage_model import ZImageTransformer2DModel  # noqa: E402

RANK, ALPHA = 2, 1.0


def wan(model_type: str) -> WanModel:
    return WanModel(
        model_type=model_type,
        in_dim=4,
        out_dim=4,
        dim=16,
        ffn_dim=24,
        num_heads=2,
        num_layers=1,
        text_dim=8,
        freq_dim=8,
    )


def qwen_image() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )


def z_image() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[8, 8, 8],
    )


def hunyuan_video() -> HYVideoDiffusionTransformer:
    return HYVideoDiffusionTransformer(
        text_states_dim=8,
        text_states_dim_2=8,
        hidden_size=16,
        heads_num=2,
        mm_double_blocks_depth=1,
        mm_single_blocks_depth=1,
        rope_dim_list=[2, 2, 4],
        guidance_embed=True,
        attn_mode="torch",
    )


def framepack() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(  # the classes by whose names FramePack's network looks
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size_t=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )


def write(path: Path, network_module, model: torch.nn.Module, version: str, **arguments) -> None:
    """The file of a network on the model, all factors drawn."""
    network = network_module.create_arch_network(1.0, RANK, ALPHA, None, None, model, **arguments)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in network.parameters():
            one.copy_(torch.randn(one.shape, generator=generator))
    metadata = {
        "ss_base_model_version": version,
        "ss_network_module": network_module.__name__.removeprefix("musubi_tuner."),
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(ALPHA),
    }
    network.save_weights(str(path), torch.float32, metadata)


def main(folder: Path) -> None:
    kohya, comfyui, lycoris = (folder / name for name in ("kohya", "comfyui", "lycoris"))
    for place in (kohya, comfyui, lycoris):
        place.mkdir(parents=True, exist_ok=True)
    write(kohya / "musubi_wan_t2v.safetensors", lora_wan, wan("t2v"), "wan")
    write(kohya / "musubi_wan_i2v.safetensors", lora_wan, wan("i2v"), "wan")
    write(kohya / "musubi_qwen_image.safetensors", lora_qwen_image, qwen_image(), "qwen_image")
    write(kohya / "musubi_z_image.safetensors", lora_zimage, z_image(), "z_image")
    write(kohya / "musubi_hunyuan_video.safetensors", lora, hunyuan_video(), "hunyuan_video")
    write(kohya / "musubi_framepack.safetensors", lora_framepack, framepack(), "framepack")
    write(lycoris / "musubi_wan_loha.safetensors", loha, wan("t2v"), "wan")
    write(lycoris / "musubi_wan_lokr.safetensors", lokr, wan("t2v"), "wan")
    fused = Namespace(
        src_path=kohya / "musubi_z_image.safetensors",
        dst_path=kohya / "musubi_z_image_fused.safetensors",
        reverse=False,
        lokr_rank=None,
    )
    convert_z_image_lora_to_comfy.main(fused)
    for name in ("wan_i2v", "z_image", "hunyuan_video", "qwen_image"):
        source = str(kohya / f"musubi_{name}.safetensors")
        convert_lora.convert(source, str(comfyui / f"musubi_{name}.safetensors"), "other", None)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
