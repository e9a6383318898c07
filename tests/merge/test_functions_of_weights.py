"""PEFT's types whose deltas depend on the base's weights: each merged as PEFT merges it."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit
from adapterkit.adapters.kinds.merging import merged_by_rows
from tests.support import oracle
from tests.support.kinds import Net, net

LAYERS = ["q_proj", "v_proj", "down_proj"]  # (32, 32), (16, 32), (32, 48)
MODELS = {"llama": oracle.llama, "tied_llama": oracle.tied_llama, "gpt2": oracle.gpt2}


def both(config, targets, **options):
    return config(target_modules=targets, task_type="CAUSAL_LM", **options)


LLAMA = {
    "oft": both(peft.OFTConfig, LAYERS, oft_block_size=8, use_cayley_neumann=False),
    "oft-neumann-terms": both(peft.OFTConfig, LAYERS, oft_block_size=4, num_cayley_neumann_terms=4),
    "oft-shared": both(peft.OFTConfig, LAYERS, oft_block_size=16, block_share=True),
    "oft-limited": both(peft.OFTConfig, LAYERS, r=4, oft_block_size=0, coft=True, eps=0.2),
    "oft-of-embeddings": both(peft.OFTConfig, ["embed_tokens", "k_proj"], oft_block_size=8),
    "boft-sizes": both(peft.BOFTConfig, LAYERS, boft_block_size=4),
    "boft-numbers": both(peft.BOFTConfig, LAYERS, boft_block_size=0, boft_block_num=8),
    "hra": both(peft.HRAConfig, LAYERS, r=5),
    "hra-orthogonal": both(peft.HRAConfig, LAYERS, r=5, apply_GS=True),
    "hira": both(peft.HiraConfig, LAYERS, r=3),
    "hira-of-embeddings": both(peft.HiraConfig, ["embed_tokens", "o_proj"], r=3),
    "ia3": both(peft.IA3Config, LAYERS, feedforward_modules=[]),
    "ia3-feedforward": both(peft.IA3Config, LAYERS, feedforward_modules=["down_proj", "v_proj"]),
    "ia3-by-an-expression": both(
        peft.IA3Config, r".*\.(q_proj|up_proj)", feedforward_modules=r".*\.mlp\.\w+"
    ),
    "miss": both(peft.MissConfig, LAYERS, r=4),
    "miss-rank-that-does-not-divide": both(peft.MissConfig, LAYERS, r=7),
    "miss-mini": both(peft.MissConfig, LAYERS, r=4, mini_r=8, init_weights="mini"),
    "miss-mini-not-dividing": both(peft.MissConfig, LAYERS, r=9, mini_r=2, init_weights="mini"),
    "miss-bat": both(peft.MissConfig, LAYERS, r=8, init_weights="bat"),
    "hra-saved-head": both(peft.HRAConfig, LAYERS, r=2, modules_to_save=["lm_head"]),
}
GPT2 = {  # whose layers are stored (in, out) and have biases; PEFT has no other type for them
    "ia3-gpt2": both(peft.IA3Config, ["c_attn", "c_fc"], feedforward_modules=[]),
    "ia3-gpt2-feedforward": both(
        peft.IA3Config, ["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    ),
    "hira-gpt2": both(peft.HiraConfig, ["c_attn", "c_proj"], r=3, fan_in_fan_out=True),
}
TIED = {
    "hira-tied": both(peft.HiraConfig, ["embed_tokens"], r=3),
    "oft-tied": both(peft.OFTConfig, ["embed_tokens"], oft_block_size=8),
}
CASES = {
    name: (model, config)
    for model, configs in [("llama", LLAMA), ("gpt2", GPT2), ("tied_llama", TIED)]
    for name, config in configs.items()
}


def trained(model: nn.Module, config: peft.PeftConfig, folder: Path) -> Path:
    """An adapter of a model, all its parameters random, saved by PEFT."""
    with oracle.quiet():
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                nn.init.normal_(parameter, mean=float("ia3" in name or "boft_s" in name), std=0.3)
        wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(model: nn.Module, *adapters: Path) -> dict[str, torch.Tensor]:
    """The state in float64."""
    return oracle.peft_merged(model.double(), *adapters)


def assert_same_change(actual, expected, before, most=1e-5) -> None:
    """Each change, relative to its norm; what PEFT leaves is the base's, bit for bit."""
    for key, value in actual.items():
        change = expected[key].double() - before[key].double()
        if not change.any():
            assert torch.equal(value, before[key]), key
            continue
        error = torch.linalg.norm(value.double() - expected[key].double())
        assert error <= most * torch.linalg.norm(change), (key, float(error))
    assert any(not torch.equal(actual[key], before[key]) for key in actual)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The bases in float32, and the adapter of each case."""
    home = tmp_path_factory.mktemp("functions")
    for name, build in MODELS.items():
        model = build()
        oracle.perturb(model, 0, 0.05)  # GPT-2's biases begin at zero
        oracle.save_base(model, home / name, "fp32")
    for name, (model, config) in CASES.items():
        trained(oracle.load(MODELS[model], home / model), config, home / name)
    return home


def test_every_type_has_a_case():
    assert {name.partition("-")[0] for name in CASES} == set(merged_by_rows())


@pytest.mark.parametrize("name", [*LLAMA, *GPT2])
def test_a_merge_is_pefts(name, home, tmp_path):
    model = CASES[name][0]
    receipt = adapterkit.merge(home / model, home / name, out=tmp_path / "out", verify=True)
    expected = merged_by_peft(oracle.load(MODELS[model], home / model), home / name)
    before = oracle.load(MODELS[model], home / model).state_dict()
    actual = oracle.merged(tmp_path / "out", MODELS[model])
    assert_same_change(actual, expected, before)
    changed = [key for key in actual if not torch.equal(actual[key], before[key])]
    assert receipt.data["verified"]["tensors"] >= len(changed) - name.count("saved")
    assert adapterkit.verify(tmp_path / "out", base=home / model, adapters=[home / name])["rows"]


@pytest.mark.parametrize("name", [n for n in LLAMA if "saved" not in n])
def test_a_merge_into_bf16_rounds_the_exact_sum_once(name, home, tmp_path):
    base = tmp_path / "base"
    oracle.save_base(oracle.load(oracle.llama, home / "llama"), base, "bf16")
    adapter = trained(oracle.load(oracle.llama, base), LLAMA[name], tmp_path / "adapter")
    adapterkit.merge(base, adapter, out=tmp_path / "out", verify=True)
    exact = merged_by_peft(oracle.load(oracle.llama, base), adapter)
    actual = oracle.merged(tmp_path / "out", oracle.llama)
    for key, value in actual.items():
        wrong = value != exact[key].bfloat16()
        assert int(wrong.sum()) <= 2 + 1e-3 * value.numel(), key


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_is_untied_or_folded_as_in_peft(name, home, tmp_path):
    base, build = home / "tied_llama", oracle.tied_llama
    adapterkit.merge(base, home / name, out=tmp_path / "fold", tied="fold", verify=True)
    expected = merged_by_peft(oracle.load(build, base), home / name)
    before = oracle.load(build, base).state_dict()
    assert_same_change(oracle.merged(tmp_path / "fold", build), expected, before)
    adapterkit.merge(base, home / name, out=tmp_path / "out", verify=True)
    actual = oracle.merged(tmp_path / "out", oracle.llama)
    key = "model.embed_tokens.weight"
    assert_same_change({key: actual[key]}, expected, before)
    assert torch.equal(actual["lm_head.weight"], before[key])


@pytest.mark.parametrize(
    "name, layers",
    [
        ("ia3-gpt2", {"attn.c_attn", "mlp.c_fc"}),
        ("ia3-gpt2-feedforward", {"attn.c_attn"}),
        ("hira-gpt2", set()),
    ],
)
def test_ia3_scales_the_biases_of_outputs_alone(name, layers, home, tmp_path):
    adapterkit.merge(home / "gpt2", home / name, out=tmp_path / "out")
    before, after = (oracle.stored(x) for x in (home / "gpt2", tmp_path / "out"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    biases = {".".join(key.split(".")[-3:-1]) for key in changed if key.endswith("bias")}
    assert biases == layers


# -- convolutions ----------------------------------------------------------------------------------

CONVOLUTIONS = {
    "boft": peft.BOFTConfig(target_modules=["image"], boft_block_size=6),
    "hra": peft.HRAConfig(target_modules=["image", "point"], r=3),
    "hira": peft.HiraConfig(target_modules=["image", "line", "strip", "tokens"], r=3),
    "ia3": peft.IA3Config(target_modules=["image", "fit"], feedforward_modules=["image"]),
    "ia3-outputs": peft.IA3Config(target_modules=["image", "point"], feedforward_modules=[]),
    "oft": peft.OFTConfig(target_modules=["point", "tokens"], oft_block_size=3),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernels_of_an_unknown_model_change_as_in_peft(name, plain, tmp_path):
    adapter = trained(net(plain), CONVOLUTIONS[name], tmp_path / "adapter")
    adapterkit.merge(plain, adapter, out=tmp_path / "out", verify=True)
    actual, before = (load_file(x / "model.safetensors") for x in (tmp_path / "out", plain))
    assert_same_change(actual, merged_by_peft(net(plain), adapter), before)


def test_boft_with_stages_is_what_pefts_cuda_kernel_merges(plain, tmp_path, monkeypatch):
    """The kernel makes one matrix of the blocks of each stage; else PEFT has one stage alone."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(stages):
            return torch.stack([torch.block_diag(*stage) for stage in stages])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
    config = peft.BOFTConfig(
        target_modules=["deep.0", "wide"],
        boft_block_size=0,
        boft_block_num=2,
        boft_n_butterfly_factor=2,
    )
    one = trained(net(plain), config, tmp_path / "one")
    tensors = load_file(one / "adapter_model.safetensors")
    assert {len(value) for key, value in tensors.items() if "boft_R" in key} == {2}
    many = peft.BOFTConfig(target_modules=["deep.0"], boft_block_size=2, boft_n_butterfly_factor=3)
    for adapter in (one, trained(net(plain), many, tmp_path / "many")):
        adapterkit.merge(plain, adapter, out=tmp_path / f"{adapter.name}-out")
        actual = load_file(tmp_path / f"{adapter.name}-out" / "model.safetensors")
        before = load_file(plain / "model.safetensors")
        assert_same_change(actual, merged_by_peft(net(plain), adapter), before)


