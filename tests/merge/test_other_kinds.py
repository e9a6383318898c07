"""PEFT's LoHa and LoKr into language models: the logits are those of PEFT with the adapter."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from tests.support import oracle

MORE = {"init_weights": False, "task_type": "CAUSAL_LM"}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}
CONFIGS = {
    "loha": peft.LoHaConfig(
        r=3, alpha=5, target_modules=["q_proj", "down_proj", "v_proj"], **PATTERNS, **MORE
    ),
    "lokr": peft.LoKrConfig(
        r=3, alpha=5, target_modules=["k_proj", "up_proj"], decompose_both=True, **MORE
    ),
    "saved": peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **MORE),
}
IDS = torch.arange(12).view(1, 12)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and an adapter of each kind for it."""
    home = tmp_path_factory.mktemp("kinds")
    oracle.save_base(oracle.llama(), home / "base", "fp32")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        peft.get_peft_model(loaded(home / "base"), config).save_pretrained(home / name)
    return home


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_peft(name, home, tmp_path):
    receipt = adapterkit.merge(home / "base", home / name, out=tmp_path / "out", verify=True)
    modules = {"loha": 6, "lokr": 4, "saved": 3}[name]
    assert len(receipt.data["parameters"]) == modules - (name == "saved")
    expected = logits(peft.PeftModel.from_pretrained(loaded(home / "base"), home / name))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, rtol=1e-5, atol=1e-6)
    assert (logits(loaded(home / "base")) - expected).abs().max() > 1e-4
    checked = adapterkit.verify(tmp_path / "out", base=home / "base", adapters=[home / name])
    assert checked["rows"]


def test_several_with_weights_and_out_again(home, tmp_path):
    pairs = {home / "loha": 0.5, home / "lokr": -2.0}
    adapterkit.merge(home / "base", pairs, out=tmp_path / "both")
    model = loaded(home / "base")
    for adapter, weight in pairs.items():
        model = peft.PeftModel.from_pretrained(model, adapter)
        for module in model.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                scaling |= {name: weight * scale for name, scale in scaling.items()}
        model = model.merge_and_unload()
    after, expected = load_file(tmp_path / "both" / "model.safetensors"), model.state_dict()
    for key, value in after.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    back = {adapter: -weight for adapter, weight in pairs.items()}
    adapterkit.merge(tmp_path / "both", back, out=tmp_path / "base")
    before = load_file(home / "base" / "model.safetensors")
    for key, value in load_file(tmp_path / "base" / "model.safetensors").items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6, msg=key)


def test_into_a_quantized_model(home, tmp_path):
    adapterkit.quantize(home / "base", to="w8a16", out=tmp_path / "q8")
    receipt = adapterkit.merge(tmp_path / "q8", home / "loha", out=tmp_path / "out", verify=True)
    assert len(receipt.data["parameters"]) == 6


def test_unsupported_kinds_and_options_are_refused(home, tmp_path):
    with pytest.raises(adapterkit.Refused, match="modules_to_save"):
        adapterkit.merge(home / "base", {home / "saved": 0.5}, out=tmp_path / "out")
    oracle.save_base(oracle.llama(intermediate_size=40), tmp_path / "other", "fp32")
    with pytest.raises(adapterkit.Refused, match="down_proj"):
        adapterkit.merge(tmp_path / "other", home / "loha", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
