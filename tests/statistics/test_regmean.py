"""combine --method regmean against float64: the delta whose outputs are nearest to those of all
adapters, exact and refitted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.errors import Refused, Unrecoverable
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.runtime import load
from adapterkit.verbs.combine.methods.regmean import RegMean
from tests.support.deltas import deltas, net, trained, weighted
from tests.support.inputs import LINEAR, draws, statistics

pytestmark = pytest.mark.usefixtures("one_thread")

# out, in, ranks, tokens of each adapter: fewer tokens than inputs, one output, one input
SIZES = {
    "square": (12, 12, (3, 2, 4), (40, 60, 50)),
    "few tokens": (20, 30, (4, 5), (7, 5)),
    "flat": (2, 50, (2, 2), (80, 30)),
    "tall": (60, 3, (3, 3), (10, 10)),
    "one": (1, 1, (1, 1), (4, 4)),
    "rank above the sides": (6, 5, (9, 9, 9), (20, 20, 20)),
}


def case(name: str, seed: int = 0) -> tuple[list[Product], list[Tensor]]:
    """Deltas, and what the layer saw with each, (tokens, in) float64."""
    out, width, ranks, tokens = SIZES[name]
    products = [
        Product(draws(out, rank, seed=seed + 2 * i), draws(rank, width, seed=seed + 2 * i + 1))
        for i, rank in enumerate(ranks)
    ]
    return products, [draws(n, width, seed=seed + 50 + i, spread=8) for i, n in enumerate(tokens)]


def covariances(xs: list[Tensor]):
    return lambda which: (xs[which].T @ xs[which] / len(xs[which])).float()


def regression(
    products: list[Product], xs: list[Tensor], weights: list[float], alpha: float
) -> tuple[Tensor, Tensor]:
    """Δ' from dense matrices, and Σ w C̃, both with the least damping."""
    cs = [covariances(xs)(i).double() for i in range(len(xs))]
    cs = [alpha * c + (1 - alpha) * c.diagonal().diag() for c in cs]
    total = sum(w * c for w, c in zip(weights, cs, strict=True))
    ridge = 1e-6 * float(total.diagonal().mean()) / sum(weights)
    cs = [c + ridge * torch.eye(len(c), dtype=c.dtype) for c in cs]
    total = sum(w * c for w, c in zip(weights, cs, strict=True))
    outputs = sum(w * p.dense() @ c for w, p, c in zip(weights, products, cs, strict=True))
    return torch.linalg.solve(total, outputs, left=False), total


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("name", SIZES)
def test_is_the_regression(name: str, alpha: float) -> None:
    products, xs = case(name)
    weights = [0.7, 1.6, 0.4][: len(products)]
    result, root, metrics = RegMean(alpha).combine_covariances(products, weights, covariances(xs))
    assert metrics["damping"] == 1e-6 and result.rank == sum(p.rank for p in products)
    expected, total = regression(products, xs, weights, alpha)
    torch.testing.assert_close(result.dense(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        (root @ root.T).double(), total / total.diagonal().mean(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", SIZES)
def test_no_other_delta_is_nearer(name: str) -> None:
    """And the distance in the metrics is that of the outputs."""
    products, xs = case(name)
    weights = [0.7, 1.6, 0.4][: len(products)]
    result, _, metrics = RegMean(1.0).combine_covariances(products, weights, covariances(xs))

    def lost(delta: Tensor) -> float:
        return sum(
            w * float(((delta - p.dense()) @ x.T).square().sum()) / len(x)
            for w, p, x in zip(weights, products, xs, strict=True)
        )

    least, zero = lost(result.dense()), lost(torch.zeros_like(result.dense()))
    assert metrics["distance"] == pytest.approx((least / zero) ** 0.5, abs=2e-3)
    for seed in range(5):
        for size in (1e-3, 1e-1):
            moved = result.dense() + size * draws(*result.dense().shape, seed=seed)
            assert lost(moved) > least


@pytest.mark.parametrize("name", SIZES)
def test_regmean_obeys_its_laws(name: str) -> None:
    """Equal covariances: the weighted mean, whatever they are. One adapter, also by its weight:
    itself. All weights doubled: the same."""
    products, xs = case(name)
    weights = [0.7, 1.6, 0.4][: len(products)]
    same = [xs[0]] * len(products)

    def combined(weights: list[float], xs: list[Tensor], alpha: float = 0.9) -> Tensor:
        method = RegMean(alpha)
        return method.combine_covariances(products, weights, covariances(xs))[0].dense()

    mean = sum(w * p.dense() for w, p in zip(weights, products, strict=True)) / sum(weights)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(combined(weights, same), mean, **close)
    torch.testing.assert_close(combined(weights, same, 1.0), mean, **close)
    alone = [1.0, *[0.0] * (len(products) - 1)]
    torch.testing.assert_close(combined(alone, xs), products[0].dense(), **close)
    torch.testing.assert_close(
        combined([2 * w for w in weights], xs), combined(weights, xs), **close
    )


def test_regmean_of_constant_inputs_is_the_mean() -> None:
    """Inputs that are 0 with both adapters; another one is with one of them alone."""
    products, xs = case("square")
    products, xs = products[:2], [x.clone() for x in xs[:2]]
    xs[0][:, :3] = 0
    xs[1][:, :2] = 0
    result = RegMean().combine_covariances(products, [1.0, 3.0], covariances(xs))[0].dense()
    one, two = (p.dense() for p in products)
    torch.testing.assert_close(result[:, :2], (one + 3 * two)[:, :2] / 4, rtol=1e-9, atol=1e-9)


# -- the verb --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    first = trained(root / "a0", 1, r=4, lora_alpha=6)
    return [first, trained(root / "a1", 2, r=3, use_rslora=True, target_modules=LINEAR)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """The statistics of each adapter, and the inputs that they are of."""
    root = tmp_path_factory.mktemp("statistics")
    both = [statistics(root / f"{i}.safetensors", seed=i) for i in range(2)]
    return [path for path, _ in both], [xs for _, xs in both]


def named(sources: list[Path], weights: tuple[float, ...]) -> dict[Path, float]:
    return dict(zip(sources, weights, strict=True))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)])
def test_files_give_the_regression(sources, files, weights, tmp_path) -> None:
    """Modules of one adapter alone are its own; what is no linear layer is the mean."""
    paths, inputs = files
    receipt = adapterkit.combine(
        named(sources, weights), method="regmean", stats=paths, out=tmp_path / "out"
    )
    actual, inputs_of = deltas(tmp_path / "out"), [deltas(source) for source in sources]
    for name, delta in actual.items():
        members = [i for i in range(2) if name in inputs_of[i]]
        own, shares = [inputs_of[i][name] for i in members], [weights[i] for i in members]
        if name in LINEAR:
            eye = torch.eye(own[0].shape[1], dtype=torch.float64)
            products, xs = [Product(d, eye) for d in own], [inputs[i][name] for i in members]
            expected, _ = regression(products, xs, shares, 0.9)
        else:
            expected = sum(w * d for w, d in zip(shares, own, strict=True)) / sum(shares)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6, msg=name)
    (note,) = [note for note in receipt.data["notes"] if "linear layers" in note]
    assert "combined by mean" in note and "embed" in note
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_refit_has_the_least_sum_of_the_rank(sources, files, rank, tmp_path) -> None:
    paths, inputs = files
    receipt = adapterkit.combine(
        sources, method="regmean", stats=paths, rank=rank, out=tmp_path / "out"
    )
    actual, own = deltas(tmp_path / "out"), [deltas(source) for source in sources]
    for name in LINEAR:
        eye = torch.eye(own[0][name].shape[1], dtype=torch.float64)
        products = [Product(each[name], eye) for each in own]
        whole, total = regression(products, [xs[name] for xs in inputs], [1.0, 1.0], 0.9)
        root = torch.linalg.cholesky(total)
        values = torch.linalg.svdvals(whole @ root)
        lost, size = float(((whole - actual[name]) @ root).norm()), float(values.norm())
        assert lost == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=3e-6 * size), name
        metrics = receipt.data["parameters"][name]
        assert metrics["output_error"] == pytest.approx(lost / size, rel=1e-4, abs=1e-5)
        assert metrics["output_error"] <= metrics["unweighted_output_error"] + 1e-9
        assert torch.linalg.matrix_rank(actual[name], rtol=1e-6) <= rank


