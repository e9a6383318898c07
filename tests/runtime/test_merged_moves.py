"""A model that moves to another dtype while adapters are merged gets its own weights back there."""

import pytest
import torch
from torch import Tensor, nn

from adapterkit import LoraConfig
from adapterkit.core.errors import Refused
from adapterkit.runtime import attach
from tests.support.layers import CASES, adapted
from tests.support.live import llama, tokens

X = tokens(2, 6)
MOVES = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "data": lambda model: [setattr(p, "data", p.data.bfloat16()) for p in model.parameters()],
}
LLAMAS = {
    "lora": {"targets": "all-linear"},
    "dora": {"targets": ["q_proj", "down_proj"], "dora": True},
    "copies": {"targets": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "rows": {"targets": ["q_proj"], "trainable_tokens": [1, 3]},
}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", LLAMAS)
def test_unmerged_after_a_move_a_model_is_its_base_moved(kind, move):
    moved = llama()
    MOVES[move](moved)
    h = attach(model := llama(), LoraConfig(4, 8, init=False, **LLAMAS[kind]), seed=1)
    h.merge()
    MOVES[move](model)
    merged = values(model)
    with h.disabled():
        same(values(model), moved.state_dict())
        assert torch.equal(model(X).logits, moved(X).logits)
    same(values(model), merged)
    h.unmerge()
    same(values(model), moved.state_dict())
    y = model(X).logits
    assert y.dtype == moved(X).logits.dtype and not torch.equal(y, moved(X).logits)
    h.detach()
    assert torch.equal(model(X).logits, moved(X).logits)


def test_a_model_that_moved_there_and_back_has_its_own_bits():
    h = attach(model := llama(), LoraConfig(4, 8, "all-linear", init=False), seed=1)
    base = values(model)
    h.merge()
    model.bfloat16().float()
    h.unmerge()
    targets = {f"{path}.weight" for path in h.state.sites}
    for name in targets:
        assert torch.equal(model.state_dict()[name], base[name]), name


@pytest.mark.parametrize("name", ["attention", "image", "embedding", "linear with its bias"])
def test_layers_of_other_kinds(name):
    case = CASES[name]
    net, adapters = adapted(case)
    expected = {name: value.double() for name, value in values(net).items()}
    adapters.merge()
    net.double()
    adapters.unmerge()
    same(values(net), expected)
    assert case.run(net).isfinite().all()


def test_a_tie_stays_one():
    h = attach(
        model := llama(tie_word_embeddings=True), LoraConfig(4, 8, ["lm_head"], init=False), seed=1
    )
    h.merge()
    model.bfloat16()
    h.unmerge()
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    model(X)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_next_to_a_merged_one_uses_the_moved_bias(dora):
    """The same as where the other one acts unmerged, to what bfloat16 rounds."""
    results = []
    for merged in (False, True):
        torch.manual_seed(0)
        h = attach(
            model := nn.Sequential(nn.Linear(16, 8)),
            LoraConfig(2, 4, ["0"], init=False, lora_bias=True),
            name="first",
            seed=1,
        )
        h.attach(LoraConfig(2, 4, ["0"], init=False, dora=dora), name="second", seed=2)
        h.activate(["first", "second"])
        if merged:
            h.merge("first")
        model.bfloat16()
        results.append(model(torch.ones(2, 16, dtype=torch.bfloat16)).float())
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def test_weights_that_were_offloaded_after_the_merge_are_refused():
    """accelerate would bring the merged ones back."""
    import accelerate

    h = attach(model := llama(), LoraConfig(4, 8, ["q_proj"], init=False), seed=1)
    h.merge()
    y = model(X).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(Refused, match="offloaded"):
        h.unmerge()
    assert torch.equal(model(X).logits, y) and h.merged == {"default": 1.0}
