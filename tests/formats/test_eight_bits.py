"""Adapters whose factors are in 8 bits: each verb reads the float32 that they decode to."""

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit import Refused, Unrecoverable
from adapterkit.adapters.formats.peft import eight_bits
from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.runtime import load
from tests.support.usual import usual

WEIGHTS, RECEIPT = "adapter_model.safetensors", "adapterkit.json"
Codes = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # codes, and scales by last word


def cast(dtype: torch.dtype) -> Codes:
    """As TensorRT-LLM takes them: no scale."""
    return lambda w: (w.to(dtype), {})


def scaled(name: str, dtype: torch.dtype, top: float, shape: str) -> Codes:
    """As convert_to_quant writes them, a scale of the tensor or of its rows."""

    def codes(w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        size = w.abs().amax() if shape == "tensor" else w.abs().amax(1, keepdim=shape == "columns")
        scale = size / top
        values = w / (scale[:, None] if shape == "rows" else scale)
        values = values.round() if dtype is torch.int8 else values
        return values.to(dtype), {name: scale.float()}

    return codes


E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
LAYOUTS = {
    "E4M3": cast(E4M3),
    "E5M2": cast(E5M2),
    "int8": scaled("scale_weight", INT8, 127, "tensor"),
    "int8 rows": scaled("scale_weight", INT8, 127, "rows"),
    "int8 columns": scaled("weight_scale", INT8, 127, "columns"),
    "E4M3 scale": scaled("weight_scale", E4M3, 448, "tensor"),
}


def decoded(codes: Tensor, scales: dict[str, Tensor]) -> Tensor:
    """The reference, in float64 until the one rounding."""
    for scale in scales.values():
        if scale.numel() not in (1, len(codes)):
            break
        return (codes.double() * scale.double().reshape(-1, 1)).float()
    return codes.float()


def write(source: Path, out: Path, layout: Codes) -> tuple[Path, Path]:
    """The adapter with factors in 8 bits, and the one that it decodes to."""
    packed, plain = out / "packed", out / "plain"
    generator = torch.Generator().manual_seed(3)
    mine, floats = {}, {}
    for key, value in load_file(source / WEIGHTS).items():
        codes, scales = layout(torch.randn(value.shape, generator=generator) / 8)
        mine |= {key: codes} | {key.removesuffix("weight") + n: s for n, s in scales.items()}
        floats[key] = decoded(codes, scales)
    for folder, tensors in ((packed, mine), (plain, floats)):
        folder.mkdir(parents=True)
        shutil.copy(source / "adapter_config.json", folder)
        save_file(tensors, folder / WEIGHTS)
    return packed, plain


VERBS = {
    "merge": lambda base, a, out: adapterkit.merge(base, {a: 0.7}, out=out, verify=True),
    "combine": lambda base, a, out: adapterkit.combine([a, a], method="linear", out=out),
    "resize": lambda base, a, out: adapterkit.resize(a, rank=2, out=out),
    "peft": lambda base, a, out: adapterkit.convert(a, to="peft", out=out),
    "vllm": lambda base, a, out: adapterkit.convert(a, to="vllm", base=base, out=out),
}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same tensors."""
    names = [path.name for path in one.glob("*.safetensors")]
    a, b = (
        {k: v for name in names for k, v in load_file(folder / name).items()}
        for folder in (one, other)
    )
    return bool(names) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("layout", usual(list(LAYOUTS), ("E4M3", "int8 rows")))
@pytest.mark.parametrize("verb", list(VERBS))
def test_a_verb_reads_what_they_decode_to(verb: str, layout: str, llama, lora, tmp_path: Path):
    packed, plain = write(lora, tmp_path, LAYOUTS[layout])
    receipt = VERBS[verb](llama, packed, tmp_path / "of-packed")
    VERBS[verb](llama, plain, tmp_path / "of-plain")
    assert same_weights(tmp_path / "of-packed", tmp_path / "of-plain")
    kind = "I8" if layout.startswith("int8") else f"F8_{layout[:4]}"
    assert any(f"are {kind}, read as the float32" in note for note in receipt.data["notes"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_models_answer_as_peft_does(layout: str, llama, lora, tmp_path: Path):
    packed, plain = write(lora, tmp_path, LAYOUTS[layout])
    adapterkit.merge(llama, packed, out=tmp_path / "merged", dtype="fp32")
    ids = torch.arange(1, 13)[None]
    auto = transformers.AutoModelForCausalLM
    with torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        base = auto.from_pretrained(llama, dtype=torch.float32)
        before = base(ids).logits
        live = load(base, packed)
        ours = base(ids).logits
        live.detach()
        expected = peft.PeftModel.from_pretrained(base, plain)(ids).logits
    assert (expected - before).abs().max() > 0.01
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_inspect_reports_eight_bit_factors(lora, tmp_path: Path):
    packed, plain = write(lora, tmp_path, LAYOUTS["E4M3"])
    one, other = adapterkit.inspect(packed), adapterkit.inspect(plain)
    assert [m["norm"] for m in one["modules"]] == [m["norm"] for m in other["modules"]]
    assert adapterkit.diff(packed, plain)["same"]


@pytest.mark.parametrize("layout", ["E4M3", "int8 rows"])
def test_files_of_other_tools(layout: str, tmp_path: Path):
    """kohya's names, the alphas cast, too."""
    mine, floats = {}, {}
    for part, shape in {"lora_down": (4, 16), "lora_up": (48, 4)}.items():
        key = f"lora_unet_double_blocks_0_img_attn_qkv.{part}."
        codes, scales = LAYOUTS[layout](torch.randn(shape))
        mine |= {f"{key}weight": codes} | {key + name: scale for name, scale in scales.items()}
        floats[f"{key}weight"] = decoded(codes, scales)
    alpha = torch.tensor(3.0)
    key = "lora_unet_double_blocks_0_img_attn_qkv.alpha"
    mine[key] = alpha.to(E4M3) if layout == "E4M3" else alpha
    floats[key] = alpha
    metadata = {"ss_base_model_version": "flux1"}
    for name, tensors in (("packed", mine), ("plain", floats)):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=metadata)
        adapterkit.convert(path, to="peft", out=tmp_path / name)
        adapterkit.convert(path, to="kohya", out=tmp_path / f"again-{name}.safetensors")
    assert same_weights(tmp_path / "packed", tmp_path / "plain")
    again = [load_file(tmp_path / f"again-{name}.safetensors") for name in ("packed", "plain")]
    assert all(torch.equal(again[0][key], again[1][key]) for key in floats)


