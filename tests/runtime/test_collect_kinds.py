"""Means, principal components and gradients of a live model; its file; PEFT's arithmetic."""

import json
from collections import Counter

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Failed, Refused
from adapterkit.runtime import attach, collect
from adapterkit.verbs.shared.statistics_file import select_statistics
from tests.support import oracle
from tests.support.live import llama, tokens

MODELS = {"llama": llama, "gpt2": oracle.gpt2}
BATCHES = [tokens(2, 9, seed=seed) for seed in range(3)]


def run_with_gradients(model: nn.Module):
    def run():
        for ids in BATCHES:
            model(input_ids=ids, labels=ids).loss.backward()

    return run


def gradients_by_autograd(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the mean loss over the batches, (out, in)."""
    for parameter in model.parameters():
        parameter.grad = None
    run_with_gradients(model)()
    gradients = {}
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and path != "lm_head":
            grad = module.weight.grad / len(BATCHES)
            gradients[f"{path}.gradient"] = grad.T if type(module).__name__ == "Conv1D" else grad
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


@pytest.mark.parametrize("name", MODELS)
def test_collected_gradients_equal_those_of_autograd(name: str):
    model = MODELS[name]()
    frozen, kept = list(model.parameters())[0:2]
    frozen.requires_grad_(False)
    kept.grad = torch.ones_like(kept)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    stats = collect(model, run_with_gradients(model), what="gradient")
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert [p.grad is not None for p in model.parameters()] == [
        p is kept for p in model.parameters()
    ]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    expected = gradients_by_autograd(MODELS[name]())
    assert stats.keys() == expected.keys() and len(stats) in (14, 8)
    for key, value in stats.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-7)


def test_each_gradient_is_freed_at_once():
    """When the first layer's weight gets its gradient, the last ones' are gone."""
    model = llama()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    first, alive = model.get_submodule("model.layers.0.self_attn.q_proj").weight, []

    def run():
        hook = first.register_hook(lambda _: alive.append(sum(w.grad is not None for w in weights)))
        run_with_gradients(model)()
        hook.remove()

    collect(model, run, what="gradient")
    assert alive == [0] * len(BATCHES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing(reentrant: bool):
    model = llama()
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    stats = collect(model.train(), run_with_gradients(model), what="gradient")
    assert model.training
    for key, value in gradients_by_autograd(llama()).items():
        torch.testing.assert_close(stats[key], value, rtol=1e-4, atol=1e-7)


class Routed(nn.Module):
    """A layer that every input passes once, one that it passes twice, one that some pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.once, self.twice, self.some = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x, routed: bool):
        x = self.twice(self.twice(self.once(x)))
        return (self.some(x) if routed else x).square().sum()


def test_the_mean_is_over_backward_passes():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    run = lambda model: [model(x, routed).backward() for routed in (True, False)]
    model = Routed()
    stats = collect(model, lambda: run(model), what="gradient")
    peft_stats = collect(model, lambda: run(model), what="gradient", compat="peft")
    run(model)
    for path, calls in {"once": 2, "twice": 4, "some": 1}.items():
        total = model.get_submodule(path).weight.grad
        torch.testing.assert_close(stats[f"{path}.gradient"], total / 2)
        torch.testing.assert_close(peft_stats[f"{path}.gradient"], total / calls)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's
@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_compat_equal_peft(name: str):
    """Those that `preprocess_loraga` leaves on the modules, (in, out) of a Conv1D."""
    model, theirs = MODELS[name](), MODELS[name]()
    if name == "gpt2":
        for module in theirs.modules():  # PEFT trains in training mode
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), target_modules=targets
    )
    preprocess_loraga(theirs, config, run_with_gradients(theirs))
    stats = collect(
        model, run_with_gradients(model), what="gradient", targets=targets, compat="peft"
    )
    count = 0
    for path, module in theirs.named_modules():
        if hasattr(module, "_peft_loraga_grad"):
            grad, count = module._peft_loraga_grad, count + 1
            grad = grad.T if name == "gpt2" else grad
            torch.testing.assert_close(stats[f"{path}.gradient"], grad, rtol=1e-4, atol=1e-7)
    assert count == len(stats)


