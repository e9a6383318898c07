"""Tiny bases and adapters for the golden jobs: a two-layer Llama, adapters in PEFT's layout.

Every value is an integer times a power of two, drawn by a formula, so that the files have the same
bytes on every machine.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS, KEYS_VALUES = 32, 64, 48, 2, 16
ATTENTION = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS_VALUES, HIDDEN),
    "self_attn.v_proj": (KEYS_VALUES, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}
MLP = {
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LINEAR = ATTENTION | MLP
FEW = {name: LINEAR[name] for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.17.0",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


def dyadic(seed: int, *shape: int, least: int, most: int, exponent: int) -> Tensor:
    """Integers of least..most times 2**exponent, float32: splitmix64 of the element's number."""
    count = int(np.prod(shape))
    z = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z = (z ^ (z >> np.uint64(31))) % np.uint64(most - least + 1)
    values = (z.astype(np.int64) + least).astype(np.float64) * 2.0**exponent
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def create_inputs(root: Path) -> None:
    """Every folder that a job names, below `root`."""
    weights = _model(seed=1, most=96, exponent=-10)
    _save_base(root / "base", {key: w.bfloat16() for key, w in weights.items()}, shards=2)
    weights = _model(seed=2, most=12_000, exponent=-17)
    _save_base(root / "base32", weights, torch_dtype="float32")
    _save_base(root / "tuned", _tuned(weights), torch_dtype="float32")

    _save_adapter(root / "style", seed=10, rank=4, alpha=8, modules=ATTENTION)
    _save_adapter(root / "skill", seed=11, rank=2, alpha=4, special_rank=3, tokenizer=True)
    _save_adapter(root / "dora", seed=12, rank=2, alpha=2, modules=MLP, use_dora=True)
    _save_adapter(root / "rslora", seed=13, rank=4, alpha=4, modules=ATTENTION, use_rslora=True)
    _save_adapter(root / "head", seed=14, rank=2, alpha=2, modules_to_save=["lm_head"])
    # no two elements of a delta have one magnitude
    fine = {"modules": FEW, "most": 3000, "exponent": -14}
    for number, name in enumerate(("law", "medicine", "english")):
        _save_adapter(root / name, seed=20 + number, rank=4, alpha=4, **fine)
    pissa = {"modules": FEW, "rank": 4, "alpha": 4, "init_lora_weights": "pissa"}
    _save_adapter(root / "pissa-initial", seed=30, **pissa)
    _save_adapter(root / "pissa-trained", seed=31, **pissa)
    _save_kohya(root / "kohya.safetensors")
    _save_pipeline(root / "pipeline", root / "unet-text.safetensors")
    _save_wan(root / "wan.safetensors", root / "motion.safetensors")
    rows = [{"input_ids": [(7 * n + i) % VOCABULARY for i in range(3 + n)]} for n in range(5)]
    rows[1]["labels"] = [-100, *rows[1]["input_ids"][1:]]
    (root / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    covariances = {}
    for number, (name, (_, width)) in enumerate(_linear()):
        factor = dyadic(40 + number, width, width, least=-8, most=8, exponent=-4)
        covariances[f"{name}.covariance"] = factor @ factor.T  # exact: integers below 2**24
    save_file(covariances, root / "covariances.safetensors")


PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
MODULES = {
    "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
    "vae": "encoder.conv_in",
}


def _save_pipeline(folder: Path, lora: Path) -> None:
    """Three models of diffusers, one layer each, and an adapter of two of them."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    factors = {}
    for number, (part, (library, name)) in enumerate(PARTS.items()):
        (folder / part).mkdir(parents=True)
        index[part] = [library, name]
        (folder / part / "config.json").write_text(json.dumps({"_class_name": name}), "utf-8")
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        weight = dyadic(50 + number, HIDDEN, HIDDEN, least=-96, most=96, exponent=-10)
        key = f"{MODULES[part]}.weight"
        save_file({key: weight.half()}, folder / part / f"{stem}.safetensors", {"format": "pt"})
        if part != "vae":
            factors |= _factors(f"{part}.{MODULES[part]}", 60 + number)
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    save_file(factors, lora, {"format": "pt"})


def _save_wan(file: Path, lora: Path) -> None:
    """A block of Wan's model in one file, and an adapter in ComfyUI's names."""
    names = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"]
    weights, factors = {}, {}
    for number, name in enumerate(names):
        weight = dyadic(70 + number, HIDDEN, HIDDEN, least=-96, most=96, exponent=-10)
        weights[f"model.diffusion_model.blocks.0.{name}.weight"] = weight
        if number % 2:
            factors |= _factors(f"diffusion_model.blocks.0.{name}", 80 + number)
    save_file(weights, file, {"modelspec.title": "a model"})
    save_file(factors, lora, {"format": "pt"})


def _factors(module: str, seed: int) -> dict[str, Tensor]:
    size = {"least": -96, "most": 96, "exponent": -10}
    a, b = dyadic(seed, 2, HIDDEN, **size), dyadic(seed + 100, HIDDEN, 2, **size)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def _linear() -> list[tuple[str, tuple[int, int]]]:
    """Names and shapes of all linear layers but the output."""
    return [(f"model.layers.{i}.{name}", s) for i in range(LAYERS) for name, s in LINEAR.items()]


def _model(*, seed: int, most: int, exponent: int) -> dict[str, Tensor]:
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), **dict(_linear())}
    shapes["lm_head"] = (VOCABULARY, HIDDEN)
    size = {"least": -most, "most": most, "exponent": exponent}
    weights = {
        f"{name}.weight": dyadic(seed * 1000 + number, *shape, **size)
        for number, (name, shape) in enumerate(shapes.items())
    }
    for name in ["norm", *(f"layers.{i}.{n}" for i in range(LAYERS) for n in _NORMS)]:
        weights[f"model.{name}.weight"] = torch.ones(HIDDEN)
    return weights


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _tuned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deltas of rank 6 on the attention, falling off towards the last ones, and a changed norm."""
    tuned = dict(weights)
    fall = torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
    for number, (name, (out, width)) in enumerate(_linear()):
        if "self_attn" in name:
            b = dyadic(500 + number, out, 6, least=-8, most=8, exponent=-7)
            a = dyadic(600 + number, 6, width, least=-8, most=8, exponent=-3)
            tuned[f"{name}.weight"] = weights[f"{name}.weight"] + (b * fall) @ a
    tuned["model.norm.weight"] = 1 + dyadic(700, HIDDEN, least=-8, most=8, exponent=-6)
    return tuned


def _save_base(folder: Path, weights: dict[str, Tensor], shards: int = 1, **config: Any) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", CONFIG | config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    keys, places = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = keys[number * len(keys) // shards : (number + 1) * len(keys) // shards]
        save_file({key: weights[key] for key in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _save_adapter(
    folder: Path,
    *,
    seed: int,
    rank: int,
    alpha: int,
    modules: dict[str, tuple[int, int]] = LINEAR,
    most: int = 16,
    exponent: int = -6,
    special_rank: int | None = None,
    tokenizer: bool = False,
    **config: Any,
) -> None:
    """A LoRA with `rank`; `special_rank`: the rank of down_proj instead."""
    folder.mkdir()
    config |= {"r": rank, "lora_alpha": alpha}
    config["target_modules"] = sorted(name.rpartition(".")[2] for name in modules)
    if special_rank:
        config["rank_pattern"] = {"down_proj": special_rank}
    factors, size = {}, {"least": -most, "most": most}
    for number, (name, (out, width)) in enumerate(_linear()):
        if not name.endswith(tuple(modules)):
            continue
        r = special_rank if special_rank and name.endswith("down_proj") else rank
        draw, key = seed * 1000 + 3 * number, f"base_model.model.{name}"
        factors[f"{key}.lora_A.weight"] = dyadic(draw, r, width, exponent=exponent, **size)
        factors[f"{key}.lora_B.weight"] = dyadic(draw + 1, out, r, exponent=exponent - 2, **size)
        if config.get("use_dora"):
            magnitude = dyadic(draw + 2, out, least=32, most=96, exponent=-7)
            factors[f"{key}.lora_magnitude_vector"] = magnitude
    if config.get("modules_to_save"):
        head = dyadic(seed * 1000 + 999, VOCABULARY, HIDDEN, least=-96, most=96, exponent=-10)
        factors["base_model.model.lm_head.weight"] = head
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    _write_json(folder / "adapter_config.json", ADAPTER_CONFIG | config)
    if tokenizer:
        _write_json(folder / "tokenizer_config.json", {"model_max_length": 64})


def _save_kohya(path: Path) -> None:
    """A file of sd-scripts for Stable Diffusion 1.5, of rank 2 and alpha 1."""
    unet, text = "lora_unet_down_blocks_0_attentions_0", "lora_te_text_model_encoder_layers_0"
    modules = {
        f"{unet}_transformer_blocks_0_attn1_to_q": (32, 32),
        f"{unet}_transformer_blocks_0_attn2_to_k": (32, 24),
        f"{text}_self_attn_q_proj": (24, 24),
        f"{text}_mlp_fc1": (48, 24),
    }
    tensors, size = {}, {"least": -16, "most": 16, "exponent": -6}
    for number, (name, (out, width)) in enumerate(modules.items()):
        tensors[f"{name}.lora_down.weight"] = dyadic(800 + 2 * number, 2, width, **size).half()
        tensors[f"{name}.lora_up.weight"] = dyadic(801 + 2 * number, out, 2, **size).half()
        tensors[f"{name}.alpha"] = torch.tensor(1.0, dtype=torch.float16)
    save_file(tensors, path, {"ss_network_dim": "2"})  # of several the order would be random


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
