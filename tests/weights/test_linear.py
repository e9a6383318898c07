"""What counts as a linear layer: one rule for files, live models and quantization."""

import pytest
import torch
import transformers
from torch import nn

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.core.weights.layers import is_linear
from adapterkit.runtime import collect
from tests.support import tiny
from tests.support.stored import checkpoint, collected


class Twice(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """One that computes the same in its own words."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Inherits(nn.Linear):
    pass


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_is_linear_where_it_computes_the_same(bias):
    expected = {nn.Linear: True, Spelled: True, Inherits: True, Twice: False}
    for cls, linear in expected.items():
        layer = cls(6, 4, bias=bias)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        assert is_linear(layer) is linear, cls
        assert layer.in_features == 6 and layer.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not is_linear(nn.Conv1d(4, 4, 1))


def test_routers_are_none():
    """Llama 4's and PhiMoE's give tuples, DeepSeek-V4's grouped one takes groups."""
    for kind in ("llama4_text", "phimoe", "deepseek_v4"):
        model = tiny.model(kind)
        odd = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not is_linear(module)
        }
        assert odd, kind
        assert all(type(model.get_submodule(name)).__name__ != "Linear" for name in odd)


def test_falcon(tmp_path):
    """Its class is one of its own: files and the live model have the same layers, and no format
    that transformers loads holds them."""
    model = tiny.model("falcon").eval()
    base = checkpoint(model, tmp_path / "base")
    ids = torch.arange(6, 20).view(2, 7)
    live = collect(model, lambda: model(ids))
    stats = collected(base, [{"input_ids": ids}], tmp_path)
    assert live.keys() == stats.keys()
    assert sum("query_key_value" in key for key in live) == model.config.num_hidden_layers
    for to in ("nf4", "w4a16"):
        with pytest.raises(Refused, match="transformers loads no quantized FalconLinear"):
            adapterkit.quantize(tmp_path / "base", out=tmp_path / to, to=to)


@pytest.mark.slow
def test_every_subclass_of_transformers():
    """Those whose forward is their own, as the rule sees them."""
    from transformers.models.dory.modeling_dory import DoryLMHead
    from transformers.models.esm.modeling_esmfold import EsmFoldLinear
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    assert is_linear(FalconLinear(4, 4)) and is_linear(EsmFoldLinear(4, 4))
    config = transformers.AutoConfig.for_model("llama4_text", hidden_size=8, num_local_experts=2)
    assert not is_linear(Llama4Router(config))
    head = DoryLMHead(transformers.AutoConfig.for_model("dory", hidden_size=8, vocab_size=9))
    assert not is_linear(head)
