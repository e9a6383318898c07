"""Models that mlx-lm quantized: decoded, merged in their format, and read by mlx-lm again."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError
from tests.support import mlx_quantized, quantized_llama
from tests.support.formats import packed_of, same, stored
from tests.support.mlx_models import COMMON, loaded, logits, off, saved, seeing, stacks_of, trained
from tests.support.mlx_quantized import computed
from tests.support.usual import usual

SEES = transformers.AutoModelForImageTextToText
TARGETS = ["q_proj", "down_proj"]
PACKINGS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    **{f"4 bits of {size}": {"size": size} for size in (32, 128)},
    **{mode: {"mode": mode} for mode in mlx_quantized.MODES},
    "8 bits of bfloat16": {"dtype": "bfloat16", "bits": 8},
}
# by the ends of paths: settings of their own, and floats
OWN = {"down_proj": {"bits": 8, "group_size": 32}, "v_proj": False, "k_proj": {"mode": "mxfp4"}}


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("mlx") / "floats", **mlx_quantized.WIDE)


def small(base: Path, out: Path, **options: Any) -> Path:
    """An adapter in PEFT's layout that changes about as much as a trained one."""
    trained(base, out, r=4, lora_alpha=1, **options)
    return out


@pytest.fixture(scope="module")
def lora(floats: Path) -> Path:
    return small(floats, floats.parent / "lora", target_modules=TARGETS)


@pytest.fixture(scope="module")
def of_mlx(lora: Path) -> Path:
    """The same in mlx-lm's layout."""
    adapterkit.convert(lora, to="mlx", out=lora.parent / "mlx")
    return lora.parent / "mlx"


@pytest.fixture(scope="module")
def base(floats: Path) -> Path:
    """4 bits, and modules with their own settings."""
    return mlx_quantized.quantized(floats, floats.parent / "base", own=OWN)


def sums(base: Path, lora: Path, place: Path) -> dict[str, torch.Tensor]:
    """W + delta in float64, of the weights as they decode, by module."""
    adapterkit.dequantize(base, out=place, dtype="fp32")
    before, factors = stored(place), load_file(lora / "adapter_model.safetensors")
    exact = {}
    for key, a in factors.items():
        if key.endswith("lora_A.weight"):
            b = factors[key.replace("lora_A", "lora_B")].double()
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            exact[module] = before[module + ".weight"].double() + b @ a.double() / 4
    return exact


def check_merged(base: Path, lora: Path, out: Path, place: Path, dtype: str = "float32") -> None:
    """Untouched tensors keep their bytes, and changed weights are as near to the sums as mlx's own
    quantization of these."""
    old, new, exact = stored(base), stored(out), sums(base, lora, place / "before")
    assert list(old) == list(new) and exact
    untouched = [key for key in old if key.rpartition(".")[0] not in exact]
    assert all(same(old[key], new[key]) for key in untouched)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    adapterkit.dequantize(out, out=place / "after", dtype="fp32")
    merged = stored(place / "after")
    for module, value in exact.items():
        own = mlx_quantized.by_mlx(value, mlx_quantized.settings_of(base, module), dtype)
        error = float((merged[module + ".weight"].double() - value).norm())
        assert error <= 1.1 * float((own.double() - value).norm()), module


@pytest.mark.parametrize("packing", usual(PACKINGS, {"4 bits", "mxfp4"}))
def test_a_merge_keeps_the_format_and_mlx_lm_reads_it(packing, floats, lora, of_mlx, tmp_path):
    """Adapters of both layouts; mlx-lm computes with the output what transformers computes with its
    decoded weights."""
    how = PACKINGS[packing]
    base = mlx_quantized.quantized(floats, tmp_path / "base", **how)
    adapterkit.merge(base, lora, out=tmp_path / "out", verify=True)
    adapterkit.merge(base, of_mlx, out=tmp_path / "again")
    adapterkit.verify(tmp_path / "out", base=base, adapters=[lora])
    again = stored(tmp_path / "again")
    assert all(same(again[key], value) for key, value in stored(tmp_path / "out").items())
    check_merged(base, lora, tmp_path / "out", tmp_path, how.get("dtype", "float32"))
    near = 5e-3 if "mode" in how else 1e-5  # mlx decodes these modes to bfloat16
    assert off(computed(tmp_path / "out"), logits(loaded(tmp_path / "after"))) < near


def test_modules_with_their_own_settings_keep_these(base, lora, of_mlx, tmp_path):
    kinds = {key.split(".")[-2]: weight.format for key, weight in packed_of(base).items()}
    assert kinds["q_proj"] == "mlx 4 bits, groups of 64" and "v_proj" not in kinds
    assert kinds["down_proj"] == "mlx 8 bits, groups of 32" and kinds["k_proj"] == "mlx mxfp4"
    assert {"embed_tokens", "lm_head"} <= kinds.keys()
    adapterkit.merge(base, lora, out=tmp_path / "out", verify=True)
    check_merged(base, lora, tmp_path / "out", tmp_path)
    assert off(computed(tmp_path / "out"), logits(loaded(tmp_path / "after"))) < 5e-3


