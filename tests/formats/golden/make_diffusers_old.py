"""Files of diffusers before it used PEFT: attention processors with factors of their own.

    python make_diffusers_old.py

diffusers 0.19.3, transformers 4.31.0, huggingface_hub 0.16.4, torch 2.13.0.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import AttnProcsLayers, LoraLoaderMixin
from diffusers.models.attention_processor import LoRAAttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parent / "diffusers-old"
SIZES, CROSS = (4, 8, 16, 16), 12
HERE = "down_blocks.0.attentions.1"


def unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        block_out_channels=SIZES, norm_num_groups=2, attention_head_dim=2, cross_attention_dim=CROSS
    )
    size = {
        name: module.to_q.in_features
        for name, module in model.named_modules()
        if name.endswith(("attn1", "attn2"))
    }
    processors = {}
    for name in model.attn_processors:
        cross = None if name.endswith("attn1.processor") else CROSS
        hidden = size[name.removesuffix(".processor")]
        processors[name] = LoRAAttnProcessor(hidden, cross_attention_dim=cross, rank=2)
    model.set_attn_processor(processors)
    return randomized(model)


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def layers(model: UNet2DConditionModel) -> dict:
    """The tensors of one block's processors."""
    processors = {k: v for k, v in model.attn_processors.items() if k.startswith(HERE)}
    return AttnProcsLayers(processors).state_dict()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    model = unet()
    # bare names, as `save_attn_procs` of the whole model writes them
    LoraLoaderMixin.write_lora_layers(layers(model), FOLDER, True, "bare.safetensors", None, True)
    config = CLIPTextConfig(
        hidden_size=CROSS, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=16,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    LoraLoaderMixin._modify_text_encoder(encoder, rank=2, patch_mlp=True)
    tensors = {
        key: value for key, value in randomized(encoder).state_dict().items()
        if "lora" in key and "layers.1" in key
    }  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(
        FOLDER, layers(model), tensors, weight_name="prefixed.safetensors", safe_serialization=True
    )