def test_alpha_by_set(sources, files, tmp_path) -> None:
    """At alpha 0 each input is regressed alone: Σ w c Δ / Σ w c, column by column."""
    paths, inputs = files
    adapterkit.combine(
        sources, method="regmean", stats=paths, settings={"alpha": 0}, out=tmp_path / "out"
    )
    actual, own = deltas(tmp_path / "out"), [deltas(source) for source in sources]
    for name in LINEAR:
        shares = [xs[name].square().mean(0) for xs in inputs]
        expected = sum(s * d[name] for s, d in zip(shares, own, strict=True)) / sum(shares)
        torch.testing.assert_close(actual[name], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Refused, match="alpha"):
        adapterkit.combine(
            sources, method="regmean", stats=paths, settings={"alpha": 1.1}, out=tmp_path / "no"
        )


def test_fully_trained_values_are_averaged(files, tmp_path) -> None:
    paths, _ = files
    heads = [
        trained(tmp_path / f"h{i}", i, target_modules=["fit"], modules_to_save=["tall"])
        for i in range(2)
    ]
    adapterkit.combine(heads, method="regmean", stats=paths, out=tmp_path / "out")
    one, two, both = (
        load_file(folder / "adapter_model.safetensors") for folder in (*heads, tmp_path / "out")
    )
    key = "base_model.model.tall.weight"
    torch.testing.assert_close(both[key], (one[key] + two[key]) / 2)


