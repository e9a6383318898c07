"""quantize to compressed-tensors' schemes and to MXFP4, LoftQ with several widths: as the library
stores and reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.core.errors import Refused, Unrecoverable
from tests.support import oracle

pytest.importorskip("compressed_tensors")
peft = pytest.importorskip("peft")

IDS = torch.arange(12)[None]
TARGETS = ("w4a16", "w8a16", "mxfp4")
transformers.utils.logging.disable_progress_bar()


def odd() -> nn.Module:
    """Widths that 128 does not divide: 192 is groups of 64, 80 one of its own."""
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return oracle.llama(num_hidden_layers=1, **sizes)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (
        lambda: oracle.llama(num_hidden_layers=2, hidden_size=256, intermediate_size=384),
        "bf16",
    ),
    "odd": (odd, "bf16"),
    "tied": (
        lambda: oracle.llama(tie=True, num_hidden_layers=1, hidden_size=128, intermediate_size=128),
        "fp32",
    ),
    "opt": (oracle.opt, "fp16"),
}


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda name: cached_folder(
        f"ct-{name}", lambda folder: oracle.save_base(MODELS[name][0](), folder, MODELS[name][1])
    )


@pytest.fixture
def gpt_oss(cached_folder: Callable[..., Path]) -> Path:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**sizes, **heads, **experts)
    return cached_folder(
        "ct-gpt-oss",
        lambda folder: oracle.save_base(oracle._model("GptOssForCausalLM", config), folder, "bf16"),
    )


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def loaded(folder: Path, dtype: Any = "auto") -> nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    with oracle.quiet():
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        model(IDS)  # compressed-tensors decompresses what it needs at the first pass
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def by_the_library(weight: Tensor, scheme: dict[str, Any], form: str) -> dict[str, Tensor]:
    """What compressed-tensors stores of a weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**scheme)
    parts = weight.float().unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero = calculate_qparams(parts.amin(2), parts.amax(2), args)
    if form == "pack-quantized":
        scale = scale.to(weight.dtype)
    state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    return compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))


def scheme_of(module: str, message: dict[str, Any]) -> dict[str, Any]:
    (group,) = (
        g
        for g in message["config_groups"].values()
        if module in g["targets"] or "Linear" in g["targets"]
    )
    return group["weights"]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_the_library(base, name: str, to: str, tmp_path: Path) -> None:
    receipt: Any = adapterkit.quantize(base(name), to=to, out=tmp_path / "out")
    old, new, message = stored(base(name)), stored(tmp_path / "out"), settings(tmp_path / "out")
    observed = 0
    for key, weight in old.items():
        if key in new:
            assert torch.equal(weight, new[key]) and key not in receipt.data["parameters"]
            continue
        module = key.removesuffix(".weight")
        theirs = by_the_library(weight, scheme_of(module, message), message["format"])
        for leaf, tensor in theirs.items():
            ours = new[f"{module}.{leaf}"]
            assert (
                ours.dtype == tensor.dtype
                and ours.shape == tensor.shape
                and torch.equal(ours, tensor)
            ), (module, leaf)
        assert receipt.data["parameters"][key]["error"] < (0.02 if to == "w8a16" else 0.25)
        observed += len(theirs)
    assert observed == len(new.keys() - old.keys()) > 0
    kept = [tensor for key, tensor in old.items() if key in new]
    totals = receipt.data["totals"]
    assert totals["tensors"] == len(new) == totals["tensors_changed"] + len(kept)
    assert totals["bytes_copied"] == sum(tensor.nbytes for tensor in kept)
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["llama", "odd", "tied"])
def test_transformers_loads_what_is_decoded(base, name: str, to: str, tmp_path: Path) -> None:
    adapterkit.quantize(base(name), to=to, out=tmp_path / "out")
    adapterkit.dequantize(tmp_path / "out", out=tmp_path / "floats", dtype="fp32")
    dtype = torch.bfloat16 if to == "mxfp4" else "auto"  # the library decodes it to nothing else
    model, floats = loaded(tmp_path / "out", dtype), stored(tmp_path / "floats")
    actual = model.state_dict()
    for key, weight in floats.items():
        assert float((actual[key].float() - weight).norm()) <= 2**-8 * float(weight.norm()), key
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 16)


