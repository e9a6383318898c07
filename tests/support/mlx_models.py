"""Tiny language models that transformers and mlx-lm both load, and what each computes."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

TOKENS = torch.tensor([[3, 1, 4, 15, 9, 26]])
COMMON: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**FEW, "moe_intermediate_size": 8}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
LATENT = {
    **GROUPED, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip
# model_type -> its sizes
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": LOCAL,
    "phimoe": {**LOCAL, "attention_bias": True, "lm_head_bias": True},
    "minimax_m2": LOCAL,
    "qwen3_moe": {**MOE, "norm_topk_prob": True},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 8},
    "olmoe": FEW,
    "dots1": GROUPED,
    "afmoe": {
        **MOE, "num_dense_layers": 1, "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "glm4_moe": GROUPED,
    "deepseek_v3": LATENT,
    "exaone_moe": MOE,
    "lfm2_moe": {
        **MOE, "num_dense_layers": 0, "layer_types": ["full_attention", "conv"],
        "tie_word_embeddings": True,
    },
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
EYES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
OF_QWEN: dict[str, Any] = {
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
    "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37,
    "vision_end_token_id": 36, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
# model_type of models that see -> what the language model inside has, and what is around it
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 4},
        {
            "vision_config": {**EYES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
            "image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37,
            "tie_word_embeddings": True, "vocab_size": 40,
        },
    ),
    "gemma4": (
        {
            "sliding_window": 8, "layer_types": LAYERS, "vocab_size_per_layer_input": 40,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "global_head_dim": 4,
            "tie_word_embeddings": True,
        },
        {"vision_config": None, "audio_config": None, "tie_word_embeddings": True},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {
            "vision_config": {
                **EYES, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28,
                "patch_size": 14, "head_dim": 8,
            },
            "image_token_index": 39, "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl": ({"rope_parameters": ROPE}, OF_QWEN),
    "qwen3_5": (
        {
            "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
        },
        OF_QWEN,
    ),
}  # fmt: skip
# settings that mlx-lm wants in config.json, and transformers writes elsewhere or not at all
WANTED = {
    "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 1.0, "num_experts": 4,
    "shared_intermediate_size": 8, "rotary_dim": 4, "is_moe_layer": [False, True],
}  # fmt: skip


def saved(kind: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """The folder of a model with weights drawn at random."""
    config = transformers.AutoConfig.for_model(kind, **COMMON | KINDS[kind] | settings)
    written = _drawn(transformers.AutoModelForCausalLM, config, folder, seed)
    own = WANTED | {"partial_rotary_factor": 0.5} if kind == "glm4_moe" else WANTED
    (folder / "config.json").write_text(json.dumps(own | written))
    return folder


def seeing(kind: str, folder: Path) -> Path:
    """The folder of a model that holds a language model, likewise."""
    text, around = SEEING[kind]
    config = transformers.AutoConfig.for_model(kind, text_config=COMMON | text, **around)
    written = _drawn(transformers.AutoModelForImageTextToText, config, folder, 0)
    written["text_config"] |= {name: text[name] for name in text if name == "global_head_dim"}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 40} | written))
    return folder


def _drawn(auto: Any, config: Any, folder: Path, seed: int) -> dict[str, Any]:
    """The config.json that is written."""
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def loaded(base: Path, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits[0]


def stacks_of(model: torch.nn.Module) -> list[str]:
    """The ends of the names of its experts' parameters, as target_parameters has them."""
    own = (name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name)
    return sorted({name.split(".", 3)[3] for name in own})


def trained(
    base: Path,
    out: Path,
    seed: int = 0,
    auto: Any = transformers.AutoModelForCausalLM,
    **options: Any,
) -> PeftModel:
    """A PEFT model with random factors, and its adapter in `out`."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(loaded(base, auto), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out, save_embedding_layers=False)
    return model.eval()


def by_mlx(base: Path, adapter: Path | None = None) -> Tensor:
    """The logits of mlx-lm, with an adapter that it loads itself."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model: Any = load_model(base)[0]
    if adapter is not None:
        model = load_adapters(model, str(adapter))
        model.eval()
    return torch.tensor(model(mx.array(TOKENS.numpy()))[0].tolist())


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
