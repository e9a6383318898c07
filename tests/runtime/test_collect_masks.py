"""Which inputs of a live model count: attention masks, labels, and what the caller says."""

import copy
from inspect import signature

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, ReformerConfig, ReformerModel

from adapterkit.core.errors import Failed
from adapterkit.runtime import collect
from adapterkit.verbs.stats.data.tokens import BOTH, TokenTracker
from tests.support import oracle, tiny
from tests.support.live import llama, tokens

# transformers 5.24 calls it cache
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 0, 0, 0, 0, 0]])


def inputs_of(model: nn.Module, run) -> dict[str, list[torch.Tensor]]:
    """What each linear layer sees, call by call."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].detach().double())
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "head" not in path
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def covariance(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


def check(stats: dict, expected: dict[str, torch.Tensor]) -> None:
    assert stats.keys() == {f"{path}.covariance" for path in expected}
    for path, value in expected.items():
        actual = stats[f"{path}.covariance"].double()
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positional", [False, True])
def test_padding_does_not_count(positional: bool):
    """A padded batch gives what its texts give one by one."""
    model, ids = llama(), tokens(3, 7)
    call = (lambda: model(ids, PADDED)) if positional else lambda: model(ids, attention_mask=PADDED)

    def one_by_one():
        for row, mask in zip(ids, PADDED, strict=True):
            model(row[None, : int(mask.sum())])

    seen = inputs_of(model, one_by_one)
    expected = {p: covariance(torch.cat([x[0] for x in xs])) for p, xs in seen.items()}
    check(collect(model, call), expected)
    whole = {
        p: covariance(x.reshape(-1, x.shape[-1])) for p, (x,) in inputs_of(model, call).items()
    }
    check(collect(model, call, mask=lambda arguments: None), whole)


def test_labels_that_are_ignored_do_not_count():
    model, ids = llama(), tokens(3, 7)
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    run = lambda: model(input_ids=ids, attention_mask=PADDED, labels=labels)
    counted = PADDED.bool() & (labels != -100)
    expected = {p: covariance(x[counted]) for p, (x,) in inputs_of(model, run).items()}
    check(collect(model, run), expected)
    by_hand = lambda arguments: arguments["input_ids"] % 2 == 0
    even = {p: covariance(x[ids % 2 == 0]) for p, (x,) in inputs_of(model, run).items()}
    check(collect(model, run, mask=by_hand), even)


def test_labels_of_texts_say_nothing_of_tokens():
    model, ids = oracle.bert_classifier(), tokens(3, 7)
    labels = torch.tensor([0, -100, 1])
    run = lambda: model(ids, attention_mask=PADDED, labels=labels)
    seen = {path: x for path, (x,) in inputs_of(model, run).items()}
    expected = {p: covariance(x[PADDED.bool()] if x.ndim == 3 else x) for p, x in seen.items()}
    assert expected["bert.pooler.dense"].shape == (32, 32)  # of a vector for each text
    stats = collect(model, run)
    check({key: value for key, value in stats.items() if "classifier" not in key}, {
        path: value for path, value in expected.items() if path != "classifier"
    })  # fmt: skip


@pytest.mark.parametrize("given", ["ids", "outputs"])
@pytest.mark.parametrize("length", [7, 5])
def test_encoder_and_decoder_have_masks_of_their_own(given: str, length: int):
    """Cross attention's keys and values see the encoder's tokens, also of the same number."""
    model, ids = oracle.t5(), tokens(3, 7)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    labels = tokens(3, length, seed=1)
    labels[1, 2:] = -100
    source = {"input_ids": ids}
    if given == "outputs":
        source = {"encoder_outputs": model.get_encoder()(input_ids=ids, attention_mask=PADDED)}
    run = lambda: model(**source, attention_mask=PADDED, labels=labels)
    expected = {}
    for path, (x,) in inputs_of(model, run).items():
        of_encoder = path.startswith("encoder") or path.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        expected[path] = covariance(x[PADDED.bool() if of_encoder else labels != -100])
    assert any("EncDecAttention.k" in path for path in expected)
    check(collect(model, run, targets=list(expected)), expected)


def test_a_mask_of_a_cache():
    """Its last columns are those of the tokens."""
    model, ids = llama(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 4:] = 0
    with torch.no_grad():
        cache = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    run = lambda: model(ids[:, 3:], attention_mask=mask, **{CACHE: copy.deepcopy(cache)})
    seen = inputs_of(model, run)
    expected = {p: covariance(x[mask[:, 3:].bool()]) for p, (x,) in seen.items()}
    check(collect(model, run), expected)


def test_masks_end_with_the_call():
    """Layers that are called outside of the model's own forward have none."""
    model, ids = llama(), tokens(3, 7)
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))

    def run():
        model(ids, attention_mask=PADDED)
        layer(x)

    stats = collect(model, run, targets=["layers.0.mlp.gate_proj"])
    inside = inputs_of(model, lambda: model(ids, attention_mask=PADDED))
    rows = torch.cat([
        inside["model.layers.0.mlp.gate_proj"][0][PADDED.bool()], x.reshape(-1, 32).double()
    ])  # fmt: skip
    check(stats, {"model.layers.0.mlp.gate_proj": covariance(rows)})


