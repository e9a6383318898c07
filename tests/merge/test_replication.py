"""layer_replication: a real deeper checkpoint. PEFT's own merge shares the copied layers' weights
and corrupts them (peft.md 1.20), so the oracle is the unmerged PEFT model's weights: copied
layer + its own delta."""

import json

import pytest
import torch
import transformers

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.core.merge.job import stacked
from tests.support import oracle
from tests.support.oracle import LINEAR, assert_rounded, exact, load, peft_model, stored

STACK = [[0, 2], [1, 3]]
ORDER = [0, 1, 1, 2]


def three_layers():
    return oracle.llama(num_hidden_layers=3, layer_types=["full_attention"] * 3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("replication")
    oracle.save_base(three_layers(), root / "base", "bf16")
    config = {"target_modules": LINEAR, "layer_replication": STACK}
    oracle.train(load(three_layers, root / "base"), root / "adapter", **config)
    return root / "base", root / "adapter"


def test_each_copy_gets_its_own_delta(pair, tmp_path):
    base, adapter = pair
    oracle.merge(base, adapter, out=tmp_path / "out", verify=True)
    expected = exact(peft_model(load(three_layers, base), adapter))
    before, after = stored(base), stored(tmp_path / "out")
    assert len(expected) == len(ORDER) * len(LINEAR)
    for name, value in expected.items():
        assert_rounded(after[name], value, name)
    for new, old in enumerate(ORDER):
        for leaf in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(
                after[f"model.layers.{new}.{leaf}.weight"],
                before[f"model.layers.{old}.{leaf}.weight"],
            )
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(after[name], before[name])


def test_the_config_counts_the_new_layers(pair, tmp_path):
    base, adapter = pair
    types = ["full_attention", "sliding_attention", "full_attention"]
    oracle.edit_config(base, tmp_path / "base", layer_types=types)
    oracle.merge(tmp_path / "base", adapter, out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(ORDER)
    assert config["layer_types"] == [types[i] for i in ORDER]


def test_the_deeper_model_loads_with_no_key_missing(pair, tmp_path):
    base, adapter = pair
    oracle.merge(base, adapter, out=tmp_path / "out")
    model = oracle.load_checked(transformers.LlamaForCausalLM, tmp_path / "out")
    assert len(model.model.layers) == len(ORDER)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_replicated_layers_of_a_sharded_base_are_merged(pair, tmp_path):
    base, adapter = pair
    oracle.save_base(three_layers(), tmp_path / "base", "bf16", max_shard_size="30KB")
    oracle.merge(tmp_path / "base", adapter, out=tmp_path / "out")
    oracle.merge(base, adapter, out=tmp_path / "whole")
    first, second = stored(tmp_path / "out"), stored(tmp_path / "whole")
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(first)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in first.values()
    )


@pytest.mark.parametrize("stack", [[[0, 4]], [[2, 2]], [[3, 5]]])
def test_layers_that_the_base_lacks_are_refused(stack, pair, tmp_path):
    base, adapter = pair
    oracle.edit_config(adapter, tmp_path / "adapter", layer_replication=stack)
    with pytest.raises(Refused, match="layer"):
        adapterkit.merge(base, [tmp_path / "adapter"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_adapters_with_different_stacks_are_refused(pair, tmp_path):
    base, adapter = pair
    oracle.edit_config(adapter, tmp_path / "other", layer_replication=[[0, 3], [2, 3]])
    with pytest.raises(Refused, match="different layer_replication"):
        adapterkit.merge(base, [adapter, tmp_path / "other"], out=tmp_path / "out")


def test_lists_of_the_config():
    """What has a value for each layer is stacked as the layers are, not ids of tokens."""
    config = {
        "num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [7, 8, 9],
        "text_config": {"bad_token_ids": [1, 2, 3], "num_hidden_layers": 3},
    }  # fmt: skip
    assert stacked(config, 3, ORDER) == {
        "num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"], "eos_token_id": [7, 8, 9],
        "text_config": {"bad_token_ids": [1, 2, 3], "num_hidden_layers": 4},
    }  # fmt: skip
