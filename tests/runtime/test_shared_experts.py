"""Layers that PEFT takes for stacks of experts by their names: shared experts, dense layers."""

import json
import random

import peft
import pytest
import torch

import adapterkit
from adapterkit import LoraConfig, Refused
from adapterkit.runtime import attach, load
from tests.fuzz import models
from tests.support import live, oracle
from tests.support.beside_peft import shake

KINDS = ("glm4_moe", "qwen3_next")  # with a dense layer; with shared experts only
TAKEN = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    saved = models.save_base(request.param, random.Random(0), folder, tie=False)
    return models.Base(saved.folder, saved.cls, saved.task, "fp32")


def run(model, plain) -> torch.Tensor:
    outputs = models.outputs(model, plain)
    assert outputs is not None
    return outputs["logits"]


CONFIGS = [
    LoraConfig(2, 6, "all-linear", rank_pattern={"up_proj": 3}, init=False),
    LoraConfig(2, 6, r".*\.(down|q)_proj", alpha_pattern={"down_proj": 5}, init="pissa"),
    LoraConfig(2, 6, ["up_proj"], rslora=True, bias="lora_only", modules_to_save=["model.norm"]),
]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("config", CONFIGS, ids=["all", "regex", "list"])
def test_peft_reads_them_as_parameters(config, base, tmp_path):
    """As target modules PEFT drops them, 57 to 98 % of the effect."""
    model = base.load(torch.float32)
    plain = run(model, model)
    adapters = attach(model, config, seed=0)
    shake(adapters.parameters())
    y = run(model, model)
    adapters.save(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    named = [site for site in adapters.state.sites if site.endswith(TAKEN)]
    assert stored["target_parameters"] == sorted(f"{path}.weight" for path in named) and named
    with oracle.quiet():
        theirs = live.peft_of(tmp_path / "out", other := base.load(torch.float32))
    torch.testing.assert_close(run(theirs, other), y, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, plain)
    second = load(base.load(torch.float32), tmp_path / "out")
    torch.testing.assert_close(run(second.model, second.model), y)
    second.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    for key in ("target_parameters", "target_modules", "modules_to_save", "r"):
        assert again[key] == stored[key]
    second.swap("default", tmp_path / "out")
    adapterkit.merge(base.folder, tmp_path / "out", out=tmp_path / "merged")
    with oracle.quiet():
        merged = base.cls.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(run(merged, merged), y, rtol=1e-2, atol=1e-2)


def test_layers_without_a_parameter_are_left_out_or_refused(base, tmp_path):
    """all-linear leaves such layers out and says so; named they are refused."""
    model = base.load(torch.float32)
    with pytest.warns(UserWarning, match="no factors for .*stacks of experts"):
        adapters = attach(model, LoraConfig(2, 4, "all-linear", dora=True))
    assert adapters.state.sites and not [x for x in adapters.state.sites if x.endswith(TAKEN)]
    adapters.save(tmp_path)
    adapters.detach()
    for settings in ({"dora": True}, {"lora_bias": True}):
        with pytest.raises(Refused, match="takes for a stack of experts"):
            attach(model, LoraConfig(2, 4, ["up_proj"], **settings))
    with pytest.warns(UserWarning, match="dropout of .* is not saved"):
        adapters = attach(model, LoraConfig(2, 4, ["up_proj"], dropout=0.1))
    adapters.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0


def test_a_router_stays_a_parameter(tmp_path):
    """A module of that name without a layer's forward."""
    folder = tmp_path / "base"
    base = models.save_base("minimax", random.Random(0), folder, tie=False)
    base = models.Base(folder, base.cls, base.task, "fp32")
    with oracle.quiet():
        theirs = peft.get_peft_model(
            base.load(torch.float32),
            peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
        )
        oracle.perturb(theirs, 0)
        theirs.save_pretrained(tmp_path / "adapter")
    model = base.load(torch.float32)
    adapters = load(model, tmp_path / "adapter")
    assert any(path.endswith("mlp.gate") for path in adapters.state.sites)
    torch.testing.assert_close(run(model, model), run(theirs.eval(), model), rtol=1e-4, atol=1e-5)
