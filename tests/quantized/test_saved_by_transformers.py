"""Blockwise kernels give the bytes that transformers saves of a model that it quantizes with
bitsandbytes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit.kernels.quant import blockwise
from adapterkit.kernels.quant.blockwise import (
    dynamic_map,
    quant_map,
    quantize_4bit,
    quantize_absmax,
)
from adapterkit.kernels.quant.llm_int8 import quantize_int8
from tests.support.bits import same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["nf4", "fp4", "nested", "int8"])
def test_checkpoints_saved_by_transformers_are_read(form: str, dtype: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(
        tmp_path / "base"
    )
    options = (
        {"load_in_8bit": True}
        if form == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    options |= {"bnb_4bit_quant_type": "fp4"} if form == "fp4" else {}
    options |= {"bnb_4bit_use_double_quant": True} if form == "nested" else {}
    how = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    base, stored = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "quantized/model.safetensors"),
    )
    names = [key.removesuffix(".weight") for key in base if "_proj" in key]
    kind: blockwise.Kind = "fp4" if form == "fp4" else "nf4"
    expected = {key: w for key, w in base.items() if "_proj" not in key}
    for name in names:
        w, key = base[f"{name}.weight"], f"{name}.weight"
        if form == "int8":
            expected[key], expected[f"{name}.SCB"] = quantize_int8(w)
            expected[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
            continue
        expected[key], absmax = quantize_4bit(w, kind)
        state = {"quant_type": kind, "blocksize": 64, "dtype": dtype, "shape": list(w.shape)}
        if form == "nested":
            absmax, expected[f"{key}.nested_absmax"], offset = quantize_absmax(absmax)
            expected[f"{key}.nested_quant_map"] = dynamic_map()
            state |= {
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": offset.item(),
            }
        expected[f"{key}.absmax"], expected[f"{key}.quant_map"] = absmax, quant_map(kind)
        expected[f"{key}.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
    assert len(names) == 7 and expected.keys() == stored.keys()
    for key, tensor in expected.items():
        assert tensor.shape == stored[key].shape and same(tensor, stored[key]), key
