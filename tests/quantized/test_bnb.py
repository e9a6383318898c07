"""bitsandbytes' files: written as transformers writes them, decoded as it decodes them, refused
where they lie."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit
from adapterkit.errors import AdapterkitError, MultipleErrors, Refused
from adapterkit.kernels import blockwise
from adapterkit.weights.codecs import bnb4
from tests.support import oracle, tiny
from tests.support.quantized_llama import change

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

STATE = bnb4.STATE
K = "model.layers.0.self_attn.k_proj.weight"  # 64 x 128: 128 blocks
Q = "model.layers.0.self_attn.q_proj"
# rows of whole blocks: bitsandbytes decodes no others rightly on CPUs
SIZES = {"hidden_size": 128, "intermediate_size": 192}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, transformers'
    "nf4": ({"to": "nf4"}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": ({"to": "fp4"}, {"load_in_4bit": True}),
    "nf4-double": (
        {"to": "nf4", "double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "fp4-double": (
        {"to": "fp4", "double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ),
    "int8": ({"to": "int8"}, {"load_in_8bit": True}),
}


def wide() -> nn.Module:
    return oracle.llama(**SIZES)


def odd() -> nn.Module:
    """No row is a whole block, and one weight has an odd number of elements."""
    return oracle.llama(
        hidden_size=36,
        intermediate_size=45,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
    )


def wide_gpt2() -> nn.Module:
    return oracle._model(
        "GPT2LMHeadModel",
        transformers.GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    )


def wide_t5() -> nn.Module:
    sizes = {
        "vocab_size": 80,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 1,
        "num_heads": 4,
    }
    return oracle._model("T5ForConditionalGeneration", transformers.T5Config(**sizes))


def slanext() -> nn.Module:
    """Its head's linear layers become float32 before they are quantized."""
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
              "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2}  # fmt: skip
    sizes = {
        "post_conv_in_channels": 16,
        "post_conv_out_channels": 32,
        "out_channels": 10,
        "hidden_size": 32,
    }
    config = transformers.SLANeXtConfig(vision_config=vision, max_text_length=8, **sizes)
    return oracle._model("SLANeXtForTableRecognition", config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama-bf16": (wide, "bf16"),
    "llama-fp32": (wide, "fp32"),
    "llama-fp16": (wide, "fp16"),
    "tied": (lambda: oracle.llama(tie=True, **SIZES), "bf16"),
    "odd": (odd, "bf16"),
    "gpt2-bf16": (oracle.gpt2, "bf16"),
    "gpt2-fp32": (oracle.gpt2, "fp32"),
    "gpt2-wide": (wide_gpt2, "bf16"),
    "bert": (oracle.bert, "fp32"),
    "classifier": (oracle.bert_classifier, "bf16"),
    "t5-bf16": (oracle.t5, "bf16"),
    "t5-fp16": (oracle.t5, "fp16"),  # its wo becomes float32
    "t5-wide": (wide_t5, "fp32"),
    "slanext-bf16": (slanext, "bf16"),
    "slanext-fp16": (slanext, "fp16"),
    "opt": (oracle.opt, "fp16"),
    "clip": (oracle.clip, "fp32"),
}


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str, **how) -> Path:
        build, dtype = MODELS[name]
        label = "-".join(["bnb", name, *how])
        return cached_folder(label, lambda folder: oracle.save_base(build(), folder, dtype, **how))

    return make


@pytest.fixture
def packed(
    cached_folder: Callable[..., Path], base: Callable[..., Path]
) -> Callable[[str, str], Path]:
    """A model in a format, by our hands."""

    def make(name: str, kind: str) -> Path:
        return (
            cached_folder(
                f"bnb-{name}-{kind}",
                lambda folder: quantized(base(name), folder / "q", **KINDS[kind][0]),
            )
            / "q"
        )

    return make


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Path:
    return cached_folder(
        "bnb-lora", lambda folder: oracle.train(wide(), folder, target_modules=["v_proj"])
    )


def quantized(base: Path, out: Path, **how):
    return adapterkit.quantize(base, out=out, **how)


def class_of(folder: Path) -> Any:
    return getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )


