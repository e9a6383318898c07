"""Trimming and dropping: exactly so many elements stay, in few passes over the deltas."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adapterkit.kernels import elementwise
from adapterkit.kernels.elementwise import Trim, ranks, top_k_threshold
from adapterkit.verbs.combine.methods.common import trim
from tests.support.card import DEVICE, Card, installed
from tests.support.method_references import trimmed
from tests.support.methods import Dense, product, record, seeds

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


def exact(x: Tensor, keep: int, height: int = 3) -> int:
    """The trimmed matrix is the stable sort's; returns the number of passes."""
    deltas, passes = Dense([x], height), 0

    def read() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return (x[first:last].clone() for first, last in deltas.blocks())

    cut = Trim(top_k_threshold(read, x.numel(), keep))
    blocks = [x[first:last].clone() for first, last in deltas.blocks()]
    for block in blocks:
        cut(block)
    assert torch.equal(torch.cat(blocks), trimmed(x, keep)), f"{keep} of {x.numel()}"
    return passes


def awkward() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(40, 50, generator=generator)
    return {
        "normal": normal,
        "equal": torch.full((40, 50), -0.3),
        "zero": torch.zeros(40, 50),
        "nearly zero": torch.where(normal > 1.5, normal, -0.0),
        "signs": normal.sign() * 0.1,
        "two values": torch.where(normal > 0.3, 2.0, -1.0),
        "few values": normal.mul(2).round(),
        "bf16": normal.bfloat16().float(),
        "wide": normal.mul(40).exp2() * normal.sign(),
        "subnormal": normal * 1e-41,
        "rows grow": normal * torch.arange(40.0)[:, None].exp2(),
        "sorted": torch.arange(2000.0).view(40, 50),
        "one large": torch.cat([torch.full((39, 50), 1e-3), torch.full((1, 50), 1e3)]),
        "float64": normal.double() + 1e-12,
        "infinite": torch.where(normal > 2, math.inf, normal),
    }


@pytest.mark.parametrize("size", [(elementwise.SAMPLE, elementwise.ROOM), (50, 100), (7, 1)])
@pytest.mark.parametrize("kind", awkward())
def test_trimming_keeps_exactly_density_times_size_elements(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "SAMPLE", size[0])
    monkeypatch.setattr(elementwise, "ROOM", size[1])
    x = awkward()[kind]
    for keep in (0, 1, 2, 37, 400, 1000, 1001, 1999, 2000, 3000):
        assert exact(x, keep, height=7) < 70
    assert exact(x[:1, :1], 1) == 0 and exact(x[:1, :1], 0) == 0
    for keep in range(7):
        exact(x[:2, :3], keep, height=1)


@pytest.mark.parametrize("most", [elementwise.AT_ONCE, 0])
@pytest.mark.parametrize("kind", awkward())
def test_trimming_on_a_gpu_keeps_exactly_density_times_size_elements(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selected among all at once, or in passes where they are too many for that."""
    monkeypatch.setattr(elementwise, "AT_ONCE", most)
    x = awkward()[kind]
    with installed(Card()), torch.inference_mode():
        there = x.to(DEVICE)
        for keep in (1, 400, 1001, 1999):
            read = lambda: (part.clone() for part in there.split(7))
            cut, blocks = Trim(top_k_threshold(read, 2000, keep, device=DEVICE)), list(read())
            for block in blocks:
                cut(block)
            assert torch.equal(torch.cat(blocks).cpu(), trimmed(x, keep))


def test_two_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = product(300, 700, 8, 1).dense().float()
    assert exact(x, 42_000, height=32) == 2
    monkeypatch.setattr(elementwise, "SAMPLE", 2000)
    assert exact(x, 42_000, height=32) == 2
    assert exact(torch.full((300, 700), 0.5), 42_000) == 2
    # 210,000 / 2000 = 105, and of 700 columns it meets each 35th
    columns = torch.where(torch.arange(700) % 35 == 0, 100.0, 1.0)
    assert exact(x * columns, 42_000, height=32) == 2


def test_few_passes_where_the_bracket_holds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values and a threshold at the jump between them: the bracket has room for neither."""
    monkeypatch.setattr(elementwise, "ROOM", 100)
    monkeypatch.setattr(elementwise, "SAMPLE", 2000)
    large = torch.rand(300, 700, generator=torch.Generator().manual_seed(0)) < 0.3
    x = torch.where(large, 2.0, -1.0)
    for off in (-1, 0, 1):
        assert exact(x, int(large.sum()) + off, height=32) <= 5


def test_few_passes_where_the_bracket_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 20 elements: each miss tells where to look next."""
    monkeypatch.setattr(elementwise, "SAMPLE", 20)
    monkeypatch.setattr(elementwise, "ROOM", 100)
    passes = [
        exact(product(64, 90, 3, seed).dense().float(), keep, height=16)
        for seed in range(5)
        for keep in (60, 1000, 5000)
    ]
    assert max(passes) <= 20 and sum(passes) / len(passes) < 8


def test_the_order_of_adapters_changes_no_sign() -> None:
    """1e8 - 1 - 1e8 is 0 in float32, were it summed there."""
    values = [1e8, -1.0, -1e8]
    for order in itertools.permutations(range(3)):
        result = record("ties", density=1.0).combine_elements(
            Dense([torch.tensor([[values[i]]]) for i in order]), [1.0] * 3, seeds
        )
        assert result.delta.item() < 0 and result.metrics["conflict"] == 1


def test_deviation_of_equal_deltas_is_zero_and_of_others_as_by_hand() -> None:
    x, y, z = (torch.randn(5, 700, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = torch.empty(5, 700)
    elementwise.deviation([x, x, x], out)
    assert not out.any(), "equal deltas vary nowhere"
    elementwise.deviation([x, y, z], out)
    torch.testing.assert_close(out, torch.stack([x, y, z]).std(0, correction=0))


def test_trimming_counts_as_peft_does() -> None:
    deltas = Dense([torch.randn(10, 10, generator=torch.Generator().manual_seed(0))])
    for density in (0.29, 0.57, 0.58, 1.0, 0.0):  # 0.29 * 100 is 28.999...
        block = deltas.rows(0, 0, 10)
        trim(deltas, 0, density)(block)
        assert int((block != 0).sum()) == int(density * 100)


def test_ranks_of_magnitudes_are_shares_from_0_to_1() -> None:
    assert ranks(torch.tensor([[3.0, -1, 2, 1, 0]])).tolist() == [[1, 0.25, 0.75, 0.5, 0]]
    assert ranks(torch.tensor([[3.0], [0]])).tolist() == [[0.5], [0.5]]


def test_drops_keep_the_expectation_and_the_density() -> None:
    deltas = Dense([torch.ones(200, 500)], height=64)
    for name in ("dare_linear", "dare_ties", "della"):
        result = record(name, density=0.3).combine_elements(deltas, [1.0], seeds).delta
        assert (
            abs(float((result != 0).float().mean()) - 0.3) < 0.005
            and abs(float(result.mean()) - 1) < 0.02
        )
    both = (
        record("dare_linear", density=0.3)
        .combine_elements(Dense([torch.ones(200, 500)] * 2), [1.0, -1.0], seeds)
        .delta
    )
    assert both.any(), "each delta has its own random numbers"