class Regrouped(nn.Module):
    """Layers that see the tokens in another order, some of them, and some of several."""

    def __init__(self):
        super().__init__()
        names = ("turned", "flat", "some", "pixels", "pairs", "texts")
        for name in names:
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, input_ids, attention_mask=None, pixels=None):
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        y = self.turned(x.transpose(0, 1)).transpose(0, 1)
        y = self.flat(y.reshape(-1, 4))
        y = self.some(y[torch.tensor([3, 0, 2, 8, 7, 5, 4, 1, 6])])
        self.texts(x.mean(1))
        if pixels is not None:
            self.pixels(pixels)
        return self.pairs(x[:, 1:] + x[:, :-1]) * y.sum()


def test_tokens_are_found_wherever_they_are():
    """As many rows as tokens: sizes say nothing."""
    model, ids = Regrouped(), torch.tensor([[0, 1, 2], [3, 1, 0], [2, 2, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    pixels = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    run, flags = lambda: model(ids, mask, pixels), mask.bool()
    seen = {path: x for path, (x,) in inputs_of(model, run).items()}
    order = flags.flatten()[torch.tensor([3, 0, 2, 8, 7, 5, 4, 1, 6])]
    every = torch.ones(3, 3, dtype=torch.bool)
    masks = {"turned": flags.T, "flat": flags.flatten(), "some": order, "pixels": every,
             "texts": every[0]}  # fmt: skip
    expected = {path: covariance(seen[path][one]) for path, one in masks.items()}
    check(collect(model, run, targets=list(masks)), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("length", [7, 8])
def test_padding_added_by_the_model_does_not_count(length: int):
    """Longformer pads to its window, and has the tokens first in its attention."""
    model = tiny.model("longformer").eval()
    ids = tokens(3, length)
    seen = inputs_of(model, lambda: model(ids))
    expected = {}
    for path, (x,) in seen.items():
        first = path.endswith(("self.query", "self.key", "self.value"))
        if "pooler" in path:
            continue
        assert x.shape[:2] == ((8, 3) if first else (3, 8)), path
        kept = x[:length] if first else x[:, :length]
        expected[path] = covariance(kept.reshape(-1, x.shape[-1]))
    expected = {p: v for p, v in expected.items() if "global" not in p and "lm_head" not in p}
    check(collect(model, lambda: [model(ids) for _ in range(2)], targets=list(expected)), expected)


def test_ids_that_a_model_appends_do_not_count():
    """Reformer concatenates ids up to its chunks."""
    config = ReformerConfig(
        vocab_size=128, hidden_size=16, num_attention_heads=2, attention_head_size=8,
        feed_forward_size=24, attn_layers=["local"], local_attn_chunk_length=4,
        axial_pos_shape=(4, 4), axial_pos_embds_dim=(8, 8), max_position_embeddings=16,
        is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = ReformerModel(config).eval(), tokens(3, 7)
    seen = inputs_of(model, lambda: model(ids))
    assert {x.shape[:2] for (x,) in seen.values()} == {(3, 8)}
    expected = {p: covariance(x[:, :7].reshape(-1, x.shape[-1])) for p, (x,) in seen.items()}
    check(collect(model, lambda: [model(ids) for _ in range(2)]), expected)


def test_writes_into_a_copy_do_not_mark_the_original():
    model, ids = oracle.llama(), tokens(3, 7)
    plain = model.model.forward

    def forward(input_ids, **kwargs):
        shifted = input_ids.clone()
        shifted[:, 1:] = input_ids[:, :-1]
        return plain(input_ids=input_ids, **kwargs)

    model.model.forward = forward
    run = lambda: model(input_ids=ids, attention_mask=PADDED)
    expected = {p: covariance(x[PADDED.bool()]) for p, (x,) in inputs_of(model, run).items()}
    check(collect(model, run), expected)


def test_vectors_of_several_tokens():
    """Refused where some of them count and others do not: a mean over a text is the text's."""
    model, ids = Regrouped(), torch.tensor([[0, 1, 2], [3, 1, 0], [2, 2, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    with pytest.raises(Failed, match=r"pairs saw an input of \(3, 2, 4\), and which of its"):
        collect(model, lambda: model(ids, mask), targets=["pairs"])
    assert collect(model, lambda: model(ids, mask * 0 + 1), targets=["pairs"])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_masks_of_another_form():
    model, ids = llama(), tokens(1, 4)
    square = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(Failed, match="attention_mask of shape"):
        collect(model, lambda: model(ids, attention_mask=square))
    stats = collect(model, lambda: model(ids, attention_mask=square), mask=lambda arguments: None)
    assert len(stats) == 14


class Sounds(nn.Module):
    """A layer whose vectors are of no ids."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sounds, attention_mask=None):
        return self.layer(sounds)


def test_a_mask_of_what_is_no_text():
    """Of the caller's it is known what it says, where it has the vectors' shape."""
    model, x = Sounds(), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    run = lambda: model(x, attention_mask=PADDED)
    with pytest.raises(Failed, match="layer saw an input of"):
        collect(model, run)
    by_hand = collect(model, run, mask=lambda arguments: PADDED)
    check(by_hand, {"layer": covariance(x[PADDED.bool()].double())})
    with pytest.raises(Failed, match="layer saw an input of"):
        collect(model, run, mask=lambda arguments: PADDED[:2])


def test_a_mask_of_no_decoder():
    model, ids = oracle.t5(), tokens(3, 7)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    run = lambda: model(input_ids=ids, labels=tokens(3, 5))
    with pytest.raises(Failed, match=r"no tokens of a decoder for a mask of \(3, 7\)"):
        collect(model, run, mask=lambda arguments: (None, PADDED))


@pytest.mark.parametrize("layer", [
    nn.Conv1d(4, 4, 3, stride=2, bias=False), nn.ConvTranspose1d(4, 4, 3, bias=False),
    nn.Conv2d(4, 4, 3, bias=False),
], ids=["stride", "transposed", "image"])  # fmt: skip
def test_outputs_of_these_convolutions_are_of_several_tokens(layer: nn.Module):
    tracker, mask = TokenTracker(), torch.arange(8) < 4
    x = torch.randn(1, 4, *(3,) * isinstance(layer, nn.Conv2d), 8)
    with torch.no_grad(), tracker:
        tracker.mark(x, mask.expand(x.shape))
        y = layer(x)
    bits = tracker.of(y)
    assert bits is not None and bool((bits == BOTH).all())
