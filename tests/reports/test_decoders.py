"""Decoders of which inspect knows the parameters: those that transformers' models have."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.verbs.look import checkpoint
from adapterkit.verbs.look.decoders import DECODERS, _parameters

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SETTINGS = ({}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 6})


def built(kind: str, **settings):
    config = transformers.AutoConfig.for_model(kind, **SIZES, **settings)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_parameters_are_those_of_transformers(kind, settings):
    model = built(kind, **settings)
    config = json.loads(model.config.to_json_string(use_diff=False))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert dict(_parameters(DECODERS[kind], config)) == shapes
    assert type(model).__name__ == DECODERS[kind].name
    bare = {"model_type": kind, **SIZES, **settings}
    assert dict(_parameters(DECODERS[kind], bare)) == shapes  # its defaults, too


def test_inspect_equals_that_by_the_model(llama, tmp_path, monkeypatch):
    """Of a sound base, and of one without a norm, with other sizes, with settings left out."""
    asked = []
    changed = {
        "sound": ({}, None),
        "tied": ({"tie_word_embeddings": True}, "lm_head.weight"),
        "lost": ({}, "model.layers.1.input_layernorm.weight"),
        "wide": ({"intermediate_size": 7}, None),
        "silent": ({"num_key_value_heads": None}, None),
        "odd": ({"hidden_act": "none such"}, None),
        "ropes": ({"rope_parameters": {"rope_type": "none such", "rope_theta": 1.0}}, None),
    }
    own = checkpoint.whole_decoder
    for name, (settings, lost) in changed.items():
        folder = tmp_path / name
        shutil.copytree(llama, folder)
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(lost, None)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        monkeypatch.setattr(checkpoint, "whole_decoder", lambda base: asked.append(own(base)))
        by_model = adapterkit.inspect(folder)
        monkeypatch.setattr(checkpoint, "whole_decoder", own)
        assert adapterkit.inspect(folder) == by_model, name
    assert [one is not None for one in asked] == [True, True] + [False] * 5
