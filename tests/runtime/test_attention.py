"""nn.MultiheadAttention: both projections, torch's fused layers, threads."""

import pickle
import threading
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn

from adapterkit import LoraConfig
from adapterkit.runtime import attach, load
from tests.support.beside_peft import check_merging, compare, shake
from tests.support.layers import CASES, TARGETS, WARNINGS, adapted, deltas, values, with_deltas

pytestmark = [
    pytest.mark.filterwarnings(text)
    for text in [*WARNINGS, "ignore:The PyTorch API of nested tensors:UserWarning"]
]


def test_peft_adds_the_second_delta_of_an_attention_twice():
    """Its files are right: so the runtime differs from it, by that delta once."""
    case = CASES["attention"]
    theirs = peft.get_peft_model(case.net(), peft.LoraConfig(r=2, target_modules=["layer"]))
    out = theirs.base_model.model.layer.base_layer.out_proj
    with torch.no_grad():
        out.lora_B["default"].weight.fill_(0.1)
        y = case.run(theirs)
        out.scaling["default"] /= 2
        half = case.run(theirs)
        with case.repaired():
            out.scaling["default"] *= 2
            once = case.run(theirs)
    torch.testing.assert_close(half, once)
    assert not torch.allclose(y, once)


def test_trained_biases_of_an_attention(tmp_path):
    case = CASES["attention to more"]
    settings = {"r": 2, "target_modules": TARGETS, "bias": "all"}
    with case.repaired():
        _, adapters = compare(case.frozen, case.run, tmp_path, **settings)
    check_merging(adapters, case.run)


def test_biases_of_its_factors(tmp_path):
    """PEFT trains none of them and uses that of the second alone; here they act as they merge."""
    case = CASES["attention to more"]
    config = peft.LoraConfig(r=2, target_modules=TARGETS, lora_bias=True)
    theirs = peft.get_peft_model(case.net(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    adapters = load(case.net(), tmp_path)
    net = adapters.model
    delta = deltas(case, net, "default")
    assert {"layer.in_proj_bias", "layer.out_proj.bias", "head.bias"} < set(delta)
    expected = with_deltas(case, net, {"default": 1.0})(case.x.double()).float()
    torch.testing.assert_close(case.run(net), expected)
    check_merging(adapters, case.run)


def test_its_weights_are_summed_in_float32():
    """Also where products are not."""
    case = CASES["attention"]
    net, _ = adapted(case)
    expected = with_deltas(case, net, {"default": 1.0}).layer
    read = mock.patch.object(
        nn.MultiheadAttention, "forward", lambda self: (self.in_proj_weight, self.out_proj.weight)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), read:
        first, second = net.layer()
    torch.testing.assert_close(first, expected.in_proj_weight.float())
    torch.testing.assert_close(second, expected.out_proj.weight.float())


def encoder(**options) -> tuple[nn.TransformerEncoder, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval(), values(3, 5, 8)


FUSED = "torch._transformer_encoder_layer_fwd"
ENCODER_TARGETS = [["self_attn"], ["linear1"], ["linear2", "self_attn"]]


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
@torch.no_grad()
def test_the_fused_encoder_layer_does_not_pass_adapters_by(targets):
    model, x = encoder()
    base = model(x)
    adapters = attach(model, LoraConfig(2, 2, targets, init=False), seed=1)
    with mock.patch(FUSED, side_effect=AssertionError("fused")):
        y = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(y, base)
    with mock.patch(FUSED, wraps=torch._transformer_encoder_layer_fwd) as fused:
        with adapters.disabled():
            assert torch.equal(model(x), base)
        assert fused.call_count == 2
    adapters.unmerge()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
@torch.no_grad()
def test_encoders_of_padded_rows(targets):
    """torch makes nested tensors of them."""
    model, x = encoder()
    padding = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 1, 1, 1, 1]]).bool()
    base = model(x, src_key_padding_mask=padding)
    adapters = attach(model, LoraConfig(2, 2, targets, init=False), seed=1)
    y = model(x, src_key_padding_mask=padding)
    assert not torch.allclose(y, base)
    adapters.merge()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), y)
    with adapters.disabled():
        assert torch.equal(model(x, src_key_padding_mask=padding), base)


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_encoders_of_padded_rows_in_a_mixed_batch(dora):
    model, x = encoder()
    padding = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 0, 1, 1, 1]]).bool()
    base = model(x, src_key_padding_mask=padding)
    config = LoraConfig(2, 2, ["linear1", "linear2"], init=False, dora=dora)
    adapters = attach(model, config, seed=1)
    y = model(x, src_key_padding_mask=padding)
    adapters.activate(None)
    assert torch.equal(model(x, src_key_padding_mask=padding), base)
    with adapters.rows(["default", None, "default"]):
        mixed = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(mixed, torch.stack([y[0], base[1], y[2]]))
    assert not mixed[padding].any() and not torch.allclose(y, base)
    assert torch.equal(model(x, src_key_padding_mask=padding), base)


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
def test_encoders_of_padded_rows_are_trained_in_eval_mode(targets):
    """As with trained parameters of its own, torch makes no nested tensors then."""
    model, x = encoder()
    padding = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    adapters = attach(model, LoraConfig(2, 2, targets, init=False), seed=1)
    y = model(x, src_key_padding_mask=padding)[~padding]
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x, src_key_padding_mask=padding)[~padding], y)
    with torch.no_grad():
        nested = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(nested[~padding], y)
        assert not nested[padding].any()
        adapters.detach()
        assert torch.equal(model(x, src_key_padding_mask=padding), base)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_attention_s_output_projection_alone(tmp_path):
    """PEFT's all-linear has it, to no effect; here it acts, and merging agrees."""
    case = CASES["attention"]
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(case.net(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = load(case.net(), tmp_path / "theirs")
    net = adapters.model
    y = case.run(net)
    delta = deltas(case, net, "default")
    assert set(delta) == {"layer.out_proj.weight", "head.weight"}
    expected = with_deltas(case, net, {"default": 1.0})(case.x.double()).float()
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(case.run(theirs), expected)
    adapters.save(tmp_path / "ours")
    adapters.merge()
    torch.testing.assert_close(case.run(net), y)
    merged = peft.PeftModel.from_pretrained(case.net(), tmp_path / "ours").merge_and_unload()
    torch.testing.assert_close(case.run(merged), y)


def test_threads_share_an_attention():
    """Each call finds its own parameters, and leaves the base's."""
    case = CASES["attention"]
    net, _ = adapted(case)
    before = dict(net.named_parameters())
    with torch.no_grad():
        expected = case.run(net)
    outputs = []

    def work():
        with torch.no_grad():
            outputs.extend(case.run(net) for _ in range(100))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 400 and all(torch.equal(y, expected) for y in outputs)
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@torch.no_grad()
def test_an_error_in_the_forward_leaves_the_parameters():
    net, _ = adapted(CASES["attention"])
    before = dict(net.named_parameters())
    with pytest.raises(AssertionError):
        net.layer(values(2, 4, 8), values(2, 5, 8), values(2, 3, 8))
    assert all(dict(net.named_parameters())[name] is p for name, p in before.items())