def test_on_a_live_model(sources, files, tmp_path) -> None:
    paths, _ = files
    adapters = load(net(), sources[0], name="one")
    adapters.load(sources[1], name="two")
    adapters.combine({"one": 1, "two": 1}, name="both", method="regmean", stats=paths)
    adapters.save(tmp_path / "live", name="both")
    adapterkit.combine(sources, method="regmean", stats=paths, out=tmp_path / "out")
    live = deltas(tmp_path / "live")
    for name, delta in deltas(tmp_path / "out").items():
        torch.testing.assert_close(live[name], delta, rtol=1e-5, atol=1e-7)


# -- refusals --------------------------------------------------------------------------------------


def test_misfitting_statistics_are_refused(sources, files, tmp_path) -> None:
    paths, _ = files
    refused = [
        ({"stats": ()}, "0 --stats files for 2 adapters"),
        ({"stats": paths[:1]}, "1 --stats files for 2 adapters"),
        ({"stats": [*paths, paths[0]]}, "3 --stats files for 2 adapters"),
        ({"stats": paths, "space": "factors"}, "not defined on A and B separately"),
    ]
    for options, text in refused:
        with pytest.raises(Refused, match=text):
            adapterkit.combine(sources, method="regmean", out=tmp_path / "out", **options)
    with pytest.raises(Refused, match="none below 0"):
        adapterkit.combine(
            named(sources, (1.0, -0.5)), method="regmean", stats=paths, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_all_missing_statistics_are_named(sources, files, tmp_path) -> None:
    paths, _ = files
    lacking = []
    for number, path in enumerate(paths):
        tensors = load_file(path)
        del tensors[f"{LINEAR[number]}.covariance"]
        save_file(tensors, tmp_path / f"lacking-{number}.safetensors")
        lacking.append(tmp_path / f"lacking-{number}.safetensors")
    with pytest.raises(Refused) as caught:
        adapterkit.combine(sources, method="regmean", stats=lacking, out=tmp_path / "out")
    assert all(f"{name}.covariance" in str(caught.value) for name in LINEAR)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["zeros", "nan", "skew", "negative"])
def test_invalid_covariances_are_refused(bad, sources, files, tmp_path) -> None:
    paths, _ = files
    tensors = load_file(paths[1])
    c = tensors["fit.covariance"]
    tensors["fit.covariance"] = {
        "zeros": torch.zeros_like(c),
        "nan": c.where(c < c.max(), float("nan")),
        "skew": c.triu(),
        "negative": c - 10 * c.diagonal().max() * torch.eye(len(c)),
    }[bad]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(Unrecoverable, match=r"fit\.covariance") as caught:
        adapterkit.combine(
            sources,
            method="regmean",
            stats=[paths[0], tmp_path / "bad.safetensors"],
            out=tmp_path / "out",
        )
    assert "bad.safetensors" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_receipt_lists_statistics_and_adapters(sources, files, tmp_path) -> None:
    paths, _ = files
    adapterkit.combine(sources, method="regmean", stats=paths, out=tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    assert list(receipt["inputs"])[2:] == ["2 0.safetensors", "3 1.safetensors"]
    fit = receipt["parameters"]["fit"]
    assert 0 < fit["distance"] < 1 and fit["damping"] == 1e-6 and len(fit["cosines"]) == 1


def test_weighted_sums_need_no_statistics(sources, files, tmp_path) -> None:
    """The same deltas as without, and nothing that statistics could weight."""
    paths, _ = files
    with pytest.raises(Refused, match="an exact result"):
        adapterkit.combine(sources, method="linear", stats=paths, out=tmp_path / "out")
    adapterkit.combine(sources, method="linear", stats=paths, rank=99, out=tmp_path / "out")
    for name, delta in weighted(sources, (1.0, 1.0)).items():
        torch.testing.assert_close(deltas(tmp_path / "out")[name], delta, rtol=1e-4, atol=1e-6)
