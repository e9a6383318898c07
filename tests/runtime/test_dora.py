"""DoRA on live models: outputs, gradients and merges are PEFT's, the norms come without the dense
sum."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterkit import LoraConfig, merge
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.runtime import attach, load
from adapterkit.runtime.patches import dora as dora_module
from adapterkit.runtime.patches.dora import RowNorms
from tests.support import oracle
from tests.support.live import llama, peft_of, tokens

NAMES = ["0", "2"]


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def conv(dimensions: int, **settings: Any) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    point = 1 if dimensions < 3 else 2  # PEFT cannot merge points of three dimensions
    layers = kind(6, 10, 3, 2, 1, **settings), nn.Tanh(), kind(10, 8, point, bias=False)
    return nn.Sequential(*layers)


# kind -> the model, the input's shape; adapted are its first and its last layer
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8, bias=False)),
        (5, 24),
    ),
    "conv1d of gpt2": (lambda: nn.Sequential(Conv1D(20, 24), nn.Tanh(), Conv1D(8, 20)), (2, 5, 24)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(30, 20), nn.Tanh(), Scaled(9, 8)), (2, 5)),
    "conv1": (lambda: conv(1), (2, 6, 11)),
    "conv2": (lambda: conv(2), (2, 6, 11, 7)),
    "conv3": (lambda: conv(3), (2, 6, 5, 7, 6)),
}


def network(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[kind][0]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    if kind == "embedding":  # the two side by side: ids have no gradient
        net[1] = nn.Identity()
    return net.to(dtype).requires_grad_(False)


def run(kind: str, model: nn.Module, train: bool) -> tuple[Tensor, ...]:
    """The output, and the gradient of the input where it has one."""
    model.train(train)
    torch.manual_seed(7)
    if kind == "embedding":
        ids = torch.randint(0, 9, NETS[kind][1])
        layers = getattr(model, "base_model", model)
        layers = getattr(layers, "model", layers)
        y = torch.cat([layers[0](ids), layers[2](ids)], -1)
        y.square().sum().backward()
        return (y.detach(),)
    x = torch.randn(NETS[kind][1], requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def by_peft(kind: str, folder: Path, seed: int = 1, **settings: Any) -> peft.PeftModel:
    settings = {"use_dora": True, "fan_in_fan_out": "gpt2" in kind} | settings
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=NAMES, **settings)
    with oracle.quiet():
        model = peft.get_peft_model(network(kind), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    with oracle.quiet():
        model.save_pretrained(folder)
    return model


def close(actual: Any, expected: Any) -> None:
    """Up to float32 rounding of sums of numbers of size 1 to 10."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-5)