@pytest.mark.parametrize("scales", [(), (4, 1, 1), (1,)])
def test_parts_of_a_stack(scales: tuple[int, ...]):
    """A file's stack is read one expert at a time."""
    codes = torch.arange(-60, 60).to(INT8).view(4, 5, 6)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)) + 0.5
    bytes_of = codes.numpy().tobytes() + scale.numpy().tobytes()
    tensors = {
        "x.weight": TensorSpec("x.weight", "I8", (4, 5, 6), "", 0, 120),
        "x.weight_scale": TensorSpec("x.weight_scale", "F32", scales, "", 120, len(bytes_of)),
    }
    spec = eight_bits.decoded(tensors)["x.weight"]
    assert isinstance(spec, eight_bits.EightBits)
    part = spec.narrowed((4, 5, 6), 1, 3)
    read = lambda one: dtypes.tensor_of(
        bytearray(bytes_of[one.start : one.stop]), one.dtype, one.shape
    )
    expected = (codes.double() * scale.double()).float()[1:3]
    assert torch.equal(part.decode(*map(read, part.parts)), expected)


# -- refused ---------------------------------------------------------------------------------------


def bare(w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return w.to(INT8), {}


def beside(*names: str, shape: tuple[int, ...] = (), dtype=torch.float32) -> Codes:
    return lambda w: (w.to(INT8), {name: torch.ones(shape).to(dtype) for name in names})


REFUSED = {
    "no scale": (bare, "lora_A.weight is I8"),
    "absmax": (beside("scale"), "lora_A.scale"),
    "mlx": (beside("scales", "biases"), "lora_A.biases"),
    "another name": (beside("weight_scale", "comfy_quant"), "lora_A.comfy_quant"),
    "two": (beside("weight_scale", "scale_weight"), "lora_A.weight is I8"),
    "shape": (beside("weight_scale", shape=(3,)), "lora_A.weight is I8"),
    "dtype": (beside("weight_scale", dtype=INT8), "lora_A.weight is I8"),
    "packed": (beside("weight_packed", "weight_shape"), "lora_A.weight_packed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_with_all_offenders(case: str, llama, lora, tmp_path: Path):
    layout, text = REFUSED[case]
    packed, _ = write(lora, tmp_path, layout)
    modules = {key.rpartition(".")[0] for key in load_file(lora / WEIGHTS)}
    for run in (VERBS["merge"], VERBS["peft"]):
        with pytest.raises(Refused) as caught:
            run(llama, packed, tmp_path / "out")
        told = "\n".join(map(str, getattr(caught.value, "errors", [caught.value])))
        assert text in told and all(module in told for module in modules)
        assert not (tmp_path / "out").exists()


def test_codes_that_are_not_finite(llama, lora, tmp_path: Path):
    packed, _ = write(lora, tmp_path, LAYOUTS["E4M3"])
    tensors = load_file(packed / WEIGHTS)
    key = next(iter(tensors))
    tensors[key].view(torch.uint8)[0, 0] = 0x7F  # NaN
    save_file(tensors, packed / WEIGHTS)
    with pytest.raises(Unrecoverable, match="not finite"):
        adapterkit.merge(llama, packed, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
