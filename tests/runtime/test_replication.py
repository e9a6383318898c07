"""layer_replication on live models: shared weights, adapters of their own."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from adapterkit import LoraConfig
from adapterkit.runtime import attach, load
from tests.support.beside_peft import assert_same, compare, shake

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
RANGES = [[0, 4], [2, 5]]
IDS = torch.tensor([[1, 2, 3, 4, 7], [5, 3, 1, 3, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        return make()

    return made


llama = seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)))
gemma = seeded(
    lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=3,
            layer_types=[
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
        )
    )
)
bert = seeded(
    lambda: BertForMaskedLM(
        BertConfig(
            **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
)
gpt2 = seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=5, n_head=2)))
CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["4.mlp", "lm_head"]}),
    "biases": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "bert": (bert, {"target_modules": ["query"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts(case, tmp_path):
    make, settings = CASES[case]
    run = (lambda model: model(input_ids=IDS).logits) if case == "bert" else logits
    base = make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = dict(base.named_modules())
    layers = base.bert.encoder.layer if case == "bert" else base.model.layers
    _, adapters = compare(
        make, run, tmp_path, r=4, layer_replication=RANGES, replicated=True, **settings
    )
    adapters.detach()
    adapters = load(base, tmp_path / "ours")
    assert [*base.named_modules()] != [*names.items()]
    adapters.detach()
    assert dict(base.named_modules()) == names
    assert_same(base.state_dict(), before)
    assert base.config.num_hidden_layers == 5 == len(layers)


def generated(model: nn.Module, **settings) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=8, do_sample=False, **settings)


@pytest.mark.parametrize("make", [llama, gemma, gpt2], ids=["llama", "gemma", "gpt2"])
def test_the_cache_knows_the_new_layers(make):
    model = make().eval()
    config, ids = copy.deepcopy(model.config), generated(model)
    h = attach(model, LoraConfig(targets="all-linear", layer_replication=RANGES), seed=1)
    assert model.config.num_hidden_layers == 7
    if make is gemma:
        assert model.config.layer_types[4:] == config.layer_types[2:]
    shake(h.parameters())
    tokens = generated(model)
    assert torch.equal(tokens, generated(model, use_cache=False))
    assert not torch.equal(tokens, ids)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * 7
    h.detach()
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(generated(model), ids)
