"""GGUF files that are refused: what a checkpoint cannot hold, and hostile files."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support.gguf_files import blocks, gguf, llama, write


def test_other_verbs_say_what_to_do(tiny: Path, tmp_path: Path):
    with pytest.raises(Refused, match="adapterkit dequantize .*gguf --out floats"):
        adapterkit.quantize(tiny, out=tmp_path / "no", to="nf4")


def test_tensors_without_a_place_and_places_without_a_tensor(tmp_path: Path):
    _, message, tensors = llama()
    extra = tensors | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    lacking = {name: value for name, value in tensors.items() if name != "blk.1.ffn_up.weight"}
    bent = tensors | {"blk.0.ffn_up.weight": tensors["blk.0.ffn_up.weight"].T}
    for wrong, text in (
        (extra, "attn_sinks"),
        (lacking, "layers.1.mlp.up_proj"),
        (bent, "layers.0.mlp.up_proj"),
    ):
        with pytest.raises(AdapterkitError, match=text):
            adapterkit.dequantize(
                write(tmp_path / "m.gguf", "llama", message, wrong),
                out=tmp_path / "no",
                dry_run=True,
            )


def test_models_that_transformers_does_not_know(tmp_path: Path):
    _, message, tensors = llama()
    with pytest.raises(Refused, match="rwkv6"):
        adapterkit.dequantize(
            write(tmp_path / "m.gguf", "rwkv6", message, tensors), out=tmp_path / "no"
        )
    message = {"attention.head_count_kv": 8, "block_count": 1}
    with pytest.raises(Refused, match="8 groups of keys"):
        adapterkit.dequantize(
            write(tmp_path / "f.gguf", "falcon", message, tensors), out=tmp_path / "no"
        )
    with pytest.raises(Refused, match="split"):
        adapterkit.dequantize(
            write(tmp_path / "s.gguf", "llama", llama()[1] | {"/split.count": 2}, tensors),
            out=tmp_path / "no",
        )


def test_a_tokenizer_that_cannot_be_made_is_noted(tmp_path: Path):
    _, message, tensors = llama()
    receipt: Any = adapterkit.dequantize(
        write(tmp_path / "m.gguf", "llama", message, tensors, tokens=None), out=tmp_path / "out"
    )
    assert any("no tokenizer" in note for note in receipt.data["notes"])


def test_values_that_are_not_finite_fail_the_job(tmp_path: Path):
    _, message, tensors = llama()
    bad = blocks(gguf.GGMLQuantizationType.Q8_0, (96, 64), 1)
    bad[3, :2] = [0, 0x7C]  # an infinite scale
    tensors["blk.0.ffn_up.weight"] = (gguf.GGMLQuantizationType.Q8_0, bad)
    with pytest.raises(AdapterkitError, match="not finite"):
        adapterkit.dequantize(
            write(tmp_path / "m.gguf", "llama", message, tensors), out=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


# --- hostile files --------------------------------------------------------------------------------


def place(data: bytes, name: bytes) -> int:
    """Where the entry of a tensor goes on after its name."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def patched(data: bytes, at: int, form: str, *values: Any) -> bytes:
    return data[:at] + struct.pack("<" + form, *values) + data[at + struct.calcsize("<" + form) :]


NORM = b"output_norm.weight"
ATTACKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "begins with"),
    "not gguf": (lambda d: b"GGML" + d[4:], "begins with"),
    "version": (lambda d: patched(d, 4, "I", 9), "version 9"),
    "big-endian": (lambda d: d[:4] + b"\0\0\0\3" + d[8:], "big-endian"),
    "cut in the data": (lambda d: d[:-5000], "in a file of"),
    "cut in the header": (lambda d: d[:700], "fits into"),
    "cut in the counts": (lambda d: d[:10], "fits into"),
    "tensor count": (lambda d: patched(d, 8, "Q", 2**40), "tensors"),
    "one tensor more": (
        lambda d: patched(d, 8, "Q", int.from_bytes(d[8:16], "little") + 1),
        "at most 1000",
    ),
    "key count": (lambda d: patched(d, 16, "Q", 2**62), "keys"),
    "key length": (lambda d: patched(d, 24, "Q", 2**63), "bytes"),
    "array length": (
        lambda d: patched(d, d.index(b"tokenizer.ggml.tokens") + 29, "Q", 2**60),
        "texts",
    ),
    "array type": (
        lambda d: patched(d, d.index(b"tokenizer.ggml.tokens") + 25, "I", 9),
        "array of type 9",
    ),
    "value type": (lambda d: patched(d, d.index(b"llama.block_count") + 17, "I", 77), "type 77"),
    "layers": (lambda d: patched(d, d.index(b"llama.block_count") + 21, "I", 2**31), "block_count"),
    "a key twice": (lambda d: d.replace(b"ggml.bos_token_id", b"ggml.eos_token_id"), "each once"),
    "rank": (lambda d: patched(d, place(d, NORM), "I", 2**31), "dimensions"),
    "no dimensions": (lambda d: patched(d, place(d, NORM), "I", 0), "at most 1000"),
    "a dimension": (lambda d: patched(d, place(d, NORM) + 4, "Q", 2**61), "in a file of"),
    "an empty tensor": (lambda d: patched(d, place(d, NORM) + 4, "Q", 0), "shape"),
    "unknown type": (lambda d: patched(d, place(d, NORM) + 12, "I", 4000), "type 4000"),
    "integers": (lambda d: patched(d, place(d, NORM) + 12, "I", 26), "type 26"),
    "half blocks": (lambda d: patched(d, place(d, NORM) + 12, "I", 12), "whole blocks"),
    "offset outside": (lambda d: patched(d, place(d, NORM) + 16, "Q", 2**50), "in a file of"),
    "offset overflow": (lambda d: patched(d, place(d, NORM) + 16, "Q", 2**64 - 32), "in a file of"),
    "overlap": (lambda d: patched(d, place(d, NORM) + 16, "Q", 0), "in a file of"),
    "a name twice": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "twice"),
    "bad text": (lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_\xff.weight"), "UTF-8"),
    "control characters": (
        lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_\n.weight"),
        "printable",
    ),
    "architecture": (
        lambda d: d.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0../..", 1),
        "architecture",
    ),
    "head count": (
        lambda d: patched(d, d.index(b"llama.attention.head_count_kv") + 33, "I", 0),
        "cannot build",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_files_are_refused_before_anything_is_written(
    name: str, tiny: Path, tmp_path: Path
):
    attack, text = ATTACKS[name]
    data = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(attack(data))
    assert path.read_bytes() != data
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.dequantize(path, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf"]
