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


def omnigen2() -> nn.Module:
    """diffusers' model of Lumina 2, of whose layers OmniGen2 is made, and those for references."""
    from diffusers import Lumina2Transformer2DModel
    from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock

    heads = {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 256}
    sizes = {"axes_dim_rope": (14, 14, 14), "axes_lens": (8, 8, 8), "cap_feat_dim": 8}
    layers = {"in_channels": 4, "num_layers": 1, "num_refiner_layers": 1}

    class OmniGen2Transformer2DModel(Lumina2Transformer2DModel):
        def __init__(self, hidden_size: int):
            super().__init__(hidden_size=hidden_size, **heads, **sizes, **layers)
            self.ref_image_patch_embedder = nn.Linear(self.x_embedder.in_features, hidden_size)
            block = Lumina2TransformerBlock(
                hidden_size, **heads, ffn_dim_multiplier=None, norm_eps=1e-5
            )
            self.ref_image_refiner = nn.ModuleList([block])
            self.image_index_embedding = nn.Parameter(torch.randn(5, hidden_size))

    return OmniGen2Transformer2DModel(hidden_size=126)


def hidream_o1() -> nn.Module:
    """transformers' Qwen3-VL and the publisher's layers for pixels, as a model of diffusers."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.loaders import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    class HiDreamO1Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
        @register_to_config
        def __init__(self, text: dict, vision: dict, patch: int):
            super().__init__()
            width = text["hidden_size"]
            self.model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
            self.model.t_embedder1 = nn.Module()
            time = nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width)
            self.model.t_embedder1.mlp = nn.Sequential(*time)
            self.model.x_embedder = nn.Module()
            self.model.x_embedder.proj1 = nn.Linear(patch, width // 4, bias=False)
            self.model.x_embedder.proj2 = nn.Linear(width // 4, width)
            self.model.final_layer2 = nn.Module()
            self.model.final_layer2.linear = nn.Linear(width, patch)

    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": WIDTH // HEADS}
    text = {"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 24}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": HEADS}
    patches = {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return HiDreamO1Transformer2DModel(
        text=text | heads | {"num_hidden_layers": 1},
        vision=vision | patches | {"out_hidden_size": WIDTH},
        patch=12,
    )


def cogvideox(**settings) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=4,
        **settings,
    )


def krea2() -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=24,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=HEADS,
        text_num_key_value_heads=HEADS,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 0),
    )


def ernie_image() -> nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_layers=1,
        ffn_hidden_size=24,
        in_channels=4,
        out_channels=4,
        text_in_dim=8,
        rope_axes_dim=(4, 2, 2),
    )


COSMOS25 = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 6}
COSMOS25 |= {"img_context_dim_in": 6, "img_context_dim_out": 32}


def cosmos(**more) -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        num_layers=1,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        extra_pos_embed_type=None,
        **more,
    )


def anima_conditioner() -> nn.Module:
    from diffusers import AnimaTextConditioner

    return AnimaTextConditioner(
        source_dim=8,
        target_dim=8,
        model_dim=WIDTH,
        num_layers=1,
        num_attention_heads=HEADS,
        target_vocab_size=12,
        min_sequence_length=4,
    )


def auraflow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=8,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )


def hunyuan_image() -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=6,
        rope_axes_dim=(4, 4),
        guidance_embeds=True,
        use_meanflow=True,
    )


def kandinsky5() -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    return Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=6,
        time_dim=8,
        model_dim=WIDTH,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel
    from diffusers.loaders.peft import PeftAdapterMixin

    class PixArt(PixArtTransformer2DModel, PeftAdapterMixin):
        """With the loader that diffusers' newer models have."""

    return PixArt(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=1,
        cross_attention_dim=WIDTH,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=True,
    )


def ideogram4() -> nn.Module:
    from diffusers import Ideogram4Transformer2DModel

    return Ideogram4Transformer2DModel(
        in_channels=4,
        num_layers=1,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        intermediate_size=24,
        adaln_dim=8,
        llm_features_dim=8,
        mrope_section=(2, 1, 1),
    )


def flux3() -> nn.Module:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=8,
        timestep_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        flow_map=True,
    )


def hunyuan_video15() -> nn.Module:
    from unittest import mock

    from diffusers.models.transformers import transformer_hunyuan_video15 as module

    class Narrow(module.HunyuanVideo15ByT5TextProjection):
        """Of 2048 hidden units otherwise."""

        def __init__(self, in_features: int, hidden_size: int, out_features: int):
            super().__init__(in_features, 10, out_features)

    with mock.patch.object(module, "HunyuanVideo15ByT5TextProjection", Narrow):
        return module.HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=8,
            text_embed_2_dim=6,
            image_embed_dim=6,
            rope_axes_dim=(2, 2, 4),
            use_meanflow=True,
        )


def qwen_image21() -> nn.Module:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        context_in_dim=8,
        axes_dims_rope=(4, 2, 2),
    )


def minimax_h3() -> nn.Module:
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=24,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=8,
        time_embed_hidden_dim=8,
        time_embed_dim=8,
        rope_freq_dim=2,
    )


def ace_step() -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=WIDTH // HEADS,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
    )


def mochi() -> nn.Module:
    """With the last block as first: its context ends there."""
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=48,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
    )


def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=1,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=WIDTH // HEADS,
        cross_attention_dim=WIDTH,
        caption_channels=8,
        sample_size=8,
    )


def skyreels() -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=1,
        inject_sample_info=True,
        rope_max_seq_len=8,
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
    "krea2": ("krea2", krea2),
    "ernie_image": ("ernie_image", ernie_image),
    "cosmos": ("cosmos", cosmos),
    "auraflow": ("auraflow", auraflow),
    "hunyuan_image": ("hunyuan_image", hunyuan_image),
    "kandinsky5": ("kandinsky5", kandinsky5),
    "pixart": ("pixart", pixart),
    "ideogram4": ("ideogram4", ideogram4),
    "flux3": ("flux3", flux3),
    "hunyuan_video15": ("hunyuan_video15", hunyuan_video15),
    "qwen_image21": ("qwen_image21", qwen_image21),
    "minimax_h3": ("minimax_h3", minimax_h3),
    "ace_step": ("ace_step", ace_step),
    "mochi": ("mochi", mochi),
    "sana": ("sana", sana),
    "hidream_o1": ("hidream_o1", hidream_o1),
    "omnigen2": ("omnigen2", omnigen2),
    "cogvideox": ("cogvideox", cogvideox),
    "cogvideox15": ("cogvideox", lambda: cogvideox(patch_size_t=2, ofs_embed_dim=8)),
    "skyreels": ("wan", skyreels),
    "cosmos25": ("cosmos", lambda: cosmos(**COSMOS25)),
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
