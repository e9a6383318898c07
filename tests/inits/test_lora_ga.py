"""LoRA-GA: its laws, and PEFT's from the same gradients."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from adapterkit.core.errors import Refused
from adapterkit.verbs.init.methods.lora_ga import DIRECTIONS, SCALES, LoraGa
from tests.support import oracle
from tests.support.input_statistics import gradients_of, linear_modules, matrix

RANK = 8  # 4 · 8 = 32 is the models' width: PEFT's randomized decomposition is exact then
SCALE = 6 / RANK**0.5
LLAMA = ("q_proj", "v_proj", "up_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")


def batches() -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 80, (3, 2, 20), generator=generator)
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def factors(weight: Tensor, gradient: Tensor, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    method = LoraGa(**settings)
    drawn = {"generator": torch.Generator().manual_seed(seed)} if method.draws else {}
    return method.factors(weight, RANK, SCALE, gradient, **drawn)


def in_peft(model, samples, ends, transposed: bool, **settings):
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        use_rslora=True,
        target_modules=list(ends),
        fan_in_fan_out=transposed,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**settings),
        task_type="CAUSAL_LM",
    )
    model = copy.deepcopy(model)
    with oracle.quiet():  # of a backward hook on the first layer
        preprocess_loraga(model, config, lambda: [model(**s).loss.backward() for s in samples])
    return peft.get_peft_model(model, config)


@pytest.fixture(
    scope="module", params=[(oracle.llama, LLAMA), (oracle.gpt2, GPT2)], ids=["llama", "gpt2"]
)
def graded(request):
    """A model, the ends of its linear layers' names, batches, and gradients."""
    build, ends = request.param
    model, samples = build(), batches()
    for module in model.modules():  # PEFT sets the model to train
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, ends, samples, gradients_of(model, linear_modules(model, ends), samples)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", SCALES)
def test_lora_ga_equals_peft(graded, direction, scale):
    """The factors but for the signs of the triplets, which are open, and the base that is left."""
    model, ends, samples, gradients = graded
    modules, transposed = linear_modules(model, ends), "c_fc" in ends
    by_weight = scale == "weight_svd"
    theirs = in_peft(model, samples, ends, transposed, direction=direction, scale=scale)
    for name, gradient in gradients.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.detach() for side in "AB")
        weight = matrix(modules[name])
        mine_a, mine_b = factors(weight, gradient, direction=direction, scale=scale)
        if scale == "stable" and transposed:  # PEFT takes `in` for `out` there
            b = b * (weight.shape[0] / weight.shape[1]) ** 0.25
        if by_weight:  # of W's largest value PEFT has an estimate, which is too small
            ratio = mine_b.norm() / b.norm()
            assert 1 - 1e-4 < ratio < 1.05
            b = b * ratio
        a_signs = (mine_a * a).sum(1).sign()
        b_signs = (mine_b * b).sum(0).sign()
        assert (mine_a - a * a_signs[:, None]).norm() < 1e-4 * a.norm(), name
        assert (mine_b - b * b_signs).norm() < 1e-4 * b.norm(), name
        part = SCALE * mine_b * b_signs @ (mine_a * a_signs[:, None])
        left = matrix(layer.base_layer)
        if not (scale == "stable" and transposed) and not by_weight:
            assert (weight - part - left).norm() < 1e-4 * part.norm() + 1e-6 * weight.norm()


def test_stable_scales_by_the_layers_outputs():
    """out^¼ / √γ, out of (out, in): Conv1D's stored (in, out) makes no difference."""
    generator = torch.Generator().manual_seed(3)
    weight, gradient = (torch.randn(96, 32, generator=generator) for _ in range(2))
    unit, stable = (
        factors(weight, gradient, scale=s, stable_gamma=9)[1] for s in ("unit", "stable")
    )
    torch.testing.assert_close(stable, unit * (96**0.25 / 3))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_are_the_gradients_triplets(direction, scale):
    """a's rows are orthonormal and b's orthogonal, in the order of the singular values."""
    generator = torch.Generator().manual_seed(4)
    weight, gradient = (torch.randn(40, 56, generator=generator) for _ in range(2))
    a, b = factors(weight, gradient, direction=direction, scale=scale)
    u, s, vh = torch.linalg.svd(gradient.double())
    order = torch.arange(2 * RANK)
    in_a = {"ArB2r": order[:RANK], "A2rBr": order[RANK:], "ArBr": order[1::2]}.get(direction)
    in_b = {"ArB2r": order[RANK:], "A2rBr": order[:RANK], "ArBr": order[0::2]}.get(direction)
    if direction == "random":
        in_a = in_b = torch.randperm(2 * RANK, generator=torch.Generator().manual_seed(0))[:RANK]
    by = {
        "stable": 40**0.25 / 4,
        "weight_svd": float(torch.linalg.svdvals(weight)[0] / s[in_b].max()),
        "gd_scale": 1 / SCALE,
        "unit": 1.0,
    }[scale]
    over = SCALE if scale == "gd_scale" else 1.0
    expected_a, expected_b = vh[in_a] / over, u[:, in_b] * s[in_b] * by
    torch.testing.assert_close(
        (a.double() @ expected_a.T).abs() * over**2, torch.eye(RANK).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(b.norm(dim=0).double(), s[in_b] * by, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        (b.double().T @ expected_b).abs(),
        torch.diag(s[in_b] * by).square(),
        rtol=1e-4,
        atol=1e-4 * float(s[0]) ** 2,
    )


def test_random_is_a_function_of_the_seed():
    generator = torch.Generator().manual_seed(5)
    weight, gradient = (torch.randn(40, 56, generator=generator) for _ in range(2))
    one, same, other = (factors(weight, gradient, seed, direction="random") for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("gradient", [
    torch.zeros(40, 56),
    torch.ones(40, 56),
    torch.ones(3, 56),
    torch.ones(40, 5) * torch.arange(5),
    torch.eye(40, 56),
], ids=["zero", "of rank 1", "3 rows", "5 columns, one dead", "equal values"])  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_with_few_triplets(gradient, direction):
    """Fewer than 2r, or none: the shapes are right and the values finite."""
    weight = torch.ones(gradient.shape)
    for scale in SCALES:
        a, b = factors(weight, gradient, direction=direction, scale=scale)
        assert a.shape == (RANK, gradient.shape[1]) and b.shape == (gradient.shape[0], RANK)
        assert a.isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("settings, message", [
    ({"direction": "ArAr"}, "--direction 'ArAr'(?s:.*)ArB2r, A2rBr, ArBr or random"),
    ({"scale": "big"}, "--scale 'big'(?s:.*)stable, weight_svd, gd_scale or unit"),
    ({"stable_gamma": 0}, "--stable-gamma 0"),
])  # fmt: skip
def test_invalid_lora_ga_settings_are_refused(settings, message):
    with pytest.raises(Refused, match=message):
        LoraGa(**settings)
