"""Factors that an embedding and its tied head share (`tie`, PEFT's ensure_weight_tying)."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from adapterkit import LoraConfig, Refused
from adapterkit.runtime import attach, load
from tests.support import live, oracle, tiny
from tests.support.beside_peft import in_peft, shake

CONFIG = LoraConfig(4, 6, ["q_proj", "embed_tokens"], tie=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter of PEFT with shared factors."""
    out = tmp_path_factory.mktemp("tied")
    with oracle.quiet():
        in_peft(
            live.llama(tie_word_embeddings=True),
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "embed_tokens"],
            ensure_weight_tying=True,
        ).save_pretrained(out)
    return out


def loss(model, x):
    return model(x).logits.float().square().mean()


def test_peft_has_the_same_outputs_and_gradients(folder):
    """PEFT's head has Parameters of its own on the embedding's memory: each gets its share of the
    gradient, and an optimizer moves the values twice. Here it is one Parameter with the sum."""
    model, x = live.llama(tie_word_embeddings=True), live.tokens()
    with oracle.quiet():
        theirs = live.peft_of(folder, live.llama(tie_word_embeddings=True))
    h = load(model, folder, trainable=True)
    torch.testing.assert_close(model(x).logits, theirs(x).logits)
    loss(model, x).backward()
    loss(theirs, x).backward()
    embedding = theirs.base_model.model.model.embed_tokens
    head = theirs.base_model.model.lm_head
    ours = model.model.embed_tokens.adapterkit.default
    for part, name, other in (("a", "A", "B"), ("b", "B", "A")):
        whole = getattr(embedding, f"lora_embedding_{name}")["default"].grad
        whole = whole + getattr(head, f"lora_{other}")["default"].weight.grad.T
        torch.testing.assert_close(getattr(ours, part).grad, whole)
    assert len(list(h.parameters())) == 6  # two of each q_proj, two of the embedding
    assert not list(model.lm_head.adapterkit.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_factors_stay_one_while_they_are_trained(dtype, tmp_path):
    model, x = live.llama(tie_word_embeddings=True, dtype=dtype), live.tokens()
    h = attach(model, CONFIG, seed=0)
    optimizer = torch.optim.AdamW(h.parameters(), lr=0.01)
    for _ in range(3):
        loss(model, x).backward()
        optimizer.step()
    h.save(tmp_path)
    stored = oracle.stored(tmp_path)
    prefix = "base_model.model."
    a, b = (stored[f"{prefix}model.embed_tokens.lora_embedding_{name}"] for name in "AB")
    assert b.abs().max() > 0 and a.abs().max() > 0
    torch.testing.assert_close(stored[f"{prefix}lm_head.lora_A.weight"], b.T)
    torch.testing.assert_close(stored[f"{prefix}lm_head.lora_B.weight"], a.T)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"]
    if dtype == torch.float32:
        with oracle.quiet():
            theirs = live.peft_of(tmp_path, live.llama(tie_word_embeddings=True))
        torch.testing.assert_close(model(x).logits, theirs(x).logits)
    again = live.llama(tie_word_embeddings=True, dtype=dtype)
    load(again, tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    assert not list(again.lm_head.adapterkit.parameters())


def test_merged_once_on_each_side(folder):
    """PEFT adds the delta twice to the one weight."""
    model, x = live.llama(tie_word_embeddings=True), live.tokens()
    h = load(model, folder)
    y = model(x).logits
    h.rescale(0.5, name="default")
    h.rescale(2.0, name="default")
    h.merge("default")
    torch.testing.assert_close(model(x).logits, y)
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight)
    h.unmerge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(x).logits, y)


