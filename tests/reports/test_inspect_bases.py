"""inspect of bases that are not as they should be: damaged, quantized, incomplete."""

import pickle
import shutil

import numpy as np
import pytest

from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.verbs.look import tables
from adapterkit.verbs.look.checkpoint import some_names
from tests.support import oracle, raw_files
from tests.support.inspections import (
    DAMAGED,
    EMBEDDING,
    INDEX,
    SHARD,
    cut,
    inspect,
    problems_of,
    rewritten,
)


def test_a_sound_base_has_no_problems(sharded):
    result = inspect(sharded)
    assert problems_of(result) == [] and len(result["shards"]) == 2
    assert result["tied"] == {"config": False, "head_stored": True}
    lines = [" ".join(line.split()) for line in tables.inspect_table(result).splitlines()]
    assert "quantization none" in lines and "tied no; a head is stored" in lines
    assert f"bytes {result['bytes']:,} in 2 files" in lines
    assert "quantization" not in tables.inspect_table(result | {"kind": "file"})


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_base(name, sharded):
    """The problem is told, and what else can be read."""
    damage, words = DAMAGED[name]
    damage(sharded)
    result = inspect(sharded)
    assert result["kind"] == "base" and any(words in text for text in problems_of(result)), (
        problems_of(result)
    )
    assert result["parameters"] > 0 and "Traceback" not in tables.inspect_table(result)
    if name in ("cut", "html", "empty-file"):
        assert [shard["tensors"] is None for shard in result["shards"]] == [False, True]
    if name in ("stray", "total", "pickle", "no-config", "headless", "tied"):
        assert len(result["problems"]) == 1


def test_every_damaged_shard_is_listed(sharded):
    for file in sharded.glob("*.safetensors"):
        file.write_bytes(b"\0" * 9)
    assert len(problems_of(inspect(sharded))) == 2


def test_a_missing_shard_hides_no_other_problem(sharded):
    """Nor does it make problems of what only seems to be missing."""

    def spoil(index):
        index["weight_map"]["ghost"] = index["weight_map"].pop(EMBEDDING)

    rewritten(sharded, INDEX, spoil)
    for name in ("missing", "layers", "pickle"):
        DAMAGED[name][0](sharded)
    words = [
        f"{SHARD} is missing",
        "ghost is not in",
        f"{EMBEDDING} in",
        "num_hidden_layers = 1000000",
        "pickles next to",
    ]
    texts = problems_of(inspect(sharded))
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
        problems_of(inspect(sharded)) == [error.problem for error in refusal.value.errors]
        and len(problems_of(inspect(sharded))) == 3
    )
    oracle.edit_config(lora, tmp_path / "odd", r=0, use_dora=True)
    cut(tmp_path / "odd")
    with pytest.raises(AdapterkitError) as refusal:
        read_adapter(LocalFolder(tmp_path / "odd"))
    assert (
        problems_of(inspect(tmp_path / "odd")) == [error.problem for error in refusal.value.errors]
        and len(refusal.value.errors) == 2
    )


def test_a_config_nested_too_deeply_is_a_problem(sharded):
    (sharded / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200)
    assert problems_of(inspect(sharded)) == ["this is not JSON: nested too deeply"]


def test_weights_as_pickles_alone(lora, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(1))
    assert problems_of(inspect(tmp_path / "base")) == ["the weights are pickles: pytorch_model.bin"]
    shutil.copytree(lora, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    result = inspect(tmp_path / "adapter")
    assert (
        problems_of(result)
        == [
            "no adapter_model.safetensors, but adapter_model.bin, a pickle: loading it may run the "
            "code in it"
        ]
        and "convert the pickle" in result["problems"][0]["hint"]
    )


QUANTIZED = {
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


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_base(name, tmp_path):
    config, extra, words = QUANTIZED[name]
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
    assert problems_of(result) == []  # several dtypes are the rule there
    with pytest.raises(Refused, match="this base is quantized"):
        raw_files.plain().folder().write(tmp_path / "adapter")
        inspect(tmp_path / "adapter", base=tmp_path / "base")


def test_names_beyond_the_sixth_are_counted():
    names = [f"w{i}" for i in range(8)]
    assert some_names(names[:6]) == "w0, w1, w2, w3, w4, w5"
    assert some_names(names) == "w0, w1, w2, w3, w4, w5 and 2 more"