def by_transformers(base: Path, out: Path, **settings) -> nn.Module:
    """What its from_pretrained makes of the base, saved."""
    said = transformers.BitsAndBytesConfig(**settings)
    with oracle.quiet():
        model = class_of(base).from_pretrained(
            base, quantization_config=said, device_map="cpu", dtype="auto"
        )
        model.save_pretrained(out)
    return model


def loaded(folder: Path) -> nn.Module:
    with oracle.quiet():
        model, info = class_of(folder).from_pretrained(
            folder, device_map="cpu", dtype="auto", output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same_files(ours: Path, theirs: Path) -> None:
    """The same weights, byte for byte, and the same config but for the dtype to compute in, which
    is the base's here."""
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    found, expected = config(ours), config(theirs)
    settings = found["quantization_config"]
    if settings["load_in_4bit"]:
        assert settings["bnb_4bit_compute_dtype"] == expected["dtype"]
        settings["bnb_4bit_compute_dtype"] = "float32"
    plain = lambda said: {
        k: plain(v) if k.endswith("_config") else v for k, v in said.items() if k != "dtype"
    }
    assert plain(found) == plain(expected)
    assert found["dtype"] == expected["dtype"]


# quantize


ALL = ("llama-bf16", "odd", "gpt2-bf16")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in MODELS for k in KINDS if n in ALL or k in ("nf4-double", "int8")],
)
def test_the_files_are_those_of_transformers(
    base, packed, name: str, kind: str, tmp_path: Path
) -> None:
    by_transformers(base(name), tmp_path, **KINDS[kind][1])
    same_files(packed(name, kind), tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model", ["flint", "inkling2_text", "deepseek_v3", "llava"])
def test_types_whose_names_in_the_file_are_others(model: str, kind: str, tmp_path: Path) -> None:
    """What is quantized is as transformers quantizes it, the rest has the same values, and all of
    it loads. A linear layer that is stored under another name than its `weight` stays a float where
    the loader would not find its scale (nor finds its own)."""
    made = tiny.model(model).half()
    made.save_pretrained(tmp_path / "base")
    by_transformers(tmp_path / "base", tmp_path / "theirs", **KINDS[kind][1])
    receipt = quantized(tmp_path / "base", tmp_path / "ours", **KINDS[kind][0])
    left = {name.removesuffix(".weight").rpartition(".")[2] for name in receipt.data["left_out"]}
    assert left == ({"weight_proj"} if (model, kind) == ("inkling2_text", "int8") else set())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    for key in {*ours, *theirs}:
        if any(key.endswith((name, f"{name}.SCB", f"{name}.weight_format")) for name in left):
            assert key not in ours or ours[key].dtype == torch.float16
        else:
            assert torch.equal(ours[key].to(theirs[key].dtype), theirs[key]), key
    loaded(tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-bf16", kind) for kind in KINDS]
    + [("tied", "int8"), ("gpt2-wide", "nf4"), ("gpt2-fp32", "int8"), ("t5-wide", "nf4-double")],
)
def test_it_loads_and_generates(packed, name: str, kind: str) -> None:
    model = loaded(packed(name, kind))
    cls = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    assert any(type(module) is cls for module in model.modules())
    start = {"decoder_start_token_id": 0} if name == "t5-wide" else {}
    with oracle.quiet():
        ids = model.generate(torch.arange(1, 5)[None], max_new_tokens=4, do_sample=False, **start)
    assert ids.shape[1] > 1 and int(ids.max()) < 80


def test_errors_are_measured(base, packed) -> None:
    receipt = json.loads((packed("llama-bf16", "nf4") / "adapterkit.json").read_text())
    before, metrics = load_file(base("llama-bf16") / "model.safetensors"), receipt["parameters"]
    assert receipt["quantised"] == 14 and len(metrics) == 14
    for key, metric in metrics.items():
        lost = (
            unpacked(load_file(packed("llama-bf16", "nf4") / "model.safetensors"), key)
            - before[key].double()
        )
        assert metric["error"] == pytest.approx(
            float(lost.norm() / before[key].double().norm()), rel=1e-3
        )


def unpacked(tensors: dict[str, Tensor], key: str) -> Tensor:
    """code * scale of a 4-bit weight, in float64 from the stored tensors alone, as stored (out,
    in)."""
    state = next(k for k in tensors if k.startswith(key + STATE))
    said = json.loads(tensors[state].numpy().tobytes())
    absmax = tensors[key + ".absmax"].double()
    if "nested_offset" in said:
        scale = (
            tensors[key + ".nested_absmax"]
            .double()
            .repeat_interleave(said["nested_blocksize"])[: len(absmax)]
        )
        absmax = (
            tensors[key + ".nested_quant_map"].double()[absmax.long()] * scale
            + said["nested_offset"]
        )
    bytes_ = tensors[key].flatten().long()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()
    out, width = said["shape"]
    values = tensors[key + ".quant_map"].double()[codes][: out * width]
    return (values * absmax.repeat_interleave(said["blocksize"])[: out * width]).view(out, width)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_base_in_shards(base, packed, kind: str, tmp_path: Path) -> None:
    sharded = base("llama-bf16", max_shard_size="100KB")
    quantized(sharded, tmp_path / "out", **KINDS[kind][0])
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [file.name for file in files] == [
        file.name for file in sorted(sharded.glob("*.safetensors"))
    ] and len(files) > 2
    tensors = {file.name: load_file(file) for file in files}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name in tensors for key in tensors[name]}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for part in tensors.values() for t in part.values()
    )
    whole = {key: t for part in tensors.values() for key, t in part.items()}
    oracle.assert_same(whole, load_file(packed("llama-bf16", kind) / "model.safetensors"))
    loaded(tmp_path / "out")
    adapterkit.verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama-bf16", "gpt2-bf16"])
