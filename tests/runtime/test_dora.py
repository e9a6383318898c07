"""DoRA on live models: outputs and gradients are PEFT's, the norms come without the dense sum."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterkit.runtime import load


class Nets:
    """Small models with one layer of a kind, and what they are fed."""

    @staticmethod
    def linear():
        return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8, bias=False))

    @staticmethod
    def conv1d():
        return nn.Sequential(Conv1D(20, 24), nn.Tanh(), Conv1D(8, 20))


INPUTS = {"linear": (5, 24), "conv1d": (2, 5, 24)}
NAMES = ["0", "2"]


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = getattr(Nets, kind)()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def shake(parameters, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def by_peft(kind: str, folder, *, name: str = "default", seed: int = 1, **settings):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=NAMES,
        use_dora=True,
        fan_in_fan_out=kind == "conv1d",
        **settings,
    )
    model = peft.get_peft_model(network(kind), config, adapter_name=name)
    shake([p for p in model.parameters() if p.requires_grad], seed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", INPUTS)
def test_outputs_and_gradients_are_pefts(kind, dropout, tmp_path):
    theirs = by_peft(kind, tmp_path, lora_dropout=dropout).train()
    ours = network(kind).train()
    adapters = load(ours, tmp_path, trainable=True)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        x = torch.randn(INPUTS[kind], requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[1], results[0])
    gradients = {
        role: [p.grad for name, p in theirs.named_parameters() if role in name and p.requires_grad]
        for role in ("lora_A", "lora_B", "magnitude")
    }
    own = [part for _, part in adapters.state.adapters["default"].parts()]
    for role, leaf in (("lora_A", "a"), ("lora_B", "b"), ("magnitude", "magnitude")):
        torch.testing.assert_close([getattr(p, leaf).grad for p in own], gradients[role])
