"""What the suites of inspect share: a call by words, the expected keys, adapters edited on disk."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.forks import command

ROOT = Path(__file__).parents[2]
EVERY = {
    "inspect", "kind", "name", "origin", "parameters", "bytes", "dtypes", "shards", "architecture",
    "tied", "quantization", "loads", "readable", "problems", "modules",
}  # fmt: skip
ADAPTER = EVERY | {
    "format", "peft_type", "base", "revision", "task_type", "peft_version", "flags",
    "modules_to_save", "replaced", "tokens",
    "groups", "statistics",
}  # fmt: skip
MODULE = {
    "module", "kind", "depth", "parameter", "experts", "rank", "alpha", "scale", "trained", "norm",
    "effective_rank", "relative",
}  # fmt: skip


def inspect(*words, **options):
    """The result, which must be JSON without NaN and hold the schema's keys."""
    result = adapterkit.inspect(*words, **options)
    json.dumps(result, allow_nan=False)
    assert set(result) == (ADAPTER if result["kind"] == "adapter" else EVERY)
    assert result["inspect"] == 1
    assert all(
        set(problem) == {"problem", "expected", "where", "hint", "command", "code"}
        for problem in result["problems"]
    )
    assert all(set(module) == MODULE for module in result["modules"])
    return result


def problems_of(result):
    return [problem["problem"] for problem in result["problems"]]


def edited(source, out, edit, **config):
    """A copy of an adapter with its tensors changed by `edit` and its config by `config`."""
    oracle.edit_config(source, out, **config)
    tensors = load_file(out / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def key(tensors, *parts):
    return next(name for name in tensors if all(part in name for part in parts))


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


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
    "cut": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-2]),
        "the data is cut off",
    ),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "html": (lambda f: (f / SHARD).write_text("<!doctype html>" + " " * 100), "an HTML page"),
    "empty-file": (lambda f: (f / SHARD).write_bytes(b""), "a file of 0 bytes"),
    "no-weight-map": (
        lambda f: rewritten(f, INDEX, lambda i: i.pop("weight_map")),
        "no weight_map",
    ),
    "index-key": (
        lambda f: rewritten(f, INDEX, lambda i: i["weight_map"].update(ghost=SHARD)),
        f"ghost is not in {SHARD}",
    ),
    "unlisted-key": (
        lambda f: rewritten(f, INDEX, lambda i: i["weight_map"].pop(NORM)),
        f"{NORM} in",
    ),
    "bad-index": (lambda f: (f / INDEX).write_text("{"), "not JSON"),
    "total": (
        lambda f: rewritten(f, INDEX, lambda i: i["metadata"].update(total_size=5)),
        "total_size 5",
    ),
    "stray": (
        lambda f: shutil.copy(f / SHARD, f / "old.safetensors"),
        "weights that are not part of the model: old.safetensors",
    ),
    "pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(1)),
        "pickles next to the weights: pytorch_model.bin",
    ),
    "no-config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad-config": (lambda f: (f / "config.json").write_text("{]"), "not JSON"),
    "layers": (
        lambda f: rewritten(f, "config.json", lambda c: c.update(num_hidden_layers=10**6)),
        "num_hidden_layers = 1000000",
    ),
    "empty-tensor": (lambda f: restored(f, torch.empty(0)), f"1 empty tensors: {NORM}"),
    "dtypes": (
        lambda f: restored(f, torch.ones(32)),
        "floats of several dtypes: BF16 (20 tensors), F32 (1 tensors)",
    ),
    "headless": (
        lambda f: rewritten_without(f, "lm_head.weight"),
        "1 of 21 parameters of LlamaForCausalLM are not stored: lm_head.weight",
    ),
    "no-weight": (
        lambda f: rewritten_without(f, "model.layers.1.mlp.up_proj.weight"),
        "1 of 21 parameters of LlamaForCausalLM are not stored: model.layers.1.mlp.up_proj.weight",
    ),
    "no-layer": (
        lambda f: rewritten(f, "config.json", lambda c: c.update(num_hidden_layers=3)),
        "9 of 30 parameters of LlamaForCausalLM are not stored: model.layers.2.",
    ),
    "misshapen": (
        lambda f: restored(f, torch.ones(33)),
        f"1 parameters of other shapes than LlamaForCausalLM's: {NORM} (33,), not (32,)",
    ),
    "tied": (
        lambda f: rewritten(f, "config.json", lambda c: c.update(tie_word_embeddings=True)),
        "lm_head.weight is stored, and",
    ),
}


def rewritten_without(folder, name):
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    size = tensors.pop(name).nbytes
    save_file(tensors, file)
    index["metadata"]["total_size"] -= size
    (folder / INDEX).write_text(json.dumps(index))


def refused(*words, **options):
    with pytest.raises(Refused) as error:
        adapterkit.inspect(*words, **options)
    assert error.value.hint
    return str(error.value)


def run(*words, **environment):
    return command("inspect", *words, env=os.environ | environment if environment else None)
