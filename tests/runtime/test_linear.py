"""Linear layers and embeddings: inputs, outputs that others have, shared modules, files."""

import copy
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertModel, GPT2Config, GPT2LMHeadModel

from adapterkit import AdapterkitError, LoraConfig
from adapterkit.runtime import attach, load
from tests.support import live
from tests.support.beside_peft import assert_same, check_merging, compare, shake
from tests.support.layers import CASES, CONFIG, IDS, WARNINGS, Case, adapted, values, with_deltas

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]


@pytest.mark.parametrize(
    "shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_inputs_of_any_shape(shape, bias):
    case = Case("linear", lambda: nn.Linear(6, 5, bias=bias), 5, values(*shape))
    net, _ = adapted(case)
    expected = with_deltas(case, net, {"default": 1.0}).layer(case.x.double()).float()
    strided = values(*shape[:-1], 12)[..., ::2].copy_(case.x)
    for x in (case.x, strided):
        torch.testing.assert_close(net.layer(x), expected)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(net.layer(x), expected)


class Kept(nn.Linear):
    """A linear layer that keeps a reference to its output."""

    def forward(self, input: Tensor) -> Tensor:
        self.output = super().forward(input)
        return self.output


@torch.no_grad()
def test_outputs_that_others_have_are_not_changed():
    case = Case("linear", lambda: Kept(6, 5), 5, values(2, 6))
    net, adapters = adapted(case)
    y = net.layer(case.x)
    assert not torch.equal(net.layer.output, y)
    adapters.detach()
    assert torch.equal(net.layer(case.x), Kept.forward(net.layer, case.x))

    case = CASES["linear"]
    net = case.net()
    output = net.layer(case.x)
    before = output.clone()
    net.layer.forward = lambda x: output
    adapters = attach(net, CONFIG, seed=1)
    assert not torch.equal(net.layer(case.x), before)
    assert torch.equal(output, before)
    adapters.detach()
    assert net.layer.forward(case.x) is output


class Scaled(nn.Module):
    """A linear-like layer of its own: what it does with its weight cannot be known."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.weight = nn.Parameter(values(5, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * F.linear(hidden, self.weight)


def test_unknown_linear_layers_run_unmerged(tmp_path):
    case = Case("linear", Scaled, 5, values(2, 6))
    net, adapters = adapted(case)
    part = net.layer.adapterkit.patches["default"]["delta"]
    expected = 3 * case.x @ net.layer.weight.T + 1.5 * case.x @ part.a.T @ part.b.T
    torch.testing.assert_close(net.layer(case.x), expected)
    with pytest.raises(AdapterkitError, match="how a Scaled uses its weight"):
        adapters.merge()
    y = case.run(net)
    adapters.save(tmp_path)
    other = load(case.net(), tmp_path)
    assert torch.equal(case.run(other.model), y)


@pytest.mark.parametrize("name", ["linear", "GPT-2's", "image"])
def test_dropout_is_peft_s(name, tmp_path):
    """From the same seed, in training alone."""
    case = CASES[name]
    config = peft.LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.4)
    theirs = peft.get_peft_model(case.net(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = load(case.net(), tmp_path, trainable=True).model
    for mode in (torch.enable_grad, torch.no_grad):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(7)
            with mode():
                outputs.append(case.run(model.train()))
        torch.testing.assert_close(*outputs)
    assert not torch.allclose(case.run(ours), outputs[1])
    torch.testing.assert_close(case.run(ours.eval()), case.run(theirs.eval()))


@pytest.mark.parametrize("name", ["embedding", "attention"])
def test_dropout_has_no_place_in(name):
    """PEFT does not drop there either."""
    case = CASES[name]
    net = case.net()
    adapters = attach(net, LoraConfig(2, 3, ["layer"], dropout=0.9, init=False))
    y = case.run(net)
    torch.testing.assert_close(case.run(net.train()), y)
    adapters.detach()


def test_a_shared_layer_of_albert(tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24}
        config = AlbertConfig(vocab_size=20, num_hidden_layers=3, num_attention_heads=2, **sizes)
        return AlbertModel(config).eval()

    def run(model):
        return model(input_ids=IDS).last_hidden_state

    settings = {"r": 2, "target_modules": ["query", "ffn", "word_embeddings"]}
    _, adapters = compare(make, run, tmp_path, **settings)
    check_merging(adapters, run)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_one_module_under_two_names(tmp_path):
    torch.manual_seed(0)
    model, x = Twice().eval(), values(2, 6)
    base = model(x)
    adapters = attach(model, LoraConfig(2, 2, ["first"], init=False), seed=1)
    y = model(x)
    part = model.first.adapterkit.patches["default"]["delta"]
    weight = model.first.weight + part.b @ part.a
    expected = F.linear(torch.tanh(F.linear(x, weight, model.first.bias)), weight, model.first.bias)
    torch.testing.assert_close(y, expected)
    adapters.merge()
    torch.testing.assert_close(model(x), y)
    adapters.unmerge()
    adapters.save(tmp_path / "one")
    adapters.detach()
    assert torch.equal(model(x), base)
    assert torch.equal(load(model, tmp_path / "one").model(x), y)


def test_parameters_are_found_by_any_adapter_s_name():
    """Names with dots and colons, and those of the site's own attributes, are apart."""
    net = CASES["linear"].net()
    adapters = attach(net, CONFIG, name="base")
    names = ["a.b", "a_b", "a:b", "a%2Eb", "parts", "train", "forward", "weight:x", "adapterkit"]
    for name in names:
        adapters.attach(CONFIG, name=name)
    parameters = {name: p for name, p in net.named_parameters() if ".adapterkit." in name}
    assert len(parameters) == 4 * len(adapters.names)
    assert all(net.get_parameter(name) is p for name, p in parameters.items())
    assert net.get_parameter("layer.adapterkit.adapterkit.a").shape == (2, 6)
    adapters.delete("a.b")
    assert net.get_parameter("layer.adapterkit.a_b.a") is parameters["layer.adapterkit.a_b.a"]


# --- files --------------------------------------------------------------------------------------


def rewritten(folder: Path, names: Mapping[str, str], **values: Tensor) -> Path:
    """An adapter's file with other keys, and with other values."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in names.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    tensors |= {f"base_model.model.{key}": value for key, value in values.items()}
    save_file(tensors, path)
    return folder


def test_factors_that_fit_no_layer_are_refused(tmp_path):
    """By their names and shapes, all at once; the model stays as it was."""
    case = CASES["embedding"]
    net, adapters = adapted(case)
    adapters.save(tmp_path)
    adapters.detach()
    rewritten(
        tmp_path,
        {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"},
        **{"head.lora_A.weight": torch.ones(2, 7)},
    )
    before = dict(net.state_dict())
    with pytest.raises(AdapterkitError) as error:
        load(net, tmp_path)
    text = str(error.value)
    assert "layer.lora_A.weight for a Embedding" in text
    assert "factors of head with shapes (2, 7), (3, 2)" in text
    assert_same(net.state_dict(), before)
    assert not hasattr(net.layer, "adapterkit")


def test_a_new_bias_has_the_dtype_of_its_factors():
    case = CASES["linear with its bias"]
    net = case.net(torch.bfloat16)
    config = LoraConfig(2, 3, ["layer"], lora_bias=True)
    adapters = attach(net, config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.bfloat16}
    case.run(net)


def test_biases_of_another_length_are_refused(tmp_path):
    net, adapters = adapted(CASES["linear with its bias"])
    adapters.save(tmp_path)
    adapters.detach()
    rewritten(tmp_path, {}, **{"layer.lora_B.bias": torch.ones(1)})
    with pytest.raises(AdapterkitError, match="one value for each output"):
        load(net, tmp_path)


def test_factors_of_one_module_by_both_names_are_refused(tmp_path):
    adapters = attach(Twice(), LoraConfig(2, 2, ["first"], init=False), seed=1)
    adapters.save(tmp_path)
    key = "base_model.model.first.lora_{}.weight"
    own = load_file(tmp_path / "adapter_model.safetensors")
    copies = {f"second.lora_{x}.weight": own[key.format(x)].clone() for x in "AB"}
    with pytest.raises(AdapterkitError, match="factors of first and second: the same module"):
        load(Twice(), rewritten(tmp_path, {}, **copies))


def test_copies_of_an_embedding_s_weight(tmp_path):
    """PEFT stores the base's weight beside an embedding's factors; it acts where it is another, and
    the runtime's files have none."""
    net = live.llama()
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    key = "model.embed_tokens.base_layer.weight"
    assert f"base_model.model.{key}" in load_file(tmp_path / "theirs/adapter_model.safetensors")
    ids = live.tokens()

    adapters = load(net, tmp_path / "theirs")
    y = net(input_ids=ids).logits
    torch.testing.assert_close(y, theirs(input_ids=ids).logits)
    assert len(net.model.embed_tokens.adapterkit.patches["default"]) == 1
    adapters.save(tmp_path / "ours")
    assert len(load_file(tmp_path / "ours/adapter_model.safetensors")) == 2
    again = live.peft_of(tmp_path / "ours", live.llama())
    torch.testing.assert_close(again(input_ids=ids).logits, y)
    adapters.detach()

    rewritten(tmp_path / "theirs", {}, **{key: values(64, 32)})
    before = net(input_ids=ids).logits
    adapters = load(net, tmp_path / "theirs")
    other = live.peft_of(tmp_path / "theirs", live.llama())
    torch.testing.assert_close(net(input_ids=ids).logits, other(input_ids=ids).logits)
    assert not torch.allclose(net(input_ids=ids).logits, y)
    with adapters.disabled():
        torch.testing.assert_close(net(input_ids=ids).logits, before)
    adapters.save(tmp_path / "ours")
    assert f"base_model.model.{key}" in load_file(tmp_path / "ours/adapter_model.safetensors")


def test_an_activated_lora_on_gpt2(tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes)).eval()

    config = LoraConfig(
        2, 4, ["c_attn"], invocation_tokens=[7, 3], init=False, task_type="CAUSAL_LM"
    )
    adapters = attach(make(), config, seed=1)
    shake(adapters.parameters())
    adapters.save(tmp_path)
    theirs = live.peft_of(tmp_path, make())
    ids = torch.tensor([[1, 7, 3, 5, 9, 2], [7, 3, 1, 1, 7, 3]])
    y = adapters.model(input_ids=ids).logits
    torch.testing.assert_close(y, theirs(input_ids=ids).logits)
    with adapters.disabled():
        base = adapters.model(input_ids=ids).logits
    assert torch.equal(y[0, :1], base[0, :1]) and not torch.allclose(y[0, 1:], base[0, 1:])
    assert not torch.allclose(y[1, 4:], base[1, 4:])
    assert [share.norm > 0 for row in adapters.report() for share in row.adapters] == [True, True]
