"""Adapters trained on the in-memory model land on the keys on disk, in the base's own layout.

Oracle: PEFT's merge of the loaded model. float32 throughout, where both round once; PEFT rounds
expert deltas twice in bfloat16, so there `compat="peft"` is held against it bit by bit and the
default against float64.
"""

import json
import warnings
from collections import Counter

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.budget import STACKS
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine import reader
from adapterkit.core.errors import Refused
from adapterkit.kernels.quant import fp8
from tests.support import tiny
from tests.support.usual import usual

transformers.utils.logging.disable_progress_bar()
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def train(model, folder, **config):
    """A PEFT adapter with random factors, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    result.save_pretrained(folder)


def peft_merged(cls, base, adapter, dtype):
    with warnings.catch_warnings():
        # patterns for parameters are said to match nothing, and yet they count
        warnings.simplefilter("ignore")
        # PEFT's own mapping failed: no oracle
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload().state_dict()


def check_against_peft(
    model, tmp_path, dtype=torch.float32, tolerance=2e-7, options=None, **config
):
    cls = type(model)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model.to(dtype).save_pretrained(base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, adapter, **config)
    expected = peft_merged(cls, base, adapter, dtype)
    adapterkit.merge(base, [adapter], out=out, verify=True, **(options or {}))
    actual, info = cls.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    actual = actual.state_dict()
    assert any(not torch.equal(before[k], expected[k]) for k in expected)
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, rtol=0, atol=tolerance), key
    assert keys(base) == keys(out)


def keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


KINDS = [
    "nomic_bert", "gte", "jina_embeddings_v3", "hrm_text", "inkling_mm_model", "kimi_k25",
    "bailing_hybrid", "sarvam_moe", "deepseek_v4", "longcat_flash", "phimoe", "minimax", "llava",
    "qwen2_vl", "qwen2_5_vl", "gemma3", "internvl", "smolvlm", "blip-2", "gpt_neox", "t5", "clip",
    "vit", "opt", "bloom", "whisper", "falcon", "phi3", "llama4_text",
]  # fmt: skip


# others have the same layers, attention or wrapper around the language model, or are held against
# PEFT in tests/merge
ALIKE = {
    "qwen2_5_vl", "sarvam_moe", "kimi_k25", "hrm_text", "inkling_mm_model", "gpt_neox", "t5", "gte",
    "internvl", "smolvlm", "whisper", "phimoe", "vit", "clip", "opt", "bloom", "gemma3",
}  # fmt: skip


@pytest.mark.parametrize("kind", usual(KINDS, lambda kind: kind not in ALIKE))
def test_all_linear_layers_of_many_models(kind, tmp_path):
    # a router that multiplies by its classifier's weight itself: PEFT's factors do nothing there
    more = {"exclude_modules": ["classifier"]} if kind == "longcat_flash" else {}
    check_against_peft(tiny.model(kind), tmp_path, target_modules="all-linear", **more)


MOES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text"]


@pytest.mark.parametrize("kind", MOES)
def test_experts_as_parameters(kind, tmp_path):
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    check_against_peft(
        tiny.model(kind), tmp_path, target_modules=["q_proj"], target_parameters=targets
    )


@pytest.mark.parametrize("parameter", EXPERTS)
def test_one_of_two_parameters_is_determined_by_config_and_shapes(parameter, tmp_path):
    check_against_peft(
        tiny.model("mixtral"), tmp_path, target_modules=[], target_parameters=[parameter]
    )


@pytest.mark.parametrize("rows, columns", [(1, 0), (0, 1), (1, 1)])
def test_factors_of_experts_that_do_not_fit(rows, columns, tmp_path):
    """Of other ranks, and of one rank that is not the same for each expert."""
    model, base, adapter = tiny.model("mixtral"), tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    train(model, adapter, target_modules=[], target_parameters=EXPERTS[:1])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "layers.0." in key]:
        a, b = (tensors[key], None) if "lora_A" in key else (None, tensors[key])
        cut = a[: len(a) - rows] if a is not None else b[:, : b.shape[1] - columns]
        tensors[key] = cut.contiguous()
    save_file(tensors, file)
    with pytest.raises(Refused, match="experts"):
        adapterkit.merge(base, [adapter], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_bfloat16_experts_like_peft(kind, tmp_path):
    options = {"compat": "peft"}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = tiny.model(kind)
    check_against_peft(
        model,
        tmp_path,
        torch.bfloat16,
        0.0,
        options,
        target_modules=["q_proj"],
        target_parameters=targets,
    )


def test_rank_pattern_on_parameters(tmp_path):
    check_against_peft(
        tiny.model("qwen3_moe"), tmp_path, target_modules=["q_proj"], target_parameters=EXPERTS,
        rank_pattern={r".*\.gate_up_proj": 4}, alpha_pattern={r".*\.gate_up_proj": 5},
    )  # fmt: skip


def test_a_two_dimensional_parameter(tmp_path):
    check_against_peft(
        tiny.model("mixtral"), tmp_path, target_modules=[], target_parameters=["mlp.gate.weight"]
    )


def hand_made(tmp_path, old_layout, version, shape=(4, 16, 24), rank=2):
    """A base with one expert stack stored as it is, and an adapter in PEFT's layout up to 0.18 or
    since 0.19."""
    count, rows, columns = shape
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    weight = torch.randn(shape)
    inputs, outputs = (rows, columns) if old_layout else (columns, rows)
    a, b = torch.randn(rank * count, inputs), torch.randn(outputs, rank * count)
    save_file({"block.experts.up": weight}, base / "model.safetensors")
    key = "base_model.model.block.experts.lora_"
    save_file({key + "A.weight": a, key + "B.weight": b}, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_parameters": ["experts.up"],
    }
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | ({"peft_version": version} if version else {}))
    )
    delta = torch.einsum(
        "ore,eri->eoi", b.double().view(outputs, rank, count), a.double().view(count, rank, inputs)
    )
    return base, adapter, weight.double() + (delta.mT if old_layout else delta)


@pytest.mark.parametrize("old_layout", [True, False])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
def test_both_layouts_are_distinguished_by_shape(old_layout, version, tmp_path):
    base, adapter, expected = hand_made(tmp_path, old_layout, version)
    adapterkit.merge(base, [adapter], out=tmp_path / "out")
    actual = load_file(tmp_path / "out" / "model.safetensors")["block.experts.up"]
    assert torch.allclose(actual.double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "version, old_layout",
    [("0.18.1", True), ("0.17.0", True), ("0.19.0", False), ("0.21.2", False)],
)
def test_square_experts_by_the_version_that_wrote_them(version, old_layout, tmp_path):
    base, adapter, expected = hand_made(tmp_path, old_layout, version, (3, 16, 16))
    adapterkit.merge(base, [adapter], out=tmp_path / "out")
    actual = load_file(tmp_path / "out" / "model.safetensors")["block.experts.up"]
    assert torch.allclose(actual.double(), expected, atol=1e-5)


@pytest.mark.parametrize("layout, old_layout", [("peft-0.18", True), ("peft-0.19", False)])
def test_square_experts_without_a_version_need_the_option(layout, old_layout, tmp_path):
    base, adapter, expected = hand_made(tmp_path, old_layout, None, (3, 16, 16))
    with pytest.raises(Refused, match="--expert-layout"):
        adapterkit.merge(base, [adapter], out=tmp_path / "out")
    adapterkit.merge(base, [adapter], out=tmp_path / "out", expert_layout=layout)
    actual = load_file(tmp_path / "out" / "model.safetensors")["block.experts.up"]
    assert torch.allclose(actual.double(), expected, atol=1e-5)


def test_experts_trained_one_by_one_merge_into_a_fused_base(tmp_path):
    """An adapter of transformers 4 names experts.3.gate_proj; this base stores the stacks of
    transformers 5."""
    model = tiny.model("qwen3_moe")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    model.config.to_json_file(base / "config.json")
    factors, expected = {}, {k: v.clone() for k, v in state.items()}
    width = state["model.layers.0.mlp.experts.down_proj"].shape[2]
    for expert in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            stack = expected[
                "model.layers.0.mlp.experts."
                + ("down_proj" if name == "down_proj" else "gate_up_proj")
            ]
            part = {
                "down_proj": stack[expert],
                "gate_proj": stack[expert, :width],
                "up_proj": stack[expert, width:],
            }[name]
            a, b = torch.randn(2, part.shape[1]), torch.randn(part.shape[0], 2)
            part += 2 * b @ a
            key = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}.lora_"
            factors |= {key + "A.weight": a, key + "B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    adapterkit.merge(base, [adapter], out=tmp_path / "out")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, atol=1e-5), key


def test_names_of_an_older_transformers(tmp_path):
    """A base saved with today's names, an adapter with the names of before (model.layers
    -> model.language_model.layers)."""
    model = tiny.model("qwen2_vl")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    state = {
        k: v.contiguous().clone() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    save_file(state, base / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["Qwen2VLForConditionalGeneration"]
    model.config.to_json_file(base / "config.json")
    new, old = "model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    out, into = state[new + ".weight"].shape
    a, b = torch.randn(2, into), torch.randn(out, 2)
    key = f"base_model.model.{old}.lora_"
    save_file({key + "A.weight": a, key + "B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    adapterkit.merge(base, [adapter], out=tmp_path / "out")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    expected = state | {new + ".weight": state[new + ".weight"] + b @ a}
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, atol=1e-5), name


def test_an_adapter_of_another_model_is_refused_though_suffixes_match(tmp_path):
    tiny.model("qwen3_moe").save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = "base_model.model.other.layers.0.self_attn.q_proj.lora_"
    save_file(
        {key + "A.weight": torch.ones(2, 64), key + "B.weight": torch.ones(64, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    with pytest.raises(Refused, match="the base has no other.layers"):
        adapterkit.merge(tmp_path / "base", [adapter], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_of_experts_is_never_completely_in_memory(tmp_path):
    """Experts stored one by one are merged one by one: each step reads one stored tensor."""
    tiny.model("mixtral").save_pretrained(tmp_path / "base")
    train(transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter",
          target_modules=[], target_parameters=EXPERTS)  # fmt: skip
    plan = adapterkit.merge(
        tmp_path / "base", [tmp_path / "adapter"], out=tmp_path / "out", dry_run=True
    )
    changed = [step for shard in plan.shards for step in shard.steps if not step.copied]
    assert len(changed) == 2 * 4 * 3
    assert all(step.source.key == step.key and len(step.shape) == 2 for step in changed)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_each_expert_reads_its_own_factors(dtype, tmp_path, monkeypatch):
    """Of experts stored one by one, plain or quantized, each part of a is read once and b is cut
    once for all."""
    model = tiny.model("mixtral")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    train(model, tmp_path / "adapter", target_modules=[], target_parameters=EXPERTS)
    base = tmp_path / "base"
    if dtype == "fp8":
        quantized_experts(base)
    read, cut = Counter(), Counter()
    read_into = Sources.read_into

    def counted(sources: Sources, spec: TensorSpec, offset: int, buffer: memoryview) -> None:
        read.update({spec: len(buffer)})
        read_into(sources, spec, offset, buffer)

    monkeypatch.setattr(Sources, "read_into", counted)
    real = reader.SharedStacks.get
    monkeypatch.setattr(
        reader.SharedStacks,
        "get",
        lambda self, spec, make: real(self, spec, lambda: (cut.update({spec.key: 1}), make())[1]),
    )
    adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "out")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert cut == dict.fromkeys((key for key in factors if "lora_B" in key), 1)
    total = sum(size for spec, size in read.items() if spec.key in factors)
    # gate and up are stored apart, and both need a
    slots = {key: 2 if "base_layer" in key else 1 for key in factors}
    assert total == sum(
        value.nbytes * (slots[key] if "lora_A" in key else 1) for key, value in factors.items()
    )


def quantized_experts(folder):
    """FP8 in blocks of 32 x 32, as transformers stores it."""
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        result = fp8.encode_fp8(tensors[key].float(), (32, 32), rule="multiply")
        tensors |= {key: result.codes, key + "_scale_inv": result.scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_stacks_are_bounded_except_the_last_ones():
    stacks, result = reader.SharedStacks(), Counter()
    specs = [TensorSpec(str(i), "F32", (1,), "", 0, STACKS) for i in range(5)]

    def get(i):
        stacks.get(specs[i], lambda: (result.update([i]), torch.ones(1))[1])

    for i in (0, 1, 2, 0, 1, 2):
        get(i)
    assert result == {0: 1, 1: 1, 2: 1}
    for i in (3, 4, 3, 0):
        get(i)
    assert result == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1} and len(stacks.stacks) == reader.LEAST_STACKS
