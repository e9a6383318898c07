"""Writes diffusers' golden file of an adapter of Wan 2.2: both transformers, with metadata.

Made with diffusers 0.42.1, peft 0.21.2, torch 2.13.0:

    python tests/formats/golden/make_diffusers_video.py
"""

import sys
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def adapter(seed: int, rank: int, alpha: int) -> tuple[dict[str, torch.Tensor], dict]:
    """The layers and settings of an adapter on a tiny transformer, all factors drawn."""
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=1,
        rope_max_seq_len=8,
    )
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=["attn1.to_q", "attn2.to_out.0"])
    )
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: torch.randn(tensor.shape, generator=generator)
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    return layers, model.peft_config["default"].to_dict()


def main(folder: Path) -> None:
    place = folder / "diffusers"
    place.mkdir(parents=True, exist_ok=True)
    adapters = {"transformer": adapter(0, 2, 4), "transformer_2": adapter(1, 4, 4)}
    WanPipeline._save_lora_weights(
        place,
        lora_layers={name: layers for name, (layers, _) in adapters.items()},
        lora_metadata={name: settings for name, (_, settings) in adapters.items()},
        is_main_process=True,
        weight_name="wan22.safetensors",
        save_function=None,
        safe_serialization=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