def gradients_of_peft(model: nn.Module, name: str = "default") -> list[list[Tensor]]:
    """By layer those of a, b and the magnitude."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, parameter in model.named_parameters():
        match = re.search(rf"(\d+)\.lora_(.*[AB]|magnitude_vector)\.{name}", key)
        if match:
            assert parameter.grad is not None
            found.setdefault(match[1], {})[match[2][-1]] = parameter.grad
    return [[roles[role] for role in "ABr"] for roles in found.values()]


def parts_of(adapters: Any, name: str = "default") -> list[Any]:
    return [part for _, part in adapters.state.adapters[name].patches()]


def gradients(adapters: Any, name: str = "default") -> list[list[Tensor]]:
    return [[p.a.grad, p.b.grad, p.magnitude.grad] for p in parts_of(adapters, name)]


@pytest.mark.parametrize("how", ["eval", "train", "dropout"])
@pytest.mark.parametrize("kind", NETS)
def test_outputs_and_gradients_are_pefts(kind, how, tmp_path):
    dropout = 0.5 if how == "dropout" else 0.0
    theirs = by_peft(kind, tmp_path, lora_dropout=dropout)
    ours = network(kind)
    adapters = load(ours, tmp_path, trainable=True)
    expected = run(kind, theirs, how != "eval")
    close(run(kind, ours, how != "eval"), expected)
    close(gradients(adapters), gradients_of_peft(theirs))


@pytest.mark.parametrize("kind", NETS)
def test_merged_as_pefts_and_back(kind, tmp_path):
    theirs = by_peft(kind, tmp_path)
    ours = network(kind)
    before = copy.deepcopy(ours.state_dict())
    adapters = load(ours, tmp_path, trainable=True)
    unmerged = run(kind, ours, False)[0]
    adapters.merge()
    torch.testing.assert_close(run_merged(kind, ours), unmerged)
    theirs.merge_adapter()
    for name in NAMES:
        layer = theirs.base_model.model[int(name)].base_layer
        torch.testing.assert_close(ours[int(name)].weight, layer.weight)
    adapters.unmerge()
    assert torch.equal(run(kind, ours, False)[0], unmerged)
    adapters.detach()
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@torch.no_grad()
def run_merged(kind: str, model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    if kind == "embedding":
        ids = torch.randint(0, 9, NETS[kind][1])
        return torch.cat([model[0](ids), model[2](ids)], -1)
    return model(torch.randn(NETS[kind][1]))


@pytest.mark.parametrize("kind", NETS)
def test_a_new_adapter_changes_nothing_and_peft_reads_it(kind, tmp_path):
    """Magnitudes are the norms of the rows; with b = 0 the factor is exactly 1."""
    ours = network(kind)
    base = run_merged(kind, ours)
    adapters = attach(ours, LoraConfig(4, 6, targets=NAMES, dora=True), seed=0)
    assert torch.equal(run_merged(kind, ours), base)
    fresh = peft.get_peft_model(
        network(kind),
        peft.LoraConfig(r=4, target_modules=NAMES, use_dora=True, fan_in_fan_out="gpt2" in kind),
    )
    for part, name in zip(parts_of(adapters), NAMES, strict=True):
        theirs = fresh.base_model.model[int(name)].lora_magnitude_vector["default"].weight
        assert part.magnitude.shape == theirs.shape and part.magnitude.dtype == torch.float32
        torch.testing.assert_close(part.magnitude.data, theirs.data)
    shake(adapters)
    y = run_merged(kind, ours)
    assert not torch.allclose(y, base)
    adapters.save(tmp_path)
    with oracle.quiet():
        again = peft.PeftModel.from_pretrained(network(kind), tmp_path)
    torch.testing.assert_close(run(kind, with_gradients(again), False)[0], y)


def with_gradients(model: nn.Module) -> nn.Module:
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in key)
    return model


@torch.no_grad()
def shake(adapters: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("init", [False, "pissa"])
def test_magnitudes_of_an_init_whose_product_is_not_zero(init):
    """‖W + s·b·a‖: the output is that of the LoRA with these factors."""
    nets = network("linear"), network("linear")
    x = torch.randn(5, 24)
    for net, dora in zip(nets, (True, False), strict=True):
        attach(net, LoraConfig(4, 6, targets=NAMES, dora=dora, init=init), seed=0)
    torch.testing.assert_close(nets[0](x), nets[1](x))


def test_new_magnitudes_are_not_rounded_on_a_bfloat16_base():
    """PEFT rounds them to the base's dtype."""
    net = network("linear", torch.bfloat16)
    adapters = attach(net, LoraConfig(4, targets=NAMES, dora=True), seed=0)
    for part in parts_of(adapters):
        norm = part.host.weight.float().norm(dim=1)
        assert part.magnitude.dtype == torch.float32
        torch.testing.assert_close(part.magnitude.data, norm)
        assert not torch.equal(norm.bfloat16().float(), norm)


# -- several --------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["dora", "lora"])
@pytest.mark.parametrize("kind", NETS)
def test_several_act_and_merge_in_turn(kind, second, tmp_path):
    """W <- g2⊙(g1⊙(W + delta1) + delta2), each norm that of the base's weight."""
    by_peft(kind, tmp_path / "1", seed=1)
    by_peft(kind, tmp_path / "2", seed=2, use_dora=second == "dora")
    with oracle.quiet():
        theirs = peft.PeftModel.from_pretrained(
            network(kind), tmp_path / "1", adapter_name="one", is_trainable=True
        )
        theirs.load_adapter(tmp_path / "2", adapter_name="two", is_trainable=True)
    theirs.base_model.set_adapter(["one", "two"])
    ours = network(kind)
    adapters = load(ours, tmp_path / "1", name="one", trainable=True)
    adapters.load(tmp_path / "2", name="two", trainable=True)
    adapters.activate(["one", "two"])
    expected = run(kind, theirs, True)
    unmerged = run(kind, ours, True)
    close(unmerged, expected)
    close(gradients(adapters, "one"), gradients_of_peft(theirs, "one"))
    adapters.merge()
    close(run_merged(kind, ours), unmerged[0])
    adapters.unmerge()
    # one merged, the other beside it: its norms are still those of the base
    adapters.activate(["one", "two"])
    adapters.merge("one")
    close(run_merged(kind, ours), unmerged[0])


