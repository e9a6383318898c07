"""Mixed batches beyond linear layers: every kind of part runs for the rows of its adapter."""

import pytest
import torch
import transformers
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach
from tests.support.card import DEVICE, Card, installed, move
from tests.support.live import llama, tokens

NAMES = ["fr", None, "de", "fr"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def inference(one_thread):
    with torch.no_grad():
        yield


def check(model: nn.Module, first: LoraConfig, second: LoraConfig, **inputs: torch.Tensor) -> None:
    """Each row is that row alone, and differs from the base where it has an adapter."""
    torch.manual_seed(5)
    adapters = attach(model.eval(), first, name="fr")
    adapters.attach(second, name="de")
    for name in adapters.names:
        for parameter in adapters.parameters(name):
            parameter.add_(torch.randn_like(parameter) * 0.1)

    def call(**values: torch.Tensor) -> torch.Tensor:
        output = model(**values)
        return output if isinstance(output, torch.Tensor) else output.logits

    with adapters.rows(NAMES):
        mixed = call(**inputs)
        assert torch.equal(call(**inputs), mixed)  # what ran for one group is undone
    for i, name in enumerate(NAMES):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        adapters.activate(name)
        torch.testing.assert_close(mixed[i : i + 1], call(**row), **CLOSE)
        adapters.activate(None)
        base = call(**row)
        assert torch.allclose(mixed[i : i + 1], base, **CLOSE) == (name is None)


IDS = {"input_ids": tokens(4, 7)}
PLAIN = LoraConfig(2, 8, ["v_proj"])


@pytest.mark.parametrize("first, second", [
    (LoraConfig(4, 8, ["embed_tokens", "q_proj"]), LoraConfig(2, 8, ["embed_tokens"])),
    (LoraConfig(4, 8, ["q_proj"], trainable_tokens=[*range(0, 60, 3)]), PLAIN),
    (LoraConfig(4, 8, ["q_proj"], modules_to_save=["lm_head"]), PLAIN),
    (
        LoraConfig(4, 8, ["q_proj"], modules_to_save=["norm", "lm_head"]),
        LoraConfig(2, 8, ["v_proj"], modules_to_save=["norm"]),
    ),
    (LoraConfig(4, 8, ["q_proj"], modules_to_save=["mlp"]), LoraConfig(2, 8, ["down_proj"])),
    (LoraConfig(4, 8, ["q_proj"], dora=True), LoraConfig(2, 8, ["embed_tokens"], dora=True)),
], ids=["embedding", "tokens", "head", "norm", "copy around factors", "dora"])  # fmt: skip
def test_parts_of_a_language_model(first, second):
    """PEFT raises where one adapter has a copy that another one lacks."""
    check(llama(), first, second, **IDS)


def test_rows_with_a_tied_head():
    first = LoraConfig(4, 8, ["q_proj"], trainable_tokens=[*range(0, 60, 3)])
    check(llama(tie_word_embeddings=True), first, PLAIN, **IDS)


def test_rows_with_trained_biases():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    first = LoraConfig(4, 8, ["query"], bias="all")
    check(model, first, LoraConfig(2, 8, ["value"], bias="lora_only"), **IDS)


def test_positions_that_all_rows_share():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, eos_token_id=1)
    )
    check(model, LoraConfig(4, 8, ["wpe", "wte"]), LoraConfig(2, 8, ["c_proj"]), **IDS)


@pytest.mark.parametrize("names", [["experts.gate_up_proj", "experts.down_proj"], ["gate.weight"]])
def test_parameters_of_experts_and_routers(names):
    config = transformers.MixtralConfig(
        **TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    first = LoraConfig(4, 8, ["q_proj"], parameters=names)
    second = LoraConfig(2, 8, ["v_proj"], parameters=names[-1:])
    check(transformers.MixtralForCausalLM(config), first, second, **IDS)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))


@pytest.mark.parametrize("dora", [True, False])
def test_rows_with_convolutions(dora):
    second = LoraConfig(2, 8, ["first"])
    x = torch.randn(4, 3, 8, 8)
    check(Convolutions(), LoraConfig(4, 8, ["first", "last"], dora=dora), second, x=x)


class Attention(nn.Module):
    def __init__(self, batch_first: bool, heads_mask: bool):
        super().__init__()
        self.batch_first, self.heads_mask = batch_first, heads_mask
        self.attn, self.last = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 4)

    def forward(self, x, padding):
        rows, length = x.shape[:2]
        mask = torch.ones(length, length).tril().log()
        if self.heads_mask:
            mask = mask.repeat(rows * 2, 1, 1)
        if not self.batch_first:
            x = x.transpose(0, 1)
        y, weights = self.attn(x, x, x, padding, attn_mask=mask)
        y = self.last(y)
        if not self.batch_first:
            y = y.transpose(0, 1)
        return torch.cat([y.flatten(1), weights.flatten(1)], 1)


@pytest.mark.parametrize("length", [5, 4])  # 4: as many tokens as rows
@pytest.mark.parametrize("heads_mask", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_with_torch_attention_and_masks(batch_first, heads_mask, length):
    """Tokens or rows first; masks of padding, of all rows, of each head."""
    padding = torch.zeros(4, length)
    padding[1:3, -1] = -1e9
    second = LoraConfig(2, 8, ["attn"])
    first = LoraConfig(4, 8, ["attn", "last"]) if batch_first else LoraConfig(4, 8, ["attn"])
    model = Attention(batch_first, heads_mask)
    check(model, first, second, x=torch.randn(4, length, 8), padding=padding)


class Encoder(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.layers(x)
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("length", [5, 4])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_with_torchs_encoder(batch_first, length):
    """Its fused path, which reads the weights of its parts, is not taken."""
    second = LoraConfig(2, 8, ["linear2"])
    for targets in (["self_attn", "linear1"], ["linear1"]):
        first = LoraConfig(4, 8, targets)
        check(Encoder(batch_first), first, second, x=torch.randn(4, length, 8))
    attention = LoraConfig(4, 8, ["self_attn"])
    check(Encoder(batch_first), attention, attention, x=torch.randn(4, length, 8))


def test_rows_one_adapter_at_a_time_are_not_waited_for():
    """A GPU has the places of the rows from the first pass on."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(3, 5, 1))
    adapters = attach(model, LoraConfig(2, init=False, targets=["0", "1"]), name="fr")
    adapters.attach(LoraConfig(2, init=False, targets=["0", "1"]), name="de")
    adapters.activate(None)
    ids = torch.arange(12).view(4, 3) % 9
    with torch.no_grad(), installed(Card()) as card:
        with adapters.rows(names := ["fr", None, "de", "fr"]):
            expected = model(ids)
        move(model)
        ids = ids.to(DEVICE)
        with adapters.rows(names):
            model(ids)
            card.waits = 0
            y = model(ids)
            assert card.waits == 0 and not card.races
        torch.testing.assert_close(y.cpu(), expected)


def test_outputs_that_are_not_one_for_each_row():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(0)

    model = nn.Module()
    model.head = Mean(6, 5)
    model.forward = lambda x: model.head(x)
    adapters = attach(model.eval(), LoraConfig(2, 2, [], modules_to_save=["head"]), name="fr")
    with (
        adapters.rows(["fr", None, None, "fr"]),
        pytest.raises(AdapterkitError, match="of head that is not one for each row"),
    ):
        adapters.model(torch.randn(4, 6))
