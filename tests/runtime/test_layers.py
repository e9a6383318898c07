"""Each kind of layer: equal to PEFT's, merged, copied, weighted, in any dtype, and taken off."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import adapterkit
from adapterkit import AdapterkitError, LoraConfig
from adapterkit.runtime import Adapters, attach, load
from adapterkit.runtime.layers import KINDS
from tests.support.beside_peft import assert_same, check_merging, compare, shake
from tests.support.oracle import load as load_base
from tests.support.oracle import save_base

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

TARGETS = ["layer", "head"]
IDS = torch.tensor([[1, 0, 7, 3], [3, 3, 10, 0]])


class Net(nn.Module):
    """A layer, and a head through which its factors get their gradients."""

    def __init__(self, layer: nn.Module, width: int, call: Callable[..., Tensor]):
        super().__init__()
        self.layer, self.head, self.call = layer, nn.Linear(width, 3), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(self.layer, x)))


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def points(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution's output with the channels last."""
    return layer(x).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Attend:
    """Attention to itself."""

    options: Mapping

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, x, x, **self.options)[0]


def attend(need_weights: bool = False, **options) -> Attend:
    return Attend({"need_weights": need_weights, **options})


def cross(layer: nn.Module, x: Tensor) -> Tensor:
    y, weights = layer(x[:, :2], x, value=x.flip(1), average_attn_weights=False)
    return y + weights.sum()


PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
CAUSAL = torch.triu(torch.full((4, 4), -torch.inf), 1)


@dataclass(frozen=True)
class Case:
    kind: str
    make: Callable[[], nn.Module]
    width: int  # of the output
    x: Tensor
    call: Callable[..., Tensor] = plain
    peft: bool = True  # whether PEFT is right
    mergeable: bool = True
    settings: Mapping = field(default_factory=dict)

    def net(self, dtype: torch.dtype = torch.float32) -> Net:
        torch.manual_seed(0)
        net = Net(self.make(), self.width, self.call).to(dtype).eval()
        for name, parameter in net.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, 0.5, 0.3)
        return net

    def frozen(self) -> Net:
        """torch's products of frozen and of trained weights differ in the last bit."""
        return self.net().requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.to(dtype) if self.x.is_floating_point() else self.x

    def run(self, model: nn.Module) -> Tensor:
        return model(self.input(model.head.weight.dtype))  # type: ignore[union-attr]

    @contextlib.contextmanager
    def repaired(self) -> Iterator[None]:
        """PEFT adds an attention's second delta twice: in its merge, and in that of the layer."""
        if self.kind != "attention":
            yield
            return
        with mock.patch.multiple(
            peft_layers.Linear, merge=lambda *args, **kwargs: None, unmerge=lambda *args: None
        ):
            yield


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def attention(batch_first: bool = True, **options) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)


