"""What a combination costs the host on a GPU: launches and waits are counted on a pretended card.

A GPU works on pieces of eight million elements: what a smaller weight costs, each of them costs.
"""

import pytest
import torch

from adapterkit.kernels import block_sizes as pieces
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods import protocol
from adapterkit.verbs.combine.methods.protocol import Deltas
from tests.support import methods
from tests.support.card import DEVICE, Card, installed

OUT, IN = 1024, 2048
LAUNCHES = 20 * pieces.GPU / 1e6  # twenty a million elements of the output
WAITS = 4  # of each delta: it is selected among all of its elements at once


def spent(name: str) -> tuple[int, float]:
    """Launches, and waits of each delta: eight of TIES, three of other methods."""
    generator, count = torch.Generator().manual_seed(0), 8 if name == "ties" else 3
    shapes = (OUT, 2), (2, IN)
    with installed(Card()) as card, torch.inference_mode():
        pairs = [
            [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
            for _ in range(count)
        ]
        deltas = Deltas([Product(*pair) for pair in pairs])
        launches, waits = card.launches, card.waits
        methods.record(name).combine_elements(deltas, [1.0] * count, methods.seeds)
    assert not card.races
    return card.launches - launches, (card.waits - waits) / count


@pytest.mark.parametrize("name", methods.ON_ELEMENTS)
def test_methods_on_elements(name: str):
    launches, waits = spent(name)
    assert launches <= LAUNCHES and waits <= WAITS * (2 if name == "breadcrumbs" else 1)


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_budget_fails_where_pieces_are_those_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "GPU", protocol.BLOCK)
    assert spent(name)[0] > LAUNCHES
