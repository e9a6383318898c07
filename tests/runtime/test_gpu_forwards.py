"""What a forward with an adapter costs a GPU, on a pretended one: launches, and no waits."""

import pytest
import torch
from torch import nn

from adapterkit import LoraConfig
from adapterkit.kernels.routing import add_routed
from adapterkit.runtime import attach
from tests.support.card import DEVICE, Card, installed, move
from tests.support.live import llama, tokens

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
Q = {"targets": ["q_proj"]}  # of two layers
# name -> settings, launches more than the base's
MODELS = {
    "lora": (Q, 2 * 2),
    # its norms each time: not all writes are seen, and a comparison would be waited for
    "dora": (Q | {"dora": True}, 2 * 30),
    "bias": (Q | {"lora_bias": True}, 2 * 3),
    "embedding": ({"targets": ["embed_tokens"]}, 3),
    "tokens": (Q | {"trainable_tokens": [1, 3]}, 2 * 2 + 5),
    "copies": (Q | {"modules_to_save": ["lm_head"]}, 2 * 2),
    "pissa": (Q | {"init": "pissa"}, 2 * 6),
}


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Waits and launches of a second forward, whose outputs are those of the CPU."""
    call = lambda x: getattr(y := model(x), "logits", y)
    with torch.no_grad():
        expected = call(x)
        with installed(Card()) as card:
            move(model)
            there = x.to(DEVICE)
            call(there)
            card.waits = card.launches = 0
            y = call(there)
            counts = card.waits, card.launches
            assert not card.races
        torch.testing.assert_close(y.cpu(), expected, **CLOSE)
    return counts


@pytest.fixture(scope="module")
def base() -> tuple[int, int]:
    return counted(llama(), tokens(2, 5))


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_language_model(name: str, base: tuple[int, int]):
    settings, most = MODELS[name]
    model = llama()
    attach(model, LoraConfig(4, 8, **{"init": False, **settings}), seed=1)
    waits, launches = counted(model, tokens(2, 5))
    assert waits == base[0] and launches - base[1] <= most


def test_forwards_of_convolutions_do_not_wait_for_the_gpu():
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)).eval()
    x = torch.randn(2, 3, 8, 8)
    model = make()
    attach(model, LoraConfig(4, 8, ["0", "1"], init=False), seed=1)
    assert counted(model, x) <= (0, counted(make(), x)[1] + 2 * 3)


@pytest.mark.parametrize("tokens, experts", [(1, 64), (1, 4), (64, 10)])
def test_forwards_of_routed_experts_do_not_wait_for_the_gpu(tokens: int, experts: int):
    rows = [torch.randn(tokens, 16) for _ in range(2)]
    factors = torch.randn(experts * 5, 16), torch.randn(experts * 4, 16), torch.ones(experts)
    how = {"top_k": 3, "temperature": 1.0}
    with torch.no_grad():
        expected = add_routed(*rows, *factors, **how)
        with installed(Card()) as card:
            there = [x.to(DEVICE) for x in (*rows, *factors)]
            card.waits = card.launches = 0
            y = add_routed(*there, **how)
            assert card.waits == 0 and card.launches <= 13
        torch.testing.assert_close(y.cpu(), expected, **CLOSE)