CASES = {
    "linear": Case("linear", lambda: nn.Linear(6, 5), 5, values(2, 4, 6)),
    "linear without bias": Case("linear", lambda: nn.Linear(6, 5, bias=False), 5, values(4, 6)),
    "linear of a vector": Case("linear", lambda: nn.Linear(6, 5), 5, values(6)),
    "linear with its bias": Case(
        "linear", lambda: nn.Linear(6, 5), 5, values(2, 4, 6), settings={"lora_bias": True}
    ),
    "GPT-2's": Case("conv1d", lambda: Conv1D(5, 6), 5, values(2, 4, 6)),
    "embedding": Case("embedding", lambda: nn.Embedding(11, 6, padding_idx=3), 6, IDS),
    "scaled embedding": Case(
        "embedding", lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), 6, IDS
    ),
    "embedding by frequency": Case(
        "embedding", lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), 6, IDS
    ),
    "line": Case(
        "conv", lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), 6, values(2, 3, 9), points
    ),
    "image": Case("conv", lambda: nn.Conv2d(3, 6, (3, 2)), 6, values(2, 3, 6, 7), points),
    "point": Case("conv", lambda: nn.Conv2d(3, 6, 1, bias=False), 6, values(2, 3, 4, 5), points),
    "same size": Case(
        "conv", lambda: nn.Conv2d(3, 6, 3, padding="same"), 6, values(2, 3, 4, 5), points
    ),
    "volume": Case(
        "conv", lambda: nn.Conv3d(3, 6, 2, padding=(0, 1, 0)), 6, values(2, 3, 3, 3, 4), points
    ),
    "image with its bias": Case(
        "conv",
        lambda: nn.Conv2d(3, 6, (3, 2)),
        6,
        values(2, 3, 6, 7),
        points,
        settings={"lora_bias": True},
    ),
    "groups": Case(
        "conv",
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        6,
        values(2, 4, 6, 7),
        points,
        mergeable=False,
    ),
    "dilation": Case(
        "conv",
        lambda: nn.Conv2d(3, 6, 3, dilation=2),
        6,
        values(2, 3, 6, 7),
        points,
        peft=False,
    ),
    "reflected": Case(
        "conv",
        lambda: nn.Conv1d(3, 6, 3, padding=1, padding_mode="reflect"),
        6,
        values(2, 3, 7),
        points,
        peft=False,
    ),
    "circular": Case(
        "conv",
        lambda: nn.Conv2d(3, 6, 3, padding="same", padding_mode="circular"),
        6,
        values(2, 3, 6, 7),
        points,
        peft=False,
    ),
    "attention": Case("attention", attention(), 8, values(2, 4, 8), attend(True)),
    "attention, tokens first": Case(
        "attention", attention(False), 8, values(4, 2, 8), attend(attn_mask=CAUSAL)
    ),
    "attention with padding": Case(
        "attention",
        attention(bias=False),
        8,
        values(2, 4, 8),
        attend(key_padding_mask=PADDING),
    ),
    "attention to more": Case(
        "attention",
        attention(add_bias_kv=True, add_zero_attn=True),
        8,
        values(2, 4, 8),
        attend(True),
    ),
    "attention to others": Case("attention", attention(), 8, values(2, 4, 8), cross),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
of_each_kind = pytest.mark.parametrize(
    "case", {case.kind: case for case in reversed(CASES.values())}.values(), ids=lambda c: c.kind
)
RIGHT_IN_PEFT = {name: case for name, case in CASES.items() if case.peft}
MERGEABLE = {name: case for name, case in CASES.items() if case.mergeable}
CONFIG = LoraConfig(2, 3, TARGETS, init=False)


def adapted(case: Case, dtype: torch.dtype = torch.float32, **how) -> tuple[Net, Adapters]:
    """The case's net with an adapter whose factors are all random."""
    net = case.net(dtype)
    adapters = attach(net, LoraConfig(2, 3, TARGETS, init=False, **case.settings), seed=1, **how)
    shake(adapters.parameters())
    return net, adapters


def deltas(case: Case, net: Net, name: str) -> dict[str, Tensor]:
    """What an adapter adds to the net's parameters, float64, from its factors."""
    sums: dict[str, Tensor] = {}
    for path in ("layer", "head"):
        kind = case.kind if path == "layer" else "linear"
        for part in getattr(net, path).adapterkit.parts[name].values():
            a, b = part.a.detach().double(), part.b.detach().double()
            delta = part.scale * (b.flatten(1) @ a.flatten(1))
            leaf = {"weight": "in_proj_weight", "weight:out_proj": "out_proj.weight"}.get(part.role)
            leaf = f"{path}.{leaf or 'weight'}"
            if kind in ("conv1d", "embedding"):
                delta = delta.T
            sums[leaf] = delta.reshape(net.state_dict()[leaf].shape)
            if part.bias is not None:
                sums[f"{path}.bias"] = part.scale * part.bias.detach().double()
    return sums


def with_deltas(case: Case, net: Net, table: Mapping[str, float]) -> Net:
    """A net in float64 whose weights are W + Σ weight·scale·b·a."""
    summed = case.net(torch.float64)
    summed.load_state_dict(net.state_dict())
    with torch.no_grad():
        for name, weight in table.items():
            for leaf, delta in deltas(case, net, name).items():
                summed.get_parameter(leaf).add_(delta, alpha=weight)
    return summed


def test_every_kind_has_a_case():
    others = {"attention_output", "parameter"}  # inside an attention; in test_parameters
    assert {case.kind for case in CASES.values()} == set(KINDS) - others


