"""combine under PEFT's names: its arithmetic in delta space and factor space."""

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file

from adapterkit.kernels import elementwise
from adapterkit.verbs.combine.methods.protocol import Deltas
from adapterkit.verbs.combine.tasks.combine import module_seeds
from tests.support import oracle
from tests.support.combining import WEIGHTS, combined, narrowed, pairs_of, peft_combined
from tests.support.deltas import assert_close, deltas, net, weighted

DELTA = [
    ("cat", None),
    ("svd", None),
    ("ties_svd", "total"),
    ("ties_svd", "frequency"),
    ("magnitude_prune_svd", None),
]
FACTORS = [("linear", None), ("ties", "total"), ("ties", "frequency"), ("magnitude_prune", None)]


@pytest.mark.parametrize(("kind", "majority"), DELTA)
def test_delta_space_agrees_with_peft(kind, majority, three, tmp_path):
    """PEFT decomposes no 1-D or 3-D kernel, and no layer of fewer rows than the rank: the other
    tests cover those."""
    options = {"density": 0.4} if "_svd" in kind else {}
    three = [narrowed(source, tmp_path) for source in three]
    theirs = options | ({"majority_sign_method": majority} if majority else {})
    options |= {"majority": majority} if majority else {}
    expected = pairs_of(peft_combined(three, tmp_path / "peft", kind, **theirs))
    combined(three, tmp_path / "out", method=kind, **options)
    ours = pairs_of(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert_close(ours, expected, 2e-5)


@pytest.mark.parametrize(("kind", "majority"), FACTORS)
def test_factor_space_is_pefts_arithmetic(kind, majority, three, tmp_path):
    options = {} if kind == "linear" else {"density": 0.4}
    theirs = options | ({"majority_sign_method": majority} if majority else {})
    options |= {"majority": majority} if majority else {}
    expected = peft_combined(three, tmp_path / "peft", kind, **theirs)
    combined(three, tmp_path / "out", method=kind, space="factors", **options)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_on_factors_is_pefts_with_the_same_draws(kind, three, tmp_path, monkeypatch):
    three = [narrowed(source, tmp_path) for source in three]
    with oracle.quiet():
        model = oracle.peft_model(net(), *three)
    names = [
        n.removeprefix("base_model.model.")
        for n, m in model.named_modules()
        if isinstance(m, oracle.peft_layers.LoraLayer)
    ]
    order = iter([(name, side, which) for name in names for side in "ab" for which in range(3)])

    def pruned(tensor, density, rescale):
        name, side, which = next(order)
        matrix = tensor.detach().flatten(1).clone()
        given = Deltas([matrix])
        draws = module_seeds(5, f"{name}/{side}")(which)
        for first, last in given.blocks():
            elementwise.drop(matrix[first:last], density, draws.at(first * matrix.shape[1]))
        return matrix.view_as(tensor)

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    expected = peft_combined(three, tmp_path / "peft", kind, density=0.6)
    assert next(order, None) is None
    combined(three, tmp_path / "out", method=kind, space="factors", density=0.6, seed=5)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in expected.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("clamp", [0.6, 0.95, 1.0])
def test_svd_clamp_holds_the_factors_below_a_quantile(clamp, mixed, tmp_path):
    """PEFT's rule on b = U s and a = Vᵀ, with the elements' negatives among them, so that no sign
    of a singular vector matters."""
    combined(mixed, tmp_path / "out", method="svd", svd_clamp=clamp)
    actual = deltas(tmp_path / "out")
    for name, delta in weighted(mixed, WEIGHTS).items():
        rank = 7 if name == "fit" else min(4, *delta.shape)
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        b, a = u[:, :rank] * s[:rank], vh[:rank]
        values = torch.cat([b.flatten(), a.flatten()])
        limit = float(torch.quantile(torch.cat([values, -values]), clamp))
        expected = b.clamp(-limit, limit) @ a.clamp(-limit, limit)
        assert float((actual[name] - expected).norm()) <= 1e-4 * float(delta.norm()), name
