"""Tiny models of diffusers' pipelines: the block types and depths of the real ones, sizes of a
few units."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def unet_sd15() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 16, 16),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=12,
    )


def unet_sdxl(deepest: int = 10) -> UNet2DConditionModel:
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 16),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=(plain, cross, cross),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, deepest),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 8,
    )


def unet_sdxl_refiner() -> UNet2DConditionModel:
    """Two levels with attention between two without."""
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 16, 16),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=(plain, cross, cross, plain),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 8,
    )


def transformer_sd3() -> SD3Transformer2DModel:
    """Its first block has a second attention, as in SD3.5 medium."""
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        in_channels=4,
        out_channels=4,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def clip(kind: type = CLIPTextModel, size: int = 8) -> Any:
    return kind(
        CLIPTextConfig(
            hidden_size=size,
            intermediate_size=2 * size,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def t5() -> T5EncoderModel:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1}
    return T5EncoderModel(T5Config(**sizes, num_heads=2, feed_forward_proj="gated-gelu"))


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)


def sd15() -> StableDiffusionPipeline:
    """The seed decides the weights; the tokenizer and the image encoder play no part."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(size=12),
        tokenizer=None,
        unet=unet_sd15(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(deepest: int = 10) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet_sdxl(deepest),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=transformer_sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=None,
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=None,
        text_encoder_3=t5(),
        tokenizer_3=None,
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=None,
        text_encoder_2=t5(),
        tokenizer_2=None,
    )


def transformer_wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )


def wan22() -> WanPipeline:
    """Two transformers: of high noise, and of low."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1}
    return WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes, num_heads=2)),
        vae=AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1], temperal_downsample=[False]),
        scheduler=UniPCMultistepScheduler(),
        transformer=transformer_wan(),
        transformer_2=transformer_wan(),
        boundary_ratio=0.875,
    )


PIPELINES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}
# ten layers in the deepest blocks take four times as long as two; tests of names have all ten
SDXL = {"sdxl": lambda: sdxl(deepest=2), "sdxl_of_ten": sdxl}
ALL = PIPELINES | SDXL | {"flux": flux, "wan22": wan22}


def outputs(pipe: Any) -> dict[str, torch.Tensor]:
    """What each model of a pipeline gives for fixed inputs, in float64."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    results = {}
    with torch.no_grad():
        if isinstance(pipe, WanPipeline):
            inputs = random(1, 4, 2, 4, 4), torch.tensor([3]), random(1, 3, 16)
            for name in ("transformer", "transformer_2"):
                results[name] = pipe.components[name].double()(*inputs).sample
        elif isinstance(pipe, FluxPipeline):
            results["transformer"] = pipe.transformer.double()(
                random(1, 4, 4), random(1, 3, 16), random(1, 8), torch.tensor([0.3]).double(),
                torch.zeros(4, 3), torch.zeros(3, 3),
            ).sample  # fmt: skip
        elif "unet" in pipe.components:
            unet = pipe.unet.double()
            width = unet.config.cross_attention_dim
            added = {"text_embeds": random(1, 8), "time_ids": random(1, 6)}
            kept = added if unet.config.addition_embed_type else None
            results["unet"] = unet(
                random(1, 4, 8, 8), 3, random(1, 3, width), added_cond_kwargs=kept
            ).sample
        else:
            results["transformer"] = pipe.transformer.double()(
                random(1, 4, 8, 8), random(1, 3, 16), random(1, 16), torch.tensor([3])
            ).sample
        for name in ("text_encoder", "text_encoder_2"):
            if name in pipe.components:
                encoder = pipe.components[name].double()
                results[name] = encoder(torch.arange(2, 8)[None]).last_hidden_state
    return results