@pytest.mark.parametrize("case", RIGHT_IN_PEFT.values(), ids=RIGHT_IN_PEFT)
def test_equals_peft(case, tmp_path):
    """Outputs, gradients, training, and files both ways; merged, and bit for bit back."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **case.settings}
    with case.repaired():
        _, adapters = compare(case.frozen, case.run, tmp_path, **settings)
    if case.mergeable:
        check_merging(adapters, case.run)


def test_peft_adds_the_second_delta_of_an_attention_twice():
    """Its files are right: so the runtime differs from it, by that delta once."""
    case = CASES["attention"]
    theirs = peft.get_peft_model(case.net(), peft.LoraConfig(r=2, target_modules=["layer"]))
    out = theirs.base_model.model.layer.base_layer.out_proj
    with torch.no_grad():
        out.lora_B["default"].weight.fill_(0.1)
        y = case.run(theirs)
        out.scaling["default"] /= 2
        half = case.run(theirs)
        with case.repaired():
            out.scaling["default"] *= 2
            once = case.run(theirs)
    torch.testing.assert_close(half, once)
    assert not torch.allclose(y, once)


def test_trained_biases_of_an_attention(tmp_path):
    case = CASES["attention to more"]
    settings = {"r": 2, "target_modules": TARGETS, "bias": "all"}
    with case.repaired():
        _, adapters = compare(case.frozen, case.run, tmp_path, **settings)
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
def test_factors_beside_half_precision_round_once(kind):
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


@of_each_kind
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
def test_autocast(case):
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


# --- linear layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_inputs_of_any_shape(shape, bias):
    case = Case("linear", lambda: nn.Linear(6, 5, bias=bias), 5, values(*shape))
    net, _ = adapted(case)
    expected = with_deltas(case, net, {"default": 1.0}).layer(case.x.double()).float()
    strided = values(*shape[:-1], 12)[..., ::2].copy_(case.x)
    for x in (case.x, strided):
        torch.testing.assert_close(net.layer(x), expected)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(net.layer(x), expected)


class Kept(nn.Linear):
    """A linear layer that keeps a reference to its output."""

    def forward(self, input: Tensor) -> Tensor:
        self.output = super().forward(input)
        return self.output


@torch.no_grad()
def test_outputs_that_others_have_are_not_changed():
    case = Case("linear", lambda: Kept(6, 5), 5, values(2, 6))
    net, adapters = adapted(case)
    y = net.layer(case.x)
    assert not torch.equal(net.layer.output, y)
    adapters.detach()
    assert torch.equal(net.layer(case.x), Kept.forward(net.layer, case.x))

    case = CASES["linear"]
    net = case.net()
    output = net.layer(case.x)
    before = output.clone()
    net.layer.forward = lambda x: output
    adapters = attach(net, CONFIG, seed=1)
    assert not torch.equal(net.layer(case.x), before)
    assert torch.equal(output, before)
    adapters.detach()
    assert net.layer.forward(case.x) is output


class Scaled(nn.Module):
    """A linear-like layer of its own: what it does with its weight cannot be known."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.weight = nn.Parameter(values(5, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * F.linear(hidden, self.weight)


def test_unknown_linear_layers_run_unmerged(tmp_path):
    case = Case("linear", Scaled, 5, values(2, 6))
    net, adapters = adapted(case)
    part = net.layer.adapterkit.parts["default"]["delta"]
    expected = 3 * case.x @ net.layer.weight.T + 1.5 * case.x @ part.a.T @ part.b.T
    torch.testing.assert_close(net.layer(case.x), expected)
    with pytest.raises(AdapterkitError, match="how a Scaled uses its weight"):
        adapters.merge()
    y = case.run(net)
    adapters.save(tmp_path)
    other = load(case.net(), tmp_path)
    assert torch.equal(case.run(other.model), y)


