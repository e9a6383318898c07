"""Intruder dimensions: `inspect --intruders` counts PEFT's, `resize --drop-intruders` removes them
as PEFT's `reduce_intruder_dimension` does (arXiv:2410.21228)."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle

RANK = 4


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (oracle.llama, ["q_proj", "v_proj", "down_proj", "embed_tokens"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),  # some c_proj are square, and all are stored (in, out)
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory) -> tuple[Path, Path, nn.Module]:
    """A base in float32, an adapter, and PEFT's model of both in float64."""
    make, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make().float()
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    flat = request.param == "gpt2"
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=targets, fan_in_fan_out=flat)
    model = get_peft_model(model.double(), config)
    for name, value in model.named_parameters():
        if "lora_" in name:  # some large, some small
            with torch.no_grad():
                value.copy_(
                    torch.randn(value.shape) * (0.02 if "s.1." in name or "h.1." in name else 0.3)
                )
    model.float().save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter", model.double()


def counted(model: nn.Module) -> dict[str, int]:
    """The modules' intruders that PEFT reports while it reduces them."""
    lines: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=0.75, logging_sink=lines.append)
    found = (line.split(": ", 1) for line in lines if ": " in line)
    counts = {
        name.removeprefix("base_model.model."): int(text.rpartition(" ")[2])
        if text.startswith("Intruders")
        else 0
        for name, text in found
    }
    return counts


def test_counts_and_reduced_deltas_equal_peft_s(case, tmp_path: Path) -> None:
    base, adapter, model = case
    model = copy.deepcopy(model)
    expected = counted(model)
    result = adapterkit.inspect(adapter, base=base, intruders=True)
    assert {m["module"]: m["intruders"] for m in result["modules"]} == expected
    assert 0 < sum(map(bool, expected.values())) < len(expected)

    out = tmp_path / "out"
    adapterkit.resize(adapter, base=base, drop_intruders=0.25, rank=RANK, out=out)
    ours = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), out)
    theirs = dict(model.named_modules())
    for name, module in ours.named_modules():
        if hasattr(module, "get_delta_weight"):
            want = theirs[name].get_delta_weight("intruder_reduced")
            is_changed = bool(expected[name.removeprefix("base_model.model.")])
            if is_changed and (module.fan_in_fan_out or "embed" in name):
                want = want.T  # PEFT stores the new a and b of these exchanged
            assert (module.get_delta_weight("default") - want).norm() <= 1e-5 * want.norm(), name


def test_a_planted_direction_is_an_intruder_and_is_removed(tmp_path: Path) -> None:
    model = oracle.llama().double()
    for layer in model.model.layers:  # one direction of outputs that the base does not use
        q = layer.self_attn.q_proj.weight
        q.data = torch.linalg.qr(torch.randn(q.shape, dtype=q.dtype))[0] @ torch.diag(
            torch.linspace(1, 0.1, q.shape[1], dtype=q.dtype)
        )
    oracle.save_base(model, tmp_path / "base", "fp32")
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():  # equal parts of all left singular vectors
                value.copy_(torch.ones(value.shape))
    model.float().save_pretrained(tmp_path / "adapter")
    how = {"base": tmp_path / "base"}
    seen = adapterkit.inspect(tmp_path / "adapter", intruders=True, **how)["modules"]
    assert [module["intruders"] for module in seen] == [1, 1]
    adapterkit.resize(tmp_path / "adapter", drop_intruders=1.0, rank=2, out=tmp_path / "out", **how)
    after = adapterkit.inspect(tmp_path / "out", intruders=True, **how)["modules"]
    assert [module["intruders"] for module in after] == [0, 0]


def test_dora_is_refused_with_the_command_that_makes_it_plain(tmp_path: Path) -> None:
    oracle.save_base(oracle.llama(), tmp_path / "base", "fp32")
    oracle.train(oracle.llama(), tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(Refused, match="--drop-intruders with DoRA"):
        adapterkit.resize(
            tmp_path / "dora", base=tmp_path / "base", drop_intruders=0.5, rank=4,
            out=tmp_path / "out",
        )  # fmt: skip
