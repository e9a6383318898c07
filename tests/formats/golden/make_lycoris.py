"""Write the golden files of LyCORIS: `python tests/formats/golden/make_lycoris.py`.

lycoris-lora 4.1.3, diffusers 0.42.0, torch 2.13.0, safetensors 0.7.0. Each file is saved by lycoris
itself (`save_weights` of its kohya network, the state dict of its wrapper) after all parameters
were drawn at random. The metadata is what sd-scripts gives to `save_weights`.
"""

import json
import logging
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

FOLDER = Path(__file__).parent / "lycoris"
WRAPPER = Path(__file__).parent / "lycoris-wrapper"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k")
POINT, CONV = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1"
NORMS = (f"{BLOCK}.norm1", "down_blocks.0.resnets.0.norm1")
ALL = (*LINEAR, POINT, CONV)
# file -> options of the network, modules
NETWORKS = {
    "locon_tucker": ({"algo": "locon", "use_tucker": True}, ALL),
    "dora": ({"algo": "locon", "dora_wd": True}, ALL),
    "dora_in": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, LINEAR),
    "loha": ({"algo": "loha"}, ALL),
    "loha_tucker": ({"algo": "loha", "use_tucker": True}, ALL),
    "lokr": ({"algo": "lokr", "factor": 2, "network_dim": 2}, ALL),
    "lokr_tucker": ({"algo": "lokr", "factor": 2, "use_tucker": True, "network_dim": 1}, ALL),
    "lokr_both": ({"algo": "lokr", "decompose_both": True, "network_dim": 1}, ALL),
    "lokr_full": ({"algo": "lokr", "full_matrix": True}, ALL),
    "oft": ({"algo": "diag-oft", "constraint": 0.01, "rescaled": True, "network_dim": 4}, ALL),
    "boft": ({"algo": "boft", "network_dim": 4}, ALL),
    "full": ({"algo": "full", "train_norm": True}, (*ALL, *NORMS)),
}
# of the wrapper: file -> options, modules
WRAPPED = {
    "locon": ({"algo": "locon"}, ALL),
    "loha": ({"algo": "loha", "train_norm": True}, (*ALL, *NORMS)),
}


def tiny_unet() -> UNet2DConditionModel:
    """A UNet with the names of Stable Diffusion 1.5 (Conv2d, Linear, norms), always the same."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def kohya_network(unet: nn.Module, options: dict, modules: tuple[str, ...]) -> nn.Module:
    """lycoris' network for these modules, all its parameters random."""
    from lycoris.kohya import LycorisNetworkKohya, create_network

    preset = LycorisNetworkKohya.apply_preset
    options = {"network_dim": 3, "network_alpha": 2.0, **options}
    rank, alpha = options.pop("network_dim"), options.pop("network_alpha")
    LycorisNetworkKohya.apply_preset(
        {"enable_conv": True, "unet_target_module": [], "unet_target_name": list(modules)}
    )
    LycorisNetworkKohya.apply_preset = classmethod(lambda cls, preset: cls)  # "full" by default
    try:
        network = create_network(1.0, rank, alpha, None, [], unet, **options)
    finally:
        LycorisNetworkKohya.apply_preset = preset
    network.apply_to([], unet, apply_text_encoder=False, apply_unet=True)
    return randomized(network)


def wrapper_network(model: nn.Module, options: dict, modules: tuple[str, ...]) -> nn.Module:
    """The network of lycoris' own wrapper for these modules, all its parameters random."""
    from lycoris import LycorisNetwork, create_lycoris

    options = {"linear_dim": 3, "linear_alpha": 2.0, **options}
    preset = LycorisNetwork.apply_preset
    LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": [], "target_name": list(modules)}
    )
    LycorisNetwork.apply_preset = classmethod(lambda cls, preset: cls)  # "full" by default
    try:
        network = create_lycoris(model, 1.0, **options)
    finally:
        LycorisNetwork.apply_preset = preset
    network.apply_to()
    return randomized(network)


def randomized(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.1 * noise)
            elif (
                name.endswith((".weight", ".bias")) and "lora_" not in name.rpartition(".")[0][-9:]
            ):
                parameter.add_(0.1 * noise)  # full: its weight is the module's own
            else:
                parameter.copy_(0.3 * noise)
    return network


def metadata(options: dict) -> dict[str, str]:
    """What sd-scripts gives to `save_weights` of an SD1.5 network, as far as it is told from."""
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(options.get("network_dim", 3)),
        "ss_network_alpha": "2.0",
        "ss_network_args": json.dumps({k: str(v) for k, v in options.items() if "_dim" not in k}),
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "tiny.safetensors",
    }


def main() -> None:
    logging.disable(logging.WARNING)
    FOLDER.mkdir(exist_ok=True)
    for name, (options, modules) in NETWORKS.items():
        network = kohya_network(tiny_unet(), options, modules)
        network.save_weights(str(FOLDER / f"{name}.safetensors"), torch.float32, metadata(options))
    WRAPPER.mkdir(exist_ok=True)
    for name, (options, modules) in WRAPPED.items():
        network = wrapper_network(tiny_unet(), options, modules)
        network.save_weights(str(WRAPPER / f"{name}.safetensors"), torch.float16, None)


if __name__ == "__main__":
    main()