def test_floats_of_a_merge_compute_what_mlx_lm_computes_with_the_adapter(floats, lora, of_mlx,
                                                                        tmp_path):  # fmt: skip
    base = mlx_quantized.quantized(floats, tmp_path / "base")
    expected = computed(base, of_mlx)
    assert off(computed(base), expected) > 0.05
    adapterkit.merge(base, of_mlx, out=tmp_path / "floats", dequantize=True, dtype="fp32")
    assert off(logits(loaded(tmp_path / "floats")), expected) < 1e-5
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((tmp_path / "floats/config.json").read_text()).keys()
    )
    fine = mlx_quantized.quantized(floats, tmp_path / "fine", bits=8, size=32)
    adapterkit.merge(fine, of_mlx, out=tmp_path / "merged")
    assert off(computed(tmp_path / "merged"), computed(fine, of_mlx)) < 0.02


@pytest.mark.parametrize("bits", usual([2, 4, 8], {4}))
def test_weights_are_as_near_as_those_of_mlx_lm_fuse(bits, floats, lora, of_mlx, tmp_path):
    base = mlx_quantized.quantized(floats, tmp_path / "base", bits=bits, dtype="bfloat16")
    exact, by_fuse = sums(base, lora, tmp_path / "before"), mlx_quantized.fused(base, of_mlx)
    adapterkit.merge(base, lora, out=tmp_path / "out")
    adapterkit.dequantize(tmp_path / "out", out=tmp_path / "after", dtype="fp32")
    merged = stored(tmp_path / "after")
    assert by_fuse.keys() == exact.keys()
    for module, value in exact.items():
        error = float((merged[module + ".weight"].double() - value).norm())
        assert error <= float((by_fuse[module].double() - value).norm()), module


def test_rounding_stochastically_keeps_the_expected_sum(floats, lora, tmp_path):
    """Where every value lies between two codes of its group's scale or a new one."""
    base = mlx_quantized.quantized(floats, tmp_path / "base", bits=8)
    exact, mean = sums(base, lora, tmp_path / "before"), {}
    for seed in range(8):
        out = tmp_path / f"{seed}"
        adapterkit.merge(base, lora, out=out, rounding="stochastic", seed=seed, verify=True)
        adapterkit.dequantize(out, out=tmp_path / f"{seed}-floats", dtype="fp32")
        for key, value in stored(tmp_path / f"{seed}-floats").items():
            mean[key] = mean.get(key, 0) + value.double() / 8
    for module, value in exact.items():
        own = mlx_quantized.by_mlx(value, mlx_quantized.settings_of(base, module), "float32")
        step = float((own.double() - value).norm())  # that of one rounding to nearest
        assert float((mean[module + ".weight"] - value).norm()) < 0.7 * step


@pytest.mark.parametrize("mode", mlx_quantized.MODES)
def test_weights_with_larger_values_get_scales_as_good_as_mlx_s(mode, tmp_path):
    """Beyond what the stored scales hold, and far below it."""
    quantized_llama.base(quantized_llama.FORMS[f"mlx-{mode}"], tmp_path)
    tensors, settings = stored(tmp_path), mlx_quantized.settings_of(tmp_path, "")
    for weight in packed_of(tmp_path).values():
        parts = {part.key: tensors[part.key] for part in weight.parts}
        for factor in (37.0, 0.011):
            value = weight.decode(parts).roll(3, 1) * factor
            new = weight.encode_keeping_scales(parts, value)
            scale = mlx_quantized.scales_of(value, settings)
            assert factor < 1 or torch.equal(new[weight.parts[1].key], scale)
            own = mlx_quantized.by_mlx(value, settings, "float32")
            assert float((weight.decode(new) - value).norm()) <= 1.0001 * float(
                (own - value).norm()
            )


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_are_merged_too(tied, tmp_path):
    sizes = mlx_quantized.WIDE | {"tie_word_embeddings": tied}
    floats = saved("llama", tmp_path / "floats", **sizes)
    base = mlx_quantized.quantized(floats, tmp_path / "base", bits=8, size=32)
    targets = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    ties = {"ensure_weight_tying": True} if tied else {}
    small(floats, tmp_path / "lora", target_modules=targets, **ties)
    adapterkit.dequantize(base, out=tmp_path / "plain", dtype="fp32")
    adapterkit.merge(tmp_path / "plain", tmp_path / "lora", out=tmp_path / "expected")
    adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "out", verify=True)
    expected = logits(loaded(tmp_path / "expected"))
    assert off(logits(loaded(tmp_path / "plain")), expected) > 0.05
    assert off(computed(tmp_path / "out"), expected) < 0.02
    assert stored(tmp_path / "out").keys() == stored(base).keys()


