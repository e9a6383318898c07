"""The largest open checkpoints as files with holes, and adapters for them: published names, shapes,
dtypes and number of files, no data."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import common

Tensors = Iterator[tuple[str, str, tuple[int, ...]]]  # key, dtype, shape
BYTES = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
BLOCK = 128  # of fp8
RANK = 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LINEAR = common.TARGETS
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


# --- the five shapes ------------------------------------------------------------------------------


def llama(layers: int = 126, hidden: int = 16384, inner: int = 53248) -> tuple[dict, Tensors]:
    config = common.config_for(2) | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}

    def tensors() -> Tensors:
        for key, shape in common.model_shapes(config):
            yield key, "BF16", shape

    return config, tensors()


def deepseek(
    layers: int = 61,
    experts: int = 256,
    dense: int = 3,
    heads: int = 128,
    vocab: int = 129280,
    predicts: int = 1,
) -> tuple[dict, Tensors]:
    """DeepSeek-V3: latent attention, experts one by one, fp8 with a scale for each block of
    128 x 128; `predicts` MTP layers."""
    hidden, inner, wide, q_rank, kv_rank, nope, rope = 7168, 2048, 18432, 1536, 512, 128, 64
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": predicts,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }

    def linear(name: str, out: int, width: int) -> Tensors:
        yield f"{name}.weight", "F8_E4M3", (out, width)
        yield f"{name}.weight_scale_inv", "F32", (math.ceil(out / BLOCK), math.ceil(width / BLOCK))

    def mlp(name: str, width: int) -> Tensors:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    def layer(n: int) -> Tensors:
        at = f"model.layers.{n}"
        yield from linear(f"{at}.self_attn.q_a_proj", q_rank, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (q_rank,)
        yield from linear(f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        yield from linear(f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (kv_rank,)
        yield from linear(f"{at}.self_attn.kv_b_proj", heads * (nope + 128), kv_rank)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * 128)
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        if n < dense:
            yield from mlp(f"{at}.mlp", wide)
            return
        yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from mlp(f"{at}.mlp.shared_experts", inner)
        for expert in range(experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", inner)

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            yield from layer(n)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)
        for n in range(layers, layers + predicts):
            at = f"model.layers.{n}"
            yield f"{at}.embed_tokens.weight", "BF16", (vocab, hidden)
            yield f"{at}.enorm.weight", "BF16", (hidden,)
            yield f"{at}.hnorm.weight", "BF16", (hidden,)
            yield f"{at}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield from layer(n)
            yield f"{at}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{at}.shared_head.head.weight", "BF16", (vocab, hidden)

    return config, tensors()


def kimi(layers: int = 61, experts: int = 384) -> tuple[dict, Tensors]:
    return deepseek(layers, experts, dense=1, heads=64, vocab=163840, predicts=0)


def qwen(
    layers: int = 94,
    experts: int = 128,
    hidden: int = 4096,
    inner: int = 1536,
    heads: int = 64,
    vocab: int = 151936,
) -> tuple[dict, Tensors]:
    """Qwen3-MoE, experts one by one."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            at = f"model.layers.{n}"
            yield f"{at}.self_attn.q_proj.weight", "BF16", (heads * 128, hidden)
            yield f"{at}.self_attn.k_proj.weight", "BF16", (512, hidden)
            yield f"{at}.self_attn.v_proj.weight", "BF16", (512, hidden)
            yield f"{at}.self_attn.o_proj.weight", "BF16", (hidden, heads * 128)
            yield f"{at}.self_attn.q_norm.weight", "BF16", (128,)
            yield f"{at}.self_attn.k_norm.weight", "BF16", (128,)
            yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
            for expert in range(experts):
                yield f"{at}.mlp.experts.{expert}.gate_proj.weight", "BF16", (inner, hidden)
                yield f"{at}.mlp.experts.{expert}.up_proj.weight", "BF16", (inner, hidden)
                yield f"{at}.mlp.experts.{expert}.down_proj.weight", "BF16", (hidden, inner)
            yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)

    return config, tensors()