# -- several, weights, other bases -----------------------------------------------------------------


def test_several_hira_add_to_the_same_weight(home, tmp_path):
    pair = (
        home / "hira",
        trained(
            oracle.load(oracle.llama, home / "llama"),
            both(peft.HiraConfig, ["q_proj", "up_proj"], r=2, init_weights=False),
            tmp_path / "other",
        ),
    )
    adapterkit.merge(home / "llama", pair, out=tmp_path / "out", verify=True)
    expected = merged_by_peft(oracle.load(oracle.llama, home / "llama"), *pair)
    before = oracle.load(oracle.llama, home / "llama").state_dict()
    assert_same_change(oracle.merged(tmp_path / "out", oracle.llama), expected, before)


@pytest.mark.parametrize("name", ["hira", "miss", "miss-mini"])
def test_half_of_a_linear_type_is_half_of_its_delta(name, home, tmp_path):
    for weight in (1.0, 0.5):
        adapterkit.merge(home / "llama", {home / name: weight}, out=tmp_path / str(weight))
    before, whole, half = (
        oracle.stored(x) for x in (home / "llama", tmp_path / "1.0", tmp_path / "0.5")
    )
    for key, value in before.items():
        torch.testing.assert_close(half[key], (value + whole[key]) / 2, rtol=0, atol=1e-6)


