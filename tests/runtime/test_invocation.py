"""aLoRA: factors act from the last invocation sequence on; everything before is the base's."""

import copy
import dataclasses
from inspect import signature

import peft
import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from tests.support.card import DEVICE, Card, installed, move

INVOCATION = [7, 9]
# the argument's name differs between versions of transformers
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(**more) -> LoraConfig:
    targets = more.pop("targets", ["q_proj", "k_proj", "v_proj", "down_proj"])
    return LoraConfig(
        4, 8, targets, init=False, invocation_tokens=INVOCATION, task_type="CAUSAL_LM", **more
    )


@pytest.fixture
def prompts() -> torch.Tensor:
    """Rows that invoke at 3 (the second of two), at 6, at their end, and never."""
    torch.manual_seed(1)
    ids = torch.randint(10, 100, (4, 9))
    for row, start in ((0, 0), (0, 3), (1, 6), (2, 7)):
        ids[row, start : start + 2] = torch.tensor(INVOCATION)
    return ids


@pytest.fixture
def adapters():
    return attach(llama(), settings(), seed=1)


@pytest.fixture
def theirs(adapters, tmp_path):
    adapters.save(tmp_path / "saved")
    return peft.PeftModel.from_pretrained(llama(), tmp_path / "saved", is_trainable=True)


def test_forward_and_gradients_are_pefts(adapters, theirs, prompts):
    ours, other = adapters.model(prompts).logits, theirs(input_ids=prompts).logits
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    ours.square().mean().backward()
    other.square().mean().backward()
    gradients = {p.grad.norm().item() for p in theirs.parameters() if p.grad is not None}
    norms = [p.grad.norm().item() for p in adapters.parameters()]
    assert len(norms) == 16 and min(norms) > 0
    for norm in norms:
        assert min(abs(norm - other) for other in gradients) < 1e-5 * max(norm, 1)


def test_tokens_before_it_are_the_bases_bit_for_bit(adapters, prompts):
    ours = adapters.model(prompts).logits
    with adapters.disabled():
        base = adapters.model(prompts).logits
    for row, start in ((0, 3), (1, 6), (2, 7), (3, 9)):
        assert torch.equal(ours[row, :start], base[row, :start])
        assert start == 9 or not torch.equal(ours[row, start], base[row, start])


def test_padding_on_the_left_changes_nothing(adapters, prompts):
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), prompts], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours = adapters.model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(ours, adapters.model(prompts).logits, rtol=1e-4, atol=1e-5)


def test_generated_tokens_are_adapted(adapters, theirs, prompts):
    """With a cache, without one, and as PEFT generates."""
    ours = adapters.model.generate(prompts[:3], **GREEDY)
    theirs.eval()
    assert torch.equal(ours, theirs.generate(input_ids=prompts[:3], **GREEDY))
    assert torch.equal(ours, adapters.model.generate(prompts[:3], use_cache=False, **GREEDY))


def test_beam_search_with_a_cache_equals_without(adapters, prompts):
    beams = GREEDY | {"num_beams": 3}
    cached = adapters.model.generate(prompts, **beams)
    assert torch.equal(cached, adapters.model.generate(prompts, use_cache=False, **beams))


def test_base_first_then_the_adapter_from_its_cache(adapters, prompts):
    """The guide's first pattern."""
    with adapters.disabled():
        said = adapters.model.generate(
            prompts[3:], **{CACHE: DynamicCache()}, return_dict_in_generate=True, **GREEDY
        )
    text = torch.cat([said.sequences, torch.tensor([INVOCATION])], 1)
    cached = adapters.model.generate(text, **{CACHE: said.past_key_values}, **GREEDY)
    assert torch.equal(cached, adapters.model.generate(text, **GREEDY))


def test_a_prefix_for_both(adapters, prompts):
    """The guide's second pattern: the shared cache is copied before the adapter writes to it."""
    shared, model = prompts[3:], adapters.model
    with adapters.disabled():
        cache = model(shared, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    text = torch.cat([shared, torch.tensor([INVOCATION])], 1)
    with torch.no_grad():
        first = model(text[:, 9:], **{CACHE: cache}).logits
        whole = model(text).logits[:, 9:]
        torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)
        later = torch.tensor([[11, 12]])
        mine = copy.deepcopy(cache)  # keeps that the adapter acts
        expected = model(torch.cat([text, later], 1)).logits[:, -2:]
        for one in (cache, mine):
            got = model(later, **{CACHE: one}).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with adapters.disabled():
            expected = model(torch.cat([shared, later], 1)).logits[:, -2:]
        got = model(later, **{CACHE: copied}).logits  # never invoked there
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_sequence_across_two_calls(adapters, prompts):
    """Its first token is in the cache, as the base's; from the second call on all is adapted."""
    model = adapters.model
    text = torch.cat([prompts[3:], torch.tensor([INVOCATION])], 1)
    with torch.no_grad():
        cache = model(text[:, :-1], use_cache=True).past_key_values
        across = model(text[:, -1:], **{CACHE: cache}).logits
        with adapters.disabled():
            cache = model(text[:, :-1], use_cache=True).past_key_values
            base = model(text[:, -1:], **{CACHE: cache}).logits
    assert not torch.allclose(across, base)


