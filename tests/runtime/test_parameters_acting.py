"""LoRA on parameters: weights, rows, checkpointing, merging, optimizers."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.moe import ExpertsInterface

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import attach, load
from adapterkit.runtime.training.optimizers import LoraFA, Riemannian, loraplus
from tests.support.experts import (
    CASES,
    EXPERTS,
    IMPLEMENTATIONS,
    TOKENS,
    close,
    loss_of,
    parameters_of,
    randomize,
    tiny,
    two_adapters,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_adapters_with_weights(implementation):
    """PEFT needs the same parameters in all of them, and has no weights."""
    base = tiny("mixtral", implementation)
    other = copy.deepcopy(base)
    handle = two_adapters(base)
    table = {"second": -0.3, "first": 0.7}
    handle.activate(table)
    with torch.no_grad():
        for path, site in handle.state.sites.items():
            for name, weight in table.items():
                for part in site.patches[name].values():
                    parameter = other.get_submodule(path).get_parameter(part.leaf)
                    parameter += weight * part.delta()
    close(base(TOKENS).logits, other(TOKENS).logits)


def test_a_module_and_its_weight_in_two_adapters():
    base = tiny("llama")
    want = copy.deepcopy(base)
    handle = attach(base, LoraConfig(3, 5, ["q_proj"]), name="module")
    handle.attach(LoraConfig(2, 3, [], parameters=["q_proj.weight"]), name="parameter")
    for name in handle.names:
        randomize(handle.parameters(name))
    handle.activate(["module", "parameter"])
    with torch.no_grad():
        for path, site in handle.state.sites.items():
            for parts in site.patches.values():
                for part in parts.values():
                    want.get_submodule(path).weight += part.delta()
    close(base(TOKENS).logits, want(TOKENS).logits)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator makes; views have their owner's memory."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.elements = max(self.elements, storage.nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("kind, implementation", [
    case for case in CASES if case[1] != "batched_mm"
])  # fmt: skip
def test_nothing_of_the_experts_size_is_made(kind, implementation):
    """In a training step; batched_mm itself gathers the weights of its tokens' experts."""
    base = tiny(kind, implementation)
    handle = attach(base, LoraConfig(2, 3, [], parameters=parameters_of(kind)))
    randomize(handle.parameters())
    stacks = [
        p.numel() for n, p in base.named_parameters() if p.ndim == 3 and "adapterkit" not in n
    ]
    with Largest(base) as largest:
        loss_of(base, TOKENS[:1, :2])
    assert largest.elements < min(stacks)
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_checkpointing_keeps_the_gradients(implementation, use_reentrant):
    base = tiny("mixtral", implementation).train()
    handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
    randomize(handle.parameters())
    loss_of(base)
    want = [p.grad.clone() for p in handle.parameters()]
    base.zero_grad()
    enable = getattr(base, "activation_checkpointing_enable", None)
    enable = enable or base.gradient_checkpointing_enable  # before transformers 5.20
    enable({"use_reentrant": use_reentrant})
    loss_of(base)
    for parameter, gradient in zip(handle.parameters(), want, strict=True):
        close(parameter.grad, gradient)


