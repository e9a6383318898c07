"""What the suites of quantized formats share: a folder's packed weights, tensors, bits and
hashes."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from tests.support import format_tools, quantized_llama
from tests.support.quantized_llama import FORMS

TOUCHED = ("q_proj", "down_proj")
WRITABLE = [name for name, form in FORMS.items() if form.writable]


def packed_of(folder: Path) -> dict[str, QuantizedWeight]:
    return {
        spec.key: spec
        for spec in quantized_weights(
            decoded_view(open_checkpoint(open_source(str(folder)))).tensors
        )
    }


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def ct(form: str, weights: dict[str, Any], **more) -> dict[str, Any]:
    return quantized_llama.compressed(form, {"symmetric": True, **weights}, **more)


INT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
BLOCK = {"strategy": "block", "block_structure": list(format_tools.BLOCK)}
GEMM = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def one_weight(folder: Path, name: str, parts: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """A checkpoint of one module, stored by a tool."""
    mxfp4, torchao = name == "transformers.mxfp4", name.startswith("torchao")
    join = "m.x_" if mxfp4 else "m._weight_" if torchao else "m."
    tensors = {
        join + leaf: part.contiguous()
        for leaf, part in parts.items()
        if not leaf.startswith("decoded")
    }
    metadata = {"format": "pt"}
    if torchao:
        text = {
            "_type": "Int8Tensor",
            "_data": {"block_size": [1, parts["qdata"].shape[1]]},
            "_tensor_data_names": [],
        }
        metadata["m.weight"] = json.dumps(text)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(
        json.dumps({"dtype": "bfloat16", "quantization_config": settings})
    )
    return folder


Q = "model.layers.0.self_attn.q_proj."


def loaded(folder: Path, name: str = "LlamaForCausalLM") -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, name).from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ), info
    return model.state_dict()