@pytest.mark.parametrize("kind", usual(["qwen3_moe", "mixtral", "dots1", "lfm2_moe"],
                                       {"qwen3_moe", "lfm2_moe"}))  # fmt: skip
def test_stacks_of_experts_have_their_names_in_transformers(kind, tmp_path):
    """gate and up are stored apart there: adapters of both layouts, merged to the same bytes."""
    sizes = mlx_quantized.WIDE | {"moe_intermediate_size": 64, "intermediate_size": 64}
    floats = saved(kind, tmp_path / "floats", **sizes)
    base = mlx_quantized.quantized(floats, tmp_path / "base", bits=8, size=32)
    targets = ["out_proj" if kind == "lfm2_moe" else "o_proj"]
    stacks = stacks_of(loaded(floats))
    small(floats, tmp_path / "lora", target_modules=targets, target_parameters=stacks)
    adapterkit.convert(tmp_path / "lora", to="mlx", out=tmp_path / "mlx", base=floats)
    receipt = adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "out", verify=True)
    assert not receipt.data["warnings"]
    adapterkit.merge(base, tmp_path / "mlx", out=tmp_path / "again", verify=True)
    old, new, again = (stored(tmp_path / name) for name in ("base", "out", "again"))
    assert old.keys() == new.keys()
    assert all(same(again[key], value) for key, value in new.items())
    changed = {re.sub(r"\d+", "#", key) for key in old if not same(old[key], new[key])}
    assert {key.split(".")[-2] for key in changed} == {
        "gate_proj", "up_proj", "down_proj", *targets,
    }  # fmt: skip
    expected = computed(base, tmp_path / "mlx")
    assert off(computed(base), expected) > 0.05
    assert off(computed(tmp_path / "out"), expected) < 0.03
    receipt = adapterkit.merge(
        base, tmp_path / "mlx", out=tmp_path / "32", dequantize=True, dtype="fp32"
    )
    assert off(computed(tmp_path / "32"), expected) < 1e-5
    said = adapterkit.dequantize(base, out=tmp_path / "plain").data["warnings"]
    for (warning,) in (receipt.data["warnings"], said):
        assert "another layout" in warning
    config = json.loads((base / "config.json").read_text()) | {"model_type": "unknown"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterkitError, match=r"the base has no .*experts"):
        adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "no")


@pytest.mark.parametrize("kind", usual(["qwen3_5", "gemma4", "gemma3"], {"qwen3_5"}))
def test_language_models_inside_others_have_their_names_in_transformers(
    kind, tmp_path, monkeypatch
):
    """mlx-lm drops what sees: adapters of both layouts, merged to the same bytes."""
    for name, size in {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}.items():
        monkeypatch.setitem(COMMON, name, size)
    floats = seeing(kind, tmp_path / "floats")
    base = mlx_quantized.quantized(floats, tmp_path / "base", bits=8, size=32)
    text = r".*language_model\..*(q_proj|gate_proj|in_proj_qkv)"
    small(floats, tmp_path / "lora", target_modules=text, auto=SEES)
    adapterkit.convert(tmp_path / "lora", to="mlx", out=tmp_path / "mlx", base=floats)
    adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "out", verify=True)
    adapterkit.merge(base, tmp_path / "mlx", out=tmp_path / "again", verify=True)
    new, again = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert all(same(again[key], value) for key, value in new.items())
    expected = computed(base, tmp_path / "mlx")
    assert off(computed(tmp_path / "out"), expected) < 0.1 * off(computed(base), expected)