def test_groups_divide_the_width(base, tmp_path: Path) -> None:
    adapterkit.quantize(base("odd"), to="w4a16", out=tmp_path / "out")
    tensors = stored(tmp_path / "out")
    assert tensors["model.layers.0.self_attn.q_proj.weight_scale"].shape == (192, 3)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (192, 1)
    adapterkit.quantize(
        base("odd"), to="w4a16", block_size=32, skip="up_proj", out=tmp_path / "small"
    )
    tensors, message = stored(tmp_path / "small"), settings(tmp_path / "small")
    assert tensors["model.layers.0.self_attn.q_proj.weight_scale"].shape == (192, 6)
    assert message["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded(tmp_path / "small").state_dict()[up], stored(base("odd"))[up])


@pytest.mark.parametrize("name", ["llama", "odd"])
def test_an_adapter_is_merged_into_it(base, name: str, tmp_path: Path) -> None:
    adapterkit.quantize(base(name), to="w4a16", out=tmp_path / "q")
    oracle.train(
        MODELS[name][0](), tmp_path / "lora", target_modules=["q_proj", "down_proj"], size=0.5
    )
    adapterkit.merge(tmp_path / "q", [tmp_path / "lora"], out=tmp_path / "out")
    adapterkit.merge(tmp_path / "q", [tmp_path / "lora"], out=tmp_path / "floats", dequantize=True)
    kept, floats = loaded(tmp_path / "out").state_dict(), stored(tmp_path / "floats")
    assert settings(tmp_path / "out") == settings(tmp_path / "q")
    for key, weight in floats.items():
        assert float((kept[key].float() - weight.float()).norm()) <= 0.16 * float(
            weight.float().norm()
        ), key


# names and layers that are not as they seem


TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture
def llava(cached_folder: Callable[..., Path]) -> Path:
    text = transformers.LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=96)
    vision = transformers.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=90)
    return cached_folder(
        "ct-llava",
        lambda folder: oracle.save_base(
            oracle._model("LlavaForConditionalGeneration", config), folder, "bf16"
        ),
    )


@pytest.fixture
def vit(cached_folder: Callable[..., Path]) -> Path:
    config = transformers.ViTConfig(**TOWER, image_size=16, patch_size=8)
    return cached_folder(
        "ct-vit",
        lambda folder: oracle.save_base(
            oracle._model("ViTForImageClassification", config), folder, "bf16"
        ),
    )


def same_as_decoded(model: nn.Module, quantized: Path, out: Path) -> None:
    """The weights of a loaded model are those that dequantize writes, which the same class
    loads."""
    adapterkit.dequantize(quantized, out=out, dtype="fp32")
    with oracle.quiet():
        floats = type(model).from_pretrained(out, dtype=torch.float32).state_dict()
    actual = model.state_dict()
    assert floats.keys() <= actual.keys()
    for key, weight in floats.items():
        assert (
            float((actual[key].float() - weight).norm()) <= 2**-8 * float(weight.norm()) + 1e-6
        ), key


@pytest.mark.parametrize("to", ["w4a16", "w8a16"])
def test_a_model_of_text_and_images(llava: Path, to: str, tmp_path: Path) -> None:
    """Its keys are those of an older transformers, and fit the class without the head better."""
    adapterkit.quantize(llava, to=to, out=tmp_path / "out", skip=".*multi_modal_projector.*")
    message = settings(tmp_path / "out")
    assert set(message["ignore"]) == {
        "lm_head",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    }
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    model(IDS)
    with torch.no_grad():  # the vision tower has seen nothing yet
        model.model.vision_tower(torch.randn(1, 3, 16, 16).to(model.dtype))
    same_as_decoded(model, tmp_path / "out", tmp_path / "floats")


