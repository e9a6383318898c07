"""combine --method regspan against float64: one number for each delta, in each module, or for all
modules of a layer or an adapter, by the outputs on what each adapter saw."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.lowrank.span import normal_equations, solve, span_weights
from adapterkit.verbs.combine.methods.regmean import RegMean
from adapterkit.verbs.combine.methods.regspan import RegSpan
from tests.statistics.test_regmean import SIZES, case, covariances
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def least_squares(
    modules: list[tuple[list[Tensor], list[Tensor]]], weights: list[float]
) -> tuple[Tensor, float]:
    """c, and the error that it leaves, of deltas and inputs (tokens, in) of several modules."""
    columns, wanted = [], []
    for deltas, xs in modules:
        scaled = [x * (w / len(x)) ** 0.5 for x, w in zip(xs, weights, strict=True)]
        outputs = [torch.cat([(x @ d.T).flatten() for x in scaled]) for d in deltas]
        columns.append(torch.stack(outputs, 1))
        own = [(x @ d.T).flatten() for x, d in zip(scaled, deltas, strict=True)]
        wanted.append(torch.cat(own))
    table, right = torch.cat(columns), torch.cat(wanted)
    sizes = table.norm(dim=0).clamp_min(1e-300)
    c = torch.linalg.lstsq(table / sizes, right, driver="gelsd").solution / sizes
    return c, float((table @ c - right).norm() / right.norm())


@pytest.mark.parametrize("name", SIZES)
def test_is_least_squares(name: str) -> None:
    products, xs = case(name)
    weights = [0.7, 1.6, 0.4][: len(products)]
    read = lambda which: (xs[which].T @ xs[which] / len(xs[which])).double()
    normal = normal_equations(products, weights, read)
    c = solve(normal, 0.0)
    expected, error = least_squares([([p.dense() for p in products], xs)], weights)
    torch.testing.assert_close(c, expected, rtol=1e-7, atol=1e-7)
    assert normal.error(c) == pytest.approx(error, abs=1e-7)


def test_groups_are_the_sum_over_their_modules() -> None:
    """Also where an adapter lacks a module."""
    one, two = case("square"), case("few tokens")
    weights = [0.7, 1.6, 0.4]
    three = [*two[0], None], [*two[1], None]
    read = lambda xs: lambda which: (xs[which].T @ xs[which] / len(xs[which])).double()
    modules = [
        ("a", one[0], read(one[1])),
        ("b", three[0], read(two[1])),
        ("a", three[0], read(two[1])),
    ]
    found = span_weights(modules, weights, 0.0)
    dense = lambda pair: ([p.dense() for p in pair[0]], pair[1])
    alone, _ = least_squares([dense(two)], weights[:2])
    torch.testing.assert_close(
        found["b"][0], torch.cat([alone, torch.zeros(1)]), rtol=1e-7, atol=1e-7
    )
    padded = [*dense(two)[0], torch.zeros(20, 30).double()], [*two[1], torch.zeros(1, 30).double()]
    both, error = least_squares([dense(one), padded], weights)
    torch.testing.assert_close(found["a"][0], both, rtol=1e-7, atol=1e-7)
    assert found["a"][1] == pytest.approx(error, abs=1e-7)


def test_a_useless_delta_gets_nothing_and_equal_ones_share() -> None:
    (one, two, _), xs = case("square")
    xs = [x.clone() for x in xs]
    blind = Product(two.left, two.right.clone())
    for x in xs:
        x[:, 0] = 0  # what it looks at alone
    blind.right[:, 1:] = 0
    read = lambda which: (xs[which].T @ xs[which] / len(xs[which])).double()
    c = solve(normal_equations([one, blind, one], [1.0, 1.0, 1.0], read), 1e-7)
    assert float(c[1]) == 0 and float(c[0]) == pytest.approx(float(c[2]), rel=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_how_far_it_is_from_regmean(name: str) -> None:
    products, xs = case(name)
    weights = [0.7, 1.6, 0.4][: len(products)]
    result, root, facts = RegSpan().combine_covariances(products, weights, covariances(xs))
    nearest, _, _ = RegMean(1.0).combine_covariances(products, weights, covariances(xs))
    outputs = lambda delta: float((delta @ root.double()).norm())
    apart = outputs(result.dense() - nearest.dense()) / outputs(nearest.dense())
    assert facts["from_regmean"] == pytest.approx(apart, abs=1e-9)
    assert facts["least_weight"] <= facts["largest_weight"]
    if name == "one":
        assert facts["from_regmean"] == pytest.approx(0, abs=1e-3)  # one direction: all of it


# -- the verb --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[list[Path], list[Path], dict]:
    """Two adapters of a llama, their statistics, and all of it as (delta, inputs) by module."""
    root = tmp_path_factory.mktemp("regspan")
    configs = [{"target_modules": oracle.LINEAR}, {"target_modules": oracle.LINEAR, "r": 2}]
    configs[0]["target_modules"] = [*oracle.LINEAR, "embed_tokens"]
    for number, config in enumerate(configs):
        oracle.train(oracle.llama(), root / f"a{number}", seed=number, **config)
    found: dict[str, tuple[list, list]] = {}
    for number in range(2):
        model = oracle.peft_model(oracle.llama(), root / f"a{number}")
        tensors = {}
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_A") and "a0" in layer.lora_A:
                name = path.removeprefix("base_model.model.")
                a, b = layer.lora_A["a0"].weight.double(), layer.lora_B["a0"].weight.double()
                generator = torch.Generator().manual_seed(len(name) + 97 * number)
                x = torch.randn(60, a.shape[1], generator=generator).double()
                x = x * torch.linspace(0.2, 2, a.shape[1]) + x[:, :1]
                tensors[f"{name}.covariance"] = (x.T @ x / len(x)).float()
                deltas, xs = found.setdefault(name, ([], []))
                deltas.append((layer.scaling["a0"] * b @ a).detach())
                xs.append(x)
        save_file(tensors, root / f"s{number}.safetensors")
    return [root / "a0", root / "a1"], [root / "s0.safetensors", root / "s1.safetensors"], found


def factors_of(folder: Path, name: str) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


GROUPS = {"module": lambda name: name, "layer": lambda name: name[:14], "adapter": lambda _: ""}


@pytest.mark.parametrize("per", GROUPS)
def test_regspan_of_files_equals_the_reference(job, per: str, tmp_path: Path) -> None:
    sources, stats, found = job
    weights, group = [0.5, 2.0], GROUPS[per]
    receipt = adapterkit.combine(
        dict(zip(sources, weights, strict=True)),
        method="regspan",
        stats=stats,
        settings={"per": per},
        out=tmp_path / "out",
    )
    members: dict[str, list] = {}
    for name, pair in found.items():
        members.setdefault(group(name), []).append(pair)
    solved = {key: least_squares(pairs, weights)[0] for key, pairs in members.items()}
    assert len(solved) == {"module": len(found), "layer": 2, "adapter": 1}[per]
    for name, (deltas, _) in found.items():
        expected = sum(c * d for c, d in zip(solved[group(name)], deltas, strict=True))
        torch.testing.assert_close(
            factors_of(tmp_path / "out", name), expected, rtol=1e-4, atol=1e-5
        )
    data = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    if per == "module":
        assert {"distance", "from_regmean", "least_weight"} <= data["parameters"][name].keys()
    else:
        for key, c in data["weights"].items():
            expected = solved["" if per == "adapter" else key]
            torch.testing.assert_close(torch.tensor(c).double(), expected, rtol=1e-5, atol=1e-5)
        assert any(note.startswith("regspan: weights") for note in receipt.data["notes"])
    adapterkit.combine(
        sources, method="regspan", stats=stats, settings={"per": per}, rank=2, out=tmp_path / "low"
    )


def test_invalid_statistics_for_regspan_are_refused(job, tmp_path: Path) -> None:
    sources, stats, _ = job
    how = {"method": "regspan", "stats": stats, "out": tmp_path / "out"}
    for settings, text in (({"per": "block"}, "per = 'block'"), ({"ridge": -1}, "ridge -1")):
        with pytest.raises(Refused, match=text):
            adapterkit.combine(sources, settings=settings, **how)
    with pytest.raises(Refused, match="none below 0"):
        adapterkit.combine({sources[0]: 1.0, sources[1]: -0.5}, **how)
    with pytest.raises(Refused, match="sets the weights too"):
        adapterkit.combine(sources, settings={"per": "layer"}, weight_for=["q_proj=2"], **how)
    with pytest.raises(Refused, match="1 --stats files for 2 adapters"):
        adapterkit.combine(sources, **how | {"stats": stats[:1]})
