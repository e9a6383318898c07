"""CorDA: its laws, and PEFT's from the same batches."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor

from adapterkit.core.errors import Refused
from adapterkit.verbs.init.methods.corda import Corda
from tests.support import oracle
from tests.support.input_statistics import inputs_of, linear_modules, matrix, statistics_of

LLAMA = ("q_proj", "v_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")


def batches(count: int = 6, length: int = 40) -> list[dict]:
    """One sample each: PEFT takes no more."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 80, (1, length), generator=generator)} for _ in range(count)
    ]


def part(weight: Tensor, covariance: Tensor, rank: int, method: str, scale: float = 1.0) -> Tensor:
    a, b = Corda(method).factors(weight, rank, scale, covariance)
    return scale * b @ a


def covariance_of(x: Tensor) -> Tensor:
    return statistics_of(x.double())["covariance"]


def reference(weight: Tensor, covariance: Tensor, rank: int, method: str) -> Tensor:
    """U S Vᵀ C'⁻¹ as the paper has it, in float64."""
    c = covariance.double()
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight.double() @ c, full_matrices=False)
    keep = slice(0, rank) if method == "ipm" else slice(len(s) - rank, None)
    return u[:, keep] * s[keep] @ torch.linalg.solve(c, vh[keep], left=False)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("build, ends", [(oracle.llama, LLAMA), (oracle.gpt2, GPT2)])
def test_corda_equals_peft(method, build, ends):
    """The part and the base that is left, from the same batches; PEFT divides the inputs of each
    batch by |max X|: here they are scaled alike."""
    model = build()
    modules = linear_modules(model, ends)
    samples = batches()
    inputs = inputs_of(model, modules, samples)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=list(ends),
        fan_in_fan_out=build is oracle.gpt2,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
        task_type="CAUSAL_LM",
    )
    theirs = copy.deepcopy(model)
    preprocess_corda(theirs, config, lambda: [theirs(**sample) for sample in samples])
    theirs = peft.get_peft_model(theirs, config)
    assert modules
    for name, module in modules.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.detach() for side in "AB")
        weight, x = matrix(module), inputs[name].view(len(samples), -1, inputs[name].shape[1])
        x = (x / x.amax((1, 2), keepdim=True).abs()).flatten(0, 1)
        scale = 6 / 4**0.5
        mine = part(weight, covariance_of(x), 4, method, scale)
        expected = scale * b @ a
        size = weight.norm()
        assert (mine - expected).norm() < 2e-4 * size, name
        assert expected.norm() > 1e-2 * size
        left = matrix(layer.base_layer)
        assert (weight - mine - left).norm() < 2e-4 * size


def test_one_sample_as_peft_without_its_scaling():
    """Of one batch |max X|² only scales C, and the part does not change."""
    model = oracle.llama()
    modules = linear_modules(model, ("o_proj",))
    for name, x in inputs_of(model, modules, batches(1)).items():
        weight = matrix(modules[name])
        expected = part(weight, covariance_of(x / float(x.max().abs())), 4, "ipm")
        torch.testing.assert_close(part(weight, covariance_of(x), 4, "ipm"), expected)


def weights() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=numbers)
    decaying = torch.logspace(0, -6, 24)
    u, _ = torch.linalg.qr(normal(24, 24))
    v, _ = torch.linalg.qr(normal(24, 24))
    return {
        "square": normal(24, 24),
        "tall": normal(60, 24),
        "wide": normal(24, 70),
        "one row": normal(1, 24),
        "one column": normal(24, 1),
        "of low rank": normal(24, 5) @ normal(5, 24),
        "ill-conditioned": u * decaying @ v,
        "with a dead row": normal(24, 24) * (torch.arange(24) != 3)[:, None],
        "zero": torch.zeros(24, 24),
        "long": normal(300, 290),
    }


def covariances(width: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(4 * width, width, generator=numbers)
    x = x * torch.logspace(0, 2, width)[torch.randperm(width, generator=numbers)]
    return {
        "of all": covariance_of(x),
        "of fewer tokens than columns": covariance_of(x[: max(width // 3, 1)]),
        "with a dead input": covariance_of(x * (torch.arange(width) != width // 2))
        if width > 1
        else covariance_of(x),
    }


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("weight", weights().values(), ids=list(weights()))
def test_is_the_papers(method, weight):
    """U S Vᵀ C'⁻¹ in float64, where that is one matrix: where values are equal, or zero, only how
    well the part fits is fixed."""
    out, width = weight.shape
    for kind, covariance in covariances(width).items():
        c = covariance.double()
        c = c + 0.01 * c.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        s = torch.linalg.svdvals(weight.double() @ c)
        for rank in {1, min(4, out, width), min(out, width)}:
            mine = part(weight, covariance, rank, method).double()
            expected = reference(weight, covariance, rank, method)
            kept = torch.linalg.matrix_norm(mine @ c)
            assert abs(float(kept - torch.linalg.matrix_norm(expected @ c))) <= 1e-5 * s[0], kind
            assert float((mine.norm() - expected.norm()).abs()) <= 1e-3 * weight.norm(), kind
            assert torch.linalg.matrix_rank(mine.float()) <= rank


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_scale_is_in_the_part(method):
    """scale·b@a is the same for all scales, and a's rows are as large as b's columns."""
    weight, covariance = weights()["wide"], covariances(70)["of all"]
    one = part(weight, covariance, 4, method)
    for scale in (0.25, 3.0, 16 / 4**0.5):
        a, b = Corda(method).factors(weight, 4, scale, covariance)
        torch.testing.assert_close(scale * b @ a, one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, Corda(method).factors(weight, 4, scale, covariance)[0])


def test_both_methods_take_different_parts():
    """The covariance decides which: ipm keeps the most of W x, kpm the least."""
    weight, covariance = weights()["square"], covariances(24)["of all"]
    root = torch.linalg.cholesky(covariance.double() + 1e-9 * torch.eye(24))
    share = lambda p: float((p.double() @ root).norm() / (weight.double() @ root).norm())
    ipm, kpm = (part(weight, covariance, 4, method) for method in ("ipm", "kpm"))
    u, s, vh = torch.linalg.svd(weight)
    assert share(kpm) < 0.3 < 0.7 < share(ipm)
    assert share(u[:, :4] * s[:4] @ vh[:4]) < share(ipm)


def test_a_rank_above_the_weights_is_filled_with_zeros():
    weight, covariance = weights()["tall"], covariances(24)["of all"]
    for method in ("ipm", "kpm"):
        a, b = Corda(method).factors(weight, 30, 2.0, covariance)
        assert a.shape == (30, 24) and b.shape == (60, 30)
        assert not a[24:].any() and not b[:, 24:].any()
        torch.testing.assert_close(2 * b @ a, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("covariance, problem", [
    (torch.zeros(24, 24), "zeros"),
    (torch.full((24, 24), torch.nan), "not finite"),
    (torch.arange(576.0).view(24, 24), "not symmetric"),
    (-torch.eye(24), "not positive"),
])  # fmt: skip
def test_invalid_covariances_are_refused(covariance, problem):
    with pytest.raises(ValueError, match=problem):
        part(weights()["square"], covariance, 4, "ipm")


def test_an_unknown_corda_method_is_refused():
    with pytest.raises(Refused, match="ipm or kpm"):
        Corda("imp")