def test_a_cache_that_is_cut_forgets(adapters, prompts):
    model = adapters.model
    with torch.no_grad():
        cache = model(prompts[:1], use_cache=True).past_key_values
        cache.crop(-7)
        later = torch.tensor([[11, 12]])
        got = model(later, **{CACHE: cache}).logits
        with adapters.disabled():
            cache = model(prompts[:1, :2], use_cache=True).past_key_values
            assert torch.allclose(model(later, **{CACHE: cache}).logits, got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_equal(adapters, prompts, reentrant: bool):
    model = adapters.model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(prompts).logits.square().mean().backward()
        return [p.grad.clone() for p in adapters.parameters()]

    plain = gradients()
    model.enable_input_require_grads()
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # by version
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": reentrant})
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    losses = [model(rows).logits.square().mean() for rows in (prompts[:2], prompts[2:])]
    with pytest.raises(AdapterkitError, match="several calls before one backward"):
        sum(losses).backward()


def test_an_invoked_adapter_with_a_plain_one(adapters, prompts):
    adapters.attach(LoraConfig(2, 4, ["v_proj"], init=False), name="plain", seed=2)
    adapters.activate("plain")
    plain = adapters.model(prompts).logits
    adapters.activate({"plain": 1.0, "default": 1.0})
    both = adapters.model(prompts).logits
    assert torch.equal(both[3], plain[3]) and not torch.equal(both[0], plain[0])


@torch.no_grad()
def test_rows_of_alora_lora_and_base(adapters, prompts):
    """Each row is what it is alone; also while text is generated, with beams."""
    adapters.attach(LoraConfig(2, 4, ["v_proj"], init=False), name="plain", seed=2)
    adapters.attach(settings(targets=["q_proj", "o_proj"]), name="other", seed=3)
    names = ["default", "plain", "other", None]
    order = [0, 3, 1, 2]
    for beams in (1, 2):
        options = GREEDY | {"num_beams": beams}
        with adapters.rows(names):
            together = adapters.model.generate(prompts[order], **options)
            logits = adapters.model(prompts[order]).logits
        for row, name in enumerate(names):
            adapters.activate(name)
            alone = prompts[order[row : row + 1]]
            torch.testing.assert_close(
                adapters.model(alone).logits[0], logits[row], rtol=1e-4, atol=1e-5
            )
            text = adapters.model.generate(alone, **options)[0]
            assert torch.equal(text, together[row, : len(text)])


def test_a_gpu_is_waited_for_once(prompts):
    """For where the adapter begins in a call's rows, whatever the number of layers."""
    waits = []
    for targets in (None, ["q_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"]):
        h = attach(llama(), settings(**({"targets": targets} if targets else {})), seed=1)
        if not targets:
            h.detach()
        with torch.no_grad():
            expected = h.model(prompts).logits
            with installed(Card()) as card:
                move(h.model)
                ids = prompts.to(DEVICE)
                h.model(ids)
                card.waits = 0
                y = h.model(ids).logits
                waits.append(card.waits)
                torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert waits[2] == waits[1] == waits[0] + 1


def test_mixture_of_experts(prompts):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=100, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    adapters = attach(model, settings(targets=["q_proj", "lm_head"]), seed=1)
    ours = model(prompts).logits
    with adapters.disabled():
        base = model(prompts).logits
    assert torch.equal(ours[1, :6], base[1, :6]) and not torch.equal(ours[1, 6], base[1, 6])


def test_saved_adapters_load_with_equal_outputs(adapters, prompts, tmp_path):
    expected = adapters.model(prompts).logits
    adapters.save(tmp_path / "saved")
    again = load(llama(), tmp_path / "saved")
    assert torch.equal(again.model(prompts).logits, expected)
    again.activate(None)
    again.delete("default")
    assert not again.model._forward_pre_hooks and not again.model._forward_hooks


def test_rows_without_the_sequence_are_counted_once(adapters, prompts):
    model = adapters.model
    assert adapters.missed_invocations == {"default": 0}
    model(prompts)
    assert adapters.missed_invocations == {"default": 1}
    model.generate(prompts, **GREEDY)  # 8 calls, which continue a cache
    assert adapters.missed_invocations == {"default": 2}
    with adapters.disabled():
        model(prompts)
    assert adapters.missed_invocations == {"default": 2}
    model(torch.full((3, 1), 11))  # shorter than the sequence
    assert adapters.missed_invocations == {"default": 5}


@torch.no_grad()
def test_in_mixed_batches_each_adapter_counts_its_own_rows(adapters, prompts):
    adapters.attach(LoraConfig(2, 4, ["v_proj"], init=False), name="plain", seed=2)
    adapters.attach(settings(targets=["q_proj"]), name="other", seed=3)
    with adapters.rows(["default", "other", "plain", "other"]):
        adapters.model(prompts)  # only the last row lacks the sequence
        assert adapters.missed_invocations == {"default": 0, "other": 1}
        adapters.model.generate(prompts, **GREEDY | {"num_beams": 3})
    assert adapters.missed_invocations == {"default": 0, "other": 4}
    adapters.delete("other")
    assert adapters.missed_invocations == {"default": 0}


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_task_for_which_peft_runs_no_alora_is_a_warning(task, prompts, tmp_path):
    config = dataclasses.replace(settings(), task_type=task)
    text = f"task_type {task}: PEFT runs an activated LoRA only with CAUSAL_LM"
    with pytest.warns(UserWarning, match=text) as ours:
        adapters = attach(llama(), config, seed=1)
    assert len(ours) == 1
    adapters.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved")
    if task is None:
        assert torch.equal(theirs(input_ids=prompts).logits, llama()(prompts).logits)


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda h, ids: h.merge(), "after its invocation only"),
        (lambda h, ids: h.model(inputs_embeds=torch.zeros(1, 3, 32)), "no input_ids"),
        (
            lambda h, ids: h.attach(settings(targets=["embed_tokens"]), name="other"),
            "invocation_tokens on model.embed_tokens",
        ),
    ],
)
def test_unsupported_calls_are_refused_and_change_nothing(adapters, prompts, misuse, message: str):
    expected = adapters.model(prompts).logits
    with pytest.raises(AdapterkitError, match=message):
        misuse(adapters, prompts)
    assert torch.equal(adapters.model(prompts).logits, expected)
