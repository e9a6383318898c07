"""Modules, bases and values that cannot be merged, and that nothing is written then."""

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Damaged, Failed
from adapterkit.core.weights import skeleton
from tests.support import oracle
from tests.support.oracle import load, stored
from tests.support.refusals import refused

# -- modules ---------------------------------------------------------------------------------------


def test_grouped_convolutions_are_refused(tmp_path):
    """PEFT cannot merge these either (peft.md 1.21)."""
    model = torch.nn.Sequential()
    model.conv, model.fit = torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.Linear(8, 8)
    (tmp_path / "base").mkdir()
    oracle.save_base(model, tmp_path / "base", "fp32")
    oracle.train(model, tmp_path / "adapter", target_modules=["conv", "fit"])
    text = refused(
        tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out", match="a grouped convolution"
    )
    assert "--exclude" in text and "conv" in text
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out", exclude="conv")


@pytest.mark.parametrize("groups", [2, 8])
def test_depthwise_convolutions_of_a_known_model(groups, tmp_path):
    model = torch.nn.Sequential()
    model.conv = torch.nn.Conv1d(8, 8, 3, groups=groups)
    (tmp_path / "base").mkdir()
    oracle.save_base(model, tmp_path / "base", "fp32")
    oracle.train(model, tmp_path / "adapter", target_modules=["conv"], r=8)
    refused(
        tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out", match="a grouped convolution"
    )


def test_lora_bias_on_a_module_without_bias(llama, tmp_path):
    """PEFT raises in the merge; here nothing is read before."""
    oracle.train(
        load(oracle.llama, llama), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True
    )
    refused(
        llama,
        tmp_path / "adapter",
        out=tmp_path / "out",
        match=r"a bias for .*q_proj, which has none",
    )


# -- bases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "consolidated.00.pth"])
def test_pickled_bases_are_refused(name, llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    (base / "model.safetensors").rename(base / name)
    text = refused(base, lora, out=tmp_path / "out", match="the weights are pickles")
    assert name in text and "save_pretrained" in text


def damaged(base, out, damage, **config):
    """A copy of a base with its tensors by `damage`."""
    oracle.edit_config(base, out, **config)
    save_file(damage(stored(base)), out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_base_that_lacks_a_weight_or_a_layer(llama, lora, tmp_path):
    """Whether transformers is needed for the adapter's names or not."""
    lost = "model.layers.1.input_layernorm.weight"
    drop = lambda tensors: {k: v for k, v in tensors.items() if k != lost}
    base = damaged(llama, tmp_path / "one", drop)
    with pytest.raises(Damaged, match=f"1 of 21 parameters of LlamaForCausalLM .*{lost}"):
        adapterkit.merge(base, [lora], out=tmp_path / "out")
    more = oracle.edit_config(llama, tmp_path / "more", num_hidden_layers=3)
    with pytest.raises(Damaged, match="9 of 30 parameters"):
        adapterkit.merge(more, [lora], out=tmp_path / "out")
    with pytest.raises(Damaged, match="1 of 21 parameters"):
        adapterkit.quantize(base, to="int8", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_head_or_a_norm_is_noted(llama, lora, tmp_path):
    """A model may lack a head on purpose; what is made of it lacks it too."""
    for lost in ("lm_head.weight", "model.norm.weight"):
        drop = lambda tensors, lost=lost: {k: v for k, v in tensors.items() if k != lost}
        base = damaged(llama, tmp_path / lost, drop)
        plan = adapterkit.merge(base, [lora], out=tmp_path / "out", dry_run=True)
        (note,) = plan.warnings
        assert f"LlamaForCausalLM are not stored: {lost}" in note


def test_a_sound_plain_base_is_not_built_for_that(llama, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(skeleton, "_built", lambda *_: pytest.fail("transformers was asked"))
    adapterkit.merge(llama, [lora], out=tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_bases_that_declare_quantization_are_refused(method, llama, lora, tmp_path):
    base = oracle.edit_config(
        llama, tmp_path / "base", quantization_config={"quant_method": method}
    )
    assert method in refused(base, lora, out=tmp_path / "out", match="this base is quantized")


@pytest.mark.parametrize(
    "suffix", ["weight.absmax", "weight_scale_inv", "qweight", "weight_packed"]
)
def test_bases_with_scales_next_to_the_weights_are_refused(suffix, llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    extra = {f"model.layers.0.self_attn.q_proj.{suffix}": torch.ones(4)}
    save_file(stored(llama) | extra, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="this base is quantized")


def test_a_scale_next_to_float_weights_is_refused(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    save_file(
        stored(llama) | {"model.layers.0.self_attn.q_proj.SCB": torch.ones(4)},
        base / "model.safetensors",
    )
    with pytest.raises(Damaged, match="I8 rows"):
        oracle.merge(base, lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float8_weights_without_scales_are_refused(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = stored(llama)
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="F8_E4M3")


def test_integer_weights_are_refused(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = stored(llama)
    save_file(tensors | {key: tensors[key].to(torch.int8)}, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="a float weight")


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_a_merged_value_beyond_the_dtype_is_an_error(dtype, tmp_path):
    """A merged value beyond the dtype's range is an error that names the tensor, with and without
    --dtype."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    model = torch.nn.Sequential()
    model.fit, model.other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    model.fit.weight.data.fill_(6e4)
    oracle.save_base(model, base, "fp32" if dtype else "fp16")
    oracle.train(model.float(), adapter, target_modules=["fit"], size=40)
    with pytest.raises(Failed, match=r"fit\.weight.*overflows in F16") as caught:
        oracle.merge(base, adapter, out=tmp_path / "out", dtype=dtype)
    assert "--dtype" in str(caught.value) and not (tmp_path / "out").exists()
    oracle.merge(base, adapter, out=tmp_path / "wide", dtype="bf16")


def test_overflow_of_an_untouched_tensor_in_a_cast(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    tensors = stored(llama)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(Failed, match=r"model\.norm\.weight"):
        oracle.merge(base, lora, out=tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite(value, part, llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    tensors, key = stored(lora), f"base_model.model.model.layers.1.mlp.up_proj.{part}.weight"
    tensors[key][0, 0] = value
    save_file(tensors, odd / "adapter_model.safetensors")
    with pytest.raises(AdapterkitError, match=r"not finite") as caught:
        oracle.merge(llama, odd, out=tmp_path / "out")
    assert "layers.1.mlp.up_proj" in str(caught.value) and not (tmp_path / "out").exists()