def test_a_lora_adds_to_a_linear_type(home, tmp_path):
    lora = tmp_path / "lora"
    oracle.train(oracle.load(oracle.llama, home / "llama"), lora, target_modules=["q_proj"])
    adapterkit.merge(home / "llama", [home / "miss", lora], out=tmp_path / "out", verify=True)
    adapterkit.merge(home / "llama", home / "miss", out=tmp_path / "first")
    adapterkit.merge(tmp_path / "first", lora, out=tmp_path / "second")
    for key, value in oracle.stored(tmp_path / "second").items():
        torch.testing.assert_close(oracle.stored(tmp_path / "out")[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["oft", "hira", "ia3-feedforward", "miss-bat"])
def test_a_quantized_base_changes_by_its_decoded_weights(name, home, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapterkit.quantize(home / "llama", to="w8a16", out=tmp_path / "q8")
        adapterkit.dequantize(tmp_path / "q8", dtype="fp32", out=tmp_path / "plain")
        adapterkit.merge(tmp_path / "q8", home / name, out=tmp_path / "out", verify=True)
        adapterkit.merge(
            tmp_path / "q8", home / name, out=tmp_path / "wide", dequantize=True, dtype="fp32"
        )
    expected = merged_by_peft(oracle.load(oracle.llama, tmp_path / "plain"), home / name)
    before = oracle.load(oracle.llama, tmp_path / "plain").state_dict()
    assert_same_change(oracle.merged(tmp_path / "wide", oracle.llama), expected, before)


def test_trained_biases_next_to_a_rotation_are_merged(plain, tmp_path):
    config = peft.OFTConfig(target_modules=["fit", "tall"], oft_block_size=2, bias="oft_only")
    adapter = trained(net(plain), config, tmp_path / "adapter")
    adapterkit.merge(plain, adapter, out=tmp_path / "out", verify=True)
    actual, before = (load_file(x / "model.safetensors") for x in (tmp_path / "out", plain))
    assert_same_change(actual, merged_by_peft(net(plain), adapter), before)
    assert not torch.equal(actual["fit.bias"], before["fit.bias"])


@pytest.mark.parametrize("name, rank", [("miss", 4), ("miss-mini", 4), ("hra", 5)])
def test_what_is_of_low_rank_is_converted_exactly(name, rank, home, tmp_path):
    base = home / "llama"
    adapterkit.convert(home / name, to="peft", rank=rank, base=base, out=tmp_path / "lora")
    adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "out")
    expected = merged_by_peft(oracle.load(oracle.llama, base), home / name)
    before = oracle.load(oracle.llama, base).state_dict()
    assert_same_change(oracle.merged(tmp_path / "out", oracle.llama), expected, before)


def test_left_out_modules_keep_their_bytes(home, tmp_path):
    adapterkit.merge(home / "llama", home / "hra", exclude="v_proj", out=tmp_path / "out")
    before, after = (oracle.stored(x) for x in (home / "llama", tmp_path / "out"))
    changed = {key.rsplit(".", 2)[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"q_proj", "down_proj"}


def test_a_plan_reads_no_weight_of_the_base_as_a_whole(home, tmp_path):
    """Rows stream: no task computes a whole tensor."""
    plan = adapterkit.merge(home / "llama", home / "oft", out=tmp_path / "out", dry_run=True)
    assert not any(shard.tasks for shard in plan.shards)


# -- refusals --------------------------------------------------------------------------------------


def refused(match, *args, **options):
    with pytest.raises(adapterkit.Refused, match=match) as caught:
        adapterkit.merge(*args, **options)
    assert not Path(options["out"]).exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["oft", "boft-sizes", "hra", "ia3", "miss-bat"])
def test_half_of_a_multiplication_is_refused(name, home, tmp_path):
    kind = name.partition("-")[0].upper()
    text = refused(
        f"{kind} of .* with weight 0.5", home / "llama", {home / name: 0.5}, out=tmp_path / "out"
    )
    assert "6 numbers of adapters or weights do not fit" in text


def test_two_adapters_on_a_rotated_weight_are_refused(home, tmp_path):
    lora = tmp_path / "lora"
    oracle.train(oracle.load(oracle.llama, home / "llama"), lora, target_modules=LAYERS)
    for other in (home / "hira", home / "miss", lora):
        for adapters in ([home / "oft", other], [other, home / "oft"]):
            for options in ({}, {"compat": "peft"}):
                out = tmp_path / "out"
                text = refused(
                    "OFT of oft and another", home / "llama", adapters, out=out, **options
                )
                assert "6 modules or tensors differ" in text and "one after the other" in text


def test_a_method_refuses_what_is_no_plain_delta(home, tmp_path):
    refused(
        "ties and HIRA of", home / "llama", [home / "hira", home / "hra"],
        method="ties", density=0.5, out=tmp_path / "out",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["oft", "boft-sizes", "hra", "hira", "ia3-feedforward"])
def test_a_base_of_other_shapes_is_refused_with_all_modules(name, home, tmp_path):
    oracle.save_base(oracle.llama(intermediate_size=40), tmp_path / "other", "fp32")
    text = refused("down_proj: ", tmp_path / "other", home / name, out=tmp_path / "out")
    assert "layers.0" in text and "layers.1" in text


def test_a_base_without_the_module_is_refused(home, tmp_path):
    refused("no matrix model.layers.0", home / "gpt2", home / "hra", out=tmp_path / "out")


def test_a_rotation_of_a_layer_stored_in_out_is_refused(home, tmp_path):
    """PEFT makes no such file: keys of another model's."""
    adapter = tmp_path / "adapter"
    trained(
        oracle.load(oracle.llama, home / "llama"), both(peft.HRAConfig, ["q_proj"], r=2), adapter
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {
        key.replace("model.model.layers", "model.transformer.h").replace(
            "self_attn.q_proj", "attn.c_proj"
        ): value
        for key, value in tensors.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(r"stored \(in, out\)", home / "gpt2", adapter, out=tmp_path / "out")


def test_unknown_settings_and_keys_are_refused_together(home, tmp_path):
    adapter = oracle.edit_config(home / "hra", tmp_path / "adapter", use_magic=True, r="many")
    text = refused("use_magic", home / "llama", adapter, out=tmp_path / "out")
    assert "r = 'many'" in text
    adapter = oracle.edit_config(home / "hra", tmp_path / "keys")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.hira_A"] = torch.ones(2, 2)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused("hira_A", home / "llama", adapter, out=tmp_path / "out")


def test_reflections_without_a_direction_are_refused_while_merging(home, tmp_path):
    for name, what in [("hra", "a zero column"), ("hra-orthogonal", "depend on others")]:
        adapter = oracle.edit_config(home / name, tmp_path / name)
        tensors = load_file(adapter / "adapter_model.safetensors")
        for value in tensors.values():
            value[:, 1] = 0 if name == "hra" else 2 * value[:, 0]
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(adapterkit.AdapterkitError, match=what):
            adapterkit.merge(home / "llama", adapter, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_attach_and_combine_name_the_type_and_what_to_do(home, tmp_path):
    from adapterkit.runtime import attach

    model = oracle.load(oracle.llama, home / "llama")
    with pytest.raises(adapterkit.Refused, match="(?s)peft_type 'OFT'.*adapterkit resize"):
        attach(model, {"r": 2, "target_modules": ["q_proj"]}).load(home / "oft", name="oft")
    with pytest.raises(adapterkit.Refused, match="peft_type 'OFT'"):
        adapterkit.combine([home / "oft", home / "oft"], method="linear", out=tmp_path / "out")
