"""inspect: what it says of bases, adapters and files, held against PEFT in memory and dense
float64; and files that are damaged."""

import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch
import transformers
from peft.tuners.lora import layer as peft_layers
from safetensors.torch import load_file, save_file

import adapterkit
import realmodel
from adapterkit.adapters.peft import read_adapter
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, Refused
from adapterkit.reports import factors, pictures, tables
from adapterkit.weights.slots import Axis, Slot
from tests.support import oracle, raw_files, tiny
from tests.support.hub_server import Hub

ROOT = Path(__file__).parents[2]
EVERY = {
    "inspect", "kind", "name", "origin", "parameters", "bytes", "dtypes", "shards", "architecture", "tied", "quantization",
    "readable", "problems", "modules",
}  # fmt: skip
ADAPTER = EVERY | {
    "format", "peft_type", "base", "revision", "task_type", "peft_version", "flags", "modules_to_save", "replaced", "tokens",
    "groups", "statistics",
}  # fmt: skip
MODULE = {
    "module", "kind", "depth", "parameter", "experts", "rank", "alpha", "scale", "trained", "norm", "effective_rank", "relative",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


def inspect(*words, **options):
    """The result, which must be JSON without NaN and hold the schema's keys."""
    result = adapterkit.inspect(*words, **options)
    json.dumps(result, allow_nan=False)
    assert set(result) == (ADAPTER if result["kind"] == "adapter" else EVERY)
    assert result["inspect"] == 1
    assert all(
        set(problem) == {"found", "expected", "where", "do"} for problem in result["problems"]
    )
    assert all(set(module) == MODULE for module in result["modules"])
    return result


def found(result):
    return [problem["found"] for problem in result["problems"]]


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
    assert found(result) == []
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


# -- a real model ----------------------------------------------------------------------------------


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
    "patterns": (oracle.llama, {"target_modules": oracle.LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": ALPHAS}),
    "dora": (oracle.llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": (oracle.llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": (oracle.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "layers": (oracle.net, {"target_modules": "line image tall point volume attention embed fit narrow".split()}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_against_peft(name, cached_folder, tmp_path):
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
    assert "cannot be told apart" in found(result)[0] and "--base" in result["problems"][0]["do"]
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
        squares = factors._squares(spec, slot, sources, lambda done: None)
    picked = weight.double().numpy()[np.ix_(*map(list, POSITIONS[name]))]
    assert squares == pytest.approx((picked**2).sum(), rel=1e-12)


def test_effective_rank():
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


def test_what_is_saved_besides_factors(tmp_path):
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


# -- adapters that are not as they should be -------------------------------------------------------


def edited(source, out, edit, **config):
    """A copy of an adapter with its tensors changed by `edit` and its config by `config`."""
    oracle.edit_config(source, out, **config)
    tensors = load_file(out / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def key(tensors, *parts):
    return next(name for name in tensors if all(part in name for part in parts))


def test_modules_that_were_not_trained(lora, tmp_path):
    one = edited(
        lora, tmp_path / "one", lambda t: t[key(t, "layers.1", "q_proj", "lora_B")].zero_()
    )
    modules = inspect(one)["modules"]
    idle = [m for m in modules if not m["trained"]]
    assert [m["module"] for m in idle] == ["model.layers.1.self_attn.q_proj"] and len(modules) == 14
    assert (idle[0]["norm"], idle[0]["effective_rank"]) == (0, 0) and found(inspect(one)) == []
    none = edited(
        lora, tmp_path / "none", lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]
    )
    assert found(inspect(none)) == ["no module is trained: every b is zero"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_problem(value, lora, tmp_path):
    def spoil(tensors):
        tensors[key(tensors, "layers.0", "v_proj", "lora_A")][1, 2] = value

    result = inspect(edited(lora, tmp_path / "bad", spoil))
    assert found(result) == ["1 values that are not finite (NaN or infinity)"]
    assert "layers.0.self_attn.v_proj.lora_A" in result["problems"][0]["where"]
    unknown = [m["module"] for m in result["modules"] if m["norm"] is None]
    assert unknown == ["model.layers.0.self_attn.v_proj"]


def test_other_values_that_are_not_finite(tmp_path):
    files = raw_files.everything_else()
    values = np.full((3, raw_files.WIDTH), np.nan, np.float32)
    files.tensors[f"{raw_files.PREFIX}score.weight"] = raw_files.Stored.of(values)
    files.folder().write(tmp_path / "bad")
    assert found(inspect(tmp_path / "bad")) == ["values that are not finite (NaN or infinity)"]


@pytest.mark.parametrize("size, norm", [(1e-100, 0.0), (1e-60, 1e-120), (1e200, None)])
def test_factors_at_the_ends_of_float64(size, norm, tmp_path):
    """A product, or a square, that leaves float64's range is no wrong number, and no exception."""
    a, b = np.zeros((4, 16)), np.zeros((16, 4))
    a[0, 0] = a[1, 1] = b[0, 0] = b[1, 1] = size * 1e-70 if norm == 0.0 else size
    name = f"{raw_files.PREFIX}model.layers.0.q_proj.lora_"
    tensors = {f"{name}A.weight": raw_files.Stored.of(a), f"{name}B.weight": raw_files.Stored.of(b)}
    raw_files.AdapterFiles(raw_files.adapter_config(lora_alpha=4), tensors).folder().write(
        tmp_path / "adapter"
    )
    result = inspect(tmp_path / "adapter")
    module = result["modules"][0]
    assert module["trained"] and module["effective_rank"] == pytest.approx(2)
    assert module["norm"] == (
        None if norm is None else pytest.approx(norm * math.sqrt(2), rel=1e-9, abs=0)
    )
    assert len(result["problems"]) == (norm is None)


REFUSED = {
    "kasa": (
        {"kasa_config": {"beta": 1}, "use_dora": False},
        "kasa_config is set: KaSA truncates the base",
        True,
    ),
    "unknown": ({"use_magic": True}, "unknown setting use_magic = True", True),
    "pissa": ({"init_lora_weights": "pizza"}, "init_lora_weights = 'pizza'", False),
    "rank": ({"r": 3}, "rank 4 in the file", False),
    "no-alpha": ({"lora_alpha": None}, "lora_alpha = None", False),
    "kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA'", False),
    "dora": ({"use_dora": True}, "use_dora, but none for", True),
    "pattern": ({"alpha_pattern": {"(": 2}}, "pattern '('", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_merge_refuses_is_a_problem(name, lora, tmp_path):
    """The rest is still told: norms too, unless the scale is not known."""
    config, words, scaled = REFUSED[name]
    oracle.edit_config(lora, tmp_path / "odd", **config)
    result = inspect(tmp_path / "odd")
    assert any(text.startswith(words) for text in found(result)), found(result)
    assert len(result["modules"]) == 14 and all(
        m["trained"] and m["effective_rank"] > 1 for m in result["modules"]
    )
    assert all(
        (m["norm"] is not None) == (m["scale"] is not None) == scaled for m in result["modules"]
    )


def test_a_merge_and_an_inspection_use_the_same_words(lora, llama, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd", kasa_config={"beta": 1}, use_magic=True)
    with pytest.raises(Refused) as refusal:
        adapterkit.merge(llama, [odd], out=tmp_path / "out")
    assert found(inspect(odd)) == [error.problem for error in refusal.value.errors]


def test_an_adapter_of_another_base(lora, tmp_path):
    """What a merge into that base would refuse is listed; the norms are there all the same."""
    oracle.save_base(oracle.llama(hidden_size=64), tmp_path / "wide")
    result = inspect(lora, base=tmp_path / "wide")
    assert len(result["problems"]) == 14 and all("shape" in text for text in found(result))
    assert all(m["relative"] is None and m["norm"] > 0 for m in result["modules"])


def test_one_refusal_hides_no_other(lora, tmp_path):
    oracle.edit_config(lora, tmp_path / "odd", use_magic=True, use_dora=True)
    texts = found(inspect(tmp_path / "odd"))
    assert (
        len(texts) == 2
        and texts[0].startswith("unknown setting use_magic")
        and texts[1].startswith("use_dora, but none for")
    )


JUNK = [
    None,
    True,
    0,
    -1,
    1.5,
    math.nan,
    math.inf,
    10**400,
    "x",
    "(",
    [],
    [1],
    ["a"],
    [None],
    [[1, 2]],
    {},
    {"a": "b"},
    {"(": 1},
    {"a": [1]},
]


def test_no_config_is_a_traceback(one_thread, tmp_path):
    """Every setting with every kind of wrong value, with factors of each kind beside it."""
    more = {
        "target_parameters",
        "trainable_token_indices",
        "layer_replication",
        "kasa_config",
        "revision",
    }
    for make, settings in (
        (raw_files.everything_else, {*raw_files.adapter_config(), *more}),
        (raw_files.token_rows, {"r", *more}),
    ):
        files = make()
        files.folder().write(tmp_path / make.__name__)
        for setting, value in itertools.product(sorted(settings), JUNK):
            config = json.dumps(files.config | {setting: value})
            (tmp_path / make.__name__ / "adapter_config.json").write_text(config)
            result = inspect(tmp_path / make.__name__)
            assert len(result["modules"]) == (2 if make is raw_files.everything_else else 1)
            tables.table(result)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


DAMAGED_ADAPTERS = {
    "cut": (cut, "cut off"),
    "no-weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "bad-config": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "list-config": (lambda f: (f / "adapter_config.json").write_text("[]"), "a JSON list"),
    "pickle": (lambda f: (f / "adapter_model.bin").write_bytes(pickle.dumps(1)), "pickles beside the adapter: adapter_model"),
    "model": (lambda f: shutil.copy(f / "adapter_model.safetensors", f / "model.safetensors"), "other weights beside"),
    "lfs": (lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.g"), "a Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_ADAPTERS)
def test_a_damaged_adapter(name, lora, tmp_path):
    damage, words = DAMAGED_ADAPTERS[name]
    shutil.copytree(lora, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter")
    assert result["kind"] == "adapter" and any(words in text for text in found(result)), found(
        result
    )
    assert result["peft_type"] == (None if "config" in name else "LORA")
    assert len(result["modules"]) == (0 if name in ("cut", "no-weights", "lfs") else 14)


# -- bases that are not as they should be ----------------------------------------------------------

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def rewritten(folder, name, edit):
    path = folder / name
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def restored(folder, norm):
    save_file(load_file(folder / SHARD) | {NORM: norm}, folder / SHARD)


DAMAGED = {
    "cut": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-2]), "the data is cut off"),
    "missing": (lambda f: (f / SHARD).unlink(), f"no file {SHARD}"),
    "html": (lambda f: (f / SHARD).write_text("<!doctype html>" + " " * 100), "an HTML page"),
    "empty-file": (lambda f: (f / SHARD).write_bytes(b""), "a file of 0 bytes"),
    "no-weight-map": (lambda f: rewritten(f, INDEX, lambda i: i.pop("weight_map")), "no weight_map"),
    "index-key": (lambda f: rewritten(f, INDEX, lambda i: i["weight_map"].update(ghost=SHARD)), f"ghost is not in {SHARD}"),
    "unlisted-key": (lambda f: rewritten(f, INDEX, lambda i: i["weight_map"].pop(NORM)), f"{NORM} in"),
    "bad-index": (lambda f: (f / INDEX).write_text("{"), "not JSON"),
    "total": (lambda f: rewritten(f, INDEX, lambda i: i["metadata"].update(total_size=5)), "total_size 5"),
    "stray": (lambda f: shutil.copy(f / SHARD, f / "old.safetensors"), "weights that are not part of the model: old.safetensors"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(1)), "pickles beside the weights: pytorch_model.bin"),
    "no-config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad-config": (lambda f: (f / "config.json").write_text("{]"), "not JSON"),
    "layers": (lambda f: rewritten(f, "config.json", lambda c: c.update(num_hidden_layers=10**6)), "num_hidden_layers = 1000000"),
    "empty-tensor": (lambda f: restored(f, torch.empty(0)), f"1 empty tensors: {NORM}"),
    "dtypes": (lambda f: restored(f, torch.ones(32)), "floats of several dtypes: BF16 (20 tensors), F32 (1 tensors)"),
    "headless": (lambda f: rewritten_without(f, "lm_head.weight"), "no head is stored, and tie_word_embeddings is false"),
    "tied": (lambda f: rewritten(f, "config.json", lambda c: c.update(tie_word_embeddings=True)), "lm_head.weight is stored, and"),
}  # fmt: skip


def rewritten_without(folder, name):
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    size = tensors.pop(name).nbytes
    save_file(tensors, file)
    index["metadata"]["total_size"] -= size
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def sharded(cached_folder, tmp_path):
    source = cached_folder(
        "inspect-sharded",
        lambda folder: oracle.save_base(oracle.llama(), folder, max_shard_size="30KB"),
    )
    shutil.copytree(source, tmp_path / "base")
    assert (tmp_path / "base" / SHARD).exists()
    return tmp_path / "base"


def test_a_sound_base_has_no_problems(sharded):
    result = inspect(sharded)
    assert found(result) == [] and len(result["shards"]) == 2
    assert result["tied"] == {"config": False, "head_stored": True}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_base(name, sharded):
    """The problem is told, and what else can be read."""
    damage, words = DAMAGED[name]
    damage(sharded)
    result = inspect(sharded)
    assert result["kind"] == "base" and any(words in text for text in found(result)), found(result)
    assert result["parameters"] > 0 and "Traceback" not in tables.table(result)
    if name in ("cut", "html", "empty-file"):
        assert [shard["tensors"] is None for shard in result["shards"]] == [False, True]
    if name in ("stray", "total", "pickle", "no-config", "headless", "tied"):
        assert len(result["problems"]) == 1


def test_every_damaged_shard_is_listed(sharded):
    for file in sharded.glob("*.safetensors"):
        file.write_bytes(b"\0" * 9)
    assert len(found(inspect(sharded))) == 2


def test_a_missing_shard_hides_no_other_problem(sharded):
    """Nor does it make problems of what only seems to be missing."""

    def spoil(index):
        index["weight_map"]["ghost"] = index["weight_map"].pop(EMBEDDING)

    rewritten(sharded, INDEX, spoil)
    for name in ("missing", "layers", "pickle"):
        DAMAGED[name][0](sharded)
    words = [
        f"no file {SHARD}",
        "ghost is not in",
        f"{EMBEDDING} in",
        "num_hidden_layers = 1000000",
        "pickles beside",
    ]
    texts = found(inspect(sharded))
    assert len(texts) == len(words) and all(
        text.startswith(word) for text, word in zip(texts, words, strict=True)
    ), texts


def test_a_refusal_lists_what_an_inspection_finds(sharded, lora, tmp_path):
    """One reading behind both: of a model, and of an adapter."""
    for name in ("missing", "layers", "unlisted-key"):
        DAMAGED[name][0](sharded)
    (sharded / SHARD.replace("2-of", "1-of")).write_bytes(b"\0" * 9)
    with pytest.raises(AdapterkitError) as refusal:
        open_checkpoint(LocalFolder(sharded))
    assert (
        found(inspect(sharded)) == [error.problem for error in refusal.value.errors]
        and len(found(inspect(sharded))) == 3
    )
    oracle.edit_config(lora, tmp_path / "odd", r=0, use_dora=True)
    cut(tmp_path / "odd")
    with pytest.raises(AdapterkitError) as refusal:
        read_adapter(LocalFolder(tmp_path / "odd"))
    assert (
        found(inspect(tmp_path / "odd")) == [error.problem for error in refusal.value.errors]
        and len(refusal.value.errors) == 2
    )


def test_a_config_nested_too_deeply_is_a_problem(sharded):
    (sharded / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200)
    assert found(inspect(sharded)) == ["not JSON: nested too deeply"]


def test_weights_as_pickles_alone(lora, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    assert found(inspect(tmp_path / "base")) == ["weights as pickles: pytorch_model.bin"]
    shutil.copytree(lora, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    result = inspect(tmp_path / "adapter")
    assert (
        found(result) == ["no adapter_model.safetensors"]
        and "convert the pickle" in result["problems"][0]["do"]
    )


QUANTISED = {
    "config": (
        {"quantization_config": {"quant_method": "fp8", "bits": 8}},
        "model.norm.extra",
        "quantization_config (fp8)",
    ),
    "siblings": (
        {},
        "model.layers.0.q_proj.weight_scale_inv",
        "model.layers.0.q_proj.weight_scale_inv (block fp8)",
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantized_base(name, tmp_path):
    config, extra, words = QUANTISED[name]
    files = raw_files.base(**config)
    tensors = (
        raw_files.base_tensors()
        | {extra: raw_files.normal(2)}
        | {"other": raw_files.Stored.of(np.ones(2, np.float16))}
    )
    files.content["model.safetensors"] = raw_files.tensors_file(tensors)
    files.write(tmp_path / "base")
    result = inspect(tmp_path / "base")
    assert result["quantization"] == {"found": words, "config": config.get("quantization_config")}
    assert found(result) == []  # several dtypes are the rule there
    with pytest.raises(Refused, match="a quantized base"):
        raw_files.plain().folder().write(tmp_path / "adapter")
        inspect(tmp_path / "adapter", base=tmp_path / "base")


# -- files, paths, the command line ----------------------------------------------------------------


def test_a_file(lora, llama, tmp_path):
    result = inspect(llama / "model.safetensors")
    assert (result["kind"], result["name"], found(result)) == ("file", "model.safetensors", [])
    assert result["parameters"] == inspect(llama)["parameters"] and result["tied"] is None
    assert found(inspect(lora / "adapter_model.safetensors")) == [
        "factors of a LoRA without adapter_config.json"
    ]
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    assert "not a safetensors file" in found(inspect(tmp_path / "bad.safetensors"))[0]


def refused(*words, **options):
    with pytest.raises(Refused) as error:
        adapterkit.inspect(*words, **options)
    assert error.value.hint
    return str(error.value)


def test_what_is_nothing_is_refused(lora, llama, tmp_path):
    assert "no such path" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "neither a checkpoint nor an adapter" in refused(tmp_path / "empty")
    shutil.copytree(lora, tmp_path / "run" / "checkpoint-5")
    assert "checkpoint-5" in refused(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("x")
    assert "not a .safetensors file" in refused(tmp_path / "notes.txt")
    assert "--base and --plot" in refused(llama, base=llama, plot=tmp_path / "x.png")


def run(*words, **environment):
    command = [sys.executable, "-m", "adapterkit", "inspect", *map(str, words)]
    variables = os.environ | environment
    return subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=60
    )


def called(*words):
    """The command in this process: (status, stdout)."""
    result = click.testing.CliRunner().invoke(main, ["inspect", *map(str, words)])
    return result.exit_code, result.stdout


def test_the_table_and_the_json_are_the_result(lora, llama, tmp_path):
    assert json.loads(called(lora, "--base", llama, "--json")[1]) == inspect(lora, base=llama)
    status, text = called(lora, "--base", llama)
    assert status == 0 and text.endswith("problems: none\n")
    line = next(
        line for line in text.splitlines() if line.startswith("model.layers.1.mlp.up_proj")
    ).split()
    module = next(m for m in inspect(lora, base=llama)["modules"] if m["module"] == line[0])
    said = [
        f"{module[name]:.4g}" for name in ("rank", "scale", "norm", "relative", "effective_rank")
    ]
    assert line[1:] == [*said[:2], "yes", *said[2:]]
    assert "relative" not in called(lora)[1]


@pytest.mark.parametrize("name", ["cut", "html", "empty-file", "missing"])
def test_what_cannot_be_read_is_status_1(name, sharded, lora, tmp_path):
    """The problem is printed as any other."""
    DAMAGED[name][0](sharded)
    status, text = called(sharded)
    assert status == 1 and "problems: 1\n" in text
    assert json.loads(called(sharded, "--json")[1])["readable"] is False
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    assert called(tmp_path / "bad.safetensors")[0] == 1
    shutil.copytree(lora, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert called(tmp_path / "adapter")[0] == 1
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert called(tmp_path / "adapter")[0] == 1


def test_what_a_trainer_leaves_is_no_problem(sharded, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "adapter")
    for folder in (sharded, tmp_path / "adapter"):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(1))
        assert found(inspect(folder)) == []


OTHERS = {
    "diffusers": [
        "unet.down_blocks.0.attentions.0.to_q.lora.down.weight",
        "unet.mid_block.to_k.lora_A.weight",
    ],
    "kohya": [
        "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight",
        "lora_te1_text_model_q_proj.alpha",
    ],
}


@pytest.mark.parametrize("layout", OTHERS)
def test_a_lora_of_another_layout_is_called_so(layout, lora, llama, tmp_path):
    for i, key in enumerate(
        [
            *OTHERS[layout],
            *(["transformer.blocks.0.attn.to_q.lora_A.weight"] * (layout == "diffusers")),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({key: torch.ones(2, 3)}, folder / "pytorch_lora_weights.safetensors")
        words = f"pytorch_lora_weights.safetensors is a LoRA in the layout of {layout}"
        for path in (folder, folder / "pytorch_lora_weights.safetensors"):
            result = inspect(path)
            assert (result["kind"], found(result)) == ("file", [words])
        for verb in (
            lambda folder=folder: adapterkit.merge(llama, [folder], out=tmp_path / "out"),
            lambda folder=folder: adapterkit.merge(folder, [lora], out=tmp_path / "out"),
            lambda folder=folder: adapterkit.combine(
                [lora, folder], method="linear", out=tmp_path / "out"
            ),
        ):
            with pytest.raises(Refused, match=words) as caught:
                verb()
            assert "config.json" not in caught.value.problem and "load_lora_weights" in str(
                caught.value
            )
    assert called(folder)[0] == 0


def test_problems_are_printed_and_the_status_is_0(lora, tmp_path):
    oracle.edit_config(lora, tmp_path / "odd", use_magic=True, r=3)
    status, text = called(tmp_path / "odd")
    assert (
        status == 0
        and "problems: 15" in text
        and "unknown setting use_magic" in text
        and "hint:" in text
    )
    assert text.count("rank 4 in the file") == 1 and "and 13 more like it" in text


def test_a_path_that_is_nothing_is_status_1(tmp_path):
    done = run(tmp_path / "nothing")
    assert (
        (done.returncode, done.stdout) == (1, "")
        and "no such path" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_headers_are_read_without_torch(llama):
    code = (
        "import sys, adapterkit; adapterkit.inspect(sys.argv[1]); print({'torch', 'numpy', "
        "'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "set()\n", done.stderr


def test_no_name_acts_on_a_terminal(tmp_path):
    files = raw_files.plain()
    files.config |= {
        "base_model_name_or_path": "\x1b[2J\u202eevil",
        "modules_to_save": ["\x1b]0;x\x07"],
    }
    files.folder().write(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter")
    for text in (tables.table(result), json.dumps(result, ensure_ascii=False)):
        assert all(c.isprintable() or c == "\n" for c in text)


# -- the Hub ---------------------------------------------------------------------------------------

WIDE = 512


@pytest.fixture
def hub():
    generator = np.random.default_rng(0)
    normal = lambda *shape: raw_files.Stored.of(generator.standard_normal(shape).astype(np.float32))
    layers = [{f"model.layers.{i}.q_proj.weight": normal(WIDE, WIDE)} for i in range(2)]
    names = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    index = {
        "metadata": {},
        "weight_map": {k: name for name, layer in zip(names, layers, strict=True) for k in layer},
    }
    base = {name: raw_files.tensors_file(layer) for name, layer in zip(names, layers, strict=True)}
    base |= {"config.json": b'{"hidden_size": 512}', INDEX: json.dumps(index).encode()}
    tensors = {}
    for i in range(2):
        tensors |= {
            f"{raw_files.PREFIX}model.layers.{i}.q_proj.lora_{k}.weight": normal(*s)
            for k, s in (("A", (64, WIDE)), ("B", (WIDE, 64)))
        }
    with Hub() as hub:
        hub.commit("org/base", base)
        hub.commit(
            "org/adapter",
            {
                f"v1/{k}": v
                for k, v in raw_files.AdapterFiles(raw_files.adapter_config(r=64), tensors)
                .folder()
                .content.items()
            },
        )
        yield hub


def on_hub(hub, tmp_path, *words):
    done = run(*words, "--json", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights_ranges(hub):
    return [
        (asked.range, asked.sent)
        for asked in hub.asked("GET", ".safetensors")
        if not asked.path.endswith(".json")
    ]


def test_a_base_on_the_hub_by_its_headers(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/base")
    assert (
        result["parameters"] == 2 * WIDE * WIDE
        and result["origin"]["repo"] == "org/base"
        and found(result) == []
    )
    asked = weights_ranges(hub)
    # of a megabyte each
    assert len(asked) == 2 and all(part == (0, 65536) and sent <= 65536 for part, sent in asked)


def test_an_adapter_on_the_hub_by_its_header_and_config(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/adapter:v1")
    assert [(m["rank"], m["alpha"], m["scale"]) for m in result["modules"]] == [(64, 8, 0.125)] * 2
    assert not result["statistics"] and all(
        m["norm"] is None and m["trained"] is None for m in result["modules"]
    )
    asked = weights_ranges(hub)
    assert len(asked) == 1 and asked[0][0] == (0, 65536)  # of half a megabyte
    assert "--download" in tables.table(result)


def test_weights_on_the_hub_are_read_when_asked_for(hub, tmp_path):
    result = on_hub(hub, tmp_path, "org/adapter:v1", "--base", "org/base", "--download")
    for name, repo in (("adapter", "org/adapter"), ("base", "org/base")):
        (tmp_path / name).mkdir()
        for path, data in hub.files(repo).items():
            (tmp_path / name / path.removeprefix("v1/")).write_bytes(data)
    assert result["modules"] == inspect(tmp_path / "adapter", base=tmp_path / "base")["modules"]
    assert all(m["relative"] > 0 for m in result["modules"])


def test_factors_on_the_hub_are_not_asked_about_without_download(hub, tmp_path, lora):
    for words in (["org/adapter:v1", "--plot", tmp_path / "x.png"], [lora, "--base", "org/base"]):
        done = run(*words, **hub.environment(tmp_path / "home"))
        assert (
            done.returncode == 1
            and "give --download" in done.stderr
            and "Traceback" not in done.stderr
        )
    assert weights_ranges(hub) == []


def test_headers_alone(lora, llama, tmp_path, monkeypatch):
    """Of an adapter on this machine no factor is read, and torch is not needed; what headers tell
    is the same."""
    whole, read = inspect(lora), LocalFolder.read
    ranges = []
    monkeypatch.setattr(
        LocalFolder, "read", lambda self, *part: ranges.append(part) or read(self, *part)
    )
    result = inspect(lora, headers=True)
    unread = {"trained": None, "norm": None, "effective_rank": None}
    assert result == whole | {
        "statistics": False,
        "modules": [module | unread for module in whole["modules"]],
    }
    assert {name for name, *_ in ranges} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    } and len(ranges) == 2
    assert "--headers" in tables.table(result)
    assert inspect(llama, headers=True) == inspect(llama)
    code = (
        f"import sys, adapterkit; adapterkit.inspect({str(lora)!r}, headers=True); assert 'torch' "
        "not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    for options, word in (
        ({"base": llama}, "--base"),
        ({"plot": tmp_path / "x.png"}, "--plot"),
        ({"download": True}, "--download"),
    ):
        with pytest.raises(Refused, match="headers alone") as refusal:
            inspect(lora, headers=True, **options)
        assert word in str(refusal.value)


# -- the picture -----------------------------------------------------------------------------------


def test_the_picture(lora, llama, tmp_path):
    assert called(lora, "--base", llama, "--plot", tmp_path / "norms.png")[0] == 0
    data = (tmp_path / "norms.png").read_bytes()
    assert data.startswith(PNG) and len(data) > 5000
    modules = inspect(lora, base=llama)["modules"]
    rows, columns, values = pictures.grid(modules, "relative")
    assert rows == ["model.layers.0", "model.layers.1"] and len(columns) == 7
    at = {m["module"]: m["relative"] for m in modules}
    assert values == [[at[f"{row}.{column}"] for column in columns] for row in rows]


def test_the_picture_has_holes_where_there_is_no_number(tmp_path):
    files = raw_files.everything_else()
    files.tensors |= raw_files.pair("model.layers.0.q$_$proj", 16, 16)
    files.tensors[f"{raw_files.PREFIX}model.conv.lora_A.weight"] = raw_files.Stored.of(
        np.full((4, 6, 3, 3), np.nan, np.float32)
    )
    files.folder().write(tmp_path / "adapter")
    result = inspect(tmp_path / "adapter", plot=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    rows, columns, values = pictures.grid(result["modules"], "norm")
    assert (rows, columns) == (["", "model.layers.0"], ["model.conv", "model.embed", "q$_$proj"])
    assert [[math.isnan(v) for v in row] for row in values] == [
        [True, False, True],
        [True, True, False],
    ]


def test_a_picture_that_cannot_be_drawn_is_refused_first(lora, tmp_path, monkeypatch):
    assert ".png" in refused(lora, plot=tmp_path / "x.jpg")
    assert ".png" in refused(lora, plot=tmp_path / "nowhere" / "x.png")
    bad = edited(lora, tmp_path / "bad", lambda t: [v.fill_(math.nan) for v in t.values()])
    assert "no norms to draw" in refused(bad, plot=tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'adapterkit[plot]'" in refused(lora, plot=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