def test_a_weight_is_the_share_of_what_it_changes():
    """y + w·(DoRA's output - y); merging it is refused, as offline."""
    net, x = network("linear"), torch.randn(5, 24)
    base = net[0](x)
    adapters = attach(net, LoraConfig(4, targets=NAMES, dora=True, init=False), seed=0)
    shake(adapters)
    y = net[0](x)
    adapters.activate({"default": 0.3})
    torch.testing.assert_close(net[0](x), base + 0.3 * (y - base))
    with pytest.raises(AdapterkitError, match=r"into 0, 2: DoRA with weight 0\.3"):
        adapters.merge()
    assert adapters.merged == {}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("kind", ["linear", "conv1d of gpt2", "conv1", "conv2", "conv3"])
def test_with_trained_biases(kind, bias, dropout, tmp_path):
    """g rescales neither the base's bias nor the trained one in its place."""
    theirs = by_peft(kind, tmp_path, bias=bias, lora_dropout=dropout)
    ours = network(kind)
    adapters = load(ours, tmp_path, trainable=True)
    for train in (True, False):
        theirs.zero_grad()
        ours.zero_grad()
        expected = run(kind, theirs, train)
        close(run(kind, ours, train), expected)
        factors = [part for part in parts_of(adapters) if part.role == "delta"]
        grads = [[p.a.grad, p.b.grad, p.magnitude.grad] for p in factors]
        close(grads, gradients_of_peft(theirs))
        trained = {n: p.grad for n, p in theirs.named_parameters() if n.endswith("bias")}
        own = [part.value.grad for part in parts_of(adapters) if part.role == "weight.bias"]
        close(own, [grad for grad in trained.values() if grad is not None])
        assert bool(own) == (bias != "none")
    unmerged = run(kind, ours, False)[0]
    adapters.merge()
    close(run_merged(kind, ours), unmerged)
    theirs.merge_adapter()
    close(ours[0].bias.data, theirs.base_model.model[0].base_layer.bias.data)


@pytest.mark.parametrize("order", [["bias", "dora"], ["dora", "bias"]])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_another_adapters_trained_bias_is_not_rescaled(bias, order, tmp_path):
    by_peft("linear", tmp_path / "bias", seed=1, bias=bias, use_dora=False, lora_dropout=0.3)
    by_peft("linear", tmp_path / "dora", seed=2, lora_dropout=0.5)
    with oracle.quiet():
        theirs = peft.PeftModel.from_pretrained(
            network("linear"), tmp_path / order[0], adapter_name=order[0], is_trainable=True
        )
        theirs.load_adapter(tmp_path / order[1], adapter_name=order[1], is_trainable=True)
    theirs.base_model.set_adapter(order)
    adapters = load(network("linear"), tmp_path / order[0], name=order[0])
    adapters.load(tmp_path / order[1], name=order[1])
    adapters.activate(order)
    ours = adapters.model
    for train in (True, False):
        close(run("linear", ours, train), run("linear", theirs, train))
    for merged in (order, order[:1]):
        unmerged = run("linear", ours, False)[0]
        adapters.merge(merged)
        close(run_merged("linear", ours), unmerged)
        adapters.unmerge()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_norms_are_those_of_the_weights_that_the_file_has(target, dropout, tmp_path):
    """Where it holds other ones than the base: those of a vocabulary that was made larger."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    settings = {"target_modules": [target], "use_dora": True, "lora_dropout": dropout}
    folder = tmp_path / "adapter"
    oracle.train(copy.deepcopy(base), folder, seed=1, **settings)
    tensors = oracle.stored(folder)
    torch.manual_seed(2)
    at = "base_model.model." + ("model." if target == "embed_tokens" else "") + target
    weight = base.get_submodule(at.removeprefix("base_model.model.")).weight.detach()
    tensors[f"{at}.base_layer.weight"] = weight + torch.randn_like(weight)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    theirs = peft_of(folder, copy.deepcopy(base))
    adapters = load(copy.deepcopy(base), folder)
    for train in (True, False):
        ours = [m.train(train) for m in (theirs, adapters.model)]
        outputs = [[torch.manual_seed(3), m(tokens()).logits][1] for m in ours]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    adapters.merge()
    torch.testing.assert_close(adapters.model(tokens()).logits, outputs[0], rtol=1e-4, atol=1e-4)
    merge(tmp_path / "base", folder, embedding_copies="adapter", out=tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(tokens()).logits, outputs[0], rtol=1e-4, atol=1e-4)


def test_a_bias_added_by_another_adapter_is_rescaled(tmp_path):
    """PEFT's merge leaves it as it is, and its forward does not."""
    by_peft("linear", tmp_path / "1", use_dora=False, lora_bias=True)
    by_peft("linear", tmp_path / "2")
    net = network("linear")
    net[2].bias = nn.Parameter(torch.ones(8))
    adapters = load(net, tmp_path / "1", name="one")
    adapters.load(tmp_path / "2", name="two")
    adapters.activate(["one", "two"])
    y = run_merged("linear", net)
    adapters.merge()
    torch.testing.assert_close(run_merged("linear", net), y)