def test_kernels_of_experts_get_tensors():
    """Another implementation may be a kernel, or compute its own gradients."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            assert isinstance(weight, torch.Tensor)
            ctx.save_for_backward(x, weight)
            return x @ weight.mT

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.mT @ x

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            where, which = torch.where(index == expert)
            gate, up = Product.apply(hidden[where], self.gate_up_proj[expert]).chunk(2, -1)
            out = Product.apply(self.act_fn(gate) * up, self.down_proj[expert])
            y = y.index_add(0, where, out * weights[where, which, None])
        return y

    results = []
    ExpertsInterface.register("kernel", forward)
    try:
        for implementation in ("eager", "kernel"):
            base = tiny("mixtral", implementation)
            handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
            randomize(handle.parameters())
            logits, _ = loss_of(base)
            results.append([logits, *(p.grad for p in handle.parameters())])
    finally:
        del ExpertsInterface._global_mapping["kernel"]
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_a_parameter_that_its_module_does_not_read_is_refused():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.holder = nn.Linear(4, 4)

        def forward(self, x):
            return self.holder(x)[..., :0].sum() + x @ self.holder.other

    model = Reader()
    model.holder.other = nn.Parameter(torch.ones(4, 2))
    attach(model, LoraConfig(2, 2, [], parameters=["other"]))
    with pytest.raises(AdapterkitError, match="Linear does not read other in its forward"):
        model(torch.ones(1, 4))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama"])
def test_merge_and_unmerge(kind):
    base = tiny(kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = base(TOKENS).logits
    parameters = ["q_proj.weight"] if kind == "llama" else EXPERTS
    handle = two_adapters(base, parameters)
    handle.activate({"first": 0.7, "second": -0.3})
    want = base(TOKENS).logits
    handle.merge()
    close(base(TOKENS).logits, want)
    handle.unmerge()
    assert torch.equal(base(TOKENS).logits, want)
    with handle.disabled():
        assert torch.equal(base(TOKENS).logits, plain)
    handle.detach()
    assert torch.equal(base(TOKENS).logits, plain)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in base.parameters())


def test_report_and_rescale():
    base = tiny("gpt_oss")
    handle = attach(base, LoraConfig(3, 5, [], parameters=EXPERTS))
    randomize(handle.parameters())
    handle.rescale(0.5, name="default")
    rows = handle.report()
    assert [row.module for row in rows][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert {row.kind for row in rows} == {"GptOssExperts"}
    (share,) = rows[0].adapters
    assert share.rank == 3 and share.scale == pytest.approx(5 / 6)
    site = handle.state.sites["model.layers.0.mlp.experts"]
    delta = site.patches["default"]["weight:gate_up_proj"].delta()
    assert share.norm == pytest.approx(float(delta.norm()), rel=1e-5)


@pytest.mark.parametrize("parameters", [EXPERTS, ["mlp.gate.weight", "down_proj"]])
@pytest.mark.parametrize("kind, implementation", [
    *(("mixtral", implementation) for implementation in IMPLEMENTATIONS),
    ("qwen3_moe", "grouped_mm"), ("deepseek_v3", "eager"), ("gpt_oss", "eager"),
])  # fmt: skip
@torch.no_grad()
def test_mixed_rows_of_experts_equal_each_adapter_alone(kind, implementation, parameters):
    """Experts run on the tokens of one adapter at a time; PEFT has no mixed batches here."""
    base = tiny(kind, implementation)
    if kind == "gpt_oss":
        parameters = [name.replace("mlp.gate.", "mlp.router.") for name in parameters]
    handle = two_adapters(base, parameters)
    for name in handle.names:
        for parameter in handle.state.adapters[name].patches():
            parameter[1].requires_grad_(False)
    names = ["second", None, "first", "second", "first"]
    tokens = torch.cat([TOKENS, TOKENS.flip(0), TOKENS[:1] + 3])
    want = []
    for name, row in zip(names, tokens, strict=True):
        handle.activate(name)
        want.append(base(row[None]).logits)
    handle.activate("first")
    with handle.rows(names):
        got = base(tokens).logits
    close(got, torch.cat(want))
    with handle.rows(["first", "second"]):
        mixed = base.generate(TOKENS, max_new_tokens=4, num_beams=2, do_sample=False)
    for name, row, generated in zip(["first", "second"], TOKENS, mixed, strict=True):
        handle.activate(name)
        alone = base.generate(row[None], max_new_tokens=4, num_beams=2, do_sample=False)[0]
        assert torch.equal(generated[: len(alone)], alone)


@pytest.mark.parametrize("kind", ["llama4_text", "jetmoe"])
def test_mixed_rows_of_regrouped_tokens_are_refused(kind):
    """These experts get the tokens by expert: nothing says which row one belongs to."""
    handle = attach(tiny(kind), LoraConfig(2, 3, [], parameters=parameters_of(kind)))
    with pytest.raises(AdapterkitError, match="routed to them"), handle.rows(["default", None]):
        raise AssertionError
    assert list(handle.active) == ["default"]


class Two(nn.Module):
    """Two linear layers: a stack of experts, or a module each."""

    def __init__(self, stacked):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(2, 6, 5, generator=generator)
        self.stacked = stacked
        if stacked:
            self.inner = nn.Module()
            self.inner.forward = self.run
            self.inner.weight = nn.Parameter(weight)
        else:
            self.inner = nn.ModuleList([nn.Linear(5, 6, bias=False) for _ in range(2)])
            for layer, matrix in zip(self.inner, weight, strict=True):
                layer.weight.data = matrix

    def run(self, x):
        return torch.stack([nn.functional.linear(x, self.inner.weight[e]) for e in range(2)])

    def forward(self, x):
        return self.inner(x) if self.stacked else torch.stack([layer(x) for layer in self.inner])


@pytest.mark.parametrize("optimizer", [
    lambda h: LoraFA(h, lr=0.1),
    lambda h: Riemannian(h, torch.optim.SGD, lr=1e-3),
    lambda h: loraplus(h, torch.optim.AdamW, lr=0.1, ratio=4),
])  # fmt: skip
def test_optimizers_take_each_expert_as_a_layer(optimizer):
    """PEFT's LoRA-FA multiplies across experts."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    factors = []
    for stacked in (True, False):
        model = Two(stacked)
        settings = {"targets": [], "parameters": ["weight"]} if stacked else {"targets": ["0", "1"]}
        handle = attach(model, LoraConfig(2, 3, **settings), seed=0)
        parts = [part for _, part in handle.state.adapters["default"].patches()]
        steps = optimizer(handle)
        generator = torch.Generator().manual_seed(2)
        starts = (
            torch.randn(2, 2, 5, generator=generator),
            torch.randn(2, 6, 2, generator=generator),
        )
        with torch.no_grad():
            for name, start in zip("ab", starts, strict=True):
                for part, value in zip(parts, [start] if stacked else start, strict=True):
                    getattr(part, name).copy_(value)
        for _ in range(3):
            model(x).square().sum().backward()
            steps.step()
            steps.zero_grad()
        values = [torch.stack([getattr(part, n) for part in parts]).detach() for n in "ab"]
        factors.append([value[0] if stacked else value for value in values])
    for got, want in zip(*factors, strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_combination_of_experts_equals_their_weighted_sum(kind):
    base = tiny(kind)
    handle = two_adapters(base)
    table = {"first": 0.7, "second": 0.3}
    handle.activate(table)
    want = base(TOKENS).logits
    handle.combine(table, name="both")
    handle.activate("both")
    close(base(TOKENS).logits, want)


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_swap_within_padded_ranks(kind, tmp_path):
    """Compiled code goes on as it is, and is one graph: nothing breaks it that does not in the
    base, whose eager experts do."""
    base = tiny(kind, "grouped_mm")
    want, parameters = {}, [*EXPERTS, "q_proj.weight"]
    for name, settings in {"low": (2, 7), "high": (4, 3)}.items():
        handle = attach(copy.deepcopy(base), LoraConfig(*settings, [], parameters=parameters))
        randomize(handle.parameters())
        handle.save(tmp_path / name)
        want[name] = handle.model(TOKENS).logits
    handle = load(base, tmp_path / "low", name="it", pad_rank=4)
    close(base(TOKENS).logits, want["low"])
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    close(compiled(TOKENS).logits, want["low"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("high", "low"):
            handle.swap("it", tmp_path / name)
            close(compiled(TOKENS).logits, want[name])
    handle.save(tmp_path / "again", name="it")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("low", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_run_without_tokens(kind):
    base = tiny(kind)
    attach(base, LoraConfig(2, 7, [], parameters=EXPERTS))
    nothing = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert base.model.layers[0].mlp.experts(*nothing).shape == (0, 32)