@pytest.mark.parametrize("name", MODELS)
def test_covariances_with_compat_equal_peft(name: str):
    """Those that `preprocess_corda` decomposes: each call's inputs over their maximum."""
    model = MODELS[name]()
    targets = ["c_attn", "mlp.c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]

    def run():
        for ids in BATCHES:
            model(input_ids=ids[:1])

    stats = collect(model, run, targets=targets, compat="peft")
    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(), target_modules=targets
    )
    with torch.no_grad():
        calib_cov_distribution(model, config, run, None, None)
    for key, value in stats.items():
        expected = model.get_submodule(key.removesuffix(".covariance")).covariance_matrix
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_means_and_principal_components():
    model, seen = llama(), []
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    run = lambda: [model(ids) for ids in BATCHES]
    with torch.no_grad():
        run()
    hook.remove()
    x = torch.cat([rows.reshape(-1, 48) for rows in seen])
    stats = collect(model, run, what=["mean", "pca"], targets=["1.mlp.down_proj"], components=5)
    assert [key.rpartition(".")[2] for key in stats] == [
        "mean", "components", "variances", "variance"
    ]  # fmt: skip
    mean, components, variances, variance = stats.values()
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(variances.double(), s[:5] ** 2 / len(x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(variance.double(), (s**2).sum()[None] / len(x), rtol=1e-4, atol=0)
    cosines = (components.double() * vh[:5]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-4, atol=0)


def test_the_file_has_shared_statistics_once(tmp_path):
    """The verbs' reader finds in it what the mapping has; of 14 layers 8 see something of their
    own."""
    model, out = llama(), tmp_path / "new" / "stats.safetensors"
    stats = collect(model, run_with_gradients(model), what="covariance, mean,gradient", out=out)
    with safe_open(out, "pt") as file:
        keys, about = list(file.keys()), json.loads(file.metadata()["adapterkit_statistics"])
        stored = {key: file.get_tensor(key) for key in keys}
    assert Counter(key.rpartition(".")[2] for key in keys) == {
        "covariance": 8, "mean": 8, "gradient": 14
    }  # fmt: skip
    assert about["tokens"] == 3 * 2 * 9 and about["model"] == "LlamaForCausalLM"
    assert about["what"] == ["covariance", "mean", "gradient"] and "compat" not in about
    assert about["shared"]["model.layers.0.self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"
    checkpoint = open_checkpoint(LocalFolder(out))
    assert len(stats) == 3 * 14
    for key, value in stats.items():
        path, _, kind = key.rpartition(".")
        spec = select_statistics(checkpoint, kind, {path: tuple(value.shape)})[path]
        assert torch.equal(stored[spec.key], value)
    assert len({value.data_ptr() for value in stats.values()}) == len(stats)


def test_as_adapterkit_stats(tmp_path):
    """The verb, which runs one layer at a time, writes the same tensors of the same texts."""
    what = "covariance,mean,pca,gradient"
    model, rows = llama(), [tokens(1, 5 + 3 * i, seed=i) for i in range(5)]
    model.save_pretrained(tmp_path / "base")
    lines = [json.dumps({"input_ids": row[0].tolist()}) for row in rows]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    adapterkit.stats(
        tmp_path / "base", data=tmp_path / "texts.jsonl", what=what, batch=1,
        out=tmp_path / "verb.safetensors",
    )  # fmt: skip

    def run():
        for ids in rows:
            model(input_ids=ids, labels=ids).loss.backward()

    collect(model, run, what=what, out=tmp_path / "live.safetensors")
    verb, live = (load_file(tmp_path / f"{name}.safetensors") for name in ("verb", "live"))
    assert verb.keys() == live.keys() and len(verb) == 8 * 5 + 14
    for key, value in live.items():
        expected = verb[key]
        if key.endswith("components"):  # those far apart
            value = (value * expected).sum(1)[:4].abs()
            expected = torch.ones_like(value)
        largest = float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * largest)


def test_gradients_of_a_model_with_adapters():
    """Adapters act, and get no gradients meanwhile."""
    model = llama()
    adapters = attach(model, LoraConfig(2, 4, ["q_proj"], init=False), seed=0)
    stats = collect(model, run_with_gradients(model), what="gradient", targets=["v_proj"])
    base = gradients_by_autograd(llama())
    assert not any(torch.allclose(value, base[key], rtol=1e-2) for key, value in stats.items())
    assert all(p.requires_grad and p.grad is None for p in adapters.parameters())
    assert not model.get_submodule("model.layers.0.self_attn.v_proj").weight.requires_grad
    adapters.detach()


@pytest.mark.parametrize("options, message", [
    ({"what": "pca", "compat": "peft"}, "compat='peft' of pca"),
    ({"what": "covariance", "compat": "paper"}, "compat='paper' of covariance"),
    ({"what": "mean,covarance"}, "did you mean 'covariance'"),
    ({"what": []}, "what=\\[\\]"),
    ({"what": [3]}, "what=\\[3\\]"),
    ({"what": "pca", "components": 0}, "components=0"),
    ({"what": "gradient", "targets": ["embed_tokens"]}, "embed_tokens: no linear layer"),
])  # fmt: skip
def test_invalid_kinds_are_refused_before_the_model_runs(options: dict, message: str):
    model = llama()
    ran = []
    with pytest.raises(AdapterkitError, match=message):
        collect(model, lambda: ran.append(model(tokens())), **options)
    assert not ran


def test_runs_without_a_backward_pass():
    model = llama()
    with pytest.raises(Failed, match="none of 14 layers got a gradient"):
        collect(model, lambda: model(tokens()), what="gradient,mean")
    with pytest.raises(ZeroDivisionError):
        collect(model, lambda: 1 / 0, what="gradient,mean")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradients_that_are_not_finite():
    model = llama()
    with pytest.raises(Failed, match="gradients of .* not finite"):
        collect(
            model, lambda: (model(tokens()).logits.sum() * torch.inf).backward(), what="gradient"
        )


def test_weights_without_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(Refused, match="gradients of 1: quantized, or on the meta device"):
        collect(model, lambda: None, what="gradient")
