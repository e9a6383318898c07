"""Each kind of layer: equal to PEFT's, merged, copied, weighted, in any dtype, and taken off."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit
from adapterkit import AdapterkitError, LoraConfig
from adapterkit.runtime import attach
from adapterkit.runtime.layers import KINDS
from tests.support.beside_peft import assert_same, check_merging, compare, shake
from tests.support.layers import CASES, CONFIG, TARGETS, WARNINGS, adapted, with_deltas
from tests.support.oracle import load as load_base
from tests.support.oracle import save_base
from tests.support.usual import usual

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNINGS]

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OF_EACH_KIND = [*{case.kind: case for case in reversed(CASES.values())}.values()]
of_each_kind = pytest.mark.parametrize("case", OF_EACH_KIND, ids=lambda case: case.kind)
RIGHT_IN_PEFT = {name: case for name, case in CASES.items() if case.peft}
MERGEABLE = {name: case for name, case in CASES.items() if case.mergeable}


def test_every_kind_has_a_case():
    others = {"attention_output", "parameter"}  # inside an attention; in test_parameters
    assert {case.kind for case in CASES.values()} == set(KINDS) - others


@pytest.mark.parametrize("case", RIGHT_IN_PEFT.values(), ids=RIGHT_IN_PEFT)
def test_every_kind_of_layer_equals_peft(case, tmp_path):
    """Outputs, gradients, training, and files both ways; merged, and bit for bit back."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **case.settings}
    with case.repaired():
        _, adapters = compare(case.frozen, case.run, tmp_path, **settings)
    if case.mergeable:
        check_merging(adapters, case.run)