@pytest.mark.parametrize("name", ["linear", "GPT-2's", "image"])
def test_dropout_is_peft_s(name, tmp_path):
    """From the same seed, in training alone."""
    case = CASES[name]
    config = peft.LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.4)
    theirs = peft.get_peft_model(case.net(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = load(case.net(), tmp_path, trainable=True).model
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        outputs.append(case.run(model.train()))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(case.run(ours), outputs[1])
    torch.testing.assert_close(case.run(ours.eval()), case.run(theirs.eval()))


@pytest.mark.parametrize("name", ["embedding", "attention"])
def test_dropout_has_no_place_in(name):
    """PEFT does not drop there either."""
    case = CASES[name]
    net = case.net()
    adapters = attach(net, LoraConfig(2, 3, ["layer"], dropout=0.9, init=False))
    y = case.run(net)
    torch.testing.assert_close(case.run(net.train()), y)
    adapters.detach()


# --- attention ----------------------------------------------------------------------------------


def encoder(**options) -> tuple[nn.TransformerEncoder, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval(), values(3, 5, 8)


FUSED = "torch._transformer_encoder_layer_fwd"
ENCODER_TARGETS = [["self_attn"], ["linear1"], ["linear2", "self_attn"]]


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
@torch.no_grad()
def test_the_fused_encoder_layer_does_not_pass_adapters_by(targets):
    model, x = encoder()
    base = model(x)
    adapters = attach(model, LoraConfig(2, 2, targets, init=False), seed=1)
    with mock.patch(FUSED, side_effect=AssertionError("fused")):
        y = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), y)
    assert not torch.allclose(y, base)
    with mock.patch(FUSED, wraps=torch._transformer_encoder_layer_fwd) as fused:
        with adapters.disabled():
            assert torch.equal(model(x), base)
        assert fused.call_count == 2
    adapters.unmerge()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
@torch.no_grad()
def test_encoders_of_padded_rows(targets):
    """torch makes nested tensors of them."""
    model, x = encoder()
    padding = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0, 1, 1, 1, 1]]).bool()
    base = model(x, src_key_padding_mask=padding)
    adapters = attach(model, LoraConfig(2, 2, targets, init=False), seed=1)
    y = model(x, src_key_padding_mask=padding)
    assert not torch.allclose(y, base)
    adapters.merge()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), y)
    with adapters.disabled():
        assert torch.equal(model(x, src_key_padding_mask=padding), base)


def test_an_attention_s_output_projection_alone(tmp_path):
    """PEFT's all-linear has it, to no effect; here it acts, and merging agrees."""
    case = CASES["attention"]
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(case.net(), config)
    shake([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = load(case.net(), tmp_path / "theirs")
    net = adapters.model
    y = case.run(net)
    delta = deltas(case, net, "default")
    assert set(delta) == {"layer.out_proj.weight", "head.weight"}
    expected = with_deltas(case, net, {"default": 1.0})(case.x.double()).float()
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(case.run(theirs), expected)
    adapters.save(tmp_path / "ours")
    adapters.merge()
    torch.testing.assert_close(case.run(net), y)
    merged = peft.PeftModel.from_pretrained(case.net(), tmp_path / "ours").merge_and_unload()
    torch.testing.assert_close(case.run(merged), y)


def test_threads_share_an_attention():
    """Each call finds its own parameters, and leaves the base's."""
    case = CASES["attention"]
    net, _ = adapted(case)
    before = dict(net.named_parameters())
    with torch.no_grad():
        expected = case.run(net)
    outputs = []

    def work():
        with torch.no_grad():
            outputs.extend(case.run(net) for _ in range(100))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 400 and all(torch.equal(y, expected) for y in outputs)
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@torch.no_grad()
def test_an_error_in_the_forward_leaves_the_parameters():
    net, _ = adapted(CASES["attention"])
    before = dict(net.named_parameters())
    with pytest.raises(AssertionError):
        net.layer(values(2, 4, 8), values(2, 5, 8), values(2, 3, 8))
    assert all(dict(net.named_parameters())[name] is p for name, p in before.items())


# --- shared modules and embeddings --------------------------------------------------------------


def test_a_shared_layer_of_albert(tmp_path):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24}
        config = AlbertConfig(vocab_size=20, num_hidden_layers=3, num_attention_heads=2, **sizes)
        return AlbertModel(config).eval()

    def run(model):
        return model(input_ids=IDS).last_hidden_state

    settings = {"r": 2, "target_modules": ["query", "ffn", "word_embeddings"]}
    _, adapters = compare(make, run, tmp_path, **settings)
    check_merging(adapters, run)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_one_module_under_two_names(tmp_path):
    torch.manual_seed(0)
    model, x = Twice().eval(), values(2, 6)
    base = model(x)
    adapters = attach(model, LoraConfig(2, 2, ["first"], init=False), seed=1)
    y = model(x)
    part = model.first.adapterkit.parts["default"]["delta"]
    weight = model.first.weight + part.b @ part.a
    expected = F.linear(torch.tanh(F.linear(x, weight, model.first.bias)), weight, model.first.bias)
    torch.testing.assert_close(y, expected)
    adapters.merge()
    torch.testing.assert_close(model(x), y)
    adapters.unmerge()
    adapters.save(tmp_path / "one")
    adapters.detach()
    assert torch.equal(model(x), base)
    assert torch.equal(load(model, tmp_path / "one").model(x), y)
