"""Makes the golden files of the Flux family; run it from the repository's root.

`diffusers` is written by diffusers 0.42.1 (PEFT 0.21.2): `save_lora_weights` of a tiny Flux
transformer; `lycoris-wrapper` by lycoris-lora 4.1.3: `create_lycoris` on it, as SimpleTuner does,
and ai-toolkit for its older LoKr. The other tools do not install (sd-scripts and ai-toolkit are no
packages, XLabs' and BFL's trainers are not public), so their files are written here with the key
names that their sources show:

kohya        sd-scripts 48d368fa, networks/lora_flux.py: fused qkv and linear1, alpha; and the
             files of `split_qkv=True`, whose b is block-diagonal and whose alpha is one part's
ai-toolkit   27a03a91, toolkit/network_mixins.py: a and b without alpha, LoKr with it; Flux.2 and
             Chroma under `diffusion_model.` with BFL's names
xlabs        networks/convert_flux_lora.py of sd-scripts lists the keys
bfl          flux1-canny-dev-lora: diffusers' converter lists the keys; biases, replaced norms, a
             wider img_in
fal-kontext  diffusers' converter lists the keys
diffusers-old  diffusers' converter of kohya files: its names with kohya's suffixes and alphas
comfyui      comfy/lora.py: `diffusion_model.` with BFL's names, dora_scale, diff_b, set_weight
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
RANK = 2
HIDDEN = 8  # 1 head of 8
SOFTWARE = json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"})

Tensors = dict[str, Tensor]
Sizes = dict[str, tuple[int, int]]  # BFL's module -> (out, in)


def double_sizes(mlp_in: int, mlp_out: int) -> Sizes:
    """The modules of a block of two streams."""
    sizes = {}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        sizes[f"{block}_attn.qkv"] = (3 * HIDDEN, HIDDEN)
        sizes[f"{block}_attn.proj"] = (HIDDEN, HIDDEN)
        sizes[f"{block}_mlp.0"] = (mlp_in, HIDDEN)
        sizes[f"{block}_mlp.2"] = (HIDDEN, mlp_out)
    return sizes


FLUX_BLOCKS: Sizes = double_sizes(4 * HIDDEN, 4 * HIDDEN) | {
    "double_blocks.0.img_mod.lin": (6 * HIDDEN, HIDDEN),
    "double_blocks.0.txt_mod.lin": (6 * HIDDEN, HIDDEN),
    "single_blocks.0.modulation.lin": (3 * HIDDEN, HIDDEN),
    "single_blocks.0.linear1": (7 * HIDDEN, HIDDEN),
    "single_blocks.0.linear2": (HIDDEN, 5 * HIDDEN),
}
FLUX_OUTSIDE: Sizes = {
    "img_in": (HIDDEN, 4),
    "txt_in": (HIDDEN, 8),
    "time_in.in_layer": (HIDDEN, 256),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, 8),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.in_layer": (HIDDEN, 256),
    "guidance_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
    "final_layer.linear": (4, HIDDEN),
}
FLUX2_BLOCKS: Sizes = double_sizes(6 * HIDDEN, 3 * HIDDEN) | {
    "single_blocks.0.linear1": (9 * HIDDEN, HIDDEN),
    "single_blocks.0.linear2": (HIDDEN, 4 * HIDDEN),
}
FLUX2_OUTSIDE: Sizes = {
    "double_stream_modulation_img.lin": (6 * HIDDEN, HIDDEN),
    "single_stream_modulation.lin": (3 * HIDDEN, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
CHROMA_BLOCKS: Sizes = double_sizes(4 * HIDDEN, 4 * HIDDEN) | {
    "single_blocks.0.linear1": (7 * HIDDEN, HIDDEN),
    "single_blocks.0.linear2": (HIDDEN, 5 * HIDDEN),
}
GUIDANCE: Sizes = {
    "distilled_guidance_layer.in_proj": (8, 4),
    "distilled_guidance_layer.layers.0.in_layer": (8, 8),
    "distilled_guidance_layer.layers.0.out_layer": (8, 8),
    "distilled_guidance_layer.out_proj": (HIDDEN, 8),
}
CLIP: Sizes = {
    "text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    "text_model.encoder.layers.0.mlp.fc1": (16, 8),
}
T5: Sizes = {
    "encoder.block.0.layer.0.SelfAttention.q": (8, 8),
    "encoder.block.0.layer.1.DenseReluDense.wi_0": (16, 8),
}


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """The next random numbers."""
    return torch.randn(shape).to(dtype)


def underscored(prefix: str, sizes: Sizes, alpha: float | None = None) -> Tensors:
    """sd-scripts' keys."""
    tensors = {}
    for name, (out, size) in sizes.items():
        key = prefix + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = normal(RANK, size)
        tensors[f"{key}.lora_up.weight"] = normal(out, RANK)
        tensors[f"{key}.alpha"] = torch.tensor(RANK if alpha is None else alpha).half()
    return tensors


