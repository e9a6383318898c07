"""Adapters that cannot be merged: the text of each refusal, and that nothing is written then."""

import json

import pytest
import torch
from safetensors.torch import save_file

from adapterkit.core.errors import AdapterkitError
from tests.support import oracle
from tests.support.oracle import assert_all_rounded, exact, load, merged, peft_model, stored
from tests.support.refusals import refused

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


def test_an_adapter_initialized_with_mica_merges(llama, tmp_path):
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


@pytest.mark.parametrize("flag, match", [
    ({"use_qalora": True}, "14 keys do not fit the base"),
    ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size = 0"),
    ({"use_qalora": True, "use_bdlora": {"nblocks": 2}}, "use_qalora with use_bdlora"),
    ({"use_bdlora": {"nblocks": 2}}, "is in none of the lists of blocks"),
    ({"use_bdlora": {"nblocks": 0}}, "nblocks = 0"),
    ({"use_bdlora": {"nblocks": 2, "speed": 3}}, "unknown setting speed"),
    ({"use_bdlora": {"nblocks": 3, "match_strict": False, "target_modules_bd_a": ["q_proj"]}},
     "rows for each of 3 blocks"),
    ({"use_bdlora": True}, "use_bdlora = True"),
])  # fmt: skip
def test_a_plain_lora_with_the_setting_of_a_variant(flag, match, llama, lora, tmp_path):
    adapter = oracle.edit_config(lora, tmp_path / "adapter", **flag)
    refused(llama, adapter, out=tmp_path / "out", match=match)


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


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING", None, 3])
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
        "14 keys do not fit the base" in text
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


def test_missing_and_misfitting_keys_are_listed_together(cached_folder, tmp_path):
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


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_layer_s_factor_among_those_of_an_embedding_is_refused(part, llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    module = "base_model.model.model.embed_tokens."
    both = {f"{module}lora_embedding_{x}": torch.ones(2, 2) for x in "AB"}
    more = both | {f"{module}{part}.weight": torch.ones(2, 2)}
    save_file(stored(lora) | more, odd / "adapter_model.safetensors")
    refused(llama, odd, out=tmp_path / "out", match="embed_tokens has .*\n.*both factors")


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
    assert f"copy {name} there" in refused(llama, odd, out=tmp_path / "out", match=f"no {name}")


def test_an_adapter_in_a_subfolder(llama, lora, tmp_path):
    """PEFT saves an adapter of another name than `default` in a folder of this name."""
    (tmp_path / "run").mkdir()
    oracle.edit_config(lora, tmp_path / "run/poet")
    assert "poet" in refused(
        llama, tmp_path / "run", out=tmp_path / "out", match="no adapter_config.json"
    )
    oracle.merge(llama, tmp_path / "run/poet", out=tmp_path / "out")


def test_a_pickled_adapter(llama, lora, tmp_path):
    odd = oracle.edit_config(lora, tmp_path / "odd")
    (odd / "adapter_model.safetensors").rename(odd / "adapter_model.bin")
    assert "--to peft --allow-pickle --out converted" in refused(
        llama, odd, out=tmp_path / "out", match="no adapter_model.safetensors"
    )
