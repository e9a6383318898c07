"""A `.safetensors` file as a base or as an adapter: what lies beside it belongs to it, unless that
is another file's."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle

MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def same(one, two):
    a, b = load_file(one / MODEL), load_file(two / MODEL)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("base_name", [MODEL, "llama-v2.safetensors"])
@pytest.mark.parametrize("adapter_name", [ADAPTER, "epoch-3.safetensors"])
def test_files_are_their_folders(base_name, adapter_name, llama, lora, tmp_path, monkeypatch):
    """The result is the folders', by whatever name; it loads, verifies and may lie beside the
    file."""
    base, adapter = (
        oracle.edit_config(llama, tmp_path / "base"),
        oracle.edit_config(lora, tmp_path / "adapter"),
    )
    (base / MODEL).rename(base / base_name)
    (adapter / ADAPTER).rename(adapter / adapter_name)
    (base / "tokenizer.json").write_text("{}")
    (base / "other-9.safetensors").write_bytes(b"no weights")
    (base / "1_Pooling").mkdir()
    monkeypatch.chdir(base)  # an output inside of the folder is apart from the file
    adapterkit.merge(base_name, f"{adapter / adapter_name}=0.5", out="merged", verify=True)
    oracle.merge(llama, f"{lora}=0.5", out=tmp_path / "whole")
    same(base / "merged", tmp_path / "whole")
    oracle.load_checked(transformers.LlamaForCausalLM, base / "merged")
    assert (base / "merged/tokenizer.json").read_text() == "{}"
    adapterkit.verify("merged", base=base_name, adapters=adapter / adapter_name)
    assert adapterkit.merge(
        base_name, f"{adapter / adapter_name}=0.5", out="merged", resume=True
    ).finished_before
    with pytest.raises(Refused, match="contains the input"):
        adapterkit.merge(base / base_name, adapter / adapter_name, out=base, overwrite=True)


def test_every_verb_takes_files(llama, lora, tmp_path):
    base, adapter = llama / MODEL, lora / ADAPTER
    adapterkit.quantize(base, to="nf4", out=tmp_path / "nf4")
    adapterkit.dequantize(tmp_path / "nf4" / MODEL, out=tmp_path / "floats")
    adapterkit.loftq(
        base,
        quantized_base=tmp_path / "nf4" / MODEL,
        rank=2,
        targets="q_proj",
        out=tmp_path / "loftq",
    )
    adapterkit.init(base, method="pissa", rank=2, targets="q_proj", out=tmp_path / "init")
    adapterkit.merge(base, adapter, out=tmp_path / "tuned")
    adapterkit.extract(base, tmp_path / "tuned" / MODEL, rank=2, out=tmp_path / "extract")
    adapterkit.resize(adapter, rank=2, out=tmp_path / "resize")
    adapterkit.combine(
        [adapter, (tmp_path / "resize" / ADAPTER, 2)], method="linear", out=tmp_path / "combine"
    )
    adapterkit.subtract(adapter, general=tmp_path / "resize" / ADAPTER, out=tmp_path / "subtract")
    adapterkit.arrow([adapter, tmp_path / "resize" / ADAPTER], out=tmp_path / "arrow")
    assert adapterkit.inspect(lora, base=base)["modules"][0]["relative"] is not None
    assert all(
        json.loads((tmp_path / "floats" / "config.json").read_text())[key]
        for key in ("model_type", "architectures")
    )


def test_a_shard_is_the_checkpoint_that_names_it(llama, lora, tmp_path):
    oracle.save_base(oracle.llama(), tmp_path / "base", "bf16", max_shard_size="6KB")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    adapterkit.merge(shards[1], lora, out=tmp_path / "one")
    adapterkit.merge(tmp_path / "base", lora, out=tmp_path / "two")
    assert [p.name for p in sorted((tmp_path / "one").iterdir())] == [
        p.name for p in sorted((tmp_path / "two").iterdir())
    ]
    (tmp_path / "base/model.safetensors.index.json").unlink()
    shards[0].unlink()
    with pytest.raises(Refused, match="no index"):
        adapterkit.merge(shards[1], lora, out=tmp_path / "no")


def test_a_config_that_may_be_another_file_s(llama, lora, tmp_path):
    both = oracle.edit_config(lora, tmp_path / "both")
    shutil.copy(both / ADAPTER, both / "old.safetensors")
    with pytest.raises(Refused, match=r"old\.safetensors next to adapter_model\.safetensors"):
        adapterkit.merge(llama, both / "old.safetensors", out=tmp_path / "no")
    (both / "adapter_config.json").unlink()
    with pytest.raises(Refused, match=r"no adapter_config\.json"):
        adapterkit.merge(llama, both / ADAPTER, out=tmp_path / "no")
    with pytest.raises(Refused, match="this is an adapter"):
        adapterkit.merge(lora / ADAPTER, lora, out=tmp_path / "no")
