"""Statistics of a live model's inputs, through to `loftq --stats`."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkit import LoraConfig, cli
from adapterkit.core.errors import AdapterkitError, Failed
from adapterkit.runtime import attach, collect
from tests.support.live import llama, tokens


def texts(model, rows=3):
    def run():
        with torch.no_grad():
            for row in range(rows):
                model(tokens(1, 7 + row, seed=row))

    return run


def by_hand(model, run):
    """E[x xᵀ] in float64, by a hook a layer."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].double())
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    run()
    for hook in hooks:
        hook.remove()
    rows = {p: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for p, xs in inputs.items()}
    return {f"{path}.covariance": x.T @ x / len(x) for path, x in rows.items()}


def state(model):
    return (
        {name: p.clone() for name, p in model.state_dict().items()},
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(name, module.training, len(module._forward_pre_hooks), sorted(module.__dict__))
         for name, module in model.named_modules()],
    )  # fmt: skip


def test_statistics_of_a_llama_equal_those_by_hand():
    """As by hand, the model as before."""
    model = llama()
    before = state(model)
    stats = collect(model, texts(model))
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][key], value) for key, value in after[0].items())
    expected = by_hand(model, texts(model))
    assert stats.keys() == expected.keys() and len(stats) == 14
    for key, value in stats.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)


def test_loftq_takes_it(tmp_path):
    """From the model to the packed base with its adapter; other statistics, other factors."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    llama(**sizes).save_pretrained(tmp_path / "base")
    model = llama(**sizes)
    save_file(collect(model, texts(model)), tmp_path / "stats.safetensors")
    for out, options in {
        "with": ["--stats", str(tmp_path / "stats.safetensors")],
        "without": [],
    }.items():
        result = CliRunner().invoke(
            cli.main,
            [
                "loftq",
                str(tmp_path / "base"),
                "--rank",
                "4",
                "--out",
                str(tmp_path / out),
                *options,
            ],
        )
        assert result.exit_code == 0, result.output
    weights = [
        load_file(tmp_path / out / "adapter" / "adapter_model.safetensors")
        for out in ("with", "without")
    ]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 28
    assert not any(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_are_wide(dtype):
    """400 inputs of 16 bits: rounding does not grow with their number."""
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    x = (torch.randn(400, 1, 8, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    stats = collect(model, lambda: [model(row) for row in x])
    expected = by_hand(model, lambda: [model(row) for row in x])
    torch.testing.assert_close(
        stats["0.covariance"].double(), expected["0.covariance"], rtol=2e-6, atol=1e-6
    )


class Shared(nn.Module):
    """Layers that see the same input, until they do not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(4, 4) for _ in range(3))
        self.apart = self.twice = self.in_place = self.views = False

    def forward(self, x):
        q = self.q(x)
        if self.twice:
            q = q + self.q(x)
        if self.in_place:
            x.mul_(2)
        k = self.k(x.view(1, *x.shape) if self.views else x + 1 if self.apart else x)
        return self.o(q + k)


@pytest.mark.parametrize("how", ["", "apart", "twice", "in_place", "views"])
@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_share_an_input(how, inference):
    torch.manual_seed(0)
    model = Shared()

    def run():
        with torch.inference_mode(inference), torch.no_grad():
            for i in range(4):
                if how:
                    setattr(model, how, i == 2)
                x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
                model(x)

    stats, expected = collect(model, run), by_hand(model, run)
    assert stats.keys() == expected.keys()
    for key, value in stats.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    pointers = {value.data_ptr() for value in stats.values()}
    assert len(pointers) == 3  # so that save_file takes them


def test_layers_that_share_an_input_have_one_sum():
    """Of a llama's seven layers four see something of their own."""
    from adapterkit.runtime.training import collection

    model, kept = llama(), []
    original = collection.Sums.settle
    collection.Sums.settle = lambda self: (kept.append(self), original(self))[1]
    try:
        collect(model, texts(model))
    finally:
        collection.Sums.settle = original
    assert len({id(total) for total in kept[0].by_module.values()}) == 2 * 4


def test_targets_and_layers_that_see_nothing():
    model = Shared()
    model.unused = nn.Linear(4, 4)
    run = lambda: model(torch.ones(2, 4))
    assert {*collect(model, run, targets=["q", "unused"])} == {"q.covariance"}
    assert {*collect(model, run, targets=r"[qk]")} == {"q.covariance", "k.covariance"}


def test_active_adapters_act():
    model = llama()
    run = texts(model)
    base = collect(model, run)
    h = attach(model, LoraConfig(4, 8, ["v_proj"], init=False), seed=0)
    with h.disabled():
        assert all(torch.equal(v, base[k]) for k, v in collect(model, run).items())
    key = "model.layers.0.self_attn.o_proj.covariance"
    assert not torch.allclose(collect(model, run)[key], base[key], rtol=1e-3)


def test_the_hooks_go_when_the_run_fails():
    model = Shared()
    with pytest.raises(ZeroDivisionError):
        collect(model, lambda: 1 / 0)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [
    {"what": "variance"},
    {"targets": ["nowhere"]},
    {"run_model": lambda: None},
])  # fmt: skip
def test_invalid_arguments_of_collect_are_refused(options):
    model = Shared()
    options = {"run_model": lambda: model(torch.ones(2, 4)), **options}
    with pytest.raises(AdapterkitError):
        collect(model, options.pop("run_model"), **options)


def test_inputs_that_are_not_finite():
    model = Shared()
    with pytest.raises(Failed, match="finite"):
        collect(model, lambda: model(torch.full((2, 4), torch.inf)))