def test_skipped_modules_stay(base, name: str, kind: str, tmp_path: Path) -> None:
    skip = {"llama-bf16": r"layers[.]0[.]mlp|o_proj", "gpt2-bf16": r"h[.]0[.]|mlp"}[name]
    ours, theirs = KINDS[kind]
    receipt = quantized(base(name), tmp_path / "ours", skip=skip, **ours)
    listed = config(tmp_path / "ours")["quantization_config"]["llm_int8_skip_modules"]
    by_transformers(base(name), tmp_path / "theirs", llm_int8_skip_modules=listed, **theirs)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base(name), tmp_path / "ours")
    )
    left = [
        key
        for key in before
        if key in after and before[key].dtype == after[key].dtype and before[key].dim() == 2
    ]
    assert (
        set(receipt.data["left_out"]) <= set(left)
        and len(receipt.data["left_out"]) == {"llama-bf16": 5, "gpt2-bf16": 6}[name]
    )
    model = loaded(tmp_path / "ours")
    for key in receipt.data["left_out"]:
        module = model.get_submodule(key.removesuffix(".weight"))
        assert type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D) and torch.equal(
            module.weight, before[key]
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes_are_those_of_the_library(
    base, block: int, double: bool, tmp_path: Path
) -> None:
    """transformers has no setting for it; what it loads, it computes with as it is."""
    quantized(base("llama-bf16"), tmp_path / "out", to="nf4", block_size=block, double_quant=double)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base("llama-bf16"), tmp_path / "out")
    )
    for key in [key for key in before if key + ".absmax" in after]:
        values, state = bnb.functional.quantize_4bit(
            before[key], blocksize=block, quant_type="nf4", compress_statistics=double
        )
        theirs = {"": values} | {f".{k}": v for k, v in state.as_dict(packed=True).items()}
        assert {k.removeprefix(key) for k in after if k.startswith(key)} == set(theirs)
        for ending, value in theirs.items():
            assert torch.equal(after[key + ending], value), key + ending
    model, weight = loaded(tmp_path / "out"), unpacked(after, "model.layers.0.mlp.up_proj.weight")
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert module.weight.quant_state.blocksize == block
    if block > 128:  # longer than a row: bitsandbytes cannot compute with it on CPUs
        return
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(module(x).double(), x.double() @ weight.T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("wrong", [None, "7" * 1000], ids=["shorter", "longer"])
def test_the_guess_of_a_states_size_may_be_wrong_either_way(
    base, packed, wrong: str | None, monkeypatch, tmp_path: Path
) -> None:
    """So far that the header is of another length."""
    monkeypatch.setattr(bnb4, "OFFSET", wrong)
    for name in ("llama-bf16", "gpt2-fp32"):
        plan = adapterkit.quantize(
            base(name), out=tmp_path / name, dry_run=True, **KINDS["nf4-double"][0]
        )
        quantized(base(name), tmp_path / name, **KINDS["nf4-double"][0])
        whole = (packed(name, "nf4-double") / "model.safetensors").read_bytes()
        assert (tmp_path / name / "model.safetensors").read_bytes() == whole
        assert len(plan.shards[0].layout.header) != 8 + int.from_bytes(whole[:8], "little")
        adapterkit.verify(tmp_path / name)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"to": "nf3"}, "--to"),
        ({"to": "nf4", "block_size": 48}, "--block-size 48"),
        ({"to": "nf4", "block_size": -64}, "--block-size -64"),
        ({"to": "int8", "double_quant": True}, "--double-quant"),
        ({"to": "int8", "block_size": 128}, "--block-size"),
        ({"to": "nf4", "skip": "."}, "no linear layer"),
        ({"to": "nf4", "skip": "("}, "--skip"),
        ({"to": "nf4", "skip": "no_such_module"}, "--skip"),
    ],
    ids=str,
)
def test_what_quantize_refuses(base, how: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=text):
        quantized(base("llama-bf16"), tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


def test_a_base_that_cannot_be_quantized(base, packed, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="quantized"):
        quantized(packed("llama-bf16", "nf4"), tmp_path / "out", to="int8")
    unknown = oracle.edit_config(
        base("llama-bf16"),
        tmp_path / "unknown",
        model_type="no_such_model",
        architectures=["NoSuch"],
    )
    with pytest.raises(Refused, match="transformers does not know"):
        quantized(unknown, tmp_path / "out", to="nf4")
    nan = shutil.copytree(base("llama-bf16"), tmp_path / "nan")
    tensor = load_file(nan / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    tensor[3, 4] = torch.nan
    change(nan, {"model.layers.1.mlp.up_proj.weight": tensor})
    for kind in KINDS:
        with pytest.raises(AdapterkitError, match="not finite"):
            quantized(nan, tmp_path / "out", **KINDS[kind][0])
    assert not (tmp_path / "out").exists()


def test_magnitudes_that_float16_cannot_hold_are_refused_in_int8(base, tmp_path: Path) -> None:
    large = shutil.copytree(base("llama-bf16"), tmp_path / "large")
    tensor = load_file(large / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    tensor[3, 4] = 1e5
    change(large, {"model.layers.1.mlp.up_proj.weight": tensor})
    with pytest.raises(AdapterkitError, match="up_proj.*float16"):
        quantized(large, tmp_path / "out", to="int8")
    assert not (tmp_path / "out").exists()
    quantized(large, tmp_path / "out", to="nf4")


# dequantize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-bf16", "llama-fp16", "gpt2-wide"])
def test_decoded_as_transformers_does(packed, name: str, kind: str, tmp_path: Path) -> None:
    adapterkit.dequantize(packed(name, kind), out=tmp_path / "out")
    with oracle.quiet():
        theirs = loaded(packed(name, kind)).dequantize().state_dict()
    ours = loaded(tmp_path / "out").state_dict()
    assert "quantization_config" not in config(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        # it forgets that a Conv1D is (in, out)
        turned = (
            name == "gpt2-wide"
            and value.dim() == 2
            and key.rsplit(".", 2)[1] in ("c_attn", "c_proj", "c_fc")
        )
        other = theirs[key].T if turned else theirs[key]
        assert other.dtype == value.dtype or turned or kind == "int8", key
        assert torch.equal(value, other.to(value.dtype)), key


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4-double"])
def test_each_value_is_rounded_once(packed, kind: str, dtype: str, tmp_path: Path) -> None:
    source = packed("odd", kind)
    adapterkit.dequantize(source, out=tmp_path / "out", dtype=dtype)
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert config(tmp_path / "out")["dtype"] == str(oracle.DTYPES[dtype]).removeprefix("torch.")
    count = 0
    for key, value in after.items():
        if key + ".absmax" not in before:
            assert torch.equal(value, before[key])
            continue
        exact, count = unpacked(before, key), count + 1
        assert value.dtype == oracle.DTYPES[dtype]
        tolerance = torch.finfo(value.dtype).eps / 2 + 2.0**-22
        torch.testing.assert_close(
            value.double(), exact, rtol=tolerance, atol=1e-9 if dtype != "fp16" else 1e-7
        )
    assert count == 14


def test_dequantize_of_floats_is_refused(base, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no quantized weights"):
        adapterkit.dequantize(base("llama-bf16"), out=tmp_path / "out")


def test_codes_stored_as_other_numbers_are_the_same_bytes(
    base, packed, lora: Path, tmp_path: Path
) -> None:
    """bnb_4bit_quant_storage, as FSDP wants it; many of these bytes are NaN as bfloat16."""
    by_transformers(
        base("llama-bf16"), tmp_path / "q", **KINDS["nf4"][1], bnb_4bit_quant_storage="bfloat16"
    )
    assert load_file(tmp_path / "q" / "model.safetensors")[K].dtype == torch.bfloat16
    for verb in (adapterkit.dequantize, lambda base, **how: oracle.merge(base, lora, **how)):
        verb(tmp_path / "q", out=tmp_path / "out", overwrite=True)
        verb(packed("llama-bf16", "nf4"), out=tmp_path / "other", overwrite=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
            tmp_path / "other" / "model.safetensors"
        ).read_bytes()
        loaded(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-bf16", "llama-fp32"])
def test_what_was_saved_after_a_forward_pass(
    base, packed, lora: Path, name: str, tmp_path: Path
) -> None:
    """On CPUs that multiply bfloat16 bitsandbytes leaves the scales in a transposed matrix of it,
    exact where the weights were."""
    model = by_transformers(base(name), tmp_path / "before", **KINDS["nf4"][1])
    with oracle.quiet(), torch.no_grad():
        model(torch.arange(6)[None])
        model.save_pretrained(tmp_path / "q")
    spoiled = load_file(tmp_path / "q" / "model.safetensors")[K + ".absmax"].dim() == 2
    if spoiled and name == "llama-fp32":
        with pytest.raises(AdapterkitError, match="after a forward pass"):
            adapterkit.dequantize(tmp_path / "q", out=tmp_path / "out")
        return
    adapterkit.dequantize(tmp_path / "q", out=tmp_path / "out")
    adapterkit.dequantize(packed(name, "nf4"), out=tmp_path / "plain")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    if spoiled:
        with pytest.raises(Refused, match="--dequantize"):
            adapterkit.merge(tmp_path / "q", [lora], out=tmp_path / "merged")
    oracle.merge(tmp_path / "q", lora, out=tmp_path / "floats", dequantize=True)


# lies

NAN, INF = float("nan"), float("inf")


def text(said: dict[str, Any] | str) -> Tensor:
    data = said if isinstance(said, str) else json.dumps(said)
    return torch.frombuffer(bytearray(data.encode()), dtype=torch.uint8)


PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}
DOUBLE = PLAIN | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.01}
LIES: dict[str, tuple[str, dict[str, Any], str]] = {  # kind, changes, what the refusal says
    "no absmax": ("nf4", {K + ".absmax": None}, "without .absmax"),
    "no quant_map": ("nf4", {K + ".quant_map": None}, "without .quant_map"),
    "no codes": ("nf4", {K: None}, "without "),
    "no state": ("nf4", {K + STATE + "nf4": None}, "k_proj"),
    "no nested_absmax": ("nf4-double", {K + ".nested_absmax": None}, "without .nested_absmax"),
    "no nested_quant_map": (
        "nf4-double",
        {K + ".nested_quant_map": None},
        "without .nested_quant_map",
    ),
    "no JSON": ("nf4", {K + STATE + "nf4": text("{'a': 1}")}, "not a JSON object"),
    "a list": ("nf4", {K + STATE + "nf4": text("[1]")}, "not a JSON object"),
    "an empty object": ("nf4", {K + STATE + "nf4": text("{}")}, "beside weights of bnb4"),
    "no text": ("nf4", {K + STATE + "nf4": torch.zeros(0, dtype=torch.uint8)}, "not a JSON object"),
    "not UTF-8": (
        "nf4",
        {K + STATE + "nf4": torch.full((40,), 255, dtype=torch.uint8)},
        "not a JSON object",
    ),
    "nested deeply": ("nf4", {K + STATE + "nf4": text("[" * 100_000)}, "not a JSON object"),
    "another shape": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [64, 64]})},
        "for (64, 64)",
    ),
    "three numbers": ("nf4", {K + STATE + "nf4": text(PLAIN | {"shape": [64, 2, 64]})}, "state"),
    "shape of floats": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [64.0, 128.0]})},
        "state",
    ),
    "shape below 0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"shape": [-64, -128]})}, "state"),
    "huge shape": (
        "nf4",
        {K + STATE + "nf4": text(PLAIN | {"shape": [1 << 40, 1 << 40]})},
        "blocks of 64",
    ),
    "block of 128": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 128})}, "blocks of 128"),
    "block of 0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 0})}, "state"),
    "block of true": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": True})}, "state"),
    "block of 64.0": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": 64.0})}, "state"),
    "block in a list": ("nf4", {K + STATE + "nf4": text(PLAIN | {"blocksize": [64]})}, "state"),
    "af4": ("nf4", {K + STATE + "nf4": text(PLAIN | {"quant_type": "af4"})}, "state"),
    "fp4 in nf4": ("nf4", {K + STATE + "nf4": text(PLAIN | {"quant_type": "fp4"})}, "state"),
    "a state of af4": (
        "nf4",
        {K + STATE + "nf4": None, K + STATE + "af4": text(PLAIN | {"quant_type": "af4"})},
        "kind 'af4'",
    ),
    "two states": ("nf4", {K + STATE + "fp4": text(PLAIN | {"quant_type": "fp4"})}, "k_proj"),
    "dtype of integers": ("nf4", {K + STATE + "nf4": text(PLAIN | {"dtype": "int64"})}, "state"),
    "unknown dtype": ("nf4", {K + STATE + "nf4": text(PLAIN | {"dtype": ["x"]})}, "state"),
    "a table of fp4": ("nf4", {K + ".quant_map": blockwise.quant_map("fp4")}, "another table"),
    "a table with NaN": ("nf4", {K + ".quant_map": torch.full((16,), NAN)}, "another table"),
    "a short table": ("nf4", {K + ".quant_map": torch.zeros(15)}, "quant_map F32 (15,)"),
    "NaN": (
        "nf4",
        {K + ".absmax": torch.ones(128).index_fill_(0, torch.tensor([7]), NAN)},
        "NaN or infinite",
    ),
    "infinity": (
        "fp4",
        {K + ".absmax": torch.ones(128).index_fill_(0, torch.tensor([7]), -INF)},
        "NaN or infinite",
    ),
    "NaN nested": ("nf4-double", {K + ".nested_absmax": torch.tensor([NAN])}, "NaN or infinite"),
    "NaN in the nested table": (
        "nf4-double",
        {K + ".nested_quant_map": torch.full((256,), NAN)},
        "NaN or infinite",
    ),
    "few scales": ("nf4", {K + ".absmax": torch.ones(127)}, "absmax F32 (127,)"),
    "scales in half": ("nf4", {K + ".absmax": torch.ones(128).half()}, "absmax F16"),
    "few nested scales": (
        "nf4-double",
        {K + ".nested_absmax": torch.ones(2)},
        "nested_absmax F32 (2,)",
    ),
    "few nested codes": (
        "nf4-double",
        {K + ".absmax": torch.ones(127, dtype=torch.uint8)},
        "absmax U8 (127,)",
    ),
    "a short nested table": (
        "nf4-double",
        {K + ".nested_quant_map": torch.zeros(255)},
        "nested_quant_map F32 (255,)",
    ),
    "nested scales in half": (
        "nf4-double",
        {K + ".nested_absmax": torch.ones(1).half()},
        "nested_absmax F16",
    ),
    "offset NaN": (
        "nf4-double",
        {K + STATE + "nf4": text(json.dumps(DOUBLE | {"nested_offset": NAN}))},
        "state",
    ),
    "offset in words": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_offset": "0.1"})},
        "state",
    ),
    "nested block": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_blocksize": 128})},
        "state",
    ),
    "nested dtype": (
        "nf4-double",
        {K + STATE + "nf4": text(DOUBLE | {"nested_dtype": "int8"})},
        "state",
    ),
    "said to be plain": ("nf4-double", {K + STATE + "nf4": text(PLAIN)}, "absmax U8"),
    "said to be double": ("nf4", {K + STATE + "nf4": text(DOUBLE)}, "without .nested_absmax"),
    "codes of 8 bytes": ("nf4", {K: torch.ones(512, 1, dtype=torch.int64)}, "codes I64"),
    "few codes": ("nf4", {K: torch.ones(4095, 1, dtype=torch.uint8)}, "codes U8 (4095, 1)"),
    "scales in a matrix": (
        "nf4",
        {K + ".absmax": torch.ones(64, 2).bfloat16()},
        "absmax BF16 (64, 2)",
    ),
    "int8 without codes": ("int8", {Q + ".weight": None}, "without .weight"),
    "int8 without scales": ("int8", {Q + ".SCB": None}, "q_proj"),
    "int8 few scales": ("int8", {Q + ".SCB": torch.ones(127)}, "SCB F32 (127,)"),
    "int8 scales of columns": ("int8", {Q + ".SCB": torch.ones(1, 128)}, "SCB F32 (1, 128)"),
    "int8 scales in half": ("int8", {Q + ".SCB": torch.ones(128).half()}, "SCB F16"),
    "int8 NaN": ("int8", {Q + ".SCB": torch.full((128,), NAN)}, "NaN or infinite"),
    "int8 infinite": ("int8", {Q + ".SCB": torch.full((128,), INF)}, "NaN or infinite"),
    "int8 tiles": ("int8", {Q + ".weight_format": torch.tensor(1, dtype=torch.uint8)}, "format 1"),
    "int8 format in words": (
        "int8",
        {Q + ".weight_format": torch.ones(3, dtype=torch.uint8)},
        "format",
    ),
    "int8 floats": ("int8", {Q + ".weight": torch.ones(128, 128)}, "F32 (128, 128)"),
    "int8 bytes": (
        "int8",
        {Q + ".weight": torch.ones(128, 128, dtype=torch.uint8)},
        "U8 (128, 128)",
    ),
    "int8 cubes": (
        "int8",
        {Q + ".weight": torch.ones(128, 16, 8, dtype=torch.int8)},
        "I8 (128, 16, 8)",
    ),
}


