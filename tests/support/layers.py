"""A net around each kind of layer, with adapters whose factors are all random."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from unittest import mock

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from adapterkit import LoraConfig
from adapterkit.runtime import Adapters, attach
from tests.support.beside_peft import shake

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
        return model(self.input(model.head.weight.dtype))

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
        "conv", lambda: nn.Conv2d(4, 6, 3, groups=2), 6, values(2, 4, 6, 7), points, mergeable=False
    ),
    "dilation": Case(
        "conv", lambda: nn.Conv2d(3, 6, 3, dilation=2), 6, values(2, 3, 6, 7), points, peft=False
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
        "attention", attention(bias=False), 8, values(2, 4, 8), attend(key_padding_mask=PADDING)
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

CONFIG = LoraConfig(2, 3, TARGETS, init=False)
# what PEFT says about layers that it adapts
WARNINGS = [
    "ignore::peft.utils.warning.PeftWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:LoRA adapter added to ConvNd layer with groups:UserWarning",
]


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
        for part in getattr(net, path).adapterkit.patches[name].values():
            a, b = part.a.detach().double(), part.b.detach().double()
            delta = part.scale * (b.flatten(1) @ a.flatten(1))
            leaf = {"weight": "in_proj_weight", "weight:out_proj": "out_proj.weight"}.get(part.role)
            leaf = f"{path}.{leaf or 'weight'}"
            if kind in ("conv1d", "embedding"):
                delta = delta.T
            sums[leaf] = delta.reshape(net.state_dict()[leaf].shape)
            if part.bias is not None:
                sums[f"{path}.{part.host_bias}"] = part.scale * part.bias.detach().double()
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
