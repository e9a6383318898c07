"""Quantization configs that contradict the stored tensors, or that nobody can read."""

import pytest

from adapterkit.core.errors import AdapterkitError, Refused
from tests.support.planned import planned, with_tensors
from tests.support.raw_files import SIZES, WIDTH, Stored, base, plain

SAID = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "nested": {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
    "older compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "without a method": {"quantization_config": {"bits": 4}},
    "no map": {"quantization_config": "int8"},
}
LAYER = "model.layers.0.q_proj"
SIBLINGS = {
    "bitsandbytes 4-bit": (".weight.absmax", "F32"), "bitsandbytes int8": (".SCB", "F32"),
    "block fp8": (".weight_scale_inv", "F32"), "fp8": (".weight_scale", "F32"),
    "compressed-tensors packed": (".weight_packed", "I32"), "GPTQ": (".qweight", "I32"),
    "AWQ": (".qzeros", "I32"), "HQQ": (".W_q", "U8"), "AQLM": (".codebooks", "F16"),
    "Quanto": (".weight._data", "I8"), "torchao": (":qdata", "I8"),
    "EETQ": (".weight_scales", "F16"),
}  # fmt: skip


def quantized(message: str) -> None:
    assert "this base is quantized" in message
    assert "adapterkit dequantize" not in message  # it would give the same refusal
    assert "the 16-bit model that it was made from" in message or "restore the base" in message


@pytest.mark.parametrize("name", SAID)
def test_a_base_that_declares_quantization_is_refused(name):
    with pytest.raises(Refused) as caught:
        planned(plain(), on=base(**SAID[name]))
    quantized(str(caught.value))
    method = SAID[name].get("quantization_config", {})
    assert not isinstance(method, dict) or method.get("quant_method", "") in str(caught.value)


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_base_with_scales_next_to_its_weights_is_refused(name):
    ending, dtype = SIBLINGS[name]
    with pytest.raises(AdapterkitError) as caught:
        planned(
            plain(),
            on=with_tensors(
                **{LAYER + ending: Stored(dtype, (4,), b"\0" * 4 * SIZES.get(dtype, 1))}
            ),
        )
    if name == "bitsandbytes int8":  # a format that is known: the rows lack their codes
        assert "I8 rows" in str(caught.value)
        return
    quantized(str(caught.value))
    assert name.split()[0] in str(caught.value)


def test_mxfp4_is_detected_by_a_pair_of_tensors():
    blocks = {"model.experts_blocks": Stored("U8", (4,), b"\0" * 4)}
    planned(plain(), on=with_tensors(**blocks))  # a name of that ending alone says nothing
    with pytest.raises(Refused, match="MXFP4"):
        planned(
            plain(),
            on=with_tensors(**blocks, **{"model.experts_scales": Stored("U8", (4,), b"\0" * 4)}),
        )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_a_base_in_eight_bits_or_fewer_is_refused(dtype):
    with pytest.raises(Refused, match=dtype):
        planned(
            plain(), on=with_tensors(extra=Stored(dtype, (8,), b"\0" * (4 if dtype == "F4" else 8)))
        )


@pytest.mark.parametrize("said", [None, False])
def test_a_config_that_declares_no_quantization_is_accepted(said):
    planned(plain(), on=base(quantization_config=said))


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "U32", "BOOL", "C64"])
def test_integer_weights_are_refused(dtype):
    size = {"I8": 1, "U8": 1, "I32": 4, "U32": 4, "BOOL": 1, "C64": 8}[dtype]
    weight = Stored(dtype, (WIDTH, WIDTH), b"\0" * WIDTH * WIDTH * size)
    with pytest.raises(Refused, match=f"{LAYER}.weight is {dtype}"):
        planned(plain(), on=with_tensors(**{LAYER + ".weight": weight}))