def test_skipped_modules_include_the_head_of_a_vision_language_model(
    llava: Path, tmp_path: Path
) -> None:
    adapterkit.quantize(llava, to="nf4", skip=".*vision_tower.*", out=tmp_path / "out")
    assert "lm_head" in settings(tmp_path / "out")["llm_int8_skip_modules"]


def test_targets_are_the_loaded_models_and_read_as_such(vit: Path, tmp_path: Path) -> None:
    """Several groups name their modules; the keys have other names."""
    adapterkit.quantize(vit, to="w4a16", out=tmp_path / "out")
    groups = settings(tmp_path / "out")["config_groups"]
    assert len(groups) == 2 and any(
        "vit.layers.0.attention.q_proj" in group["targets"] for group in groups.values()
    )
    assert "vit.encoder.layer.0.attention.attention.query.weight_packed" in stored(tmp_path / "out")
    with oracle.quiet():
        model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
        model(torch.randn(1, 3, 16, 16).to(model.dtype))
    same_as_decoded(model, tmp_path / "out", tmp_path / "floats")


def test_linear_layers_of_other_classes_are_ignored(
    cached_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """compressed-tensors takes derived classes for Linear, as MultiheadAttention's out_proj is
    one."""
    text = {**TOWER, "vocab_size": 96, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(
        text_config=text, vision_config={**TOWER, "image_size": 16, "patch_size": 8}
    )
    base = cached_folder(
        "ct-siglip",
        lambda folder: oracle.save_base(oracle._model("SiglipModel", config), folder, "bf16"),
    )
    adapterkit.quantize(base, to="w8a16", out=tmp_path / "out")
    assert "vision_model.head.attention.out_proj" in settings(tmp_path / "out")["ignore"]


def test_experts_are_refused(cached_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **TOWER, num_key_value_heads=2, vocab_size=96, num_local_experts=2
    )
    base = cached_folder(
        "ct-mixtral",
        lambda folder: oracle.save_base(
            oracle._model("MixtralForCausalLM", config), folder, "bf16"
        ),
    )
    for to in TARGETS:
        with pytest.raises(Refused, match="with experts"):
            adapterkit.quantize(base, to=to, out=tmp_path / "no")
    with pytest.raises(Refused, match="with experts"):
        adapterkit.loftq(base, rank=2, bits_for=["q_proj=8"], out=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    adapterkit.quantize(base, to="nf4", out=tmp_path / "nf4")


def test_values_that_decode_to_infinity_are_refused(tmp_path: Path) -> None:
    oracle.save_base(MODELS["tied"][0](), tmp_path / "base", "fp32")
    tensors = stored(tmp_path / "base")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][0, 0] = -3.4e38  # code -8 of 7.5 steps
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    verbs: dict[str, Callable[[], Any]] = {
        "quantize": lambda: adapterkit.quantize(tmp_path / "base", to="w4a16", out=tmp_path / "no"),
        "loftq": lambda: adapterkit.loftq(
            tmp_path / "base", rank=2, bits_for=["q_proj=8"], out=tmp_path / "no"
        ),
        "init": lambda: adapterkit.init(
            tmp_path / "base", method="pissa", rank=2, quantize="w4a16", out=tmp_path / "no"
        ),
    }
    for verb in verbs.values():
        with pytest.raises(
            Unrecoverable, match="up_proj.weight decodes to values that are not finite"
        ):
            verb()
        assert not (tmp_path / "no").exists()


# MXFP4 of GPT-OSS


def test_gpt_oss_as_its_makers_store_it(gpt_oss: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    receipt: Any = adapterkit.quantize(gpt_oss, to="mxfp4", out=tmp_path / "out")
    old, new = stored(gpt_oss), stored(tmp_path / "out")
    stacks = {key for key in old if key.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert set(receipt.data["parameters"]) == stacks and len(stacks) == 4
    assert new.keys() - old.keys() == {
        key + ending for key in stacks for ending in ("_blocks", "_scales")
    }
    assert old.keys() - new.keys() == stacks and all(
        torch.equal(new[key], old[key]) for key in old.keys() - stacks
    )
    assert settings(tmp_path / "out")["quant_method"] == "mxfp4"
    model = loaded(tmp_path / "out").state_dict()
    for key in stacks:
        error = float((model[key].double() - old[key].double()).norm() / old[key].double().norm())
        assert (
            error == pytest.approx(receipt.data["parameters"][key]["error"], rel=1e-3)
            and error < 0.14
        )
    adapterkit.dequantize(tmp_path / "out", out=tmp_path / "plain")
    assert all(
        torch.equal(weight, model[key]) for key, weight in stored(tmp_path / "plain").items()
    )


def test_a_layer_of_gpt_oss_is_left_alone(gpt_oss: Path, tmp_path: Path) -> None:
    adapterkit.quantize(gpt_oss, to="mxfp4", skip=r".*layers\.0\.mlp.*", out=tmp_path / "out")
    assert "model.layers.0.mlp.experts" in settings(tmp_path / "out")["modules_to_not_convert"]
    tensors = stored(tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    assert "model.layers.1.mlp.experts.gate_up_proj_blocks" in tensors
    with pytest.raises(Refused, match="both or none"):
        adapterkit.quantize(gpt_oss, to="mxfp4", skip="q_proj,gate_up_proj", out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


# LoftQ with several widths


def test_loftq_with_several_widths(base, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "rank": 8,
        "bits_for": ["layers.0.*(down|q)_proj=8", "layers.1.*down_proj=4"],
    }
    receipt: Any = adapterkit.loftq(base("llama"), out=tmp_path / "out", **how)
    metrics = {
        key: metric for key, metric in receipt.data["parameters"].items() if "error_after" in metric
    }
    wide = {f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert (
        len(metrics) == 14
        and {key for key, metric in metrics.items() if metric["error"] < 0.03} == wide
    )
    assert all(metric["error_after"] < metric["error"] for metric in metrics.values())
    packed = stored(tmp_path / "out" / "base")
    for key in metrics:
        assert (
            packed[key.replace("weight", "weight_packed")].shape[1] * (4 if key in wide else 8)
            == packed[key.replace("weight", "weight_shape")][1]
        )
    old = stored(base("llama"))
    model = peft.PeftModel.from_pretrained(
        loaded(tmp_path / "out" / "base"), tmp_path / "out" / "adapter"
    )
    merged = model.merge_and_unload().state_dict()
    for key, metric in metrics.items():
        error = float((merged[key].double() - old[key].double()).norm() / old[key].double().norm())
        # the library computes in bfloat16
        assert error == pytest.approx(metric["error_after"], rel=0.1), key
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"bits_for": ["down_proj"]}, "the value 4 or 8"),
        ({"bits_for": ["down_proj=2"]}, "the value 4 or 8"),
        ({"bits_for": ["=8"]}, "the value 4 or 8"),
        ({"bits_for": ["nothing=8"]}, "matches none"),
        ({"bits_for": ["mlp=8"]}, "matches none"),
        ({"bits_for": ["(=8"]}, "regular expression"),
        ({"bits_for": ["down_proj=8"], "double_quant": True}, "double-quant"),
        ({"bits_for": ["down_proj=8"], "block_size": 48}, "one of 128, 64, 32"),
        ({"bits": 8, "block_size": 64}, "block-size"),
    ],
)
def test_widths_that_are_refused(base, how: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=text):
        adapterkit.loftq(base("llama"), rank=4, out=tmp_path / "no", **how)
    assert not (tmp_path / "no").exists()


def test_the_loftq_command_into_compressed_tensors(base, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from adapterkit.cli import main

    source, out = str(base("llama")), str(tmp_path / "out")
    words = [
        "--rank",
        "4",
        "--iterations",
        "1",
        "--bits-for",
        "q_proj=8",
        "--bits-for",
        "v_proj=8",
        "--out",
        out,
        "--json",
    ]
    done = CliRunner().invoke(main, ["loftq", source, *words])
    assert done.exit_code == 0, done.output
    groups = settings(tmp_path / "out" / "base")["config_groups"].values()
    assert {group["weights"]["num_bits"]: len(group["targets"]) for group in groups} == {
        4: 10,
        8: 4,
    }
