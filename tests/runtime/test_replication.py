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
    T5Config,
    T5ForConditionalGeneration,
)

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.beside_peft import SIZES, WARNINGS, assert_same, compare, shake

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]

DEEP = SIZES | {"num_hidden_layers": 5}
RANGES = [[0, 4], [2, 5]]
IDS = torch.tensor([[1, 2, 3, 4, 7], [5, 3, 1, 3, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        return make()

    return made


llama = seeded(lambda: LlamaForCausalLM(LlamaConfig(**DEEP, attention_bias=True)))
gemma = seeded(
    lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **DEEP,
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
            **{k: v for k, v in DEEP.items() if k != "num_key_value_heads"},
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
def test_replicated_layers_equal_peft(case, tmp_path):
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


def config_of(ranges=RANGES, **settings) -> LoraConfig:
    return LoraConfig(targets=["q_proj"], layer_replication=ranges, **settings)


def test_the_weights_are_shared():
    model = llama().eval()
    own = {id(parameter) for parameter in model.parameters()}
    layers = list(model.model.layers)
    h = attach(model, config_of(), seed=1)
    factors = {id(parameter) for parameter in h.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == own | factors
    assert len(factors) == 7 * 2
    assert [layer in layers for layer in model.model.layers] == [True] * 4 + [False] * 2 + [True]
    numbers = [layer.self_attn.layer_idx for layer in model.model.layers]
    assert numbers == list(range(7))
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 8
    h.detach()
    assert list(model.model.layers) == layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(5))
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 6


def test_adapters_of_one_model_have_one_order(tmp_path):
    model = llama().eval()
    y = logits(model)
    h = attach(model, config_of(), name="a", seed=1)
    shake(h.parameters())
    h.attach(config_of(), name="b", seed=2)
    h.save(tmp_path / "a", name="a")
    results = []
    for name in ("a", "b", None):
        h.activate(name)
        results.append(logits(model))
    for call in (
        lambda: h.attach(config_of([[0, 5], [4, 5]]), name="c"),
        lambda: h.attach(LoraConfig(targets=["q_proj"]), name="c"),
    ):
        with pytest.raises(AdapterkitError, match="as the model's other adapters have it"):
            call()
        assert h.names == ["a", "b"] and torch.equal(logits(model), results[2])
    h.load(tmp_path / "a", name="c")
    h.activate("c")
    assert torch.equal(logits(model), results[0])
    h.activate(None)
    for name in ("a", "c", "b"):
        h.delete(name)
    assert len(model.model.layers) == 5 and torch.equal(logits(model), y)
    h.attach(LoraConfig(targets=["q_proj"]), name="plain")
    with pytest.raises(AdapterkitError, match="expected: None"):
        h.load(tmp_path / "a", name="a")
    assert len(model.model.layers) == 5


def test_shared_weights_are_not_merged():
    model = llama().eval()
    h = attach(model, config_of(), seed=1)
    y = logits(model)
    with pytest.raises(AdapterkitError, match="`adapterkit merge` writes the deeper model"):
        h.merge()
    assert torch.equal(logits(model), y) and not h.merged


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


@pytest.mark.parametrize("make, config, word", [
    (llama, config_of([[0, 4], [2, 7]]), r"layers \[5, 6\]"),
    (llama, config_of(modules_to_save=["nothing"]), "nothing"),
    (llama, LoraConfig(targets=["nothing"], layer_replication=RANGES), "nothing"),
    (t5, LoraConfig(targets=["q"], layer_replication=[[0, 1]]), "2 lists of layers"),
], ids=["outside", "copies", "targets", "t5"])  # fmt: skip
def test_a_refused_replication_changes_nothing(make, config, word):
    model = make().eval()
    modules, settings = dict(model.named_modules()), model.config.to_dict()
    with pytest.raises(AdapterkitError, match=word):
        attach(model, config)
    assert dict(model.named_modules()) == modules and model.config.to_dict() == settings


class Stack(nn.Module):
    """Layers in no model of transformers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_without_a_config():
    model = seeded(Stack)().eval()
    x, layers = torch.randn(2, 4), list(model.layers)
    y = layers[2](layers[1](layers[1](layers[0](x))))
    h = attach(model, LoraConfig(targets=r"layers\.\d", layer_replication=[[0, 2], [1, 3]]))
    torch.testing.assert_close(model(x), y)
    h.detach()
    assert list(model.layers) == layers