def test_stacks_that_transformers_turns_around_are_refused_by_name(tmp_path):
    """gpt-oss interleaves gate and up, and keeps matrices (in, out), here of one shape."""
    sizes = {"num_local_experts": 4, "intermediate_size": 64, "hidden_size": 128, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt_oss", vocab_size=40, **sizes, **heads)
    floats = tmp_path / "floats"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(floats)
    stack = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    small(floats, tmp_path / "lora", target_modules=["q_proj"], **stack)
    small(floats, tmp_path / "q", target_modules=["q_proj"])
    split = {}  # as mlx-lm names them
    for key, value in stored(floats).items():
        start, _, leaf = key.rpartition(".experts.")
        leaf, ending = leaf.removesuffix("_bias"), ".bias" if leaf.endswith("_bias") else ".weight"
        halves = {"down_proj": value} if leaf == "down_proj" else {
            "gate_proj": value[..., ::2], "up_proj": value[..., 1::2]}  # fmt: skip
        turned = {name: x.mT if x.dim() == 3 else x for name, x in halves.items()}
        named = {f"{start}.experts.{name}{ending}": x for name, x in turned.items()}
        split |= named if start else {key: value}
    save_file({k: v.contiguous() for k, v in split.items()}, floats / "model.safetensors")
    base = mlx_quantized.quantized(floats, tmp_path / "base")
    assert {"model.layers.0.mlp.experts.gate_proj.weight"} <= packed_of(base).keys()
    with pytest.raises(AdapterkitError, match="the base has no model.layers.0.mlp.experts"):
        adapterkit.merge(base, tmp_path / "lora", out=tmp_path / "no")
    adapterkit.merge(base, tmp_path / "q", out=tmp_path / "out", verify=True)
    assert off(computed(tmp_path / "out"), computed(base)) > 1e-3


@pytest.mark.parametrize("name", ["mlx4", "metal"])
def test_inspect_names_the_format(name, tmp_path):
    quantized_llama.base(quantized_llama.FORMS[name], tmp_path / "base")
    found = adapterkit.inspect(tmp_path / "base")["quantization"]
    assert f"({name.rstrip('4')})" in found["found"]
    assert found["config"]["bits"] == quantized_llama.FORMS[name].settings["bits"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_metal_decodes_to_the_same_before_and_after_a_merge(tmp_path):
    """As it does without Apple's GPU, in the dtype of the scales."""
    form = quantized_llama.FORMS["metal"]
    quantized_llama.base(form, tmp_path / "base")
    quantized_llama.llama().save_pretrained(tmp_path / "floats")
    small(tmp_path / "floats", tmp_path / "lora", target_modules=TARGETS)
    adapterkit.merge(tmp_path / "base", tmp_path / "lora", out=tmp_path / "out", verify=True)
    for name in ("base", "out"):
        adapterkit.dequantize(tmp_path / name, out=tmp_path / f"{name}-floats", dtype="bf16")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu")
        own = stored(tmp_path / f"{name}-floats")
        assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())


Q = "model.layers.0.self_attn.q_proj"
LIES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # tensors changed, settings changed, what the refusal says
    "1 bit": ({}, {"bits": 1}, "MLX's mode affine, bits 1, group_size 64"),
    "groups of 48": ({}, {"group_size": 48}, "group_size 48"),
    "an unknown mode": ({}, {"mode": "nf4"}, "MLX's mode nf4"),
    "mxfp4 of 8 bits": ({}, {Q: {"mode": "mxfp4", "bits": 8}}, f"{Q}.weight: MLX's mode mxfp4"),
    "true bits": ({}, {"bits": True}, "bits True"),
    "other bits": ({}, {"bits": 8}, "words of 8 bits"),
    "a mode without biases": ({}, {Q: {"mode": "mxfp8"}}, "mxfp8 scales for each 32 columns"),
    "no scales": ({f"{Q}.scales": None}, {}, f"{Q} is without .scales"),
    "no biases": ({f"{Q}.biases": None}, {}, f"{Q} is without .biases"),
    "biases of another dtype": ({f"{Q}.biases": torch.zeros(128, 2).half()}, {}, "biases F16"),
    "too few scales": ({f"{Q}.scales": torch.ones(128, 1)}, {}, r"scales F32 \(128, 1\)"),
    "NaN": ({f"{Q}.scales": torch.full((128, 2), float("nan"))}, {}, "NaN or infinite"),
    "codes that should be floats": ({}, {Q: False}, "stored as U32"),
    "floats with settings": ({f"{Q}.weight": torch.ones(128, 128), f"{Q}.scales": None,
                              f"{Q}.biases": None}, {Q: {"bits": 4}}, "stored as F32"),
    "a scale of the matrix": ({f"{Q}.global_scale": torch.ones(1)}, {}, "global_scale"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_files_that_contradict_their_config_are_refused(lie, floats, tmp_path):
    base = mlx_quantized.quantized(floats, tmp_path / "base")
    tensors, settings, text = LIES[lie]
    config = json.loads((base / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = config["quantization"] | settings
    (base / "config.json").write_text(json.dumps(config))
    changed = {k: v for k, v in (stored(base) | tensors).items() if v is not None}
    save_file(changed, base / "model.safetensors", {"format": "mlx"})
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.dequantize(base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_of_older_versions_has_the_settings_once(floats, lora, tmp_path):
    base = mlx_quantized.quantized(floats, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"], config["quantization"]["mode"]
    (base / "config.json").write_text(json.dumps(config))
    adapterkit.merge(base, lora, out=tmp_path / "out", verify=True)
    check_merged(base, lora, tmp_path / "out", tmp_path)