# -- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cancelled", [0.0, 0.9, 0.99])
def test_norms_are_those_of_the_dense_sum(dtype, cancelled, monkeypatch):
    """Also where most of a row cancels, and in blocks."""
    monkeypatch.setattr(dora_module, "BLOCK", 40)
    torch.manual_seed(0)
    layer = nn.Linear(30, 20).to(dtype)
    a, b = torch.linalg.qr(torch.randn(30, 30))[0][:6], torch.randn(20, 6)
    with torch.no_grad():
        layer.weight.copy_(b @ a - 0.1 * torch.randn(20, 30))
    norms = RowNorms()(layer, 0, a, b, -cancelled)
    expected = (layer.weight.double() - cancelled * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norms, expected.float(), rtol=2e-5, atol=0)


def test_a_row_that_cancels_has_no_norm_of_zero():
    """PEFT divides by it."""
    layer = nn.Linear(30, 20, bias=False)
    nn.init.zeros_(layer.weight[3].data)
    net = nn.Sequential(layer)
    adapters = attach(net, LoraConfig(4, targets=["0"], dora=True), seed=0)
    y = net(torch.randn(5, 30))
    y.sum().backward()
    assert y.isfinite().all() and (y[:, 3] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapters.parameters())


@pytest.fixture
def counts(monkeypatch) -> dict[str, int]:
    """How often the weight is read."""
    counts = {"squares": 0, "project": 0}
    for name in counts:
        own = getattr(dora_module._Rows, name)

        def counted(self, *args, own=own, name=name):
            counts[name] += 1
            return own(self, *args)

        monkeypatch.setattr(dora_module._Rows, name, counted)
    return counts


def test_an_evaluation_reads_the_weight_once(counts):
    net, x = network("linear"), torch.randn(5, 24)
    adapters = attach(net, LoraConfig(4, targets=["0"], dora=True, init=False), seed=0)
    (part,) = parts_of(adapters)

    def changes(expected: dict[str, int]) -> Tensor:
        before = dict(counts)
        with torch.no_grad():
            y = net(x)
            net(x)
        assert {name: counts[name] - before[name] for name in counts} == expected
        return y

    nothing, projected = {"squares": 0, "project": 0}, {"squares": 0, "project": 1}
    changes(nothing)  # new magnitudes are norms
    with torch.no_grad():
        part.b.mul_(2)
    y = changes(nothing)
    with torch.no_grad():
        part.magnitude.mul_(2)
    assert not torch.equal(y, changes(nothing))
    with torch.no_grad():
        part.a.mul_(2)
    changes(projected)
    part.a.data = part.a.data * 2
    changes(projected)
    adapters.rescale(0.5, name="default")
    changes(nothing)
    with torch.no_grad():
        net[0].weight.mul_(2)
    changes({"squares": 1, "project": 1})
    # a trained a is read each time: not all optimizers count what they change
    before = dict(counts)
    net(x), net(x)
    assert counts["project"] == before["project"] + 2 and counts["squares"] == before["squares"]
    part.fix("a")
    net(x), net(x)
    assert counts["project"] == before["project"] + 3


def test_writes_that_no_version_counts_are_seen_after_training():
    """As a fused optimizer's or FSDP's."""
    net, x = network("linear"), torch.randn(5, 24)
    adapters = attach(net, LoraConfig(4, targets=["0"], dora=True, init=False), seed=0)
    with torch.no_grad():
        net(x)
    net(x).sum().backward()
    (part,) = parts_of(adapters)
    version = part.b._version
    part.b.data.mul_(3)
    assert part.b._version == version
    with torch.no_grad():
        y = net(x)
    part.norms, part._folded = RowNorms(), type(part._folded)()
    with torch.no_grad():
        assert torch.equal(net(x), y)


def test_values_computed_in_inference_mode_serve_training():
    """A frozen DoRA below a trained adapter: its factor is saved for the backward pass."""
    net, x = network("linear"), torch.randn(5, 24)
    adapters = attach(net, LoraConfig(4, targets=["2"], dora=True, init=False), seed=0)
    shake(adapters)
    adapters.state.adapters["default"].trainable = False
    adapters.attach(LoraConfig(4, targets=["0"], init=False), name="below", seed=1)
    adapters.activate(["default", "below"])
    with torch.inference_mode():
        net(x)
    net(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapters.parameters("below"))


