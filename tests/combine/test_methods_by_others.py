"""Combination methods against PEFT's functions and mergekit's golden numbers."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from tests.support.methods import combined, drawn, product, record

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_methods_equal_peft(name: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not density and "dare" in name:
        with pytest.raises(Refused):
            record(name, density=density)
        return
    products = [product(21, 34, 5, seed) for seed in (1, 2, 3, 4)]
    deltas = [p.dense().float().double() for p in products]
    turn = iter(range(8))

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return tensor * (drawn(tensor.shape, next(turn)) < density) / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    weights = [0.7, -1.6, 0.4, 2.0]
    for majority in ("total", "frequency") if "ties" in name else (None,):
        turn = iter(range(4))
        given = {"majority_sign_method": majority} if majority else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = getattr(merge_utils, name)(
                deltas, torch.tensor(weights, dtype=torch.float64), density, **given
            )
        actual = combined(record(name, density=density, majority=majority), products, weights)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def ours(method: str, parameters: dict) -> tuple[str, dict, list[float]]:
    """Our method, options and weights for mergekit's."""
    weight = parameters.get("weight", 1.0)
    names = {"task_arithmetic": "linear", "linear": "mean"}
    options = {
        "select": parameters.get("select_topk"),
        **{key: parameters.get(key) for key in ("density", "gamma", "t")},
    }
    given = {key: value for key, value in options.items() if value is not None}
    return names.get(method, method), given, weight if isinstance(weight, list) else [weight] * 3


@pytest.mark.parametrize("golden", GOLDEN["cases"], ids=lambda case: case["method"])
def test_methods_equal_mergekit(golden: dict) -> None:
    name, options, weights = ours(golden["method"], golden["parameters"])
    deltas = [torch.tensor(d).double() for d in GOLDEN["deltas"]][: 2 if name == "slerp" else 3]
    products = [Product(d, torch.eye(d.shape[1], dtype=torch.float64)) for d in deltas]
    actual = combined(record(name, **options), products, weights[: len(products)])
    torch.testing.assert_close(actual, torch.tensor(golden["merged"]).double(), rtol=0, atol=3e-6)


def test_della_chances_against_mergekit() -> None:
    golden = GOLDEN["della"]
    chances = record("della", density=golden["density"], epsilon=golden["epsilon"]).probabilities(
        torch.tensor(GOLDEN["deltas"][0])
    )
    torch.testing.assert_close(chances, torch.tensor(golden["chances"]), rtol=0, atol=1e-6)
