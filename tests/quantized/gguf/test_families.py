"""Adapters merged into GGUF files of families that transformers does not read: what is written is
the merged model in llama.cpp's layout."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.adapters.formats import library
from adapterkit.adapters.formats.library import format_named
from adapterkit.adapters.formats.modules.names import rules_of
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.gguf_files import (
    COMMON,
    VOCAB,
    gguf,
    known_without_a_model,
    llama,
    names,
    of_llama,
    permuted,
    qwen35,
    write,
)
from tests.support.usual import usual

SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
GOLDEN = Path(__file__).parents[2] / "formats" / "golden"
# of llama.cpp's converters, those derived from its class of Llama that do not say otherwise
PERMUTED = ("llama", "arcee", "granite", "mistral3", "olmo", "smollm3")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
# whose loader renames keys, or whose experts are in stacks
ASKED = ("olmoe", "qwen3next", "gemma3n", "glm4moe", "deepseek2", "llama4")
# architecture -> class, config, modules and stacks that are adapted
FAMILIES: dict[str, tuple[str, str, dict[str, Any], list[str], list[str]]] = {
    "apertus": ("ApertusForCausalLM", "ApertusConfig", {}, [*ATTENTION, *MLP[1:]], []),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {}, [*ATTENTION, *MLP[1:]], []),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {}, [*ATTENTION, *MLP], []),
    "command-r": ("CohereForCausalLM", "CohereConfig", {}, [*ATTENTION, *MLP], []),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {}, [*ATTENTION, *MLP], []),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", {}, [*ATTENTION, *MLP], []),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {}, [*ATTENTION, *MLP], []),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {}, [*ATTENTION, "gate_up_proj", "down_proj"], []),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}, [*ATTENTION, *MLP], []),
    "hunyuan-dense": (
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        {},
        [*ATTENTION, *MLP],
        [],
    ),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", {}, [*ATTENTION, *MLP], []),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}, [*ATTENTION, *MLP], []),
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2},
        ATTENTION,
        STACKS,
    ),
    "phi2": ("PhiForCausalLM", "PhiConfig", {}, [*ATTENTION[:3], "dense", "fc1", "fc2"], []),
    "seed_oss": ("SeedOssForCausalLM", "SeedOssConfig", {}, [*ATTENTION, *MLP], []),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}, [*ATTENTION, *MLP], []),
    "qwen3next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 32},
        [*ATTENTION, "in_proj_ba", "out_proj", *(f"shared_expert.{name}" for name in MLP)],
        STACKS,
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        [*ATTENTION, *MLP, "per_layer_input_gate", "per_layer_projection"],
        [],
    ),
    "kimi-linear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {key: MLA[key] for key in MLA if "lora" not in key and "routed" not in key}
        | {"kv_lora_rank": 16, "q_lora_rank": None, "num_experts": 4, "num_experts_per_token": 2}
        | {"moe_intermediate_size": 48, "linear_num_heads": 2, "linear_head_dim": 16}
        | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"mlp_layer_types": ["dense", "sparse"]},
        [*ATTENTION[:3], "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "b_proj", "f_a_proj", *MLP],
        STACKS,
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
        [*ATTENTION, *MLP, "per_layer_input_gate", "per_layer_projection"],
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "mistral3": ("Ministral3ForCausalLM", "Ministral3Config", {}, [*ATTENTION, *MLP], []),
    "glm4moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        EXPERTS
        | {key: MLA[key] for key in ("n_routed_experts", "n_shared_experts", "n_group")}
        | {"first_k_dense_replace": 1, "topk_group": 1},
        [*ATTENTION, *MLP],
        STACKS,
    ),
    "deepseek2": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        EXPERTS | MLA,
        [*LATENT, "kv_b_proj", *MLP],
        STACKS,
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"intermediate_size_mlp": 80, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        [*ATTENTION, *MLP],
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
}

# that transformers reads, too: class of the config
READ = {
    "gemma2": "Gemma2Config",
    "nemotron": "NemotronConfig",
    "phi3": "Phi3Config",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "stablelm": "StableLmConfig",
    "starcoder2": "Starcoder2Config",
}

USUAL = ("granite", "cohere2", "glm4moe", "deepseek2", "mistral3", "qwen3next", "gemma3n", "llama4")


def model_of(arch: str) -> nn.Module:
    cls, kind, more, *_ = FAMILIES[arch]
    how = COMMON | {"tie_word_embeddings": False, "pad_token_id": 0} | more
    if "q_lora_rank" in more or arch in ("phi2", "olmo", "olmo2", "olmoe"):
        how.pop("head_dim")
    return oracle._model(cls, getattr(transformers, kind)(**how)).float()


def tensors_of(arch: str, model: nn.Module) -> dict[str, np.ndarray]:
    """The model in llama.cpp's layout, but for tensors that its converter makes otherwise and no
    adapter of these tests touches."""
    actual: dict[str, np.ndarray] = {}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, value in names(arch, model).items():
        kind = name.split(".")[-2]
        if arch == "llama4" and value.ndim == 3:  # (experts, in, out)
            value = value.swapaxes(1, 2)
        if kind == "attn_kv_b":
            heads_, layer = model.config.num_attention_heads, name.split(".")[1]
            each = value.reshape(heads_, -1, value.shape[1])
            k, v = np.split(each, [model.config.qk_nope_head_dim], axis=1)
            actual |= {f"blk.{layer}.attn_k_b.weight": k.swapaxes(1, 2).copy()}
            actual |= {f"blk.{layer}.attn_v_b.weight": v.copy()}
            continue
        if "gate_up_proj" in name or "gate_up_exps" in name:
            layer = name.split(".")[2 if name.startswith("model") else 1]
            if value.ndim == 3 and arch != "gemma4":
                halves = zip(("gate", "up"), np.split(value, 2, axis=1), strict=True)
                actual |= {f"blk.{layer}.ffn_{half}_exps.weight": own for half, own in halves}
                continue
        if arch in PERMUTED and kind in heads:
            value = permuted(value, heads[kind])
        actual[name] = value.copy()
    return actual


def metadata_of(model: nn.Module) -> dict[str, Any]:
    config = SimpleNamespace(**model.config.to_dict())
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": 64,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(
            config, "intermediate_size_mlp", getattr(config, "intermediate_size", 0)
        ),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or 16,
        "attention.shared_kv_layers": getattr(config, "num_kv_shared_layers", None),
        "attention.q_lora_rank": getattr(config, "q_lora_rank", None),
        "attention.kv_lora_rank": getattr(config, "kv_lora_rank", None),
        "attention.key_length_mla": getattr(config, "qk_head_dim", None),
        "attention.value_length_mla": getattr(config, "v_head_dim", None),
        "rope.dimension_count": getattr(config, "qk_rope_head_dim", None),
        "leading_dense_block_count": getattr(config, "first_k_dense_replace", None),
        "expert_count": getattr(config, "num_experts", None)
        or getattr(config, "n_routed_experts", None)
        or getattr(config, "num_local_experts", None),
        "expert_shared_count": getattr(config, "n_shared_experts", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(
            config, "shared_expert_intermediate_size", None
        ),
    }
    if isinstance(found["feed_forward_length"], list):
        found["feed_forward_length"] = found["feed_forward_length"][0]
    return {key: value for key, value in found.items() if value is not None}


def train(model: nn.Module, out: Path, modules: list[str], stacks: list[str]) -> Any:
    """The model with an adapter of random factors."""
    with oracle.quiet():
        config = LoraConfig(r=4, target_modules=modules, target_parameters=stacks or None)
        wrapped = get_peft_model(model, config)
        oracle.perturb(wrapped, 3)
        wrapped.save_pretrained(out)
    return wrapped


def adapter_of(model: nn.Module, out: Path, modules: list[str]) -> dict[str, Tensor]:
    train(model, out, modules, [])
    return load_file(out / "adapter_model.safetensors")


def read(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: np.array(tensor.data) for tensor in tensors}


@pytest.mark.parametrize(
    "arch",
    usual(
        FAMILIES,
        (
            "granite",
            "cohere2",
            "glm4moe",
            "deepseek2",
            "mistral3",
            "qwen3next",
            "gemma3n",
            "llama4",
        ),
    ),
)
def test_the_merged_model_in_the_layout_of_the_file(arch: str, tmp_path: Path):
    model, (*_, modules, stacks) = model_of(arch), FAMILIES[arch]
    # copies: PEFT merges stacks in place
    before = {name: value.copy() for name, value in tensors_of(arch, model).items()}
    path = write(tmp_path / "m.gguf", arch, metadata_of(model), before, tokens=None)
    assert bool(known_without_a_model(path)) == (arch not in ASKED)
    wrapped = train(model, tmp_path / "a", modules, stacks)
    expected = tensors_of(arch, wrapped.merge_and_unload())
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", verify=True)
    actual = read(tmp_path / "out.gguf")
    assert actual.keys() == expected.keys() == before.keys()
    changed = 0
    for name, value in expected.items():
        if np.array_equal(value, before[name]):
            assert np.array_equal(actual[name].reshape(value.shape), value), name
        else:
            changed += 1
            assert np.allclose(actual[name].reshape(value.shape), value, atol=1e-6), name
    layers = model.config.num_hidden_layers
    assert changed >= layers * len(ATTENTION) - 2


def joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With queries, keys and values in one tensor, and gate and up of experts, as llama.cpp's
    converter is told to by --fuse-qkv and --fuse-gate-up-exps."""
    found = dict(tensors)
    wholes = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
    wholes |= {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
    for whole, parts in wholes.items():
        for name in [name for name in found if f".{parts[0]}." in name]:
            each = [found.pop(name.replace(parts[0], part)) for part in parts]
            found[name.replace(parts[0], whole)] = np.concatenate(
                each, axis=max(each[0].ndim - 2, 0)
            )
    return found


@pytest.mark.parametrize("arch", ["granite", "glm4moe", "llama"])
def test_tensors_in_one(arch: str, tmp_path: Path):
    if arch == "llama":  # which transformers reads, but not so
        model, message, _ = llama()
        stacks, of = [], lambda model: of_llama(model)[1]
    else:
        model, stacks = model_of(arch), FAMILIES[arch][4]
        message, of = metadata_of(model), lambda model: tensors_of(arch, model)
    before = joined(of(model))
    path = write(tmp_path / "m.gguf", arch, message, before, tokens=None)
    assert "blk.0.attn_qkv.weight" in before and bool(stacks) == any("gate_up" in n for n in before)
    wrapped = train(model.float(), tmp_path / "a", ["q_proj", "v_proj"], stacks)
    expected = joined(of(wrapped.merge_and_unload()))
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", verify=True)
    actual = read(tmp_path / "out.gguf")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(actual[name].reshape(value.shape), value, atol=1e-6), name
        assert np.array_equal(value, before[name]) == ("qkv.w" not in name and "exps" not in name)


def test_fused_experts_next_to_linear_attention(tmp_path: Path):
    """What a hybrid has in attn_qkv is one module, and stays."""
    model, message, tensors = qwen35(experts=True)
    train(model.float(), tmp_path / "a", ["q_proj", "shared_expert.up_proj"], STACKS)
    files = {}
    for name, own in (("apart", tensors), ("one", joined(tensors))):
        path = write(tmp_path / f"{name}.gguf", "qwen35moe", message, own)
        adapterkit.merge(path, tmp_path / "a", out=tmp_path / f"{name}-out.gguf", verify=True)
        files[name] = read(tmp_path / f"{name}-out.gguf")
    expected = joined(files["apart"])
    assert files["one"].keys() == expected.keys() and "blk.3.attn_q.weight" not in expected
    assert all(np.array_equal(files["one"][name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "arch, shifted", [("gemma", True), ("qwen3next", True), ("exaone4", False)]
)
def test_norms_that_were_trained(arch: str, shifted: bool, tmp_path: Path):
    """Those of which llama.cpp adds 1 to the weights, and others."""
    model = model_of(arch)
    of = lambda model: {
        name: value + (shifted and "norm" in name and "ssm_norm" not in name)
        for name, value in tensors_of(arch, model).items()
    }
    before = of(model)
    path = write(tmp_path / "m.gguf", arch, metadata_of(model), before, tokens=None)
    whole = [n.removesuffix(".weight") for n, v in model.named_parameters() if "norm" in n]
    with oracle.quiet():
        config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=whole)
        wrapped = get_peft_model(model, config)
        oracle.perturb(wrapped, 5)
        wrapped.save_pretrained(tmp_path / "a")
    expected = of(wrapped.merge_and_unload())
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", verify=True)
    changed = 0
    for name, value in read(tmp_path / "out.gguf").items():
        assert np.allclose(value.reshape(expected[name].shape), expected[name], atol=1e-6), name
        changed += not np.array_equal(value, before[name])
    assert changed >= len(whole)


@pytest.mark.parametrize("arch", usual(READ, ("phi3", "qwen3")))
def test_architectures_that_are_read_without_a_model(arch: str, tmp_path: Path):
    config = getattr(transformers, READ[arch])
    tied = arch == "gemma2"
    model = oracle._model(
        READ[arch].replace("Config", "ForCausalLM"),
        config(**COMMON, tie_word_embeddings=tied, pad_token_id=0),
    )
    metadata = metadata_of(model) | {"/tokenizer.ggml.padding_token_id": 0}
    path = write(tmp_path / "m.gguf", arch, metadata, tensors_of(arch, model))
    assert known_without_a_model(path) > 8


def test_names_are_those_of_the_gguf_package():
    """As `tests/formats/golden/make_gguf_names.py` asked it; None for what a family does not have,
    of which the tables of others that are included say more."""
    golden = json.loads((GOLDEN / "gguf_names.json").read_text())
    architectures = format_named("gguf").names.architectures
    assert [*golden] == [*architectures]
    for name in architectures:
        for rule in rules_of(library.architectures()[name], ""):
            own = rule.namings.get("gguf") or rule.namings.get("gguf_model")
            known = [golden[name][module] for module in rule.model if own]
            assert {*known} <= {own, None}, (name, rule)


@pytest.mark.parametrize("word", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_model_that_sees(word: str, tmp_path: Path):
    model = model_of("mistral3")
    before = tensors_of("mistral3", model)
    path = write(tmp_path / "m.gguf", "mistral3", metadata_of(model), before, tokens=None)
    adapter = adapter_of(model, tmp_path / "a", ["q_proj"])
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "plain.gguf")
    file = tmp_path / "a" / "adapter_model.safetensors"
    renamed = {key.replace("model.layers", f"{word}layers"): v for key, v in adapter.items()}
    save_file(renamed, file)
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "seeing.gguf")
    plain, seeing = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("plain", "seeing"))
    assert plain == seeing


