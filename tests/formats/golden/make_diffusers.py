"""Files of diffusers, saved by its pipelines' `save_lora_weights`, and kohya's names by its own
converter.

    PYTHONPATH=. python tests/formats/golden/make_diffusers.py

diffusers 0.42.1, PEFT 0.21.2, transformers 5.24.0, torch 2.13.0.
"""

from pathlib import Path

import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from tests.support import pipelines

FOLDER = Path(__file__).parent
SD15 = r"down_blocks\.0\.attentions\.1\..*(attn1\.to_q|attn2\.to_k|to_out\.0|proj_in|ff\.net\.2)"
SDXL = (
    r"conv_in|add_embedding\.linear_1|mid_block\.resnets\.0\.(conv1|time_emb_proj)|"
    r"down_blocks\.2\.attentions\.1\.transformer_blocks\.9\.attn2\.to_v|"
    r"up_blocks\.0\.upsamplers\.0\.conv"
)
SD3 = (
    r"transformer_blocks\.0\.attn\.(to_q|to_v|add_k_proj|to_add_out)|transformer_blocks\.0\.attn2"
    r"\.to_(q|k|v)|transformer_blocks\.2\.norm1_context\.linear|norm_out\.linear|proj_out"
)


def trained(model, config: LoraConfig):
    """Its adapter's tensors, with random weights."""
    inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return get_peft_model_state_dict(model)


def moved(folder: str, name: str) -> None:
    """The file that the pipeline saved, under another name."""
    (FOLDER / folder / "pytorch_lora_weights.safetensors").rename(
        FOLDER / folder / f"{name}.safetensors"
    )


def config(targets: str, rank: int = 2, alpha: float | None = None, **options) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=targets, **options
    )


def sd15() -> None:
    pipe = pipelines.sd15()
    unet = trained(pipe.unet, config(SD15))
    encoder = trained(pipe.text_encoder, config(r".*layers\.1\.(self_attn\.v_proj|mlp\.fc1)"))
    # transformers 5 names its modules without text_model
    pipe.save_lora_weights(FOLDER / "diffusers" / "respelled", unet, encoder)
    moved("diffusers/respelled", "sd15")
    # the form of training scripts: attention by diffusers' own names, the rest by PEFT's
    pipe.save_lora_weights(
        FOLDER / "diffusers-old",
        convert_state_dict_to_diffusers(unet),
        convert_state_dict_to_diffusers(encoder),
    )
    moved("diffusers-old", "sd15_training")


def sd15_metadata() -> None:
    pipe = pipelines.sd15()
    options = {"rank_pattern": {"proj_in": 3}, "alpha_pattern": {"attn2.to_k": 1}}
    unet = trained(pipe.unet, config(SD15, alpha=4, **options))
    metadata = _collate_lora_metadata({"unet": pipe.unet})
    pipe.save_lora_weights(FOLDER / "diffusers", unet, **metadata)
    moved("diffusers", "sd15_metadata")


def sdxl() -> None:
    pipe = pipelines.sdxl()
    unet = trained(pipe.unet, config(SDXL, use_dora=True))
    encoder = trained(pipe.text_encoder_2, config(r".*layers\.0\.self_attn\.k_proj"))
    pipe.save_lora_weights(FOLDER / "diffusers", unet, text_encoder_2_lora_layers=encoder)
    moved("diffusers", "sdxl_dora")


def sdxl_kohya() -> None:
    """A file with kohya's keys and diffusers' names, whose alphas are integers."""
    pipe = pipelines.sdxl()
    tensors = trained(pipe.unet, config(r".*2\.attentions\.0\.transformer_blocks\.9\.attn1\.to_q"))
    tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}
    kohya = convert_state_dict_to_kohya(tensors)
    save_file(kohya, FOLDER / "kohya" / "sdxl_diffusers.safetensors", {"format": "pt"})


def sd3() -> None:
    pipe = pipelines.sd3()
    transformer = trained(pipe.transformer, config(SD3, alpha=1))
    encoder = trained(pipe.text_encoder, config(r".*layers\.0\.self_attn\.(q|out)_proj"))
    metadata = _collate_lora_metadata(
        {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    )
    pipe.save_lora_weights(FOLDER / "diffusers", transformer, encoder, **metadata)
    moved("diffusers", "sd3_metadata")


if __name__ == "__main__":
    for folder in ("diffusers/respelled", "diffusers-old", "kohya"):
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    sd15()
    sd15_metadata()
    sdxl()
    sdxl_kohya()
    sd3()
