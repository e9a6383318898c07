"""Factors on single parameters, beside their module's children and inside MultiheadAttention: what
comes out is loaded by PEFT.

PEFT's file names the nesting of such parameters only, so a wrong key or pattern is dropped without
a word. Every result here is laid on the model by PEFT, in float64, and held against the sum of what
PEFT makes of each input.
"""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle, tiny

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def conformer():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    convolutions = {
        "conv_dim": (16,),
        "conv_stride": (5,),
        "conv_kernel": (10,),
        "num_conv_pos_embedding_groups": 4,
    }
    more = {
        "num_conv_pos_embeddings": 16,
        "conv_depthwise_kernel_size": 3,
        "position_embeddings_type": "relative",
    }
    return oracle._model(
        "Wav2Vec2ConformerModel",
        transformers.Wav2Vec2ConformerConfig(**sizes, **convolutions, **more),
    )


def mamba():
    config = transformers.MambaConfig(
        vocab_size=80, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4
    )
    return oracle._model("MambaForCausalLM", config)


def siglip():
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return oracle._model(
        "SiglipVisionModel", transformers.SiglipVisionConfig(**tower, image_size=16, patch_size=4)
    )


def moe(kind):
    return lambda: tiny.model(kind)


def deltas(build, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each parameter of the model, in float64; `Error` where it makes up a tensor
    or drops one."""
    before = build().double().state_dict()
    model = build().double()
    with oracle.quiet():
        wrapped = oracle.peft.PeftModel.from_pretrained(
            model, adapter, autocast_adapter_dtype=False
        )
        result = oracle.peft.get_peft_model_state_dict(wrapped)
        stored = load_file(adapter / "adapter_model.safetensors")
        assert set(result) == set(stored), set(result) ^ set(stored)
        assert all(torch.equal(result[key], value.double()) for key, value in stored.items())
        wrapped.double().merge_adapter()
    after = plain_state(wrapped)
    assert set(after) == set(before)
    return {
        key: after[key] - before[key] for key in before if not torch.equal(after[key], before[key])
    }


def plain_state(wrapped) -> dict[str, torch.Tensor]:
    """The merged values by their names in the model (PEFT's own `unload` leaves layers inside
    parameter wrappers as they are)."""
    state = {}
    for key, value in wrapped.state_dict().items():
        if ".lora_" not in key and ".original_module." not in key:
            name = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
            while ".base_layer." in name:
                name = name.replace(".base_layer.", ".")
            state[name] = value
    return state


def assert_sum(build, out: Path, sources: list[Path], weights, tolerance: float = 3e-6) -> None:
    actual, expected = deltas(build, out), {}
    for source, weight in zip(sources, weights, strict=True):
        for key, delta in deltas(build, source).items():
            expected[key] = expected.get(key, 0) + weight * delta
    assert set(actual) == set(expected)
    for key, delta in expected.items():
        assert float((actual[key] - delta).norm()) <= tolerance * float(delta.norm()), key


def trained(build, folder: Path, seed: int = 1, **config) -> Path:
    oracle.train(build(), folder, seed=seed, **({"target_modules": []} | config))
    return folder


def base_of(build, folder: Path) -> Path:
    build().save_pretrained(folder)
    return folder


def combine(sources, out: Path, weights, **options) -> Path:
    given = [f"{source}={weight}" for source, weight in zip(sources, weights, strict=True)]
    with oracle.quiet():
        adapterkit.combine(given, out=out, **({"method": "linear"} | options))
    return out


# model, what each of two adapters has, and whether the files say enough without a base
PARAMETERS = {
    "one and another": (conformer, [["pos_bias_u"], ["pos_bias_v"]], False),
    "both and one": (conformer, [["pos_bias_u", "pos_bias_v"], ["self_attn.pos_bias_u"]], False),
    "both in either order": (
        conformer,
        [["pos_bias_u", "pos_bias_v"], ["pos_bias_v", "pos_bias_u"]],
        True,
    ),
    "experts alone": (moe("mixtral"), [[EXPERTS[0]], [EXPERTS[1]]], False),
    "experts and one": (moe("mixtral"), [EXPERTS, [EXPERTS[1]]], True),
    "experts": (moe("qwen3_moe"), [EXPERTS, ["gate_up_proj", "down_proj"]], True),
    "transposed experts": (moe("gpt_oss"), [[EXPERTS[0]], EXPERTS], True),
    "square experts": (moe("llama4_text"), [EXPERTS, EXPERTS], True),
    "other layers": (
        moe("mixtral"),
        [["layers.0.mlp.experts.down_proj"], ["layers.1.mlp.experts.gate_up_proj"]],
        True,
    ),
    "a matrix of a layer": (
        moe("mixtral"),
        [["q_proj.weight"], ["k_proj.weight", "mlp.gate.weight"]],
        True,
    ),
    "beside its children": (mamba, [["mixer.A_log"], ["A_log"]], True),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_joined_by_name(name, tmp_path):
    build, targets, known = PARAMETERS[name]
    base = base_of(build, tmp_path / "base")
    sources = [
        trained(build, tmp_path / f"a{i}", i + 1, target_parameters=named, r=3 + i, lora_alpha=5)
        for i, named in enumerate(targets)
    ]
    weights = (1.0, -0.5)
    assert_sum(build, combine(sources, tmp_path / "out", weights, base=base), sources, weights)
    if known:
        assert_sum(build, combine(sources, tmp_path / "alone", weights), sources, weights)
    else:
        with pytest.raises(Refused, match="--base"):
            combine(sources, tmp_path / "alone", weights)


@pytest.mark.parametrize("first", [0, 1])
def test_children_of_a_module_whose_parameter_is_a_target(first, tmp_path):
    """The keys of `mixer.in_proj` go through the wrapper of `mixer.A_log`, whichever adapter brings
    which."""
    parts = [
        {"target_modules": ["in_proj"], "bias": "all"},
        {"target_modules": ["in_proj", "dt_proj"], "target_parameters": ["mixer.A_log"]},
    ]
    order = [parts[first], parts[1 - first]]
    sources = [
        trained(mamba, tmp_path / f"a{i}", i + 1, **config) for i, config in enumerate(order)
    ]
    out = combine(sources, tmp_path / "out", (1.0, 1.0))
    assert_sum(mamba, out, sources, (1.0, 1.0))
    biases = [key for key in load_file(out / "adapter_model.safetensors") if key.endswith(".bias")]
    assert "base_model.model.backbone.layers.0.mixer.base_layer.dt_proj.base_layer.bias" in biases


@pytest.mark.parametrize("first", [0, 1])
def test_two_wrappers_around_a_child(first, tmp_path):
    parts = [
        {"target_modules": ["linear_q"]},
        {"target_modules": ["linear_k"], "target_parameters": ["pos_bias_u", "pos_bias_v"]},
    ]
    order = [parts[first], parts[1 - first]]
    sources = [
        trained(conformer, tmp_path / f"a{i}", i + 1, **config) for i, config in enumerate(order)
    ]
    out = combine(sources, tmp_path / "out", (0.7, 1.2))
    assert any(
        ".self_attn.base_layer.base_layer.linear_q." in key
        for key in load_file(out / "adapter_model.safetensors")
    )
    assert_sum(conformer, out, sources, (0.7, 1.2))


def test_a_trained_bias_under_factors_of_another_adapter(tmp_path):
    """bias="all" saves a bias beside its weight, and inside the wrapper where the module has
    factors."""
    build = oracle.gpt2
    sources = [
        trained(
            build, tmp_path / "a", 1, target_modules=["c_attn"], bias="all", fan_in_fan_out=True
        ),
        trained(build, tmp_path / "b", 2, target_modules=["c_fc"], fan_in_fan_out=True),
    ]
    assert_sum(build, combine(sources, tmp_path / "out", (1.0, 1.0)), sources, (1.0, 1.0))


PATTERNS = {
    "experts, ranks": (moe("qwen3_moe"), {"rank_pattern": {r".*\.gate_up_proj": 5}}, EXPERTS),
    "experts, alphas": (moe("mixtral"), {"alpha_pattern": {"down_proj": 9}}, EXPERTS),
    "biases": (
        conformer,
        {"alpha_pattern": {"pos_bias_u": 9}, "rank_pattern": {"pos_bias_v": 2}},
        ["pos_bias_u", "pos_bias_v"],
    ),
    "matrices": (
        moe("mixtral"),
        {"rank_pattern": {"q_proj.weight": 2}, "alpha_pattern": {"q_proj": 3}},
        ["q_proj.weight"],
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_that_tell_parameters_apart(name, tmp_path):
    build, patterns, targets = PATTERNS[name]
    base = base_of(build, tmp_path / "base")
    sources = [
        trained(build, tmp_path / f"a{i}", i + 1, target_parameters=targets, **patterns)
        for i in range(2)
    ]
    out = combine(sources, tmp_path / "out", (0.5, 2.0), base=base)
    assert_sum(build, out, sources, (0.5, 2.0))
    adapterkit.resize(sources[0], out=tmp_path / "same", rank=8, base=base)
    assert_sum(build, tmp_path / "same", sources[:1], (1.0,))
    adapterkit.subtract(sources[:1], general=sources[1:], out=tmp_path / "less", base=base)
    assert_sum(build, tmp_path / "less", sources, (1.0, -1.0))
    check_merge(build, base, sources[0], tmp_path / "merged")


def check_merge(build, base: Path, adapter: Path, out: Path) -> None:
    adapterkit.merge(base, [adapter], out=out, verify=True)
    cls = type(build())
    actual, before = (cls.from_pretrained(folder).double().state_dict() for folder in (out, base))
    expected = deltas(build, adapter)
    for key, value in before.items():
        delta = expected.get(key, torch.zeros(()))
        # PEFT 0.21 adds it twice
        delta = delta / 2 if key.endswith("attention.out_proj.weight") else delta
        assert float((actual[key] - value - delta).abs().max()) <= 2e-6 * float(
            value.abs().max() + delta.abs().max()
        ), key
    assert set(expected) <= set(before)


ATTENTION = [
    {"rank_pattern": {"attention": 2}, "alpha_pattern": {"out_proj": 11}},
    {"rank_pattern": {"out_proj": 2}, "alpha_pattern": {"head.attention": 11}},
    {"rank_pattern": {"^head.attention": 3, "out_proj": 6}},
]


@pytest.mark.parametrize("patterns", ATTENTION, ids=str)
def test_the_output_projection_of_attention_has_the_attention_s_patterns(patterns, tmp_path):
    base = base_of(siglip, tmp_path / "base")
    config = {"target_modules": ["head.attention", "fc1"], **patterns}
    sources = [trained(siglip, tmp_path / f"a{i}", i + 1, **config) for i in range(2)]
    check_merge(siglip, base, sources[0], tmp_path / "merged")
    assert_sum(siglip, combine(sources, tmp_path / "out", (0.5, 2.0)), sources, (0.5, 2.0))
    assert_sum(
        siglip, combine(sources, tmp_path / "energy", (0.5, 2.0), energy=1.0), sources, (0.5, 2.0)
    )
    for energy in (0.5, 0.9):
        combine(sources, tmp_path / f"{energy}", (0.5, 2.0), energy=energy)
        assert set(deltas(siglip, tmp_path / f"{energy}")) == set(deltas(siglip, sources[0]))
    adapterkit.resize(sources[0], out=tmp_path / "same", rank=8)
    assert_sum(siglip, tmp_path / "same", sources[:1], (1.0,))


def test_the_output_projection_of_attention_inside_a_wrapped_module(tmp_path):
    """The head's own parameter is a target, and so its attention's keys lie inside the head's
    wrapper."""
    base = base_of(siglip, tmp_path / "base")
    config = {
        "target_modules": ["head.attention"],
        "target_parameters": ["probe"],
        "rank_pattern": {"head.attention": 2},
    }
    sources = [trained(siglip, tmp_path / f"a{i}", i + 1, **config) for i in range(2)]
    check_merge(siglip, base, sources[0], tmp_path / "merged")
    assert_sum(siglip, combine(sources, tmp_path / "out", (0.5, 2.0)), sources, (0.5, 2.0))


def test_attention_in_one_adapter_only(tmp_path):
    """The result's own list of modules does not name the output projection, which PEFT would wrap
    once more."""
    sources = [
        trained(siglip, tmp_path / "a", 1, target_modules=["fc1"]),
        trained(siglip, tmp_path / "b", 2, target_modules=["head.attention"]),
    ]
    assert_sum(siglip, combine(sources, tmp_path / "out", (1.0, 1.0)), sources, (1.0, 1.0))


@pytest.mark.parametrize(
    "targets",
    [["attn.c_proj.weight"], ["c_attn.weight", "mlp.c_proj.weight"], ["wpe.weight"]],
    ids=str,
)
def test_a_transposed_layer_s_weight_as_a_parameter(targets, tmp_path):
    """PEFT adds b@a to the weight as GPT-2 stores it, square or not."""
    base = base_of(oracle.gpt2, tmp_path / "base")
    sources = [
        trained(oracle.gpt2, tmp_path / f"a{i}", i + 1, target_parameters=targets) for i in range(2)
    ]
    check_merge(oracle.gpt2, base, sources[0], tmp_path / "merged")
    assert_sum(oracle.gpt2, combine(sources, tmp_path / "out", (0.5, 2.0)), sources, (0.5, 2.0))


@pytest.mark.parametrize("build, config", [
    (mamba, {"target_modules": ["in_proj", "x_proj"], "target_parameters": ["mixer.A_log"]}),
    (conformer, {"target_modules": ["linear_q", "linear_out"],
                 "target_parameters": ["pos_bias_u", "pos_bias_v"]}),
    (conformer, {"target_parameters": ["depthwise_conv.weight"], "target_modules": ["linear_out"]}),
])  # fmt: skip
def test_merge_reads_keys_inside_wrappers(build, config, tmp_path):
    base = base_of(build, tmp_path / "base")
    check_merge(build, base, trained(build, tmp_path / "a", **config), tmp_path / "merged")


def test_results_that_peft_cannot_load_are_refused(tmp_path):
    outer = trained(conformer, tmp_path / "outer", target_parameters=["pos_bias_u"])
    inner = trained(conformer, tmp_path / "inner", target_parameters=["linear_q.weight"])
    module = trained(conformer, tmp_path / "module", target_modules=["linear_q"])
    with pytest.raises(AdapterkitError, match="PEFT cannot load it"):
        combine([outer, inner], tmp_path / "out", (1.0, 1.0))
    with pytest.raises(AdapterkitError, match="PEFT cannot load both"):
        combine([inner, module], tmp_path / "out", (1.0, 1.0))
    saved = trained(
        conformer, tmp_path / "saved", target_modules=["linear_v"], modules_to_save=["linear_q"]
    )
    with pytest.raises(AdapterkitError, match="linear_q.* inside .*self_attn"):
        combine([outer, saved], tmp_path / "out", (1.0, 1.0))
    assert not (tmp_path / "out").exists()


def test_square_stacks_of_two_versions_are_not_added(tmp_path):
    build = moe("llama4_text")
    sources = [
        trained(build, tmp_path / f"a{i}", i + 1, target_parameters=[EXPERTS[1]]) for i in range(2)
    ]
    old = oracle.edit_config(sources[1], tmp_path / "old", peft_version="0.18.0")
    tensors = load_file(old / "adapter_model.safetensors")
    square = {k: t[:, :16] if "lora_A" in k else t[:16] for k, t in tensors.items()}
    for folder in (sources[0], old):
        save_file(
            {k: t.contiguous() for k, t in square.items()}, folder / "adapter_model.safetensors"
        )
    with pytest.raises(AdapterkitError, match="transposed them in 0.19"):
        combine([sources[0], old], tmp_path / "out", (1.0, 1.0))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_layers_narrower_than_the_rank(init, rslora, tmp_path):
    """PiSSA and OLoRA cut the factors there to the layer's own width; the scale is that of r all
    the same."""
    build = oracle.net
    config = {
        "target_modules": ["narrow", "fit"],
        "r": 6,
        "lora_alpha": 5,
        "init_lora_weights": init,
        "use_rslora": rslora,
    }
    with oracle.quiet():
        before = build().double().state_dict()
        wrapped = oracle.peft.get_peft_model(build(), oracle.peft.LoraConfig(**config))
        wrapped.save_pretrained(tmp_path / "initial")
        residual = {key: value.clone() for key, value in plain_state(wrapped).items()}
        oracle.perturb(wrapped, 3)
        wrapped.save_pretrained(tmp_path / "trained")
        wrapped.merge_adapter()
    after = plain_state(wrapped)
    rows = load_file(tmp_path / "trained" / "adapter_model.safetensors")[
        "base_model.model.narrow.lora_A.weight"
    ]
    assert rows.shape[0] == 3
    adapterkit.rebase(tmp_path / "trained", initial=tmp_path / "initial", out=tmp_path / "plain")
    actual = deltas(build, tmp_path / "plain")
    for name in ("narrow.weight", "fit.weight"):
        expected = after[name].double() - before[name]
        assert float((actual[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name
    (tmp_path / "base").mkdir()
    save_file(residual, tmp_path / "base" / "model.safetensors")
    adapterkit.merge(
        tmp_path / "base", [tmp_path / "trained"], out=tmp_path / "merged", base_is_residual=True
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(
        torch.allclose(merged[name], after[name], atol=1e-5)
        for name in ("narrow.weight", "fit.weight")
    )
    with pytest.raises(AdapterkitError, match="rank 3 in the file"):
        wrong = oracle.edit_config(tmp_path / "trained", tmp_path / "wrong", init_lora_weights=True)
        adapterkit.merge(tmp_path / "base", [wrong], out=tmp_path / "no")


def test_resizing_a_dora_without_its_base_notes_the_approximation(tmp_path):
    source = trained(oracle.net, tmp_path / "a", target_modules=["fit"], use_dora=True)
    notes = adapterkit.resize(source, out=tmp_path / "out", rank=2).data["notes"]
    assert any("magnitudes stay" in note and "--base" in note for note in notes)
    base = tmp_path / "base"
    base.mkdir()
    oracle.save_base(oracle.net(), base, "fp32")
    notes = adapterkit.resize(source, out=tmp_path / "plain", rank=2, base=base).data["notes"]
    assert not any("magnitudes stay" in note for note in notes)