def hybrid() -> Tensors:
    """diffusers' names, sd-scripts' suffixes and alphas."""
    tensors = {}
    for name, (out, size) in diffusers_names().items():
        key = f"transformer.{name}"
        tensors[f"{key}.lora_down.weight"] = normal(RANK, size)
        tensors[f"{key}.lora_up.weight"] = normal(out, RANK)
        tensors[f"{key}.alpha"] = torch.tensor(1.0).half()
    return tensors


def dotted(prefix: str, sizes: Sizes) -> Tensors:
    """Keys with lora_A and lora_B."""
    tensors = {}
    for name, (out, size) in sizes.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = normal(RANK, size)
        tensors[f"{prefix}{name}.lora_B.weight"] = normal(out, RANK)
    return tensors


def kohya() -> Tensors:
    """`train_t5xxl=True` and `in_dims`, alpha half of the rank."""
    return (
        underscored("lora_unet_", FLUX_BLOCKS, alpha=1)
        | underscored("lora_unet_", {k: FLUX_OUTSIDE[k] for k in ("img_in", "time_in.in_layer")})
        | underscored("lora_te1_", CLIP, alpha=1)
        | underscored("lora_te3_", T5, alpha=1)
    )


def kohya_split() -> Tensors:
    """`split_qkv=True`: each part of qkv and of linear1 has factors of its own."""
    tensors = {}
    shares = {"double_blocks.0.img_attn.qkv": (1, 1, 1), "single_blocks.0.linear1": (1, 1, 1, 4)}
    for name, parts in shares.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = normal(RANK * len(parts), HIDDEN)
        blocks = [normal(share * HIDDEN, RANK) for share in parts]
        tensors[f"{key}.lora_up.weight"] = torch.block_diag(*blocks)
        tensors[f"{key}.alpha"] = torch.tensor(1.0).half()
    return tensors


def diffusers_names() -> Sizes:
    """A few of the modules as ai-toolkit's Flux.1 files name them."""
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    square = (HIDDEN, HIDDEN)
    return {
        f"{double}.attn.to_q": square,
        f"{double}.attn.to_k": square,
        f"{double}.attn.to_v": square,
        f"{double}.attn.to_out.0": square,
        f"{double}.attn.add_q_proj": square,
        f"{double}.attn.add_k_proj": square,
        f"{double}.attn.add_v_proj": square,
        f"{double}.attn.to_add_out": square,
        f"{double}.norm1.linear": (6 * HIDDEN, HIDDEN),
        f"{double}.ff.net.0.proj": (4 * HIDDEN, HIDDEN),
        f"{double}.ff_context.net.2": (HIDDEN, 4 * HIDDEN),
        f"{single}.attn.to_q": square,
        f"{single}.attn.to_k": square,
        f"{single}.attn.to_v": square,
        f"{single}.proj_mlp": (4 * HIDDEN, HIDDEN),
        f"{single}.proj_out": (HIDDEN, 5 * HIDDEN),
        f"{single}.norm.linear": (3 * HIDDEN, HIDDEN),
    }


