"""inspect: what it says of sound bases and adapters, held against PEFT in memory and dense
float64."""

import math

import numpy as np
import pytest
import torch
import transformers
from peft.tuners.lora import layer as peft_layers
from safetensors.torch import load_file, save_file

import realmodel
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.weights.parameters import Axis, Slot
from adapterkit.verbs.look import factors
from tests.support import oracle, raw_files, tiny
from tests.support.inspections import inspect, problems_of


def wrapped_deltas(base, adapter, build):
    """(delta, weight) of every adapted parameter in float64, by PEFT, with its layer; keys as
    inspect's `parameter`s."""
    wrapped = oracle.peft_model(oracle.load(build, base), adapter).double()
    deltas = {}
    with torch.no_grad(), oracle.quiet():
        for path, layer in wrapped.named_modules():
            if isinstance(layer, peft_layers.LoraLayer):
                name = path.removeprefix("base_model.model.").replace(".base_layer", "")
                leaf = getattr(layer, "parameter_name", None) or "weight"
                leaf = (
                    "in_proj_weight"
                    if isinstance(layer.get_base_layer(), torch.nn.MultiheadAttention)
                    else leaf
                )
                deltas[f"{name}.{leaf}"] = (
                    layer.get_delta_weight("a0"),
                    getattr(layer.get_base_layer(), leaf),
                    layer,
                )
    return deltas


def entropy_rank(matrix):
    values = np.linalg.svd(matrix.flatten(1).numpy(), compute_uv=False) ** 2
    p = values[values > values.max() * 1e-20] / values.sum()
    return math.exp(-(p * np.log(p)).sum())


