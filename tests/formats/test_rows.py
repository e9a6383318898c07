"""Orders of rows against the loops that define them."""

import pytest
import torch

from adapterkit.adapters.formats.base_model import model_heads
from adapterkit.adapters.formats.modules.row_permutations import (
    ORDERS,
    Heads,
    LinearHeads,
    inverse,
    order,
)
from adapterkit.core.errors import Refused

pytestmark = pytest.mark.quick

HEADS = [
    Heads(4, 2, LinearHeads(2, 6, 3)), Heads(4, 4, LinearHeads(1, 4, 3)),
    Heads(6, 1, LinearHeads(3, 3, 3)), Heads(1, 1, LinearHeads(1, 1, 3)),
]  # fmt: skip
WIDTH = 6  # of a head


def rotated(count: int) -> list[int]:
    """Where row i of the first, then of the second half of each head is in a file of pairs."""
    return [
        head * WIDTH + 2 * i + half
        for head in range(count)
        for half in (0, 1)
        for i in range(WIDTH // 2)
    ]


def grouped(heads: Heads) -> list[int]:
    """Where each head of q, then of k, then of v, is in a file of groups."""
    per = heads.query // heads.key
    q = [(h // per) * (per + 2) + h % per for h in range(heads.query)]
    k = [g * (per + 2) + per for g in range(heads.key)]
    v = [g * (per + 2) + per + 1 for g in range(heads.key)]
    return [head * WIDTH + row for head in q + k + v for row in range(WIDTH)]


@pytest.mark.parametrize("heads", HEADS)
def test_orders_that_need_heads(heads):
    q, k, total = heads.query, heads.key, heads.query + 2 * heads.key
    assert order("rotary_q", q * WIDTH, heads, "m").tolist() == rotated(q)
    assert order("rotary_k", k * WIDTH, heads, "m").tolist() == rotated(k)
    assert order("groups", total * WIDTH, heads, "m").tolist() == grouped(heads)


def test_orders_of_linear_attention():
    """Heads of values of two keys, three each, two rows a head."""
    heads = Heads(4, 2, LinearHeads(2, 6, 3))
    tiled = [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]  # k0 v0, k1 v0, k0 v1, ... in the file
    assert order("values", 12, heads, "m").tolist() == tiled
    first = 2 * 2 * 3  # queries and keys
    expected = [*range(first), *(first + row for row in tiled)]
    assert order("values_last", first + 12, heads, "m").tolist() == expected
    assert order("values", 6, heads, "m").tolist() == [0, 2, 4, 1, 3, 5]
    with pytest.raises(Refused, match="heads is unknown") as caught:
        order("values", 12, Heads(4, 2), "m")
    assert "linear_num_key_heads" in caught.value.expected


def test_orders_that_need_none():
    assert order("swap_halves", 6, None, "m").tolist() == [3, 4, 5, 0, 1, 2]
    assert order("swap_pair", 6, None, "m", 3).tolist() == [3, 4, 5, 0, 1, 2]
    assert order("swap_pair", 6, None, "m", 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert order("interleave", 6, None, "m").tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("heads", HEADS)
def test_the_inverse_brings_rows_back(name, heads):
    size = (heads.query + 2 * heads.key) * heads.query * heads.key * WIDTH
    if name == "values_last":
        size += 2 * heads.linear.key * heads.linear.size
    rows = torch.randn(size, 3)
    index = order(name, size, heads, "m", size // 2)
    assert torch.equal(rows[index][inverse(index)], rows)


@pytest.mark.parametrize("name", ["rotary_q", "rotary_k", "groups"])
def test_heads_that_are_unknown_are_refused(name):
    with pytest.raises(Refused, match="heads is unknown"):
        order(name, 24, None, "m")


@pytest.mark.parametrize("name, size", [
    ("rotary_q", 20), ("values", 7), ("rotary_k", 6), ("groups", 12), ("swap_halves", 5),
    ("interleave", 5),
])  # fmt: skip
def test_rows_that_do_not_divide_are_refused(name, size):
    with pytest.raises(Refused, match=f"m: the tensor has {size} rows"):
        order(name, size, Heads(4, 2, LinearHeads(1, 2, 3)), "m")


@pytest.mark.parametrize("config, heads", [
    ({"num_attention_heads": 8, "num_key_value_heads": 2}, Heads(8, 2)),
    ({"num_attention_heads": 8}, Heads(8, 8)),
    ({"num_attention_heads": 8, "num_key_value_heads": None}, Heads(8, 8)),
    ({"n_head": 8, "n_query_groups": 4}, Heads(8, 4)),
    ({"text_config": {"num_attention_heads": 8, "num_key_value_heads": 2}}, Heads(8, 2)),
    ({"num_attention_heads": 8, "num_key_value_heads": 3}, None),
    ({"num_attention_heads": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
      "linear_key_head_dim": 16}, Heads(8, 8, LinearHeads(2, 4, 16))),
    ({"num_attention_heads": 8, "linear_num_key_heads": 3, "linear_num_value_heads": 4,
      "linear_key_head_dim": 16}, Heads(8, 8)),
    ({"num_attention_heads": "8", "text_config": "none"}, None),
    ({"num_attention_heads": True}, None),
    ({"num_attention_heads": 8, "num_key_value_heads": -2}, None),
    ({}, None),
])  # fmt: skip
def test_heads_of_a_config(config, heads):
    assert model_heads(config) == heads
