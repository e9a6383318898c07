"""Inits on a live model: each leaves the model's output as it was, but for `random`."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.registry import members
from adapterkit.runtime import attach, load
from tests.support.live import llama, peft_of, tokens

TARGETS = ["q_proj", "v_proj", "down_proj"]
WITHOUT_STATISTICS = [n for n, init in members("inits").items() if set(init.needs) <= {"weight"}]
INITS = {name: name for name in WITHOUT_STATISTICS} | {
    "random": False,
    "pissa_niter_4": "pissa_niter_4",
}


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return llama()(tokens()).logits.detach()


@pytest.mark.parametrize("name", INITS)
def test_output_and_base(name: str, expected, tmp_path):
    """The delta is zero at the start, the base's weights are never touched, a step changes the
    output, and the saved adapter works on the original base in PEFT."""
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = LoraConfig(4, 6, TARGETS, init=INITS[name], rank_pattern={"v_proj": 2})
    adapters = attach(model, config, seed=3)
    start = model(tokens()).logits
    changed = (start - expected).abs().max() > 1e-3
    assert bool(changed) == (name == "random")
    optimizer = torch.optim.SGD(adapters.parameters(), lr=50.0)
    start.square().mean().backward()
    optimizer.step()
    trained = model(tokens()).logits
    assert (trained - start).abs().max() > 1e-4
    adapters.save(tmp_path / "saved")
    theirs = peft_of(tmp_path / "saved", llama())
    torch.testing.assert_close(theirs(tokens()).logits, trained, rtol=1e-4, atol=1e-5)
    again = load(llama(), tmp_path / "saved")
    torch.testing.assert_close(again.model(tokens()).logits, trained, rtol=1e-4, atol=1e-5)
    adapters.detach()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["pissa", "olora", "mica", "orthogonal"])
def test_factors_are_pefts(name: str, tmp_path):
    """Products of the factors, which leave the signs of singular vectors open."""
    ours = attach(llama(), LoraConfig(4, 6, ["q_proj"], init=name), seed=3)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=name, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(), config)
    for path, module in theirs.named_modules():
        if not isinstance(module, peft.tuners.lora.Linear):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        part = ours.state.sites[path.removeprefix("base_model.model.")].patches["default"]["delta"]
        if name == "orthogonal":
            assert (part.b @ part.a).abs().max() < 1e-6 < part.a.abs().max()
            torch.testing.assert_close(part.a.norm(), a.norm(), rtol=0.3, atol=0)
        elif name == "mica":
            torch.testing.assert_close(part.b @ part.b.T, b @ b.T, rtol=1e-3, atol=1e-5)
            assert not part.a.any() and not part.b.requires_grad and part.a.requires_grad
        else:
            torch.testing.assert_close(part.b @ part.a, b @ a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_trained_by_peft_and_not_converted(name: str, tmp_path):
    """PEFT changes its base again when it loads such an adapter; here the base stays."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=name, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=50.0)
    theirs(input_ids=tokens()).logits.square().mean().backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    adapters = load(llama(), tmp_path / "theirs")
    ours = adapters.model(tokens()).logits
    torch.testing.assert_close(ours, theirs(input_ids=tokens()).logits, rtol=1e-3, atol=1e-4)


def test_the_seed_determines_the_factors():
    one, other, third = (
        attach(llama(), LoraConfig(4, 8, TARGETS), seed=seed) for seed in (1, 1, 2)
    )
    pairs = list(zip(one.parameters(), other.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_same_records_as_offline(tmp_path):
    """`adapterkit init` and the live init give the same factors."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapterkit.init(
        tmp_path / "base", method="pissa", rank=4, targets="q_proj", out=tmp_path / "out"
    )
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    adapters = attach(model, LoraConfig(4, 4, ["q_proj"], init="pissa"))
    for path, site in adapters.state.sites.items():
        part = site.patches["default"]["delta"]
        product = [stored[f"base_model.model.{path}.lora_{x}.weight"] for x in "BA"]
        torch.testing.assert_close(part.b @ part.a, product[0] @ product[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "eva"}, "init eva"),
        ({"init": "loftq"}, "init loftq"),
        ({"init": "orthogonal", "rank": 3}, "an even rank"),
        ({"init": "pissa", "rank": 64}, "rank 64 for"),
        ({"init": "pissa", "invocation_tokens": [1]}, "activated LoRA"),
    ],
)
def test_invalid_inits_are_refused_and_leave_the_model(settings: dict, message: str, expected):
    model = llama()
    with pytest.raises(AdapterkitError, match=message):
        attach(model, LoraConfig(**{"targets": TARGETS} | settings))
    assert torch.equal(model(tokens()).logits, expected)
    assert all(p.requires_grad for p in model.parameters())
