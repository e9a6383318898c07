"""Quantized formats merged into and written again; configs of several groups, weights in
several files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import safe_open, save_file

import adapterkit
from adapterkit.bases.quantized.codecs.fp8 import Fp8
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.tasks import rows
from adapterkit.core.weights.codec import check_writable
from tests.support import oracle, quantized_llama
from tests.support.formats import (
    CHANNEL,
    INT,
    TOUCHED,
    WRITABLE,
    Q,
    ct,
    packed_of,
    same,
    sha,
    stored,
)
from tests.support.quantized_llama import FORMS, LINEAR, Form, change, few
from tests.support.usual import usual

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


# what comes back, what a merge makes of it


@pytest.mark.parametrize("name", FORMS)
def test_dequantized_checkpoints_have_the_plain_model_s_keys_and_values(
    base: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """As planned: keys and shapes of the plain model, one rounding to its dtype, nothing left that
    says quantized."""
    folder, plain = base(name), dict(quantized_llama.llama().state_dict())
    adapterkit.dequantize(folder, out=tmp_path / "32", dtype="fp32")
    adapterkit.dequantize(folder, out=tmp_path / "16")
    exact, rounded = stored(tmp_path / "32"), stored(tmp_path / "16")
    assert set(exact) == set(rounded) == set(plain)
    for key, weight in plain.items():
        assert exact[key].shape == weight.shape and same(exact[key].bfloat16(), rounded[key])
        assert float((exact[key] - weight.float()).norm() / weight.float().norm()) < (
            FORMS[name].lost or 0.13
        )
    assert not set(FORMS[name].files) & {path.name for path in (tmp_path / "16").iterdir()}
    assert "quantization_config" not in json.loads((tmp_path / "16/config.json").read_text())
    with safe_open(tmp_path / "16/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


BY_VALUES = ("fp8-scale", "fp8-qscale", "mxfp8", "fp4")


@pytest.mark.parametrize("name", WRITABLE)
def test_reencoded_weights_equal_their_own_encoder_s(
    base: Callable[[str], Path], name: str
) -> None:
    """Every byte of a weight that its own encoder made comes back. transformers' fp8 computes
    1 / (448 / x), so the last bits of its scales may differ; smaller powers of 2 may hold the same
    values, so for these the values are compared."""
    tensors = stored(base(name))
    for spec in packed_of(base(name)).values():
        parts = {part.key: tensors[part.key] for part in spec.parts}
        again = spec.encode_keeping_scales(parts, spec.decode(parts))
        assert list(again) == list(parts) and [stored.key for stored in spec.max_outputs] == list(
            parts
        )
        if name in BY_VALUES:
            assert same(spec.decode(again), spec.decode(parts)), spec.key
            continue
        rough = {key for key in parts if key.endswith("_scale_inv")}
        assert all(same(again[key], parts[key]) for key in parts if key not in rough), spec.key
        assert all(
            torch.allclose(again[key], parts[key], rtol=2.0**-22, atol=0) for key in rough
        ), spec.key


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("indexed", [True, False])
def test_integers_of_any_bytes_come_back(symmetric: bool, indexed: bool, tmp_path: Path) -> None:
    """Whatever made them: old scales win where new ones are not nearer."""
    form = Form(
        quantized_llama.words(4, 32, symmetric, indexed),
        ct("pack-quantized", INT | {"symmetric": symmetric}),
        0,
    )
    quantized_llama.base(form, tmp_path)
    tensors, generator = stored(tmp_path), torch.Generator().manual_seed(0)
    for spec in packed_of(tmp_path).values():
        parts = {part.key: tensors[part.key] for part in spec.parts}
        words, scale = list(parts)[:2]
        parts[words] = torch.randint(-(2**31), 2**31, parts[words].shape, generator=generator).to(
            torch.int32
        )
        parts[scale][0] = 0
        value = spec.decode(parts)
        again = spec.encode_keeping_scales(parts, value)
        assert torch.equal(spec.decode(again), value)
        far = value + 9 * value.abs().max()  # does not fit the old scales
        assert (
            float((spec.decode(spec.encode_keeping_scales(parts, far)) - far).norm() / far.norm())
            < 0.1
        )


# to the nearest by slices: test_memory
@pytest.mark.parametrize("rounding", usual(["nearest", "stochastic"], {"stochastic"}))
@pytest.mark.parametrize(
    "name", usual(WRITABLE, {"int4-g_idx", "fp8", "nvfp4", "mlx4", "int8-zero"})
)
def test_merged_by_slices_of_rows(
    base, lora: Path, name: str, rounding: str, tmp_path: Path, monkeypatch
) -> None:
    """As many as the format allows, or one: the same bytes."""
    for size in (1 << 20, 1):
        monkeypatch.setattr(rows, "SLICE", size)
        adapterkit.merge(base(name), [lora], out=tmp_path / f"{size}", rounding=rounding)
        adapterkit.merge(
            base(name), [lora], out=tmp_path / f"{size}-floats", dequantize=True, rounding=rounding
        )
    for kind in ("", "-floats"):
        assert sha(tmp_path / f"1{kind}") == sha(tmp_path / f"{1 << 20}{kind}")
    slices = {len(list(spec.row_ranges(1))) for spec in packed_of(base(name)).values()}
    assert (max(slices) > 1) == (
        name not in ("fp8-tensor", "modelopt-fp8")
        and "nvfp4" not in name
        and name != "modelopt-file"
    )


# of the others each step: test_reencoded_weights_equal_their_own_encoder_s
@pytest.mark.parametrize("name", few(WRITABLE))
def test_merges_into_every_writable_format_are_near_exact(
    base: Callable[[str], Path], lora: Path, name: str, tmp_path: Path
) -> None:
    folder, form = base(name), FORMS[name]
    adapterkit.dequantize(folder, out=tmp_path / "plain", dtype="fp32")
    before = stored(tmp_path / "plain")
    exact = oracle.exact(
        oracle.peft_model(oracle.load("LlamaForCausalLM", tmp_path / "plain"), lora)
    )
    assert len(exact) == 4

    oracle.merge(folder, lora, out=tmp_path / "floats", dequantize=True)
    oracle.assert_all_rounded(
        stored(tmp_path / "floats"), exact, {k: v.bfloat16() for k, v in before.items()}
    )
    assert not set(form.files) & {path.name for path in (tmp_path / "floats").iterdir()}

    oracle.merge(folder, lora, out=tmp_path / "kept")
    old, new = stored(folder), stored(tmp_path / "kept")
    assert list(old) == list(new)
    touched = {key for key in old if key.split(".")[-2] in TOUCHED}
    assert all(same(old[key], new[key]) for key in set(old) - touched)
    assert all(
        old[key].shape == new[key].shape and old[key].dtype == new[key].dtype for key in touched
    )
    kept = {
        key
        for key in touched
        if key.endswith(("input_scale", "input_global_scale", "weight_shape", "g_idx"))
    }
    assert all(same(old[key], new[key]) for key in kept)
    config = json.loads((tmp_path / "kept/config.json").read_text())
    assert config.get("quantization_config", {}) == form.settings
    adapterkit.dequantize(tmp_path / "kept", out=tmp_path / "kept-32", dtype="fp32")
    after = stored(tmp_path / "kept-32")
    for key, expected in exact.items():
        value = expected.value.double()
        assert float((after[key].double() - value).norm() / value.norm()) < form.lost, key
    metrics = json.loads((tmp_path / "kept/adapterkit.json").read_text())
    assert "survived" in json.dumps(metrics)


# of every format: test_reencoded_weights_equal_their_own_encoder_s
@pytest.mark.parametrize("name", few(WRITABLE))
def test_nothing_added_is_nothing_changed(
    base: Callable[[str], Path], cached_folder, name: str, tmp_path: Path
) -> None:
    config = {"target_modules": list(LINEAR), "size": 0.0}
    zeros = cached_folder(
        "formats-zeros", lambda folder: oracle.train(quantized_llama.llama(), folder, **config)
    )
    oracle.merge(base(name), zeros, out=tmp_path / "out")
    old, new = stored(base(name)), stored(tmp_path / "out")
    assert set(old) == set(new) and all(same(old[key], new[key]) for key in old)


@pytest.mark.parametrize("name", [name for name in FORMS if not FORMS[name].writable])
def test_merges_into_read_only_formats_are_refused_without_dequantize(
    base: Callable[[str], Path], lora: Path, cached_folder, name: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterkitError, match="cannot be written again") as caught:
        oracle.merge(base(name), lora, out=tmp_path / "no")
    assert "--dequantize" in str(caught.value)
    oracle.merge(base(name), lora, out=tmp_path / "floats", dequantize=True)
    head = cached_folder(
        "formats-head",
        lambda folder: oracle.train(quantized_llama.llama(), folder, target_modules=["lm_head"]),
    )
    oracle.merge(base(name), head, out=tmp_path / "head")  # touches nothing that is quantized
    old, new = stored(base(name)), stored(tmp_path / "head")
    assert {key for key in old if not same(old[key], new[key])} == {"lm_head.weight"}


# configs with several groups, tensors beside the weight, several files


def test_each_module_has_the_precision_of_its_group(tmp_path: Path) -> None:
    """Each module by the group that names it: by its name, a pattern, its class."""
    groups = {
        "a": {"targets": ["Linear"], "weights": INT, "format": "pack-quantized"},
        "b": {
            "targets": ["re:.*down_proj$"],
            "weights": quantized_llama.FP8 | {"strategy": "channel"},
            "format": "float-quantized",
        },
        "c": {
            "targets": [Q[:-1]],
            "weights": CHANNEL | {"symmetric": False},
            "format": "int-quantized",
        },
    }
    settings = quantized_llama.compressed("mixed-precision", {}) | {"config_groups": groups}
    quantized_llama.llama().save_pretrained(tmp_path)
    plain = stored(tmp_path)
    makers = {
        "down_proj": quantized_llama.fp8("channel"),
        Q + "weight": quantized_llama.int8(False),
    }
    tensors = {}
    for key, weight in plain.items():
        module = key.removesuffix(".weight")
        maker = makers.get(key) or makers.get(module.rpartition(".")[2])
        maker = maker or (
            quantized_llama.words(4, 32) if module.rpartition(".")[2] in LINEAR else None
        )
        tensors |= (
            {module + end: part for end, part in maker(weight.float()).items()}
            if maker
            else {key: weight}
        )
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    change(tmp_path, {}, settings)
    kinds = {key: (spec.kind, spec.bits) for key, spec in packed_of(tmp_path).items()}
    assert kinds[Q + "weight"] == ("int8", 8) and kinds["model.layers.1.mlp.down_proj.weight"] == (
        "fp8",
        8,
    )
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == ("words", 4) and len(kinds) == 14
    groups["b"]["targets"] = ["Linear"]
    change(tmp_path, {}, settings)
    with pytest.raises(AdapterkitError, match="2 of the config's groups fit"):
        packed_of(tmp_path)
    groups["b"]["targets"] = ["re:(a+)+("]
    change(tmp_path, {}, settings)
    with pytest.raises(AdapterkitError, match="pattern"):
        packed_of(tmp_path)


def test_scales_of_inputs_and_cache_stay_with_the_format(
    base: Callable[[str], Path], lora: Path, tmp_path: Path
) -> None:
    """Scales of inputs and of the cache are kept with the format, and go with it."""
    shutil.copytree(base("fp8-channel"), tmp_path / "base")
    cache = {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in (0, 1) for x in "kv"}
    change(tmp_path / "base", cache)
    oracle.merge(tmp_path / "base", lora, out=tmp_path / "kept")
    assert set(cache) <= set(stored(tmp_path / "kept"))
    oracle.merge(tmp_path / "base", lora, out=tmp_path / "floats", dequantize=True)
    assert set(stored(tmp_path / "floats")) == set(quantized_llama.llama().state_dict())


def test_parts_in_several_files(base: Callable[[str], Path], lora: Path, tmp_path: Path) -> None:
    """Codes in one file, scales in another."""
    tensors = stored(base("int4"))
    shutil.copytree(base("int4"), tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {key: names[key.endswith("weight_scale")] for key in tensors}
    for name in names:
        save_file(
            {k: v for k, v in tensors.items() if where[k] == name},
            tmp_path / "base" / name,
            {"format": "pt"},
        )
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    for dequantize in (False, True):
        oracle.merge(base("int4"), lora, out=tmp_path / f"one{dequantize}", dequantize=dequantize)
        oracle.merge(
            tmp_path / "base", lora, out=tmp_path / f"two{dequantize}", dequantize=dequantize
        )
        oracle.assert_same(
            oracle.stored(tmp_path / f"two{dequantize}"),
            oracle.stored(tmp_path / f"one{dequantize}"),
        )
        index = json.loads((tmp_path / f"two{dequantize}/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(oracle.stored(tmp_path / f"two{dequantize}"))
    adapterkit.dequantize(tmp_path / "base", out=tmp_path / "plain")
    assert set(oracle.stored(tmp_path / "plain")) == set(quantized_llama.llama().state_dict())


def test_nvfp4_keeps_the_scale_that_layers_share(base: Callable[[str], Path]) -> None:
    """As long as the largest value fits it; then a new one."""
    for name, leaf in (("nvfp4", "weight_global_scale"), ("modelopt-nvfp4", "weight_scale_2")):
        tensors = stored(base(name))
        spec = packed_of(base(name))[Q + "weight"]
        parts = {part.key: tensors[part.key] for part in spec.parts}
        value = spec.decode(parts)
        assert same(spec.encode_keeping_scales(parts, value / 2)[Q + leaf], parts[Q + leaf])
        larger = spec.encode_keeping_scales(parts, value * 2)
        assert not same(larger[Q + leaf], parts[Q + leaf])
        assert torch.allclose(spec.decode(larger), value * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "writable"), [((4, 6), True), ((1, 4, 6), True), ((3, 4, 6), False)]
)
def test_one_fp8_scale_of_a_stack_is_read_only(shape, writable):
    """Encoding gives a scale to each expert, which the stored one cannot hold."""
    place = {"file": "f", "start": 0, "stop": 0, "folder": 0}
    codes, scale = (
        TensorSpec(key=key, dtype=d, shape=s, **place)
        for key, d, s in [("w", "F8_E4M3", shape), ("s", "F32", (1,))]
    )
    weight = Fp8(
        key="w", dtype="BF16", shape=shape, parts=(codes, scale), block=(4, 6), power=False, **place
    )
    assert bool(weight.read_only) is not writable
    assert bool(check_writable([weight], "base")) is not writable