def test_differing_values_of_a_head_are_kept(folder, tmp_path):
    """PEFT trains them apart on bases in half precision, and saves both."""
    from safetensors.torch import save_file

    stored = oracle.stored(folder)
    key = "base_model.model.lm_head.lora_A.weight"
    save_file(stored | {key: stored[key] + 1}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    model = live.llama(tie_word_embeddings=True)
    load(model, tmp_path)
    assert torch.equal(model.lm_head.adapterkit.default.a, stored[key] + 1)


def test_magnitudes_of_a_tied_head_act(tmp_path):
    """A tied head has one of each output, and its embedding one of each value; PEFT keeps the
    factors one, which only training needs."""
    with oracle.quiet():
        wrapped = in_peft(
            live.llama(tie_word_embeddings=True),
            r=4,
            target_modules=["lm_head", "q_proj"],
            ensure_weight_tying=True,
            use_dora=True,
        )
        shake(p for name, p in wrapped.named_parameters() if "magnitude" in name)
        wrapped.save_pretrained(tmp_path)
    model, x = live.llama(tie_word_embeddings=True), torch.arange(8)[None]
    load(model, tmp_path)
    torch.testing.assert_close(model(x).logits, wrapped(x).logits)
    with pytest.raises(Refused, match="dora with tie on lm_head, to be trained"):
        load(live.llama(tie_word_embeddings=True), tmp_path, trainable=True)


@torch.no_grad()
def test_tied_adapters_run_without_gradients_and_swap(folder, tmp_path):
    model, x = live.llama(tie_word_embeddings=True), live.tokens()
    with oracle.quiet():
        theirs = live.peft_of(folder, live.llama(tie_word_embeddings=True))
    h = load(model, folder, pad_rank=8)
    torch.testing.assert_close(model(x).logits, theirs(x).logits)
    with torch.inference_mode():
        text = model.generate(x[:1], max_new_tokens=4, do_sample=False)
        assert torch.equal(
            text, theirs.generate(input_ids=x[:1], max_new_tokens=4, do_sample=False)
        )
    model.bfloat16().float()
    h.save(tmp_path / "again")
    again = oracle.stored(tmp_path / "again")
    assert {value.shape for key, value in again.items() if "lm_head" in key} == {(4, 32), (64, 4)}
    other = live.llama(tie_word_embeddings=True)
    second = attach(other, dataclasses.replace(CONFIG, rank=6), seed=3)
    shake(second.parameters(), 4)
    second.save(tmp_path / "other")
    h.swap("default", tmp_path / "other")
    torch.testing.assert_close(model(x).logits, other(x).logits, atol=2e-3, rtol=1e-3)


def test_copies_of_a_model_share_their_own_factors():
    model, x = live.llama(tie_word_embeddings=True), live.tokens()
    h = attach(model, CONFIG, seed=0)
    other = copy.deepcopy(model)
    shake(h.parameters())
    head, embedding = other.lm_head.adapterkit.default, other.model.embed_tokens.adapterkit.default
    assert head.a.data_ptr() == embedding.b.data_ptr()
    assert not torch.equal(other(x).logits, model(x).logits)


def test_unsupported_ties_are_refused():
    with pytest.raises(Refused, match="dora with tie on lm_head"):
        attach(
            live.llama(tie_word_embeddings=True),
            LoraConfig(targets=["lm_head"], tie=True, dora=True),
        )
    with pytest.raises(Refused, match="expected: tied weights"):
        attach(live.llama(), CONFIG)


def test_a_switch_that_does_more_than_tie():
    """SwitchTransformers scales its decoder's outputs by the config's flag: one side is not merged,
    in files and live by the same rule, and nothing changes."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, "num_experts": 2}
    layers = {"num_layers": 1, "num_decoder_layers": 1, "num_sparse_encoder_layers": 0}
    config = SwitchTransformersConfig(
        vocab_size=40, **sizes, **layers, num_sparse_decoder_layers=0, tie_word_embeddings=True
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ids = torch.arange(8).reshape(1, 8)
    adapters = attach(model, LoraConfig(2, 4, ["lm_head"], init=False))
    with torch.no_grad():
        y = model(input_ids=ids, decoder_input_ids=ids).logits
        with pytest.raises(Refused, match="does more with tie_word_embeddings than tie"):
            adapters.merge()
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, y)
    assert model.config.tie_word_embeddings and not adapters.merged


def test_embeddings_of_several_modules_are_tied_to_nothing(tmp_path):
    """Of a vision model's images; PEFT takes the setting, and ties nothing."""
    with oracle.quiet():
        theirs = in_peft(tiny.model("sam"), target_modules=["v_proj"], ensure_weight_tying=True)
        theirs.save_pretrained(tmp_path)
    adapters = load(tiny.model("sam"), tmp_path)
    assert adapters.state.sites and all(path.endswith("v_proj") for path in adapters.state.sites)