MERGED = (
    "no absmax",
    "block of 128",
    "NaN",
    "offset in words",
    "scales in a matrix",
    "int8 tiles",
    "int8 NaN",
)


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(packed, lora: Path, lie: str, tmp_path: Path) -> None:
    jobs: list[Callable] = [adapterkit.dequantize]
    if lie in MERGED:
        jobs.append(lambda base, **how: adapterkit.merge(base, [lora], **how))
    kind, tensors, said = LIES[lie]
    source = shutil.copytree(packed("llama-bf16", kind), tmp_path / "base")
    change(source, tensors)
    for job in jobs:
        with pytest.raises(AdapterkitError) as caught:
            job(source, out=tmp_path / "out")
        assert said in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_all_lies_at_once(packed, lora: Path, tmp_path: Path) -> None:
    source = shutil.copytree(packed("llama-bf16", "nf4-double"), tmp_path / "base")
    layer = "model.layers.1.mlp."
    change(
        source,
        {
            K + ".absmax": None,
            f"{Q}.weight.nested_absmax": torch.tensor([NAN]),
            f"{layer}up_proj.weight{STATE}nf4": text("no"),
            f"{layer}down_proj.weight.quant_map": torch.zeros(16),
        },
    )
    with pytest.raises(MultipleErrors) as caught:
        adapterkit.merge(source, [lora], out=tmp_path / "out")
    for word in (
        K,
        "without .absmax",
        f"{Q}.weight.nested_absmax",
        f"{layer}up_proj",
        f"{layer}down_proj.weight.quant_map",
    ):
        assert word in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