def test_a_copy_of_the_model_has_norms_of_its_own():
    net, x = network("linear"), torch.randn(5, 24)
    adapters = attach(net, LoraConfig(4, targets=["0"], dora=True, init=False), seed=0)
    with torch.no_grad():
        y = net(x)
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), y)
        twin[0].weight.mul_(2)
        assert torch.equal(net(x), y) and not torch.equal(twin(x), y)
    assert adapters.names == ["default"]


# -- models ---------------------------------------------------------------------------------------


def test_gradient_checkpoints_and_autocast():
    """The norms are the same under autocast, whose products are rounded."""
    results = []
    for checkpoints, cast in ((False, False), (True, False), (False, True)):
        model = llama()
        adapters = attach(model, LoraConfig(4, targets="all-linear", dora=True, init=False), seed=0)
        shake(adapters)
        if checkpoints:
            model.activation_checkpointing_enable()
        ids = tokens()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model.train()(input_ids=ids, labels=ids).loss
            norms = [part.row_norms(part.host) for part in parts_of(adapters)]
        loss.backward()
        results.append((loss.detach(), norms, [p.grad for p in adapters.parameters()]))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2][1], results[0][1])


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_compiles_into_one_graph(bias):
    net, x = network("linear"), torch.randn(5, 24)
    config = LoraConfig(4, targets=NAMES, dora=True, init=False, bias=bias)
    adapters = attach(net, config, seed=0)
    shake(adapters)
    y = net(x)
    y.sum().backward()
    expected = [p.grad.clone() for p in adapters.parameters()]
    for parameter in adapters.parameters():
        parameter.grad = None
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    compiled(x).sum().backward()
    torch.testing.assert_close([p.grad for p in adapters.parameters()], expected)


def test_offload_without_an_accelerator_changes_nothing(tmp_path):
    x, config = torch.randn(5, 24), LoraConfig(4, targets=NAMES, dora=True, init=False)
    nets = [network("linear") for _ in range(2)]
    for net, offload in zip(nets, (False, True), strict=True):
        adapters = attach(net, config, seed=0, ephemeral_gpu_offload=offload)
    adapters.save(tmp_path)
    again = network("linear")
    load(again, tmp_path, ephemeral_gpu_offload=True)
    assert torch.equal(nets[0](x), nets[1](x)) and torch.equal(nets[0](x), again(x))


def test_offload_without_a_driver_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    x, net = torch.randn(5, 24), network("linear")
    attach(net, LoraConfig(4, targets=["0"], dora=True), seed=0, ephemeral_gpu_offload=True)
    assert net(x).isfinite().all()


def test_offload_computes_norms_where_the_accelerator_is(monkeypatch):
    devices = []

    def accelerator():
        devices.append("meta")
        return torch.device("cpu")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    net = network("linear")
    attach(net, LoraConfig(4, targets=["0"], dora=True), seed=0)
    assert not devices
    net = network("linear")
    attach(net, LoraConfig(4, targets=["0"], dora=True), seed=0, ephemeral_gpu_offload=True)
    assert devices


def test_layers_without_dora_are_refused(tmp_path):
    nets = {
        "groups": (nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)), "with groups"),
        "meta": (nn.Sequential(nn.Linear(4, 4, device="meta")), "meta device"),
    }
    for net, problem in nets.values():
        with pytest.raises(Refused, match=f"(?s)DoRA on 0: .*{problem}"):
            attach(net, LoraConfig(4, targets=["0"], dora=True))
        assert not any("adapterkit" in name for name, _ in net.named_modules())
    by_peft("linear", tmp_path)
    with pytest.raises(AdapterkitError, match="another model"):
        load(nn.Sequential(nn.Linear(24, 22), nn.Tanh(), nn.Linear(22, 8)), tmp_path)


def test_a_dora_on_a_meta_device_base_waits_for_it(tmp_path):
    expected = run_merged("linear", load(network("linear"), _saved(tmp_path)).model)
    with torch.device("meta"):
        net = NETS["linear"][0]()
    load(net, tmp_path)
    net.to_empty(device="cpu")
    net.load_state_dict(network("linear").state_dict())
    torch.testing.assert_close(run_merged("linear", net), expected)


def _saved(folder: Path) -> Path:
    by_peft("linear", folder)
    return folder
