"""The whole model in memory against hooks and autograd on transformers' own."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from adapterkit.core.errors import AdapterkitError
from tests.support.live import llama, tokens
from tests.support.stored import checkpoint, collected


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def batches(masked: bool = True):
    result = []
    for seed in range(3):
        ids = tokens(2, 9 + seed, seed=seed)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, -3:] = 0
            batch["labels"][:, 0] = -100
            batch["labels"][0, -3:] = -100
        result.append(batch)
    return result


def reference(model, data):
    """Covariance and mean in float64, gradient by autograd, of all linear layers but the head."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"
    }
    inputs = {name: [] for name in layers}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].detach().double())
        )
        for name, module in layers.items()
    ]
    for batch in data:
        (model(**batch).loss / len(data)).backward()
    for hook in hooks:
        hook.remove()
    expected = {}
    for name, module in layers.items():
        rows = [x.reshape(-1, x.shape[-1]) for x in inputs[name]]
        kept = [
            x[(batch["attention_mask"].bool() & (batch["labels"] != -100)).reshape(-1)]
            if "attention_mask" in batch
            else x
            for x, batch in zip(rows, data, strict=True)
        ]
        x = torch.cat(kept)
        gradient = module.weight.grad
        expected[f"{name}.covariance"] = x.T @ x / len(x)
        expected[f"{name}.mean"] = x.mean(0)
        expected[f"{name}.gradient"] = gradient.T if isinstance(module, Conv1D) else gradient
    return expected


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("masked", [True, False])
def test_collected_statistics_equal_those_by_hand(tmp_path, build, masked):
    model, data = build(), batches(masked)
    expected = reference(model, data)
    what = ("covariance", "mean", "gradient")
    base = checkpoint(model, tmp_path / "base")
    stats = collected(base, data, tmp_path, what=what, whole=True)
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(stats[key].double(), value.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"what": ("covariances",)},
    {"what": ()},
    {"compat": "corda"},
    {"compat": "peft", "what": ("pca",)},
    {"components": 0},
    {"targets": "nowhere"},
    {"targets": "norm"},
    {"what": ("gradient",), "batches": [{"input_ids": tokens()}]},
    {"batches": []},
])  # fmt: skip
def test_invalid_arguments_are_refused(tmp_path, options):
    base = checkpoint(llama(), tmp_path / "base")
    with pytest.raises(AdapterkitError):
        collected(base, options.pop("batches", batches()), tmp_path, **options)
    assert not [*tmp_path.glob("work/*")]
