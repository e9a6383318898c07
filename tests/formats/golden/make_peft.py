"""Make the golden adapters of PEFT: `python make_peft.py FOLDER`.

With PEFT 0.21.2 and transformers 5.24.0: `peft/`, the experts as stacks whose matrices are (out,
in). With PEFT 0.18.1 and transformers 4.57.1: `peft-per-expert/`, where each expert is a module;
with PEFT 0.18.1 and both versions of transformers: `peft-0.18/`, stacks in its layout; torch
2.13.0.

Each adapter is beside the model that it was made on (`base/`) and the logits of both
(`logits.safetensors`: tokens, base, adapted). Those of other types than LoRA are alone, unless they
cannot be read without their model.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
    "head_dim": 4, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {
        "num_experts": 3, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 4,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_moe": {
        "num_experts": 3, "moe_intermediate_size": 6, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt_oss": {"num_local_experts": 3, "layer_types": ["full_attention"]},
    "llama": {"num_hidden_layers": 2},
    # layers of both kinds with keys of their own, of which one has no values, and without
    "gemma4": {
        "text_config": SIZES | {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "global_head_dim": 8, "num_key_value_heads": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 24,
            "tie_word_embeddings": True,
        },
        "vision_config": None, "audio_config": None, "tie_word_embeddings": True,
    },
    "qwen2_vl": {
        "text_config": SIZES | {
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]},
        },
        "vision_config": {
            "depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "patch_size": 2,
            "spatial_merge_size": 1, "mlp_ratio": 1,
        },
        "image_token_id": 20, "video_token_id": 21, "vision_start_token_id": 22,
        "vision_end_token_id": 23,
    },
}  # fmt: skip
STACKS = ["gate_up_proj", "down_proj"]
EACH = {
    "mixtral": ["w1", "w2", "w3"],
    "qwen2_moe": ["gate_proj", "up_proj", "down_proj"],
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj"],
}
TOKENS = torch.tensor([[5, 9, 3, 17, 4, 20, 8, 11]])


def tiny(kind: str) -> Any:
    """A tiny model with random weights in float32."""
    sizes = {} if "text_config" in MODELS[kind] else SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes | MODELS[kind])
    torch.manual_seed(0)
    options = {"attn_implementation": "eager"}
    if not transformers.__version__.startswith("4.") and kind != "qwen2_vl":
        options["experts_implementation"] = "eager"
    auto = transformers.AutoModelForCausalLM
    if sizes == {}:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits[0]


def make(folder: Path, kind: str, with_base: bool = True, **settings: Any) -> None:
    """An adapter with random factors, saved by PEFT beside its model and logits."""
    model = tiny(kind)
    values = {"tokens": TOKENS[0], "base": logits(model)}
    if with_base:
        model.save_pretrained(folder / "base")
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, **settings}
    config = peft.LoraConfig(**options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    values["adapted"] = logits(wrapped.eval())
    wrapped.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    finish(folder)
    save_file(values, folder / "logits.safetensors")


def make_type(folder: Path, config: peft.PeftConfig, *, with_base: bool = False) -> None:
    """An adapter of another type or variant on the Llama, alone or beside its model."""
    model = tiny("llama")
    if with_base:
        model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    wrapped.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    finish(folder)


def types() -> dict[str, peft.PeftConfig]:
    """The types and variants that are a LoRA in other words."""
    blocks = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return {
        "llama_adalora": peft.AdaLoraConfig(init_r=3, total_step=10, lora_alpha=3, **targets),
        "llama_bdlora": peft.LoraConfig(
            r=4, lora_alpha=6, use_bdlora=peft.tuners.lora.config.BdLoraConfig(**blocks), **targets
        ),
        "llama_gralora": peft.GraloraConfig(r=4, alpha=5, hybrid_r=1, **targets),
        "llama_vera": peft.VeraConfig(r=3, **targets),
    }


def finish(folder: Path) -> None:
    """One order of lists and tensors from run to run, and the name of the base as a relative
    path."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    config["base_model_name_or_path"] = "base"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def main(out: Path) -> None:
    old_peft = peft.__version__.startswith("0.18")
    old_models = transformers.__version__.startswith("4.")
    if not old_peft:
        for kind in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"):
            make(out / "peft" / kind, kind, target_modules=["q_proj"], target_parameters=STACKS)
        make(
            out / "peft" / "llama_patterns", "llama",
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"layers.0.self_attn.v_proj": 4, "down_proj": 1}, use_rslora=True,
            alpha_pattern={"layers.1.self_attn.q_proj": 5},
        )  # fmt: skip
        make(
            out / "peft" / "llama_embeddings", "llama", target_modules=["embed_tokens", "lm_head"],
        )  # fmt: skip
        make(out / "peft" / "llama_dora", "llama", target_modules=["o_proj"], use_dora=True)
        make(out / "peft" / "qwen2_vl", "qwen2_vl", target_modules=["q_proj", "qkv"])
        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"  # as Unsloth has it
        make(out / "served" / "peft" / "gemma4", "gemma4", target_modules=targets)
        make(
            out / "peft" / "gpt_oss_patterns", "gpt_oss", target_modules=["q_proj"],
            target_parameters=STACKS, rank_pattern={"gate_up_proj": 3},
            alpha_pattern={"down_proj": 5, "q_proj": 7}, use_rslora=True,
        )  # fmt: skip
        for name, config in types().items():
            make_type(out / "peft" / name, config, with_base=name == "llama_vera")
    elif old_models:
        for kind, leaves in EACH.items():
            make(out / "peft-per-expert" / kind, kind, target_modules=["q_proj", *leaves])
        make(
            out / "peft-0.18" / "gpt_oss", "gpt_oss", target_modules=["q_proj"],
            target_parameters=STACKS,
        )  # fmt: skip
    else:
        for kind in ("mixtral", "qwen3_moe"):
            make(
                out / "peft-0.18" / kind, kind, target_modules=["q_proj"],
                target_parameters=STACKS,
            )  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