def test_families_that_need_a_config_are_refused(tmp_path: Path):
    model = model_of("cohere2")
    tensors = tensors_of("cohere2", model)
    path = write(tmp_path / "m.gguf", "cohere2", metadata_of(model), tensors, tokens=None)
    with pytest.raises(Refused, match="transformers .* cannot read the config"):
        adapterkit.dequantize(path, out=tmp_path / "floats")
    keys = adapter_of(model, tmp_path / "a", ["q_proj"])
    unknown = {key.replace("q_proj", "z_proj"): value.clone() for key, value in keys.items()}
    save_file(keys | unknown, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(
        Refused, match=r"the base has no model.layers.0.self_attn.z_proj[\s\S]*convert that to GGUF"
    ):
        adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "floats").exists()


def test_rows_in_an_order_for_other_positions_are_refused(tmp_path: Path):
    model = model_of("glm4")
    message = metadata_of(model) | {"rope.dimension_sections": [4, 2, 2, 0]}
    path = write(tmp_path / "m.gguf", "glm4", message, tensors_of("glm4", model), tokens=None)
    adapter_of(model, tmp_path / "a", ["q_proj"])
    with pytest.raises(Refused, match="sections of positions"):
        adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")


def test_tensors_without_a_name_are_compared_too(tmp_path: Path):
    model = model_of("cohere2")
    tensors = tensors_of("cohere2", model) | {"blk.0.unknown.weight": np.ones(32, np.float32)}
    path = write(tmp_path / "m.gguf", "cohere2", metadata_of(model), tensors, tokens=None)
    tensors["blk.0.unknown.weight"] = tensors["blk.0.unknown.weight"] + 1
    other = write(tmp_path / "o.gguf", "cohere2", metadata_of(model), tensors, tokens=None)
    found: Any = adapterkit.diff(path, other)
    assert [row["name"] for row in found["changed"]] == ["blk.0.unknown.weight"]


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen3VL"])
def test_the_language_model_of_a_model_that_sees(kind: str, tmp_path: Path):
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=COMMON, vision_config=vision)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    layer = model.get_submodule("model.language_model.layers.1")
    weights = {
        "blk.1.attn_k.weight": layer.self_attn.k_proj.weight,
        "blk.1.ffn_up.weight": layer.mlp.up_proj.weight,
    }
    random = np.random.default_rng(1)
    tensors = {
        name: random.normal(size=value.shape).astype(np.float32) for name, value in weights.items()
    }
    message = {key: COMMON[name] for key, name in SIZES.items()}
    path = write(tmp_path / "m.gguf", kind.lower(), message, tensors, tokens=None)
    factors = {}
    for module, value in zip(("self_attn.k_proj", "mlp.up_proj"), tensors.values(), strict=True):
        stem = f"base_model.model.model.language_model.layers.1.{module}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(2, value.shape[1])
        factors[f"{stem}.lora_B.weight"] = torch.randn(value.shape[0], 2)
    (tmp_path / "a").mkdir()
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "up_proj"]).save_pretrained(
        tmp_path / "a"
    )
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")
    a, b = [*factors.values()][::2], [*factors.values()][1::2]
    for (name, actual), one, other in zip(read(tmp_path / "out.gguf").items(), a, b, strict=True):
        expected = torch.from_numpy(tensors[name]) + other @ one
        assert torch.allclose(torch.from_numpy(actual), expected, atol=1e-5)
