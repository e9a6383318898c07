"""Tiny models of many architectures, and what each is asked."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support import oracle

TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = {"image_size": 16, "patch_size": 4}
MOE = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}


def _build(cls: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    with oracle.quiet():
        model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(std=0.1)
    return model


def _siglip() -> nn.Module:
    text = TEXT | {"max_position_embeddings": 16}
    return _build(
        "SiglipModel", transformers.SiglipConfig(text_config=text, vision_config=TOWER | IMAGE)
    )


def _mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=80, hidden_size=32, state_size=6, num_hidden_layers=2, use_mambapy=False
    )
    return _build("MambaForCausalLM", config)


def _falcon_mamba() -> nn.Module:
    config = transformers.FalconMambaConfig(
        vocab_size=80, hidden_size=32, state_size=6, num_hidden_layers=2, use_mambapy=False
    )
    return _build("FalconMambaForCausalLM", config)


def _llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**TOWER, **IMAGE)
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=79,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
    )
    return _build("LlavaNextForConditionalGeneration", config)


def _blip2() -> nn.Module:
    config = transformers.Blip2Config(
        vision_config=TOWER | IMAGE,
        qformer_config=TEXT | {"encoder_hidden_size": 32, "max_position_embeddings": 16},
        text_config={"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, **TEXT},
        num_query_tokens=4,
        image_token_index=79,
    )
    return _build("Blip2ForConditionalGeneration", config)


def _qwen3_next() -> nn.Module:
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    return _build(
        "Qwen3NextForCausalLM", transformers.Qwen3NextConfig(**MOE, **heads, **experts, **kinds)
    )


def _sam() -> nn.Module:
    vision = (
        TOWER
        | IMAGE
        | {
            "mlp_dim": 48,
            "output_channels": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
        }
    )
    prompt = {
        "hidden_size": 16,
        "image_size": 16,
        "patch_size": 4,
        "image_embedding_size": 4,
        "mask_input_channels": 4,
    }
    mask = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
        "num_hidden_layers": 1,
    }
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask
    )
    return _build("SamModel", config)


def _mixtral() -> nn.Module:
    return _build("MixtralForCausalLM", transformers.MixtralConfig(**MOE, num_local_experts=4))


def _gpt_oss() -> nn.Module:
    return _build("GptOssForCausalLM", transformers.GptOssConfig(**MOE, num_local_experts=4))


def _qwen3_moe() -> nn.Module:
    return _build(
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24),
    )


def _whisper() -> nn.Module:
    sizes = {
        "vocab_size": 80,
        "d_model": 32,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
    }
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **sizes, **layers, **tokens, encoder_ffn_dim=48, decoder_ffn_dim=48
    )
    return _build("WhisperForConditionalGeneration", config)


def _wav2vec2() -> nn.Module:
    convolutions = {
        "conv_dim": (16, 16),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_conv_pos_embeddings": 8,
    }
    config = transformers.Wav2Vec2Config(**TEXT, **convolutions, num_conv_pos_embedding_groups=4)
    return _build("Wav2Vec2ForCTC", config)


def _gte() -> nn.Module:
    return _build("GteForMaskedLM", transformers.GteConfig(**TEXT))


def _jina() -> nn.Module:
    config = transformers.JinaEmbeddingsV3Config(**TEXT, max_position_embeddings=64)
    return _build("JinaEmbeddingsV3ForMaskedLM", config)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "vit": oracle.vit,
    "clip": oracle.clip,
    "siglip": _siglip,
    "mamba": _mamba,
    # multiplies by a weight itself where another path calls the layer
    "falcon_mamba": _falcon_mamba,
    "bert": lambda: oracle.bert("BertForMaskedLM"),
    "llava": _llava,
    "blip2": _blip2,
    "qwen3_next": _qwen3_next,
    "sam": _sam,
    "gpt2": oracle.gpt2,
    "t5": oracle.t5,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "qwen3_moe": _qwen3_moe,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "gte": _gte,  # with a fused bias in the file
    "jina": _jina,
}


def asked(name: str) -> dict[str, Tensor]:
    """Inputs of a forward."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 3, 16, 16, generator=generator)
    words = torch.arange(1, 11)[None]
    pictured = torch.cat([torch.full((1, 4), 79), words], 1)
    return {
        "vit": {"pixel_values": image},
        "clip": {"pixel_values": image, "input_ids": words},
        "siglip": {"pixel_values": image, "input_ids": words},
        "llava": {
            "pixel_values": torch.stack([image, image], 1),
            "image_sizes": torch.tensor([[16, 16]]),
            "input_ids": words,
        },
        "blip2": {"pixel_values": image, "input_ids": pictured},
        "sam": {"pixel_values": image, "input_points": torch.tensor([[[[3.0, 5.0]]]])},
        "t5": {"input_ids": words, "decoder_input_ids": words},
        "whisper": {
            "input_features": torch.randn(1, 8, 32, generator=generator),
            "decoder_input_ids": words,
        },
        "wav2vec2": {"input_values": torch.randn(1, 400, generator=generator)},
    }.get(name, {"input_ids": words})


def answers(name: str, model: nn.Module) -> list[Tensor]:
    """All floats that a forward gives."""
    inputs = asked(name)
    if name == "llava":  # as many places for the image as the model makes of it
        with torch.no_grad():
            features = model.get_image_features(
                inputs["pixel_values"], image_sizes=inputs["image_sizes"]
            )
        features = getattr(features, "pooler_output", features)
        inputs["input_ids"] = torch.cat(
            [torch.full((1, len(features[0])), 79), inputs["input_ids"]], 1
        )
    with torch.no_grad(), oracle.quiet():
        given = model(**inputs, return_dict=True)
    return [
        value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()
    ]
