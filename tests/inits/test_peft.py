"""Inits from the weight alone, and those that draw, beside PEFT's: s·b·a and the base that is left,
never the factors themselves, whose signs and rotations are free."""

import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import adapterkit
from tests.support import experts, initialized, oracle
from tests.support.initialized import base_of

RANK, ALPHA = 4, 6.0
BUILDS = {"llama": oracle.llama, "gpt2": oracle.gpt2, "t5": oracle.t5}
EXACT = [
    ("llama", "pissa"), ("gpt2", "pissa"), ("t5", "pissa"), ("llama", "olora"), ("t5", "olora"),
    ("llama", "mica"),
]  # fmt: skip


def of_peft(model: nn.Module, method: object, targets, **settings) -> nn.Module:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=method, **settings
    )
    with oracle.quiet():
        return peft.get_peft_model(model, config).base_model.model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def delta(layer) -> Tensor:
    """scale·b@a (out, in) in float64."""
    a, b = (side["default"].weight.double() for side in (layer.lora_A, layer.lora_B))
    return (layer.scaling["default"] * b @ a).detach()


@pytest.mark.parametrize(("kind", "method"), EXACT)
@pytest.mark.parametrize("rslora", [False, True])
def test_parts_and_bases_as_peft(kind, method, rslora, tmp_path):
    model = BUILDS[kind]()
    base, out = tmp_path / "base", tmp_path / "out"
    with oracle.quiet():
        model.save_pretrained(base)
    settings = {"use_rslora": rslora, "fan_in_fan_out": kind == "gpt2"}
    theirs = layers_of(of_peft(model, method, "all-linear", **settings))
    how = {"rank": RANK, "alpha": ALPHA, "rslora": rslora, "targets": "all-linear"}
    adapterkit.init(base, method=method, out=out, **how)
    ours = layers_of(
        initialized.load(type(model), base_of(out, base), out / "adapter").base_model.model
    )
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        weight = layer.base_layer.weight.detach()
        size = float(weight.norm()) + float(delta(layer).norm())
        assert float((delta(ours[name]) - delta(layer)).norm()) <= 2e-5 * size, name
        rest = ours[name].base_layer.weight
        assert float((rest - weight).norm()) <= 2e-5 * size, name
        if method == "mica":  # b's columns span the same minor directions
            spans = [x.lora_B["default"].weight.detach().double() for x in (ours[name], layer)]
            one, other = (b @ b.T for b in spans)
            assert float((one - other).norm()) <= 1e-4, name


def test_olora_where_peft_transposes_wrongly(tmp_path):
    """On GPT-2's Conv1D PEFT decomposes the weight as it is stored: b and a of the wrong shapes."""
    model = oracle.gpt2()
    with oracle.quiet():
        model.save_pretrained(tmp_path / "base")
    with pytest.raises(RuntimeError):
        broken = of_peft(model, "olora", ["c_attn"], fan_in_fan_out=True)
        broken(input_ids=torch.arange(8)[None])
    how = {"rank": RANK, "alpha": ALPHA, "targets": "c_attn"}
    adapterkit.init(tmp_path / "base", method="olora", out=tmp_path / "out", **how)
    key = "transformer.h.0.attn.c_attn"
    weight = oracle.stored(tmp_path / "base")[f"{key}.weight"].T.double()
    q, r = torch.linalg.qr(weight)
    part = initialized.products(tmp_path / "out/adapter")[key]
    assert torch.allclose(part, q[:, :RANK] @ r[:RANK], atol=1e-6)


def test_milora_is_the_minor_part(tmp_path):
    """PEFT has no MiLoRA: beside the paper's equation."""
    oracle.save_base(oracle.llama(), tmp_path / "base", "fp32")
    how = {"rank": RANK, "alpha": ALPHA, "targets": "all-linear"}
    adapterkit.init(tmp_path / "base", method="milora", out=tmp_path / "out", **how)
    for name, part in initialized.products(tmp_path / "out/adapter").items():
        weight = oracle.stored(tmp_path / "base")[f"{name}.weight"].double()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        minor = (u[:, -RANK:] * s[-RANK:]) @ vh[-RANK:]
        assert float((ALPHA / RANK * part - minor).norm()) <= 1e-5 * float(weight.norm()), name


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Layers with enough elements for the distribution of what is drawn."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    oracle.save_base(oracle.llama(**sizes, vocab_size=300), folder, "fp32")
    return folder


DRAWN = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "random": False}


@pytest.mark.parametrize("method", DRAWN)
def test_random_factors_have_the_distribution_of_peft(method, wide, tmp_path):
    """Spread, bounds and shape of each factor, on linear layers and, where PEFT draws so there, on
    embeddings."""
    rank = 16
    targets = ["q_proj", "down_proj"] + ["embed_tokens"] * (method in ("default", "gaussian"))
    cls = type(oracle.llama())
    config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=DRAWN[method])
    torch.manual_seed(0)
    with oracle.quiet():
        wrapped = peft.get_peft_model(initialized.load(cls, wide), config)
    theirs = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    how = {"rank": rank, "targets": ",".join(targets)}
    adapterkit.init(wide, method=method, out=tmp_path / "out", **how)
    ours = oracle.stored(tmp_path / "out/adapter")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        mine = ours[key]
        assert mine.shape == tensor.shape and mine.dtype == tensor.dtype
        if not tensor.any():
            assert not mine.any(), key
            continue
        bound = 6 / math.sqrt(tensor.numel())  # of the relative error of a spread
        assert float(mine.std()) == pytest.approx(float(tensor.std()), rel=bound), key
        assert abs(float(mine.mean())) <= bound * float(tensor.std()), key
        if method in ("default", "random") and "embed" not in key:
            assert float(mine.abs().max()) <= math.sqrt(3) * float(tensor.std()) * (1 + bound)
        # a fourth moment tells a uniform from a normal
        kurtosis = [
            float((x.double() ** 4).mean() / (x.double() ** 2).mean() ** 2) for x in (mine, tensor)
        ]
        assert kurtosis[0] == pytest.approx(kurtosis[1], rel=0.15), key


@pytest.mark.parametrize("method", ["default", "gaussian"])
def test_experts_are_drawn_as_by_peft(method, tmp_path):
    """The bound is of one expert's inputs; each expert has numbers of its own."""
    model = experts.tiny("mixtral")
    with oracle.quiet():
        model.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(
            r=RANK, target_modules=[], target_parameters=["gate_up_proj", "experts.down_proj"],
            init_lora_weights=DRAWN[method],
        )  # fmt: skip
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
    how = {"rank": RANK, "targets": "gate_up_proj,experts.down_proj"}
    adapterkit.init(tmp_path / "base", method=method, out=tmp_path / "out", **how)
    ours = oracle.stored(tmp_path / "out/adapter")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        if not tensor.any():
            assert not ours[key].any()
            continue
        assert float(ours[key].std()) == pytest.approx(float(tensor.std()), rel=0.2), key
        parts = ours[key].unflatten(0, (4, RANK))
        assert not torch.equal(parts[0], parts[1])
