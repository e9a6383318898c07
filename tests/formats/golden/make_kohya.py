"""Files of kohya's sd-scripts, saved by its own networks of a few modules each.

    python make_kohya.py SD_SCRIPTS

SD_SCRIPTS is a checkout (commit 48d368fa, 2026-02-16) with torch 2.13, transformers 4.44.0,
diffusers 0.25.0, huggingface_hub 0.24.5, einops, toml, imagesize, opencv-python-headless.
The networks are those that are made for loading (ranks and alphas by module). Models of fixed size
are built without storage and told smaller sizes, so that the files stay small.
"""

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import torch
from library.original_unet import UNet2DConditionModel
from library.sd3_models import MMDiT
from library.sdxl_original_unet import SdxlUNet2DConditionModel
from networks import lora, lora_sd3
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

FOLDER = Path(__file__).parent / "kohya"
SMALLER = 64  # the divisor of all sizes


def shrunk(model: torch.nn.Module) -> torch.nn.Module:
    """Its layers say that they are smaller; networks read little else of them."""
    for module in model.modules():
        for size in ("in_features", "out_features", "in_channels", "out_channels"):
            if isinstance(getattr(module, size, None), int):
                setattr(module, size, max(getattr(module, size) // SMALLER, 2))
        if isinstance(module, torch.nn.Linear):
            size = module.out_features, module.in_features
            module.weight = torch.nn.Parameter(torch.empty(size, device="meta"))
    return model


def clip(kind: type) -> torch.nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8}
    config = CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    return kind(config)


def saved(name: str, module, network_of, ranks: dict[str, tuple[int, float]], dtype, metadata):
    """Write the network of these ranks and alphas with random weights."""
    network = network_of(
        modules_dim={key: rank for key, (rank, _) in ranks.items()},
        modules_alpha={key: alpha for key, (_, alpha) in ranks.items()},
    )
    loras = network.text_encoder_loras + network.unet_loras
    assert sorted(one.lora_name for one in loras) == sorted(ranks), name
    generator = torch.Generator().manual_seed(len(ranks))
    network.apply_to(None, None)
    for key, parameter in network.named_parameters():
        if "lora_" in key.split(".", 1)[1]:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    trained = {
        "ss_network_module": module.__name__,
        "ss_network_dim": str(max(rank for rank, _ in ranks.values())),
        "ss_network_alpha": str(float(max(alpha for _, alpha in ranks.values()))),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
    }
    network.save_weights(str(FOLDER / f"{name}.safetensors"), dtype, trained | metadata)


def sd15() -> None:
    with torch.device("meta"):
        unet = shrunk(UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    block = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0"
    ranks = {
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (2, 1.0),
        "lora_te_text_model_encoder_layers_1_mlp_fc2": (2, 1.0),
        "lora_unet_mid_block_attentions_0_proj_in": (2, 4.0),
        f"{block}_attn1_to_q": (2, 4.0),
        f"{block}_attn2_to_k": (2, 4.0),
        f"{block}_attn2_to_v": (3, 1.5),
        f"{block}_attn2_to_out_0": (2, 4.0),
        f"{block}_ff_net_0_proj": (2, 4.0),
        f"{block}_ff_net_2": (2, 4.0),
    }
    metadata = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    metadata["modelspec.architecture"] = "stable-diffusion-v1/lora"
    encoder = clip(CLIPTextModel)
    saved("sd15", lora, lambda **sizes: lora.LoRANetwork(encoder, unet, **sizes), ranks,
          torch.float32, metadata)  # fmt: skip


def sdxl() -> None:
    with torch.device("meta"):
        unet = shrunk(SdxlUNet2DConditionModel())
    ranks = {
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (2, 1.0),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": (2, 1.0),
        "lora_unet_input_blocks_2_0_in_layers_2": (2, 1.0),
        "lora_unet_input_blocks_3_0_op": (2, 1.0),
        "lora_unet_input_blocks_4_0_skip_connection": (2, 1.0),
        "lora_unet_input_blocks_4_1_proj_in": (2, 1.0),
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k": (2, 1.0),
        "lora_unet_middle_block_1_transformer_blocks_3_ff_net_0_proj": (2, 1.0),
        "lora_unet_middle_block_2_emb_layers_1": (2, 1.0),
        "lora_unet_output_blocks_2_2_conv": (2, 1.0),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn1_to_out_0": (2, 1.0),
        "lora_unet_output_blocks_8_0_out_layers_3": (2, 1.0),
    }
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    metadata["modelspec.architecture"] = "stable-diffusion-xl-v1-base/lora"
    encoders = [clip(CLIPTextModel), clip(CLIPTextModelWithProjection)]
    saved("sdxl", lora, lambda **sizes: lora.LoRANetwork(encoders, unet, is_sdxl=True, **sizes),
          ranks, torch.float16, metadata)  # fmt: skip


def sd3() -> None:
    with torch.device("meta"):
        mmdit = shrunk(
            MMDiT(input_size=None, pos_embed_max_size=8, in_channels=16, adm_in_channels=1024,
                  context_embedder_in_features=1024, context_embedder_out_features=256, depth=4,
                  qk_norm="rms", x_block_self_attn_layers=[0])
        )  # fmt: skip
    encoders = [clip(CLIPTextModelWithProjection), clip(CLIPTextModelWithProjection)]
    t5 = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    encoders.append(T5EncoderModel(t5))
    ranks = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (2, 1.0),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": (2, 1.0),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_o": (2, 1.0),
        "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1": (2, 1.0),
        "lora_unet_context_embedder": (2, 1.0),
        "lora_unet_t_embedder_mlp_2": (2, 1.0),
        "lora_unet_x_embedder_proj": (2, 1.0),
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (3, 1.0),
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": (2, 1.0),
        "lora_unet_joint_blocks_0_x_block_attn2_proj": (2, 1.0),
        "lora_unet_joint_blocks_0_context_block_attn_qkv": (2, 1.0),
        "lora_unet_joint_blocks_0_context_block_attn_proj": (2, 1.0),
        "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1": (2, 1.0),
        "lora_unet_joint_blocks_0_x_block_adaLN_modulation_1": (2, 1.0),
        "lora_unet_joint_blocks_3_context_block_adaLN_modulation_1": (2, 1.0),
        "lora_unet_joint_blocks_3_x_block_mlp_fc1": (2, 1.0),
        "lora_unet_final_layer_adaLN_modulation_1": (2, 1.0),
        "lora_unet_final_layer_linear": (2, 1.0),
    }
    metadata = {"ss_base_model_version": "sd3m"}
    metadata["modelspec.architecture"] = "stable-diffusion-3-medium/lora"

    def network(**sizes):
        return lora_sd3.LoRANetwork(encoders, mmdit, train_t5xxl=True, **sizes)

    saved("sd3", lora_sd3, network, ranks, torch.bfloat16, metadata)
    # trained with q, k and v apart: one a for each in the file, b block-diagonal
    name = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    apart = lora_sd3.LoRANetwork([], mmdit, modules_dim={name: 2}, modules_alpha={name: 1.0},
                                 split_qkv=True)  # fmt: skip
    saved("sd3_split", lora_sd3, lambda **_: apart, {name: (2, 1.0)}, torch.float32, metadata)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    sd15()
    sdxl()
    sd3()
