"""Tiny transformers of diffusers, one of each family, with drawn weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

HEADS, WIDTH = 2, 16  # as the models of the golden files


def wan(image: bool = False, **settings) -> nn.Module:
    from diffusers import WanTransformer3DModel

    extra = {"image_dim": 8, "added_kv_proj_dim": WIDTH} if image else {}
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=1,
        rope_max_seq_len=8,
        **extra | settings,
    )


def wan_vace() -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=1,
        rope_max_seq_len=8,
        vace_layers=[0],
        vace_in_channels=4,
    )


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )


def z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[8, 8, 8],
    )


def hunyuan_video(width: int = WIDTH) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=width // HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size_t=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        rope_axes_dim=(2, 2, 4),
    )


def ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )


def ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
    )


def hidream() -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=HEADS,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(8, 8, 8),
        cap_feat_dim=8,
    )


# each model, and the architecture whose rules name its modules
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "wan t2v": ("wan", wan),
    "wan i2v": ("wan", lambda: wan(image=True)),
    "wan vace": ("wan", wan_vace),
    "qwen_image": ("qwen_image", qwen_image),
    "z_image": ("z_image", z_image),
    "hunyuan_video": ("hunyuan_video", hunyuan_video),
    "ltx": ("ltx", ltx),
    "ltx2": ("ltx2", ltx2),
    "hidream": ("hidream", hidream),
    "lumina2": ("lumina2", lumina2),
}


def drawn(model: nn.Module) -> nn.Module:
    """The model with every parameter drawn, norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of modules that have weights; bare parameters are left out."""
    modules = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    return {
        key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] in modules
    }
