"""dequantize of bitsandbytes' formats: as transformers decodes, each value rounded once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle
from tests.support.bnb import KINDS, K, by_transformers, config, loaded, unpacked


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
def test_weights_saved_after_a_forward_pass_decode_or_are_refused(
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
