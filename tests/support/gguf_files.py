"""GGUF files of tiny models in llama.cpp's layouts, and what transformers reads of them."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapterkit.bases.gguf.header import find_gguf
from adapterkit.bases.gguf.model import open_plain_gguf
from adapterkit.bases.gguf.weight import GgufWeight, encode_rows
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.sources import open_source
from tests.support import oracle

gguf = pytest.importorskip("gguf")

VOCAB = 96
TOKENS = (
    [chr(33 + i) for i in range(80)]
    + ["ab", "<s>", "</s>"]
    + [f"<unused{i}>" for i in range(VOCAB - 83)]
)
SIZES = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
ROPE = 10000.0


def decoded_kinds() -> list[Any]:
    """Types of blocks that the package decodes."""
    actual = []
    for kind, (_, width) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, width), np.uint8), kind)
        except NotImplementedError:
            continue
        actual.append(kind)
    return [kind for kind in actual if kind.name not in ("F32", "F16", "BF16")]


def blocks(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random blocks of a type whose values are finite."""
    values, width = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    actual = random.integers(0, 256, (int(np.prod(shape)) // values, width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        while not (
            fine := (np.abs(np.nan_to_num(gguf.dequantize(actual, kind), nan=1e9)) < 1e4).all(
                axis=-1
            )
        ).all():
            actual[~fine] = random.integers(0, 256, ((~fine).sum(), width), dtype=np.uint8)
    return actual.reshape(*shape[:-1], shape[-1] // values * width)


def write(
    path: Path,
    arch: str,
    settings: dict[str, Any],
    tensors: dict[str, Any],
    tokens: list[str] | None = TOKENS,
) -> Path:
    """A GGUF file by the package's own writer; a tensor is an array of floats, or (type,
    blocks)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in settings.items():
        if key == "/general.alignment":
            writer.add_custom_alignment(value)
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(
            key.removeprefix("/") if key[0] == "/" else f"{arch}.{key}", value
        )
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(81)
        writer.add_eos_token_id(82)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[1], raw_dtype=value[0])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- models in llama.cpp's layouts, as its converter writes them ----------------------------------


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: pairs that rotate together stand side by side."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def names(arch: str, model: nn.Module) -> dict[str, np.ndarray]:
    """The model's weights under llama.cpp's names, by its converter's own table."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    actual = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, ending = (
            key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "weight")
        )
        actual[f"{table.get_name(stem) or stem}.{ending}"] = value.float().numpy()
    return actual


