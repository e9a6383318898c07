"""Losses and gradients of coefficients: against the runtime, finite differences in float64, and
the model run one layer at a time."""

import itertools

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from adapterkit.runtime import load
from tests.statistics.test_layerwise import MODELS as STORED
from tests.support import oracle
from tests.support.fitting import batches_of, in_float64, points, runs_of
from tests.support.usual import usual


def vit():
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_labels=3,
                       num_attention_heads=4, image_size=16, patch_size=4)  # fmt: skip
    torch.manual_seed(0)
    return ViTForImageClassification(config).eval()


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
             "labels": torch.tensor([0, 2, 1])}]  # fmt: skip


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# model, data, targets
CASES = {
    "llama": (*STORED["llama"][:2], {"target_modules": "all-linear"}),
    "embedding and head": (*STORED["tied llama"][:2],
                           {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": (*STORED["gpt2"][:2], {"target_modules": ["c_attn", "c_proj", "wpe"]}),
    "experts": (*STORED["qwen2_moe"][:2],
                {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "t5": (*STORED["t5"][:2], {"target_modules": ["q", "v", "wo"]}),
    "bart": (*STORED["bart"][:2], {"target_modules": ["q_proj", "fc1"]}),
    "bert": (*STORED["bert"][:2], {"target_modules": ["query", "dense"]}),
    "whisper": (*STORED["whisper"][:2], {"target_modules": ["q_proj", "conv1"]}),
    "vit": (vit, images, {"target_modules": ["query", "projection"]}),
}  # fmt: skip


@pytest.fixture
def case(request, tmp_path):
    make, data, config = CASES[request.param]
    base, adapters = tmp_path / "base", [tmp_path / "a", tmp_path / "b"]
    make().save_pretrained(base)
    for seed, adapter in enumerate(adapters):
        oracle.train(make(), adapter, seed=seed, size=0.1, r=3 + seed, **config)
    return base, adapters, data()


@pytest.mark.parametrize(
    ("case", "directions"),
    usual(
        itertools.product(CASES, [False, True]),
        lambda row: row[0] in (("llama", "experts") if row[1] else ("llama", "t5", "vit")),
    ),
    indirect=["case"],
)
def test_gradients_of_weights_equal_finite_differences(case, tmp_path, large, directions):
    """Of each batch: finite differences; the same one layer at a time."""
    base, adapters, inputs = case
    found = []
    for whole in (True, False):
        work = tmp_path / "work"
        with runs_of(base, adapters, work, whole=whole, directions=directions) as runs:
            batches, c = batches_of(inputs, 2), points(runs.weighted_model.size)
            found.append(runs.gradients(c, batches))
            torch.testing.assert_close(runs.losses(c, batches), found[-1][0])
            if len(found) == 1:
                way = torch.randn(c.shape, generator=torch.Generator().manual_seed(1)).double()
                # T5's attention and routers compute in float32 whatever the model's dtype is
                is_exact = runs.stored.model.config.model_type not in ("t5", "qwen2_moe")
                step, error = (1e-5, 1e-7) if is_exact else (3e-3, 1e-2)
                up, down = (runs.losses(c + s * step * way, batches) for s in (1, -1))
                rows = found[0][1]
                assert rows.shape == (len(batches), len(c)) and len(rows) > 1
                each = [len(batch.samples) for batch in batches]
                change = torch.stack([part.sum() for part in (up - down).split(each)])
                slopes, expected = rows @ way, change / (2 * step)
                torch.testing.assert_close(slopes, expected, rtol=error, atol=error)
    for layerwise, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(layerwise, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", usual(CASES, {"llama", "experts"}), indirect=True)
def test_losses_are_those_of_the_runtime(case, tmp_path):
    """One adapter alone, at its own weight."""
    base, adapters, inputs = case
    batches = batches_of(inputs, 1)
    with runs_of(base, adapters, tmp_path / "work") as runs:
        numbers = torch.tensor([owner[0] for owner in runs.weighted_model.owners])
        losses = runs.losses(0.7 * (numbers == 1), batches)
        model = type(runs.stored.model)
    live = in_float64(model.from_pretrained(base, dtype=torch.float64).eval())
    handle = load(live, adapters[1], name="it", dtype=torch.float64)
    handle.activate({"it": 0.7})
    with torch.no_grad():
        expected = torch.stack([live(**batch.inputs).loss for batch in batches])
    torch.testing.assert_close(losses.float(), expected.float(), rtol=1e-6, atol=1e-6)