@pytest.mark.parametrize("case", MERGEABLE.values(), ids=MERGEABLE)
def test_merging_the_files_gives_what_the_runtime_gives(case, tmp_path):
    net, adapters = adapted(case)
    save_base(case.net(), _new(tmp_path / "base"), "fp32")
    adapters.save(tmp_path / "adapter")
    adapterkit.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "merged")
    merged = load_base(case.net, tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(case.run(merged), case.run(net))
    adapters.merge()
    torch.testing.assert_close(dict(net.state_dict()), dict(merged.state_dict()))


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_groups_cannot_be_merged():
    net, adapters = adapted(CASES["groups"])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(AdapterkitError, match="all groups"):
        adapters.merge()
    assert_same(net.state_dict(), before)


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.06}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", MERGEABLE.values(), ids=MERGEABLE)
def test_several_adapters_act_with_their_weights(case, dtype):
    net, adapters = adapted(case, dtype)
    for number, name in enumerate(("base", "v1.5", "v1_5")):
        rank = number + 1
        config = LoraConfig(rank, 2, TARGETS, init=False, **case.settings)
        adapters.attach(config, name=name, seed=number)
    table = {"v1_5": -0.75, "base": 0.5, "default": 1.5}
    adapters.activate(table)
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    expected = with_deltas(case, net, table)(
        case.input(dtype).double()
        if dtype.is_floating_point and case.x.is_floating_point()
        else case.x
    )
    actual = case.run(net)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(case.run(net).double(), expected, **tolerance)
        adapters.merge()
        torch.testing.assert_close(case.run(net).double(), expected, **tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv"])
def test_float32_factors_on_half_precision_round_once(kind):
    """As in PEFT the factors are float32 and so is their product."""
    case = next(case for case in CASES.values() if case.kind == kind)
    net, adapters = adapted(case, torch.bfloat16)
    host, x = net.layer, case.input(torch.bfloat16)
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
    with adapters.disabled():
        y = host(x).double()
    exact = with_deltas(case, net, {"default": 1.0}).layer
    x = x.double() if x.is_floating_point() else x
    update = exact(x) - case.net(torch.float64).requires_grad_(False).layer.to(
        torch.bfloat16
    ).double()(x)
    expected = y + update
    error = (host(case.input(torch.bfloat16)).double() - expected).abs()
    assert (error <= expected.abs() * 2**-8 + 1e-5).all()


@every
def test_copies_have_their_own_adapters(case):
    net, adapters = adapted(case)
    y = case.run(net)
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    shake(adapters.parameters(), seed=5)
    assert not torch.equal(case.run(net), y)
    for twin in twins:
        assert torch.equal(case.run(twin), y)
        own = twin._adapterkit
        assert {id(p) for p in own.parameters()}.isdisjoint(map(id, adapters.parameters()))
        own.detach()
        assert torch.equal(case.run(twin), case.run(case.net()))


@every
def test_leaves_no_trace(case):
    """While adapters are there names, class and state dict stay; then all is bit for bit back."""
    net, fresh = case.net(), case.net()
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    attributes = {path: set(module.__dict__) for path, module in net.named_modules()}
    adapters = attach(net, CONFIG, seed=1)
    assert_same(net.state_dict(), fresh.state_dict())
    moved = case.run(net)
    with adapters.disabled():
        assert torch.equal(case.run(net), case.run(case.frozen()))
    assert not torch.allclose(moved, case.run(fresh))
    adapters.detach()
    assert_same(net.state_dict(), fresh.state_dict())
    assert torch.equal(case.run(net), case.run(fresh))
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert [name for name, _ in net.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert {path: set(m.__dict__) for path, m in net.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@of_each_kind
def test_gradients_reach_the_input(case):
    """Through the layer below the factors, and with checkpointing of both kinds."""
    net, adapters = adapted(case)
    expected = with_deltas(case, net, {"default": 1.0})

    def gradients(model: nn.Module, run, dtype=torch.float32) -> list[Tensor | None]:
        x = case.input(dtype).clone()
        x = x.requires_grad_() if x.is_floating_point() else x
        model.zero_grad()
        run(model, x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in adapters.parameters())]

    own = gradients(net, lambda model, x: model(x))
    if case.x.is_floating_point():
        merged = gradients(expected, lambda model, x: model(x), torch.float64)
        torch.testing.assert_close(own[0].double(), merged[0], rtol=1e-4, atol=1e-5)
        again = gradients(net, lambda model, x: checkpoint(model, x, use_reentrant=True))
        torch.testing.assert_close(again, own)
    again = gradients(net, lambda model, x: checkpoint(model, x, use_reentrant=False))
    torch.testing.assert_close(again, own)


@pytest.mark.parametrize(
    "case",
    usual(OF_EACH_KIND, lambda case: case.kind in ("linear", "embedding", "attention")),
    ids=lambda case: case.kind,
)
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    net, adapters = adapted(case)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, expected = case.run(compiled), case.run(net)
    torch.testing.assert_close(y, expected)
    parameters = list(adapters.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
    )
    with torch.no_grad():
        torch.testing.assert_close(case.run(compiled), case.run(net))


@of_each_kind
def test_autocast_keeps_the_base_s_dtype(case):
    """The output has the dtype of the base's, and the factors' gradients are float32."""
    net, adapters = adapted(case)
    expected = net.call(net.layer, case.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.call(net.layer, case.x)
        with torch.no_grad():
            torch.testing.assert_close(net.call(net.layer, case.x), y, rtol=0.02, atol=0.02)
        with adapters.disabled():
            assert y.dtype == net.call(net.layer, case.x).dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    gradients = [p.grad for path, p in net.layer.named_parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients)


@of_each_kind
def test_keyword_inputs_and_hooks(case):
    net, _ = adapted(case)
    y = net.layer(*[case.x] * 3) if case.kind == "attention" else net.layer(case.x)
    names = {"attention": ("query", "key", "value"), "conv1d": ("x",)}.get(case.kind, ("input",))
    by_name = net.layer(**dict.fromkeys(names, case.x))
    torch.testing.assert_close(by_name, y)
    outputs = []
    net.layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    net.layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0), *args[1:]))
    flipped = net.layer(*[case.x] * len(names))
    assert outputs[0] is flipped
    if case.kind != "attention":
        torch.testing.assert_close(flipped, y.flip(0))