def gpt_oss(layers: int = 36, experts: int = 128) -> tuple[dict, Tensors]:
    """gpt-oss: stacks of experts in mxfp4."""
    hidden, vocab = 2880, 201088
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": vocab,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", "BF16", (vocab, hidden)
        for n in range(layers):
            at = f"model.layers.{n}"
            for name, out, width in (
                ("q", 4096, hidden),
                ("k", 512, hidden),
                ("v", 512, hidden),
                ("o", hidden, 4096),
            ):
                yield f"{at}.self_attn.{name}_proj.weight", "BF16", (out, width)
                yield f"{at}.self_attn.{name}_proj.bias", "BF16", (out,)
            yield f"{at}.self_attn.sinks", "BF16", (64,)
            yield f"{at}.mlp.router.weight", "BF16", (experts, hidden)
            yield f"{at}.mlp.router.bias", "BF16", (experts,)
            for name, out in (("gate_up", 2 * hidden), ("down", hidden)):
                yield f"{at}.mlp.experts.{name}_proj_blocks", "U8", (experts, out, hidden // 32, 16)
                yield f"{at}.mlp.experts.{name}_proj_scales", "U8", (experts, out, hidden // 32)
                yield f"{at}.mlp.experts.{name}_proj_bias", "BF16", (experts, out)
            yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield "model.norm.weight", "BF16", (hidden,)
        yield "lm_head.weight", "BF16", (vocab, hidden)

    return config, tensors()


@dataclass(frozen=True)
class Base:
    name: str
    shape: Callable[..., tuple[dict, Tensors]]  # called with layers= and perhaps experts=
    shards: int
    modules: tuple[str, ...]  # that the adapter has
    experts: bool  # and an adapter on the experts beside
    small: dict  # sizes of the model that pays the imports


BASES = (
    Base("Llama-3.1-405B", llama, 191, LINEAR, False, {"layers": 2}),
    Base("Qwen3-235B-A22B", qwen, 118, ATTENTION, True, {"layers": 2, "experts": 8}),
    Base("gpt-oss-120b", gpt_oss, 15, ATTENTION, True, {"layers": 2, "experts": 8}),
    Base("DeepSeek-V3", deepseek, 163, LATENT, True, {"layers": 2, "experts": 16, "dense": 1}),
    Base("Kimi-K2-like", kimi, 61, LATENT, False, {"layers": 2, "experts": 16}),
)


# --- files with holes -----------------------------------------------------------------------------


def write_sparse(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """A safetensors file whose data is a hole, read as zeros; its data's bytes."""
    table: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, dtype, shape in tensors:
        stop = at + BYTES[dtype] * math.prod(shape)
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


def make_base(folder: Path, config: dict, tensors: Tensors, shards: int) -> Path:
    if folder.exists():
        return folder
    part = common.fresh(folder.with_name(folder.name + ".part"))
    entries = list(tensors)
    total = sum(BYTES[dtype] * math.prod(shape) for _, dtype, shape in entries)
    groups: list[list] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used >= total * len(groups) / shards:
            groups.append([])
        groups[-1].append(entry)
        used += BYTES[entry[1]] * math.prod(entry[2])
    weight_map = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_sparse(part / name, group)
        weight_map |= {key: name for key, _, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (part / "config.json").write_text(json.dumps(config, indent=2))
    return part.rename(folder)


def make_adapter(
    folder: Path, config: dict, tensors: Tensors, modules: tuple[str, ...], experts: bool
) -> Path:
    """A LoRA of rank 16 in float32 as PEFT writes it: holes for factors."""
    if folder.exists():
        return folder
    part = common.fresh(folder.with_name(folder.name + ".part"))
    layers = config["num_hidden_layers"]
    factors: list[tuple[str, str, tuple[int, ...]]] = []

    def lora(module: str, out: int, width: int, count: int = 1) -> None:
        factors.append((f"base_model.model.{module}.lora_A.weight", "F32", (count * RANK, width)))
        factors.append((f"base_model.model.{module}.lora_B.weight", "F32", (out, count * RANK)))

    stacks = set()
    for key, _, shape in tensors:
        module = key.removesuffix(".weight")
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else layers
        if (
            layer < layers
            and module.rpartition(".")[2] in modules
            and ".experts." not in key
            and key.endswith(".weight")
        ):
            lora(module, shape[0], shape[1])
        if layer < layers and ".mlp.experts." in key:
            stacks.add(layer)
    count = next(
        (
            config[name]
            for name in ("n_routed_experts", "num_experts", "num_local_experts")
            if name in config
        ),
        0,
    )
    hidden, inner = (
        config["hidden_size"],
        config.get("moe_intermediate_size", config["intermediate_size"]),
    )
    for layer in sorted(stacks) if experts else ():
        at = f"model.layers.{layer}.mlp.experts"
        lora(f"{at}.base_layer", 2 * inner, hidden, count)  # gate_up_proj, the inner wrapper
        lora(at, hidden, inner, count)
    write_sparse(part / "adapter_model.safetensors", factors)
    chosen = {
        "target_modules": list(modules),
        "target_parameters": list(STACKS) if experts else None,
    }
    (part / "adapter_config.json").write_text(
        json.dumps({**common.PEFT_CONFIG, "r": RANK, "lora_alpha": 2 * RANK, **chosen}, indent=2)
    )
    return part.rename(folder)
