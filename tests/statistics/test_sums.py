"""Sums over inputs against float64, and principal components against numpy's."""

import pytest
import torch

from adapterkit.core.errors import Failed
from adapterkit.kernels.lowrank.truncated import principal_components
from adapterkit.verbs.stats.sums import BLOCK, Sum, Sums
from tests.support.card import DEVICE, WORKSPACE, Card, installed

ALL = ("covariance", "mean", "pca")
SMALL = WORKSPACE + (4 << 20)  # bytes of a card without room for totals


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x, mask=None):
    rows = (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows), rows.mean(0)


@pytest.mark.parametrize("width", [1, 5, 300, 700])
def test_panels_make_the_full_covariance(width):
    """Widths of one panel, and of several of which the last is short; blocks in between."""
    x = draws(40, 7, width) + 1
    sums = Sums(ALL, components=3)
    for batch in x:
        sums.add("a", batch)
    stats = dict(sums.statistics())
    covariance, mean = reference(x)
    torch.testing.assert_close(stats["a.covariance"].double(), covariance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats["a.mean"].double(), mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(stats["a.covariance"], stats["a.covariance"].T)
    values, vectors = torch.linalg.eigh(covariance - mean.outer(mean))
    k = min(3, width)
    torch.testing.assert_close(
        stats["a.variances"].double(), values.flip(0)[:k], rtol=1e-5, atol=1e-6
    )
    aligned = (stats["a.components"].double() * vectors.T.flip(0)[:k]).sum(1).abs()
    torch.testing.assert_close(aligned, torch.ones(k).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stats["a.variance"][0].double(), values.sum(), rtol=1e-5, atol=1e-6)


def test_rounding_does_not_grow():
    """A million vectors with a large mean: as exact as a few."""
    x = draws(4096, 4) * 1e-2 + 100
    sums = Sums(ALL, components=4)
    for _ in range(256):
        sums.add("a", x)
    stats = dict(sums.statistics())
    covariance, mean = reference(x)
    torch.testing.assert_close(stats["a.covariance"].double(), covariance, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["a.mean"].double(), mean, rtol=1e-7, atol=0)


def test_a_mask_leaves_vectors_out():
    x, mask = draws(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0] * 5]).bool()
    sums = Sums(ALL, components=8)
    sums.add("a", x, mask)
    sums.add("b", x, mask)
    sums.add("c", x)
    stats = dict(sums.statistics())
    assert sums.shared == {"b": "a"}
    for name, count in (("a", mask), ("c", None)):
        covariance, mean = reference(x, count)
        torch.testing.assert_close(stats[f"{name}.covariance"].double(), covariance)
        torch.testing.assert_close(stats[f"{name}.mean"].double(), mean)
    assert sums.by_module["a"].vectors == 7


def test_nothing_counts():
    sums = Sums()
    sums.add("a", draws(2, 3, 4), torch.zeros(2, 3))
    assert not dict(sums.statistics())


def test_an_input_changed_in_place_counts_as_another():
    sums, x = Sums(("mean",)), draws(2, 4)
    first = x.clone()
    sums.add("a", x)
    x.mul_(3)
    sums.add("b", x)
    stats = dict(sums.statistics())
    torch.testing.assert_close(stats["a.mean"], first.mean(0))
    torch.testing.assert_close(stats["b.mean"], 3 * first.mean(0))


def test_layers_part():
    """Two that shared their inputs at first: each has its own sum from then on."""
    sums, x = Sums(("mean", "covariance")), draws(4, 6, 5)
    for i, batch in enumerate(x):
        sums.add("a", batch)
        sums.add("b", batch + 1 if i > 1 else batch)
    stats = dict(sums.statistics())
    assert not sums.shared
    later = torch.cat([x[:2], x[2:] + 1])
    for name, value in (("a", x), ("b", later)):
        covariance, mean = reference(value)
        torch.testing.assert_close(stats[f"{name}.covariance"].double(), covariance)
        torch.testing.assert_close(stats[f"{name}.mean"].double(), mean)


def test_calls_are_normalized_as_corda_does():
    x = draws(3, 1, 6, 5)
    sums = Sums(normalize=True)
    for batch in x:
        sums.add("a", batch)
    expected = sum((b[0] / b.max().abs()).T @ (b[0] / b.max().abs()) for b in x) / 3
    torch.testing.assert_close(dict(sums.statistics())["a.covariance"], expected)


def test_inputs_that_are_not_finite_are_refused():
    sums = Sums(("mean",))
    sums.add("a", torch.full((2, 4), torch.inf))
    with pytest.raises(Failed, match="finite"):
        dict(sums.statistics())


def test_few_components_are_those_of_a_full_decomposition():
    scales = torch.linspace(3, 0.1, 300)[:, None]
    x = (draws(300, 300) * scales).double()
    covariance, mean = x.T @ x / 300, x.mean(0)
    few = principal_components(covariance, mean, 10)
    full = principal_components(covariance, mean, 300)
    torch.testing.assert_close(few[1], full[1][:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(few[0], full[0][:10], rtol=0, atol=1e-4)


def sums_of(batches, before=None, device=None):
    """Statistics of batches on a device, with sums that other ones gave before; where the sums
    are."""
    sums = Sums(ALL, components=3)
    sums.merge(before or [])
    for batch in batches:
        sums.add("a", batch if device is None else batch.to(device))
    sums.settle()
    (total,) = sums.groups
    return {key: value.tolist() for key, value in sums.statistics()}, total


@pytest.mark.parametrize(
    ("kind", "memory", "on_host"),
    [("cuda", 80 << 30, False), ("cuda", SMALL, True), ("mps", 80 << 30, True)],
)
@pytest.mark.parametrize("goes_on", [False, True])
def test_sums_are_on_the_device_of_the_inputs_if_memory_allows(kind, memory, on_host, goes_on):
    """With the same bits; those that come back from files of the work folder too."""
    first, *more = draws(3, BLOCK + 5, 100)

    def stored():
        sums = Sums(ALL)
        sums.add("a", first)
        sums.settle()
        (one,) = sums.groups
        tensors = {name: value.clone() for name, value in one.tensors().items()}
        return [Sum.of(one.record(), tensors)]

    batches = more if goes_on else [first, *more]
    expected, _ = sums_of(batches, stored() if goes_on else None)
    with installed(Card(memory, kind=kind)) as card:
        found, total = sums_of(batches, stored() if goes_on else None, kind)
        assert total.vector.device.type == ("cpu" if kind == "mps" else kind)
        assert {panel.device.type for panel in total.block} == {kind}
        assert {panel.device.type for panel in total.total} == {"cpu" if on_host else kind}
    assert found == expected and not card.races


def test_a_full_gpu_gets_a_third_of_the_sums():
    """Sums in the inputs' dtype: a third of all."""
    card = Card(SMALL)
    with installed(card):
        sums = Sums(("covariance",))
        for name in "abc":
            sums.add(name, draws(BLOCK, 64).to(DEVICE))
        sums.settle()
        there = [t for one in sums.groups for t in (*one.block, *one.total) if t.is_cuda]
    assert {tensor.dtype for tensor in there} == {torch.float32}
    assert sum(tensor.nbytes for tensor in there) == 3 * 4 * 64 * 64
