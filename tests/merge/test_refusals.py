"""What is refused, in which words, and that nothing is written then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.errors import AdapterkitError, Damaged, Failed, Refused
from tests.support import oracle
from tests.support.oracle import assert_all_rounded, exact, load, merged, peft_model, stored


def refused(base, *adapters, out, match, kind=Refused, **options):
    """The refusal's text; its four parts are there, and nothing was written."""
    with pytest.raises(kind, match=match) as caught:
        oracle.merge(base, *adapters, out=out, **options)
    assert not out.exists() and not [
        f for f in out.parent.iterdir() if out.name in f.name and f != out
    ]
    text = str(caught.value)
    assert "expected: " in text or isinstance(caught.value, Failed), text
    return text


# -- what an adapter's config says -----------------------------------------------------------------

CHANGED = ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"]


@pytest.mark.parametrize("init", CHANGED)
def test_an_init_that_changed_the_base(init, llama, lora, tmp_path):
    """Refused with the ways out; with --base-is-residual the base is taken as the changed one."""
    adapter = oracle.edit_config(lora, tmp_path / "adapter", init_lora_weights=init)
    text = refused(llama, adapter, out=tmp_path / "out", match=init)
    assert (
        "--base-is-residual" in text
        and "rebase" in text
        and "path_initial_model_for_weight_conversion" in text
    )
    oracle.merge(llama, adapter, out=tmp_path / "out", base_is_residual=True)
    oracle.merge(llama, lora, out=tmp_path / "plain")
    oracle.assert_same(stored(tmp_path / "out"), stored(tmp_path / "plain"))


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "orthogonal", "eva", "mica", "default"]
)
def test_an_init_that_did_not(init, llama, lora, tmp_path):
    adapter = oracle.edit_config(lora, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": init}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    oracle.merge(llama, adapter, out=tmp_path / "out")
    oracle.merge(llama, lora, out=tmp_path / "plain")
    oracle.assert_same(stored(tmp_path / "out"), stored(tmp_path / "plain"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_residual_base_of_a_real_init(init, llama, tmp_path):
    """PEFT's own init, trained, its changed base saved: merging onto that base gives what the model
    computes."""
    model = load(oracle.llama, llama).float()
    config = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": init, "lora_alpha": 4}
    with oracle.quiet():
        wrapped = oracle.peft.get_peft_model(model, oracle.peft.LoraConfig(r=4, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(
                    0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        right = wrapped.eval()(tokens).logits
    with oracle.quiet():
        wrapped.unload().save_pretrained(tmp_path / "residual")
    refused(llama, tmp_path / "adapter", out=tmp_path / "out", match=init)
    oracle.merge(
        tmp_path / "residual", tmp_path / "adapter", out=tmp_path / "out", base_is_residual=True
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            load(oracle.llama, tmp_path / "out")(tokens).logits, right, rtol=1e-4, atol=1e-5
        )


FLAGS = {
    "alora": {"alora_invocation_tokens": [1, 2]},
    "arrow": {"arrow_config": {"top_k": 2}},
    "kasa": {"kasa_config": {"beta": 1e-4}},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "megatron": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "unknown": {"use_rotation_of_2027": True},
    "unknown-table": {"quantum_config": {"depth": 3}},
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_mean_other_arithmetic(name, llama, lora, tmp_path):
    adapter = oracle.edit_config(lora, tmp_path / "adapter", **FLAGS[name])
    assert next(iter(FLAGS[name])) in refused(
        llama, adapter, out=tmp_path / "out", match="is set|unknown setting"
    )


def test_adapters_of_real_variants(llama, tmp_path):
    """KaSA's and aLoRA's own files, made by PEFT, are refused by name."""
    from peft import LoraConfig

    for name, config in {
        "alora": {"alora_invocation_tokens": [1, 2]},
        "kasa": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    }.items():
        if name == "kasa":
            from peft.tuners.lora.config import KasaConfig

            config = {"kasa_config": KasaConfig()}
        with oracle.quiet():
            wrapped = oracle.peft.get_peft_model(
                load(oracle.llama, llama), LoraConfig(r=4, target_modules=["q_proj"], **config)
            )
            wrapped.save_pretrained(tmp_path / name)
        refused(llama, tmp_path / name, out=tmp_path / "out", match=next(iter(config)))


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_settings_that_are_off_change_nothing(value, llama, lora, tmp_path):
    adapter = oracle.edit_config(lora, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rotation_of_2027": value}))
    oracle.merge(llama, adapter, out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "ADALORA", "PREFIX_TUNING", None, 3])
def test_other_kinds_of_adapters(kind, llama, lora, tmp_path):
    adapter = oracle.edit_config(lora, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    refused(llama, adapter, out=tmp_path / "out", match="peft_type")


# -- an adapter that does not belong to the base ---------------------------------------------------


def test_an_adapter_of_another_model(lora, cached_folder, tmp_path):
    base = cached_folder(
        "base-neox-bf16", lambda folder: oracle.save_base(oracle.neox(), folder, "bf16")
    )
    text = refused(base, lora, out=tmp_path / "out", match="the base has no")
    assert (
        "14 of one kind" in text
        and text.count("the base has no") == 3
        and "trained on this base" in text
    )


def test_all_offenders_are_listed(llama, lora, tmp_path):
    """A matching file but for three keys: all three are in the message, and the good ones are not
    merged."""
    odd = oracle.edit_config(lora, tmp_path / "odd")
    swap = {
        "layers.0.self_attn.q_proj": "layers.7.self_attn.q_proj",
        "layers.1.mlp.up_proj": "layers.1.mlp.upp_proj",
    }
    tensors = {}
    for key, tensor in stored(lora).items():
        for old, new in swap.items():
            key = key.replace(old, new)
        tensors[key] = (
            tensor[:, :-1].contiguous() if "layers.0.self_attn.v_proj.lora_A" in key else tensor
        )
    save_file(tensors, odd / "adapter_model.safetensors")
    text = refused(llama, odd, out=tmp_path / "out", match="problems found")
    assert all(
        word in text
        for word in ("layers.7.self_attn.q_proj", "upp_proj", "layers.0.self_attn.v_proj", "shape")
    )


def test_what_a_file_lacks_is_listed_with_what_does_not_fit(cached_folder, tmp_path):
    """One look: a bias that the file lacks, a factor and a bias of the wrong shape, another file's
    foreign key, a missing base."""
    build = lambda: oracle.llama(attention_bias=True)
    base = cached_folder("biased-llama", lambda folder: oracle.save_base(build(), folder, "bf16"))
    for name in ("one", "two"):
        oracle.train(
            load(build, base), tmp_path / name, target_modules=["q_proj", "k_proj"], lora_bias=True
        )
    layer = "base_model.model.model.layers.0.self_attn."
    tensors = stored(tmp_path / "one")
    del tensors[layer + "k_proj.lora_B.bias"]
    for key in (layer + "q_proj.lora_A.weight", layer + "q_proj.lora_B.bias"):
        tensors[key] = tensors[key][..., :-1].contiguous()
    save_file(tensors, tmp_path / "one/adapter_model.safetensors")
    others = {
        key.replace("layers.1", "layers.9"): tensor
        for key, tensor in stored(tmp_path / "two").items()
    }
    save_file(others, tmp_path / "two/adapter_model.safetensors")
    text = refused(
        base, tmp_path / "one", tmp_path / "two", out=tmp_path / "out", match="problems found"
    )
    named = (
        "lora_bias, but none for",
        "q_proj.lora_A.weight: shape",
        "q_proj.lora_B.bias: shape",
        "layers.9.self_attn.q_proj",
    )
    assert all(word in text for word in named), text
    (tmp_path / "empty").mkdir()
    text = refused(
        tmp_path / "empty",
        tmp_path / "one",
        out=tmp_path / "out",
        match="problems found",
        kind=AdapterkitError,
    )
    assert "lora_bias, but none for" in text and "empty" in text


def test_a_match_by_suffix_alone(llama, lora, tmp_path):
    """Keys of another wrapping whose ends occur in the base: PEFT would apply nothing and say
    nothing."""
    odd = oracle.edit_config(lora, tmp_path / "odd")
    save_file(
        {k.replace("model.layers", "decoder.layers"): v for k, v in stored(lora).items()},
        odd / "adapter_model.safetensors",
    )
    refused(llama, odd, out=tmp_path / "out", match="the base has no")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_a_pair(part, llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"
    save_file(
        {k: v for k, v in stored(lora).items() if k != key}, odd / "adapter_model.safetensors"
    )
    refused(llama, odd, out=tmp_path / "out", match="expected: both factors")


def test_empty_factors_of_a_broken_save(llama, lora, tmp_path):
    """ZeRO-3 and FSDP saves without gathering leave empty tensors."""
    odd = oracle.edit_config(lora, tmp_path / "odd")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(
        {k: torch.empty(0) if k == key else v for k, v in stored(lora).items()},
        odd / "adapter_model.safetensors",
    )
    assert "gather" in refused(llama, odd, out=tmp_path / "out", match="expected: matrices")


def test_a_key_of_no_known_kind(llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    extra = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magic": torch.ones(3)}
    save_file(stored(lora) | extra, odd / "adapter_model.safetensors")
    assert "lora_magic" in refused(
        llama, odd, out=tmp_path / "out", match="another kind of adapter"
    )


def test_a_tensor_that_nothing_speaks_of(llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    extra = {"base_model.model.model.norm.weight": torch.ones(32)}
    save_file(stored(lora) | extra, odd / "adapter_model.safetensors")
    refused(llama, odd, out=tmp_path / "out", match="model.norm.weight")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing(name, llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    (odd / name).unlink()
    refused(llama, odd, out=tmp_path / "out", match=f"no {name}")


def test_an_adapter_in_a_subfolder(llama, lora, tmp_path):
    """PEFT saves an adapter of another name than `default` in a folder of that name."""
    (tmp_path / "run").mkdir()
    oracle.edit_config(lora, tmp_path / "run/poet")
    assert "poet" in refused(
        llama, tmp_path / "run", out=tmp_path / "out", match="no adapter_config.json"
    )
    oracle.merge(llama, tmp_path / "run/poet", out=tmp_path / "out")


def test_a_pickled_adapter(llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    (odd / "adapter_model.safetensors").rename(odd / "adapter_model.bin")
    assert "save_pretrained" in refused(
        llama, odd, out=tmp_path / "out", match="no adapter_model.safetensors"
    )


# -- modules ---------------------------------------------------------------------------------------


def test_grouped_convolutions(tmp_path):
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
def test_pickled_bases(name, llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    (base / "model.safetensors").rename(base / name)
    text = refused(base, lora, out=tmp_path / "out", match="weights as pickles")
    assert name in text and "save_pretrained" in text


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_bases_whose_config_says_quantized(method, llama, lora, tmp_path):
    base = oracle.edit_config(
        llama, tmp_path / "base", quantization_config={"quant_method": method}
    )
    assert method in refused(base, lora, out=tmp_path / "out", match="a quantized base")


@pytest.mark.parametrize(
    "suffix", ["weight.absmax", "weight_scale_inv", "qweight", "weight_packed"]
)
def test_bases_with_scales_beside_the_weights(suffix, llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    extra = {f"model.layers.0.self_attn.q_proj.{suffix}": torch.ones(4)}
    save_file(stored(llama) | extra, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="a quantized base")


def test_a_scale_beside_floats(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    save_file(
        stored(llama) | {"model.layers.0.self_attn.q_proj.SCB": torch.ones(4)},
        base / "model.safetensors",
    )
    with pytest.raises(Damaged, match="I8 rows"):
        oracle.merge(base, lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float8_bases(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = stored(llama)
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="F8_E4M3")


def test_integer_weights(llama, lora, tmp_path):
    base = oracle.edit_config(llama, tmp_path / "base")
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = stored(llama)
    save_file(tensors | {key: tensors[key].to(torch.int8)}, base / "model.safetensors")
    refused(base, lora, out=tmp_path / "out", match="a float weight")


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_overflow(dtype, tmp_path):
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


# -- options and outputs ---------------------------------------------------------------------------

OPTIONS = {
    "tied": {"tied": "loose"},
    "compat": {"compat": "mergekit"},
    "dtype": {"dtype": "float8"},
    "include": {"include": "(q_proj"},
    "exclude": {"exclude": "*"},
    "max_shard_size": {"max_shard_size": "5 potatoes"},
    "tokenizer": {"tokenizer": "adapter"},
    "engine": {"engine": "abacus"},
    "device": {"device": "abacus"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, llama, lora, tmp_path):
    text = refused(llama, lora, out=tmp_path / "out", match=None, **OPTIONS[name])
    assert OPTIONS[name][name] in text and "--" + name.replace("_", "-") in text


def test_no_adapter(llama, tmp_path):
    refused(llama, out=tmp_path / "out", match="no adapter")


@pytest.mark.parametrize("weight", ["nan", "inf", "heavy", ""])
def test_weights_that_are_no_numbers(weight, llama, lora, tmp_path):
    refused(llama, f"{lora}={weight}", out=tmp_path / "out", match="is no weight")


def test_a_path_that_is_not_there(llama, lora, tmp_path):
    refused(tmp_path / "nowhere", lora, out=tmp_path / "out", match="no such path")
    refused(llama, tmp_path / "nowhere", out=tmp_path / "out", match="no such path")


def test_output_in_the_way(llama, lora, tmp_path):
    """A folder that holds something is left alone; --overwrite replaces an older output of
    adapterkit only."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(Refused):
        oracle.merge(llama, lora, out=out)
    with pytest.raises(Refused):
        oracle.merge(llama, lora, out=out, overwrite=True)
    assert [f.name for f in out.iterdir()] == ["diary.txt"] and (
        out / "diary.txt"
    ).read_text() == "mine"


@pytest.mark.parametrize("where", ["base", "adapter", "inside", "around"])
def test_output_that_is_an_input(where, llama, lora, tmp_path):
    base, adapter = (
        oracle.edit_config(llama, tmp_path / "all/base"),
        oracle.edit_config(lora, tmp_path / "all/adapter"),
    )
    out = {"base": base, "adapter": adapter, "inside": base / "new", "around": tmp_path / "all"}[
        where
    ]
    before = stored(base) | stored(adapter)
    for overwrite in (False, True):
        with pytest.raises(Refused):
            oracle.merge(base, adapter, out=out, overwrite=overwrite)
    oracle.assert_same(stored(base) | stored(adapter), before)


def test_base_model_name_is_neither_followed_nor_copied(llama, lora, tmp_path):
    adapter = oracle.edit_config(
        lora, tmp_path / "adapter", base_model_name_or_path="/home/somebody/secret/model"
    )
    oracle.merge(llama, adapter, out=tmp_path / "out")
    assert all(b"somebody" not in f.read_bytes() for f in (tmp_path / "out").iterdir())


def test_the_verbs_are_importable():
    from adapterkit import merge, verify

    assert merge is adapterkit.merge and verify.__name__ == "verify"


def test_mica(llama, tmp_path):
    """mica's base is unchanged: it merges."""
    oracle.train(
        load(oracle.llama, llama),
        tmp_path / "adapter",
        target_modules=["q_proj"],
        init_lora_weights="mica",
    )
    oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out")
    expected = exact(peft_model(load(oracle.llama, llama), tmp_path / "adapter"))
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama), expected, load(oracle.llama, llama).state_dict()
    )


# -- whose file it is ------------------------------------------------------------------------------


@pytest.fixture
def runs(llama, lora, tmp_path, monkeypatch):
    """Adapters in folders of one name, each with another thing wrong with its files."""
    monkeypatch.chdir(tmp_path)
    for name in ("cut", "json", "unknown", "key", "nan", "good", "other"):
        oracle.edit_config(lora, tmp_path / name / "ckpt")
    weights = lambda name: tmp_path / name / "ckpt/adapter_model.safetensors"
    weights("cut").write_bytes(weights("good").read_bytes()[:-8])
    (tmp_path / "json/ckpt/adapter_config.json").write_text("{")
    oracle.edit_config(lora, tmp_path / "new", brand_new=5)
    (tmp_path / "new/adapter_config.json").replace(tmp_path / "unknown/ckpt/adapter_config.json")
    tensors = stored(lora)
    save_file(tensors | {"x.lora_Q": torch.ones(1)}, weights("key"))
    save_file(
        {key: torch.full_like(value, float("nan")) for key, value in tensors.items()},
        weights("nan"),
    )
    odd = {key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}
    save_file(odd, weights("other"))
    return ["cut", "json", "unknown", "key"]


@pytest.mark.parametrize(
    "how", [lambda text: text, lambda text: f"./{text}", lambda text: str(Path(text).absolute())]
)
def test_a_bad_file_s_message_says_whose_it_is_as_its_user_calls_it(how, runs, llama):
    sources = [how(f"{name}/ckpt") for name in ["good", *runs]]
    for verb, options in (("merge", {}), ("combine", {"method": "linear"}), ("arrow", {})):
        arguments = [llama, sources] if verb == "merge" else [sources]
        with pytest.raises(AdapterkitError) as caught:
            getattr(adapterkit, verb)(*arguments, out="out", **options)
        lines = [
            line.removeprefix("- ") for line in str(caught.value).splitlines() if "ckpt" in line
        ]
        files = (
            "adapter_model.safetensors",
            "adapter_config.json",
            "adapter_config.json",
            "adapter_model.safetensors",
        )
        assert len(lines) == 4, lines
        for line, source, file in zip(lines, sources[1:], files, strict=True):
            assert line.startswith(f"{source}/{file}: "), line
    for name, where in (("nan", "/adapter_model.safetensors: "), ("other", ": ")):
        with pytest.raises(AdapterkitError) as caught:
            adapterkit.merge(llama, [how("good/ckpt"), how(f"{name}/ckpt")], out="out2")
        assert how(f"{name}/ckpt") + where in str(caught.value) and how("good/ckpt") not in str(
            caught.value
        )


def test_a_path_stands_in_messages_only(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "out")
    assert all(str(tmp_path).encode() not in f.read_bytes() and str(lora).encode() not in f.read_bytes()
               for f in (tmp_path / "out").iterdir())  # fmt: skip