def lokr(sizes: Sizes) -> Tensors:
    """w1 whole, w2 factored; alpha is stored. qkv's w1 has 6 rows, linear1's 9."""
    tensors = {}
    for name, (out, size) in sizes.items():
        small = out // HIDDEN if out > HIDDEN else 2
        small = 2 * small if small == 3 else small
        key = f"diffusion_model.{name}"
        tensors[f"{key}.alpha"] = torch.tensor(1.0).half()
        tensors[f"{key}.lokr_w1"] = normal(small, 2)
        tensors[f"{key}.lokr_w2_a"] = normal(out // small, 1)
        tensors[f"{key}.lokr_w2_b"] = normal(1, size // 2)
    return tensors


def xlabs() -> Tensors:
    """Attention only."""
    tensors = {}
    names = {
        "double_blocks.0.processor.qkv_lora1": (3 * HIDDEN, HIDDEN),
        "double_blocks.0.processor.qkv_lora2": (3 * HIDDEN, HIDDEN),
        "double_blocks.0.processor.proj_lora1": (HIDDEN, HIDDEN),
        "double_blocks.0.processor.proj_lora2": (HIDDEN, HIDDEN),
        "single_blocks.0.processor.qkv_lora": (3 * HIDDEN, HIDDEN),
        "single_blocks.0.processor.proj_lora": (HIDDEN, 5 * HIDDEN),
    }
    for name, (out, size) in names.items():
        tensors[f"{name}.down.weight"] = normal(RANK, size)
        tensors[f"{name}.up.weight"] = normal(out, RANK)
    return tensors


def bfl() -> Tensors:
    """A control LoRA: all linear layers with a bias, all norms, img_in twice as wide."""
    sizes = FLUX_BLOCKS | FLUX_OUTSIDE | {"img_in": (HIDDEN, 8)}
    tensors = dotted("", sizes)
    for name, (out, _) in sizes.items():
        tensors[f"{name}.lora_B.bias"] = normal(out)
    for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for norm in ("query_norm", "key_norm"):
            tensors[f"{block}.norm.{norm}.scale"] = normal(HIDDEN)
    return tensors


def comfyui() -> Tensors:
    """What ComfyUI's loader takes beside plain factors, too."""
    tensors = dotted("diffusion_model.", FLUX_BLOCKS)
    tensors |= dotted("text_encoders.clip_l.transformer.", CLIP)
    tensors |= dotted("text_encoders.t5xxl.transformer.", T5)
    qkv = "diffusion_model.double_blocks.0.img_attn"
    tensors[f"{qkv}.proj.dora_scale"] = normal(HIDDEN, 1).abs()
    tensors[f"{qkv}.qkv.diff_b"] = normal(3 * HIDDEN)
    tensors[f"{qkv}.norm.query_norm.set_weight"] = normal(HIDDEN)
    return tensors


def tiny_flux() -> torch.nn.Module:
    """A Flux.1 of one block of each kind."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HIDDEN,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).half()


def diffusers_flux(path: Path) -> None:
    """What diffusers' own saver writes."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer = tiny_flux()
    config = LoraConfig(
        r=RANK,
        lora_alpha=1,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "norm1.linear"],
        rank_pattern={"proj_mlp": 3},
    )
    transformer.add_adapter(config)
    tensors = get_peft_model_state_dict(transformer)
    tensors = {key: normal(*tensor.shape) for key, tensor in sorted(tensors.items())}
    settings = config.to_dict() | {"target_modules": sorted(config.target_modules or ())}
    FluxPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=tensors,
        weight_name=path.name,
        transformer_lora_adapter_metadata=settings,
    )


def lycoris_flux(path: Path) -> None:
    """What LyCORIS' own saver writes."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["FluxAttention", "FeedForward"]})
    network = create_lycoris(
        tiny_flux(), 1.0, linear_dim=1, linear_alpha=0.5, algo="lokr", factor=2
    )
    network.apply_to()
    for parameter in network.parameters():
        parameter.data = normal(*parameter.shape)
    network.save_weights(str(path), torch.float16, {})


def main() -> None:
    torch.manual_seed(0)
    version = {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux"}
    toolkit = {"software": SOFTWARE, "format": "pt"}
    flux = {"ss_base_model_version": "flux1"}
    flux2 = {"ss_base_model_version": "flux2"}
    chroma = {"ss_base_model_version": "chroma"}
    files: dict[str, tuple[Tensors, dict[str, str] | None]] = {
        "kohya/flux": (kohya(), version),
        "kohya/flux_split_qkv": (kohya_split(), version),
        "ai-toolkit/flux": (dotted("transformer.", diffusers_names()), toolkit | flux),
        "ai-toolkit/flux2": (
            dotted("diffusion_model.", FLUX2_BLOCKS | FLUX2_OUTSIDE),
            toolkit | flux2,
        ),
        "ai-toolkit/flux2_lokr": (lokr(FLUX2_BLOCKS), toolkit | flux2),
        "ai-toolkit/chroma": (
            dotted("diffusion_model.", CHROMA_BLOCKS | GUIDANCE),
            toolkit | chroma,
        ),
        "xlabs/flux": (xlabs(), None),
        "bfl/control": (bfl(), None),
        "fal-kontext/flux": (dotted("base_model.model.", FLUX_BLOCKS), None),
        "comfyui/flux": (comfyui(), None),
        "onetrainer/flux_hybrid": (hybrid(), None),
    }
    for name, (tensors, metadata) in files.items():
        path = HERE / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata)
    for name, make in {"diffusers": diffusers_flux, "lycoris-wrapper": lycoris_flux}.items():
        (HERE / name).mkdir(exist_ok=True)
        make(HERE / name / "flux.safetensors")


if __name__ == "__main__":
    main()
