"""What the suites of bitsandbytes' formats share: models, transformers' own files and their
comparison."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adapterkit
from adapterkit.bases.quantized.codecs import bnb4
from tests.support import oracle

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
    vision = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 64, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2,
    }  # fmt: skip
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


def quantized(base: Path, out: Path, **how):
    return adapterkit.quantize(base, out=out, **how)


def class_of(folder: Path) -> Any:
    return getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )


def by_transformers(base: Path, out: Path, **settings) -> nn.Module:
    """What its from_pretrained makes of the base, saved."""
    message = transformers.BitsAndBytesConfig(**settings)
    with oracle.quiet():
        model = class_of(base).from_pretrained(
            base, quantization_config=message, device_map="cpu", dtype="auto"
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
    actual, expected = config(ours), config(theirs)
    settings = actual["quantization_config"]
    if settings["load_in_4bit"]:
        assert settings["bnb_4bit_compute_dtype"] == expected["dtype"]
        settings["bnb_4bit_compute_dtype"] = "float32"
    plain = lambda message: {
        k: plain(v) if k.endswith("_config") else v for k, v in message.items() if k != "dtype"
    }
    assert plain(actual) == plain(expected)
    assert actual["dtype"] == expected["dtype"]


def unpacked(tensors: dict[str, Tensor], key: str) -> Tensor:
    """code * scale of a 4-bit weight, in float64 from the stored tensors alone, as stored (out,
    in)."""
    state = next(k for k in tensors if k.startswith(key + STATE))
    message = json.loads(tensors[state].numpy().tobytes())
    absmax = tensors[key + ".absmax"].double()
    if "nested_offset" in message:
        scale = (
            tensors[key + ".nested_absmax"]
            .double()
            .repeat_interleave(message["nested_blocksize"])[: len(absmax)]
        )
        absmax = (
            tensors[key + ".nested_quant_map"].double()[absmax.long()] * scale
            + message["nested_offset"]
        )
    bytes_ = tensors[key].flatten().long()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()
    out, width = message["shape"]
    values = tensors[key + ".quant_map"].double()[codes][: out * width]
    return (values * absmax.repeat_interleave(message["blocksize"])[: out * width]).view(out, width)


def text(message: dict[str, Any] | str) -> Tensor:
    data = message if isinstance(message, str) else json.dumps(message)
    return torch.frombuffer(bytearray(data.encode()), dtype=torch.uint8)


NAN, INF = float("nan"), float("inf")