def attention(config: Any, **more: Any) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": float(rope["rope_theta"]),
    } | more


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
COMMON |= {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def llama(**how: Any) -> tuple[nn.Module, dict, dict]:
    model = oracle._model(
        "LlamaForCausalLM",
        transformers.LlamaConfig(**COMMON | {"tie_word_embeddings": False} | how),
    )
    return (model, *of_llama(model))


def of_llama(model: nn.Module) -> tuple[dict, dict]:
    """A Llama's metadata and tensors."""
    config, actual = model.config, names("llama", model)
    for name in actual:
        if ".attn_q." in name or ".attn_k." in name:
            keys = ".attn_k." in name
            heads = config.num_key_value_heads if keys else config.num_attention_heads
            actual[name] = permuted(actual[name], heads)
    more = {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    return attention(config, **more), actual


def gemma3() -> tuple[nn.Module, dict, dict]:
    model = oracle._model("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**COMMON))
    actual = {
        name: value + 1 if name.endswith("norm.weight") else value
        for name, value in names("gemma3", model).items()
    }
    return (
        model,
        attention(model.config, **{"attention.key_length": 16, "attention.sliding_window": 32}),
        actual,
    )


def qwen3moe(width: int = 768, head: int = 16) -> tuple[nn.Module, dict, dict]:
    how = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "head_dim": head,
    }
    how |= {"tie_word_embeddings": False, "norm_topk_prob": True}
    model = oracle._model("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**COMMON | how))
    actual: dict[str, np.ndarray] = {}
    for name, value in names("qwen3moe", model).items():
        if "gate_up" in name:
            layer = name.split(".")[2] if name.startswith("model") else name.split(".")[1]
            gate, up = np.split(value, 2, axis=1)
            actual |= {
                f"blk.{layer}.ffn_gate_exps.weight": gate,
                f"blk.{layer}.ffn_up_exps.weight": up,
            }
        else:
            actual[name] = value
    more = {
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": width,
        "attention.key_length": head,
    }
    return model, attention(model.config, **more), actual


def lfm2() -> tuple[nn.Module, dict, dict]:
    how = {
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    }
    config = {key: value for key, value in COMMON.items() if key != "head_dim"} | how
    model = oracle._model("Lfm2ForCausalLM", transformers.Lfm2Config(**config))
    actual = {
        name: value.squeeze(1) if ".conv.weight" in name else value
        for name, value in names("lfm2", model).items()
    }
    return (
        model,
        attention(model.config, **{"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}),
        actual,
    )


def gpt2() -> tuple[nn.Module, dict, dict]:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4)
    model = oracle._model("GPT2LMHeadModel", config)
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    actual = {
        name: value.T if name.endswith(turned) else value
        for name, value in names("gpt2", model).items()
    }
    message = {
        "block_count": 2,
        "context_length": 1024,
        "embedding_length": 48,
        "feed_forward_length": 192,
    }
    return (
        model,
        message | {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5},
        actual,
    )


def falcon() -> tuple[nn.Module, dict, dict]:
    """With one head of keys, as Falcon 7B."""
    config = {key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "ffn_hidden_size": 256}
    model = oracle._model("FalconForCausalLM", transformers.FalconConfig(**config, bias=False))
    settings = {"context_length": 64, "block_count": 2, "embedding_length": 64}
    settings |= {"feed_forward_length": 256, "attention.head_count": 4}
    settings |= {"attention.head_count_kv": 1, "attention.layer_norm_epsilon": 1e-5}
    return model, settings, names("falcon", model)


def minimax_m2() -> tuple[nn.Module, dict, dict]:
    how = {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}
    config = transformers.MiniMaxM2Config(**COMMON | how | {"tie_word_embeddings": False})
    model = oracle._model("MiniMaxM2ForCausalLM", config)
    actual = names("minimax-m2", model)
    for layer in range(config.num_hidden_layers):
        key = f"model.layers.{layer}.mlp."
        actual[f"blk.{layer}.exp_probs_b.bias"] = actual.pop(f"{key}e_score_correction_bias.weight")
    more = {"expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2}
    more |= {"rope.dimension_count": 8, "attention.key_length": 16}
    return model, attention(config, **more), in_halves(actual)


def in_halves(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacks of gate and up, each in a tensor of its own."""
    actual: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if "gate_up" not in name:
            actual[name] = value
            continue
        layer = name.split(".")[2 if name.startswith("model") else 1]
        halves = zip(("gate", "up"), np.split(value, 2, axis=1), strict=True)
        actual |= {f"blk.{layer}.ffn_{half}_exps.weight": own.copy() for half, own in halves}
    return actual


def tiled(value: np.ndarray, first: int = 0) -> np.ndarray:
    """llama.cpp's order of what belongs to six heads of values of two of keys, from a row on: the
    first of each, then the second and the third of each."""
    heads = value[first:].reshape(2, 3, -1, *value.shape[1:]).swapaxes(0, 1)
    return np.concatenate([value[:first], heads.reshape(-1, *value.shape[1:])])


def of_qwen35(name: str, value: np.ndarray) -> np.ndarray:
    """A tensor of Qwen 3.5 with two heads of keys and six of values, each of 16."""
    if name.endswith("norm.weight") and "ssm_norm" not in name:
        return value + 1
    if ".ssm_conv1d." in name:
        value = value.squeeze(1)
    if ".ssm_a" in name and ".ssm_alpha" not in name:
        value = -np.exp(value)
    if any(part in name for part in (".attn_qkv.", ".ssm_conv1d.")):
        return tiled(value, 64)
    if ".ssm_out." in name:
        return np.ascontiguousarray(tiled(value.T).T)
    over = (".attn_gate.", ".ssm_alpha.", ".ssm_beta.", ".ssm_a", ".ssm_dt")
    return tiled(value) if any(part in name for part in over) else value


def qwen35(experts: bool = False) -> tuple[nn.Module, dict, dict]:
    """Three layers of linear attention and one of full attention."""
    kind, arch = ("Qwen3_5Moe", "qwen35moe") if experts else ("Qwen3_5", "qwen35")
    how = {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 6}
    how |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": ROPE, "partial_rotary_factor": 0.25}
    how |= {"rope_parameters": rope | {"mrope_section": [11, 11, 10], "mrope_interleaved": True}}
    if experts:
        how |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        how |= {"shared_expert_intermediate_size": 32}
    config = getattr(transformers, f"{kind}TextConfig")(**COMMON | how)
    model = oracle._model(f"{kind}ForCausalLM", config)
    more = {
        "attention.key_length": 16,
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.inner_size": 96,
        "rope.dimension_sections": [11, 11, 10, 0],
        "rope.dimension_count": 4,
    }
    if experts:
        more |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
        more |= {"expert_shared_feed_forward_length": 32, "feed_forward_length": 96}
    actual = {}
    for name, value in names(arch, model).items():
        own = re.sub(r"model\.layers\.(\d+).*dt_bias\.weight", r"blk.\1.ssm_dt.bias", name)
        own = own.removesuffix(".weight") if own.endswith(".ssm_a.weight") else own
        actual[own] = of_qwen35(own, value)
    return model, attention(config, **more), in_halves(actual)


MODELS: dict[str, Callable[[], tuple[nn.Module, dict, dict]]] = {
    "llama": llama,
    "gemma3": gemma3,
    "qwen3moe": qwen3moe,
    "lfm2": lfm2,
    "gpt2": gpt2,
    "falcon": falcon,
    "minimax-m2": minimax_m2,
    "qwen35": qwen35,
    "qwen35moe": lambda: qwen35(experts=True),
}


def known_without_a_model(path: Path) -> int:
    """How many parameters of a file are known without its model, each as it is known with it."""
    files, known = find_gguf(open_source(path)), 0
    plain = open_plain_gguf(files) if files else None
    full = read_checkpoint(open_source(path))
    for key, weight in plain.tensors.items() if plain else ():
        assert isinstance(weight, GgufWeight) and weight.placement
        if weight.parts[0].key == key:
            continue
        other, known = full.tensors[key], known + 1
        assert isinstance(other, GgufWeight) and other.placement
        assert (weight.types, weight.shape, weight.parts) == (other.types, other.shape, other.parts)
        numbers = torch.arange(math.prod(weight.shape)).view(-1, weight.shape[-1]).float()
        one, two = (each.placement.join([numbers], weight.shape) for each in (weight, other))
        assert torch.equal(one, two)
    return known


def stored(folder: Path) -> dict[str, Tensor]:
    return {
        key: value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def theirs(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with oracle.quiet():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype
        ).state_dict()


def same(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    left = {key: value for key, value in other.items() if key not in ours}
    assert all(key == "lm_head.weight" for key in left)
    for key, value in ours.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def split(path: Path, folder: Path, parts: list[int]) -> list[Path]:
    """The file in parts of so many tensors, as llama-gguf-split writes them."""
    folder.mkdir()
    reader, first, paths = gguf.GGUFReader(path), 0, []
    for number, count in enumerate(parts):
        name = folder / f"m-{number + 1:05d}-of-{len(parts):05d}.gguf"
        writer = gguf.GGUFWriter(name, reader.fields["general.architecture"].contents())
        if number:
            writer.kv_data[0].clear()
        else:
            copy_metadata(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(parts))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[first : first + count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        first += count
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        paths.append(name)
    return paths


def copy_metadata(reader: Any, writer: Any) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


# --- image models, as ComfyUI-GGUF's tools/convert.py and its patched quantizer write them --------


def write_images(
    path: Path,
    tensors: dict[str, Tensor],
    kind: str = "F32",
    *,
    arch: str = "flux",
    in_rows: bool = False,
    metadata: bool = True,
) -> Path:
    """Tensors in their publisher's names: matrices in a type, or in F16 where its blocks do not
    fit, others in F32. `in_rows`: what has rows of other widths in rows of 256, as of Stable
    Diffusion; `metadata`: none is as stable-diffusion.cpp writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    if not metadata:
        writer.kv_data[0].clear()
    for name, value in tensors.items():
        if in_rows and value.dim() > 1 and value.numel() % 256 == 0 and value.shape[-1] % 256:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", tuple(value.shape))
            value = value.reshape(-1, 256)
        own = kind if value.dim() == 2 else "F32"
        if value.shape[-1:] and value.shape[-1] % SIZES[gguf.GGMLQuantizationType[own].value][0]:
            own = "F16"
        array = encode_rows(own, value.reshape(-1, value.shape[-1])).numpy()
        shape = (*value.shape[:-1], array.shape[-1])
        raw = array.reshape(shape)
        raw = (
            raw.view(np.float32) if own == "F32" else raw.view(np.float16) if own == "F16" else raw
        )
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[own])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def read_images(path: Path) -> dict[str, Tensor]:
    """The values of a file by gguf-py, in the shapes that ComfyUI-GGUF gives them."""
    reader, found = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = field.contents() if field else tensor.shape[::-1].tolist()
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values)).float().reshape(shape)
    return found