def check_against_peft(base, adapter, build):
    """Ranks, scales, norms, effective ranks and relative norms of every module, with the base and
    without it."""
    deltas = wrapped_deltas(base, adapter, build)
    result = inspect(adapter, base=base)
    assert problems_of(result) == []
    assert {module["parameter"] for module in result["modules"]} == set(deltas)
    for module in result["modules"]:
        delta, weight, layer = deltas[module["parameter"]]
        assert (module["rank"], module["alpha"]) == (layer.r["a0"], layer.lora_alpha["a0"])
        assert (
            module["scale"] == pytest.approx(layer.scaling["a0"], rel=1e-12)
            and module["trained"] is True
        )
        assert module["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
        assert module["relative"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-9)
        experts = list(delta) if module["experts"] else [delta]
        assert module["effective_rank"] == pytest.approx(
            sum(map(entropy_rank, experts)) / len(experts), rel=1e-6
        )
    alone = inspect(adapter)
    known = ("module", "depth", "rank", "scale", "norm", "effective_rank")
    assert [[m[k] for k in known] for m in alone["modules"]] == [
        [m[k] for k in known] for m in result["modules"]
    ]
    return result


@pytest.fixture(scope="module")
def smollm2():
    return realmodel.smollm2(layers=3, shards=2)


def test_a_real_base(smollm2):
    result = inspect(smollm2)
    stored = oracle.stored(smollm2)
    files = sorted(smollm2.glob("*.safetensors"))
    assert (result["kind"], result["name"], result["problems"], result["modules"]) == (
        "base",
        smollm2.name,
        [],
        [],
    )
    assert result["parameters"] == sum(tensor.numel() for tensor in stored.values()) == 38_932_416
    assert result["bytes"] == sum(file.stat().st_size for file in files)
    count = {
        "tensors": len(stored),
        "parameters": result["parameters"],
        "bytes": 2 * result["parameters"],
    }
    assert result["dtypes"] == {"BF16": count}
    assert [(shard["file"], shard["tensors"]) for shard in result["shards"]] == [
        (f.name, len(load_file(f))) for f in files
    ]
    assert result["architecture"] == {"classes": ["LlamaForCausalLM"], "model_type": "llama"}
    assert (
        result["tied"] == {"config": True, "head_stored": False} and result["quantization"] is None
    )


def test_a_lora_of_a_real_base(smollm2, tmp_path):
    config = {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
    }
    oracle.train(
        oracle.load_checked(transformers.LlamaForCausalLM, smollm2),
        tmp_path / "lora",
        size=0.01,
        **config,
    )
    result = check_against_peft(smollm2, tmp_path / "lora", "LlamaForCausalLM")
    row = {"kind": "module", "rank": 8, "alpha": 16, "scale": 16 / math.sqrt(8), "count": 3}
    assert result["groups"] == [
        {"modules": name} | row for name in ("down_proj", "q_proj", "v_proj")
    ]
    assert result["flags"]["rslora"] is True and result["flags"]["dora"] is False
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert result["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert (result["format"], result["peft_type"], result["statistics"]) == ("peft", "LORA", True)


# -- every kind of layer ---------------------------------------------------------------------------

ALPHAS = {"k_proj": 7, r"layers\.1\..*_proj": 9}
KINDS = {
    "patterns": (
        oracle.llama,
        {"target_modules": oracle.LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": ALPHAS},
    ),
    "dora": (oracle.llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": (oracle.llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": (oracle.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "layers": (
        oracle.net,
        {"target_modules": "line image tall point volume attention embed fit narrow".split()},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_norms_and_ranks_equal_peft_s_deltas(name, cached_folder, tmp_path):
    build, config = KINDS[name]
    base = cached_folder(
        f"inspect-{build.__name__}", lambda folder: oracle.save_base(build(), folder, "fp32")
    )
    oracle.train(oracle.load(build, base), tmp_path / "adapter", **config)
    result = check_against_peft(base, tmp_path / "adapter", build)
    assert result["flags"]["dora"] is (name == "dora")


def test_experts_are_one_module_each(tmp_path):
    """Stacks that the base stores expert by expert; two wrappers on one module, told apart by the
    base."""
    tiny.model("mixtral").save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    oracle.train(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets)
    result = check_against_peft(tmp_path / "base", tmp_path / "adapter", "MixtralForCausalLM")
    assert {group["modules"]: group["count"] for group in result["groups"]} == {
        "experts.down_proj": 2, "experts.gate_up_proj": 2, "q_proj": 2,
    }  # fmt: skip
    assert [module["experts"] for module in inspect(tmp_path / "adapter")["modules"]] == [
        4,
        4,
        None,
    ] * 2


def test_wrappers_with_patterns_need_the_base(tmp_path):
    """A file of two parameters of one module does not say which is which: a scale is not
    guessed."""
    tiny.model("mixtral").save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    pattern = {r".*\.gate_up_proj": 5}
    oracle.train(
        model,
        tmp_path / "adapter",
        target_modules=[],
        target_parameters=targets,
        alpha_pattern=pattern,
    )
    result = inspect(tmp_path / "adapter")
    assert all(module["scale"] is None and module["norm"] is None for module in result["modules"])
    assert (
        "ambiguous parameters" in problems_of(result)[0]
        and "--base" in result["problems"][0]["hint"]
    )
    scales = {
        m["parameter"].rpartition(".")[2]: m["scale"]
        for m in inspect(tmp_path / "adapter", base=tmp_path / "base")["modules"]
    }
    assert scales == {"gate_up_proj": 5 / 4, "down_proj": 6 / 4}


POSITIONS = {
    "whole": (range(40), range(6), range(5)),
    "rows": (range(7, 31), range(6), range(5)),
    "every-third-row": (range(1, 40, 3), range(6), range(5)),
    "permuted": (np.array([39, 3, 17, 0]), range(6), range(5)),
    "columns": (range(40), range(6), range(1, 4)),
    "both": (range(0, 40, 2), np.array([5, 0]), range(5)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_the_norm_of_a_part_of_a_stored_tensor(name, tmp_path, monkeypatch):
    """Read seven rows at a time, whatever positions a slot has."""
    weight = torch.randn(40, 6, 5)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    size = (tmp_path / "w.safetensors").stat().st_size
    spec = TensorSpec("w", "F32", (40, 6, 5), "w.safetensors", size - weight.numel() * 4, size)
    slot = Slot("w", (40, 6, 5), tuple(Axis(0, i, of) for i, of in enumerate(POSITIONS[name])))
    monkeypatch.setattr(factors, "BLOCK", 7 * 6 * 5 * 4)
    with Sources((LocalFolder(tmp_path),), {}) as sources:
        reader = LocalReader(sources, torch.device("cpu"), dtype=None)
        squares = factors._sum_of_squares(spec, slot, reader, lambda done: None)
    picked = weight.double().numpy()[np.ix_(*map(list, POSITIONS[name]))]
    assert squares == pytest.approx((picked**2).sum(), rel=1e-12)


def test_effective_ranks_equal_those_by_hand():
    assert factors.effective_rank(torch.ones(5, dtype=torch.float64)) == pytest.approx(5)
    assert factors.effective_rank(torch.tensor([3.0, 0.0])) == pytest.approx(1)
    assert factors.effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(
        math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    )


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    tensors = {
        k: v
        for i in (10, 2, 1)
        for k, v in raw_files.pair(f"model.layers.{i}.q_proj", 16, 16, seed=i).items()
    }
    raw_files.AdapterFiles(raw_files.adapter_config(), tensors).folder().write(tmp_path / "adapter")
    modules = inspect(tmp_path / "adapter")["modules"]
    assert [module["module"] for module in modules] == [
        f"model.layers.{i}.q_proj" for i in (1, 2, 10)
    ]


def test_inspect_lists_modules_saved_besides_factors(tmp_path):
    raw_files.everything_else().folder().write(tmp_path / "all")
    result = inspect(tmp_path / "all")
    assert result["modules_to_save"] == ["score"] and result["flags"]["bias"] == "all"
    assert result["replaced"] == [
        "model.layers.0.up_proj.bias",
        "model.layers.1.up_proj.bias",
        "score.weight",
    ]
    assert {m["module"]: m["kind"] for m in result["modules"]} == {
        "model.embed": "embedding",
        "model.conv": "module",
    }
    raw_files.token_rows().folder().write(tmp_path / "rows")
    assert inspect(tmp_path / "rows")["tokens"] == [{"module": "model.embed", "rows": [0, 7, 19]}]
