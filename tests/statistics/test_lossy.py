"""Fits in the norm of the outputs, ‖(Δ - b·a) C^½‖_F, against dense float64: the kernels, resize,
extract and combine."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.lowrank.weighted import (
    Decomposition,
    decompose_dense,
    decompose_product,
    root,
)
from tests.support import kinds, oracle
from tests.support.combining import pairs_of
from tests.support.deltas import deltas, trained, weighted
from tests.support.extraction import BUILDS, low_rank, mixture, moved, tuned
from tests.support.inputs import LINEAR, draws, root_of, statistics

pytestmark = pytest.mark.usefixtures("one_thread")

# out, in, rank of the delta, tokens: few tokens, few outputs, few inputs, a rank above both
SIZES = {
    "square": (16, 16, 4, 100),
    "few tokens": (24, 40, 6, 5),
    "one token": (12, 20, 4, 1),
    "flat": (2, 60, 2, 200),
    "one output": (1, 30, 1, 50),
    "tall": (70, 4, 3, 50),
    "one input": (9, 1, 1, 5),
    "rank above the sides": (7, 5, 11, 30),
    "full": (30, 20, 20, 60),
}


def case(name: str) -> tuple[Product, Tensor]:
    """A delta, and the root of what its layer sees."""
    out, width, rank, tokens = SIZES[name]
    x = draws(tokens, width, seed=3, spread=10)
    product = Product(draws(out, rank, seed=1), draws(rank, width, seed=2, spread=0.1))
    return product, root((x.T @ x / tokens).float())[0]


def errors_of(delta: Tensor, fit: Tensor, s: Tensor) -> tuple[float, float]:
    """Relative errors in both norms."""
    rest = delta - fit
    return float(rest.norm() / delta.norm()), float((rest @ s).norm() / (delta @ s).norm())


def best_output_error(delta: Tensor, s: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(delta @ s)
    return float(values[rank:].norm() / values.norm())


def plain_fit(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def left_over(decomposition: Decomposition, name: str, rank: int) -> float:
    parts, total = decomposition.energies[name]
    return max(1 - float(parts[:rank].sum()) / total, 0.0) ** 0.5


def check(decomposition: Decomposition, delta: Tensor, s: Tensor, most: int, close: float) -> None:
    """For every rank the factors are the best, and the four errors are those of dense matrices."""
    for rank in range(1, most + 1):
        a, b = decomposition.factors(rank)
        assert a.shape == (rank, delta.shape[1]) and b.shape == (delta.shape[0], rank)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-5)
        error, output_error = errors_of(delta, b.double() @ a.double(), s)
        assert output_error == pytest.approx(best_output_error(delta, s, rank), abs=close), rank
        unweighted_error, unweighted_output_error = errors_of(delta, plain_fit(delta, rank), s)
        expected = {
            "error": error,
            "output_error": output_error,
            "unweighted_error": unweighted_error,
            "unweighted_output_error": unweighted_output_error,
        }
        assert decomposition.energies.keys() == expected.keys()
        for name, value in expected.items():
            assert left_over(decomposition, name, rank) == pytest.approx(value, abs=close), name
        assert output_error <= unweighted_output_error + close and unweighted_error <= error + close


@pytest.mark.parametrize("name", SIZES)
def test_from_factors(name: str) -> None:
    product, s = case(name)
    delta = product.dense()
    check(decompose_product(product, s), delta, s.double(), min(product.rank, *delta.shape), 1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_from_a_dense_delta(name: str) -> None:
    product, s = case(name)
    delta = product.dense().float()
    most = min(product.rank, *delta.shape)
    check(decompose_dense(delta, most, root=s), delta.double(), s.double(), most, 2e-3)


def test_from_a_dense_delta_that_is_searched() -> None:
    """Above the sizes that are decomposed in full."""
    x = draws(900, 600, seed=5, spread=20)
    s = root((x.T @ x / len(x)).float())[0]
    values = 0.7 ** torch.arange(600, dtype=torch.float64)
    q, _ = torch.linalg.qr(draws(700, 600, seed=6))
    delta = (q * values) @ torch.linalg.qr(draws(600, 600, seed=7))[0]
    fit = decompose_dense(delta.float(), 8, root=s)
    a, b = fit.factors(8)
    error = errors_of(delta, b.double() @ a.double(), s.double())[1]
    assert error == pytest.approx(best_output_error(delta, s.double(), 8), rel=1e-4)


def test_a_covariance_of_ones_is_the_plain_fit() -> None:
    product, _ = case("square")
    fit = decompose_product(product, torch.eye(16))
    for rank in (1, 3):
        a, b = fit.factors(rank)
        torch.testing.assert_close(b @ a, plain_fit(product.dense(), rank), rtol=0, atol=1e-9)
        assert left_over(fit, "output_error", rank) == pytest.approx(
            left_over(fit, "unweighted_error", rank), abs=1e-9
        )


def test_a_delta_of_zeros() -> None:
    product, s = case("square")
    fit = decompose_product(Product(product.left * 0, product.right), s)
    a, b = fit.factors(3)
    assert not (b @ a).any() and all(total == 0 for _, total in fit.energies.values())


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_factors_are_never_multiplied_out() -> None:
    product, s = Product(draws(900, 4, seed=1), draws(4, 60, seed=2)), torch.eye(60)
    with Largest() as largest:
        decompose_product(product, s).factors(2)
    assert largest.elements <= 900 * 8 < 900 * 60


# -- resize ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("adapter") / "a", 1, r=6, lora_alpha=9)


@pytest.fixture(scope="module")
def stats(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    return statistics(tmp_path_factory.mktemp("statistics") / "stats.safetensors")


def outputs_lost(delta: Tensor, fit: Tensor, x: Tensor) -> float:
    return float(((delta - fit) @ x.T).norm() / (delta @ x.T).norm())


@pytest.mark.parametrize("rank", [1, 2])
def test_resize_with_statistics_lowers_the_output_error(adapter, stats, rank, tmp_path) -> None:
    """The error of the outputs on the inputs that the statistics are of; plain elsewhere."""
    path, xs = stats
    receipt = adapterkit.resize(adapter, rank=rank, stats=path, out=tmp_path / "out")
    before, after = deltas(adapter), deltas(tmp_path / "out")
    for name, delta in before.items():
        metrics = receipt.data["parameters"][name]
        if name not in LINEAR:
            torch.testing.assert_close(after[name], plain_fit(delta, rank), rtol=0, atol=1e-6)
            assert "output_error" not in metrics
            continue
        s = root_of(path, name)
        error, output_error = errors_of(delta, after[name], s)
        assert output_error == pytest.approx(best_output_error(delta, s, rank), abs=1e-6)
        unweighted_error, unweighted_output_error = errors_of(delta, plain_fit(delta, rank), s)
        names = ("error", "output_error", "unweighted_error", "unweighted_output_error")
        expected = (error, output_error, unweighted_error, unweighted_output_error)
        for key, value in zip(names, expected, strict=True):
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        x = xs[name]
        lost = outputs_lost(delta, after[name], x)
        assert lost <= outputs_lost(delta, plain_fit(delta, rank), x)
        assert output_error == pytest.approx(lost, abs=1e-3)
        assert metrics["damping"] == 1e-6 and metrics["rank"] == rank
    (note,) = [note for note in receipt.data["notes"] if "linear layers" in note]
    assert "norm of their weights" in note and "embed" in note
    adapterkit.verify(tmp_path / "out")


def test_other_cuts_count_in_that_norm(adapter, stats, tmp_path) -> None:
    path, _ = stats
    before = deltas(adapter)
    spectra = {name: torch.linalg.svdvals(before[name] @ root_of(path, name)) for name in LINEAR}
    for cut, count in (
        ({"energy": 0.9}, lambda s: int((s.square().cumsum(0) < 0.9 * s.square().sum()).sum()) + 1),
        ({"sv_ratio": 4}, lambda s: int((s * 4 >= s[0]).sum())),
    ):
        out = tmp_path / next(iter(cut))
        metrics = adapterkit.resize(adapter, stats=path, out=out, **cut).data["parameters"]
        for name, s in spectra.items():
            assert metrics[name]["rank"] == count(s), (cut, name)


@pytest.mark.parametrize("size", ["7KB", "9KB"])
def test_a_size_is_spent_on_what_the_outputs_lose(adapter, stats, size, tmp_path) -> None:
    """The factors at a rank that was cut afterwards are the best of that rank too."""
    path, _ = stats
    metrics = adapterkit.resize(adapter, stats=path, max_size=size, out=tmp_path / "out").data[
        "parameters"
    ]
    file = tmp_path / "out" / "adapter_model.safetensors"
    assert file.stat().st_size <= int(size.removesuffix("KB")) * 1000
    before, after, cut = deltas(adapter), deltas(tmp_path / "out"), 0
    for name in LINEAR:
        s, rank = root_of(path, name), metrics[name]["rank"]
        error, output_error = errors_of(before[name], after[name], s)
        assert output_error == pytest.approx(best_output_error(before[name], s, rank), abs=1e-6)
        assert metrics[name]["error"] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert metrics[name]["output_error"] == pytest.approx(output_error, rel=1e-4, abs=1e-6)
        assert "energies" not in metrics[name]
        cut += rank < min(6, *before[name].shape)
    assert cut


def test_alpha_is_kept(adapter, stats, tmp_path) -> None:
    path, _ = stats
    adapterkit.resize(adapter, rank=2, stats=path, alpha="keep", out=tmp_path / "keep")
    adapterkit.resize(adapter, rank=2, stats=path, out=tmp_path / "rank")
    kept, plain = deltas(tmp_path / "keep"), deltas(tmp_path / "rank")
    for name in LINEAR:
        torch.testing.assert_close(kept[name], plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case",
    [
        *kinds.SIMPLE.values(),
        kinds.Case("loha", kinds.LINEAR, {"r": 4}),  # of full rank: dense
        kinds.Case("lokr", kinds.LINEAR, {"r": 50, "alpha": 4}),
        kinds.Case("dora", ["fit", "tall", "tokens"], {"r": 3}, base=True),
    ],
    ids=str,
)
def test_resize_of_other_types(case, tmp_path) -> None:
    """Their deltas as PEFT merges them, in the norm of the outputs."""
    base = tmp_path / "base"
    base.mkdir()
    torch.manual_seed(0)
    save_file(kinds.Net().state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    with oracle.quiet():
        adapter = kinds.trained(case, base, tmp_path / "adapter")
        want = kinds.deltas(base, adapter)
    widths = {name: delta.shape[1] for name, delta in want.items() if name != "tokens"}
    path, _ = statistics(tmp_path / "stats.safetensors", widths, tokens=9)
    metrics = kinds.resized(case, base, adapter, tmp_path / "out", rank=2, stats=path)
    with oracle.quiet():
        actual = kinds.deltas(base, tmp_path / "out")
    for name in widths:
        if not want[name].any():
            continue
        s = root_of(path, name)
        error, output_error = errors_of(want[name], actual[name], s)
        assert output_error == pytest.approx(best_output_error(want[name], s, 2), abs=1e-3), name
        assert metrics[name]["error"] == pytest.approx(error, rel=1e-3, abs=1e-3), name
        assert metrics[name]["output_error"] == pytest.approx(output_error, rel=1e-3, abs=1e-3)


def test_memory_of_other_types(tmp_path) -> None:
    """With statistics the delta twice, the covariance, its copies in float64 and the root."""
    base = tmp_path / "base"
    base.mkdir()
    save_file(kinds.Net().state_dict(), base / "model.safetensors")
    with oracle.quiet():
        adapter = kinds.trained(kinds.Case("loha", ["tall"], {"r": 2}), base, tmp_path / "loha")
    width = kinds.Net().tall.in_features
    path, _ = statistics(tmp_path / "stats.safetensors", {"tall": width}, tokens=9)
    alone, weighted = (
        adapterkit.resize(adapter, rank=2, out=tmp_path / "out", stats=stats, dry_run=True)
        for stats in (None, path)
    )
    claims = [plan.shards[0].tasks[0].memory for plan in (alone, weighted)]
    assert claims[1] == 2 * claims[0] + (4 + 3 * 8 + 4) * width**2


# -- extract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_extract_with_statistics_lowers_the_output_error(name, cached_folder, tmp_path) -> None:
    """Also of weights that are stored (in, out); what did not change has no factors."""
    base = cached_folder(
        f"lossy-{name}", lambda folder: oracle.save_base(BUILDS[name](), folder, "fp32")
    )
    changed = lambda key, t: t.dim() == 2 and ".0." in key and "embed" not in key
    after = tuned(base, BUILDS[name], tmp_path / "tuned", low_rank(5, changed))
    old, new = (
        {
            key: weight.double()
            for key, weight in oracle.load(BUILDS[name], folder).state_dict().items()
        }
        for folder in (base, after)
    )
    wanted = {
        key.removesuffix(".weight"): (new[key] - old[key]).T
        if name == "gpt2"
        else new[key] - old[key]
        for key in old
        if old[key].dim() == 2
    }
    layers = oracle.load(BUILDS[name], base).named_modules()
    modules = [m for m, layer in layers if type(layer).__name__ in ("Linear", "Conv1D")]
    widths = {m: wanted[m].shape[1] for m in modules if m != "lm_head"}
    path, _ = statistics(tmp_path / "stats.safetensors", widths, tokens=60)
    receipt = adapterkit.extract(
        base, after, rank=3, stats=path, exclude="lm_head", out=tmp_path / "out"
    )
    actual = pairs_of(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert actual and all(".0." in module for module in actual)
    for module, fit in actual.items():
        s, metrics = root_of(path, module), receipt.data["parameters"][module]
        delta = wanted[module]
        error, output_error = errors_of(delta, fit, s)
        assert output_error == pytest.approx(best_output_error(delta, s, 3), rel=1e-4, abs=1e-5)
        assert metrics["output_error"] == pytest.approx(output_error, rel=1e-3)
        assert metrics["error"] == pytest.approx(error, rel=1e-3)
        plain, plain_output = errors_of(delta, plain_fit(delta, 3), s)
        assert metrics["unweighted_error"] == pytest.approx(plain, rel=1e-3)
        assert metrics["unweighted_output_error"] == pytest.approx(plain_output, rel=1e-3)
        assert output_error < plain_output


def test_extract_of_experts_ignores_statistics_and_notes_it(cached_folder, tmp_path) -> None:
    build = lambda: mixture("mixtral")
    base = cached_folder("lossy-mixtral", lambda f: oracle.save_base(build(), f, "fp32"))
    after = tuned(base, build, tmp_path / "tuned", moved)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    path, _ = statistics(tmp_path / "stats.safetensors", dict.fromkeys(attention, 64), tokens=80)
    receipt = adapterkit.extract(
        base, after, rank=2, stats=path, exclude="lm_head", out=tmp_path / "out"
    )
    metrics = receipt.data["parameters"]
    assert all("output_error" in metrics[name] for name in attention)
    experts = [name for name in metrics if "experts" in name or "gate" in name]
    assert experts and not any("output_error" in metrics[name] for name in experts)
    (note,) = [note for note in receipt.data["notes"] if "linear layers" in note]
    assert f"{len(experts)} of {len(experts) + len(attention)}" in note


# -- combine ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    return [trained(root / f"a{i}", i, r=4, lora_alpha=6) for i in range(2)]


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("method", ["linear", "ties", "knots"])
def test_combine_with_statistics_lowers_the_output_error(method, files, two, tmp_path) -> None:
    """The refit of whatever the method gives; several files: the mean of their covariances."""
    paths = [statistics(tmp_path / f"{i}.safetensors", seed=i)[0] for i in range(files)]
    options = {} if method == "linear" else {"density": 0.6}
    adapterkit.combine(two, method=method, energy=1.0, out=tmp_path / "whole", **options)
    receipt = adapterkit.combine(
        two, method=method, rank=2, stats=paths, out=tmp_path / "out", **options
    )
    whole, actual = deltas(tmp_path / "whole"), deltas(tmp_path / "out")
    for name in LINEAR:
        mean = sum(load_file(path)[f"{name}.covariance"] for path in paths) / files
        s = root(mean)[0].double()
        error, output_error = errors_of(whole[name], actual[name], s)
        best = best_output_error(whole[name], s, 2)
        assert output_error == pytest.approx(best, rel=1e-4, abs=1e-5), name
        metrics = receipt.data["parameters"][name]
        assert metrics["output_error"] == pytest.approx(output_error, rel=1e-3, abs=1e-4)
        assert metrics["error"] == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert metrics["energy"] == pytest.approx(1 - output_error**2, abs=1e-4)
        assert metrics["output_error"] <= metrics["unweighted_output_error"] + 1e-6


def test_a_share_of_the_energy_is_one_of_the_outputs(two, stats, tmp_path) -> None:
    path, _ = stats
    whole = weighted(two, (1.0, 1.0))
    metrics = adapterkit.combine(
        two, method="linear", energy=0.9, stats=path, out=tmp_path / "out"
    ).data["parameters"]
    for name in LINEAR:
        squares = torch.linalg.svdvals(whole[name] @ root_of(path, name)).square()
        rank = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
        assert metrics[name]["rank"] == rank and metrics[name]["energy"] >= 0.9


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, text",
    [
        ({"method": "linear"}, "an exact result"),
        ({"method": "linear", "space": "factors"}, "--space factors"),
        ({"method": "linear", "rank": 2, "svd_clamp": 0.9}, "--svd-clamp"),
    ],
)
def test_statistics_that_nothing_uses_are_refused(options, text, two, stats, tmp_path) -> None:
    with pytest.raises(Refused, match=text):
        adapterkit.combine(two, stats=stats[0], out=tmp_path / "out", **options)


def test_three_files_for_two_adapters_are_refused(two, stats, tmp_path) -> None:
    with pytest.raises(Refused, match="3 --stats files for 2 adapters"):
        adapterkit.combine(two, method="linear", rank=2, stats=[stats[0]] * 3, out=tmp_path / "out")


def test_missing_and_misfitting_statistics_are_listed_together(adapter, stats, tmp_path) -> None:
    tensors = load_file(stats[0])
    first, second = (f"{name}.covariance" for name in LINEAR)
    tensors[second] = tensors[second][:-1, :-1].contiguous()
    del tensors[first]
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(Refused) as caught:
        adapterkit.resize(
            adapter, rank=2, stats=tmp_path / "wrong.safetensors", out=tmp_path / "out"
        )
    assert first in str(caught.value) and second in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_linear_layers_is_refused(stats, tmp_path) -> None:
    source = trained(tmp_path / "a", 1, target_modules=["embed", "image"])
    with pytest.raises(Refused, match="no linear layers"):
        adapterkit.resize(source, rank=2, stats=stats[0], out=tmp_path / "out")
