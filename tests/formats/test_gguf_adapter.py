"""GGUF adapters: the container byte for byte as llama.cpp's converter writes it."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterkit.bases.gguf.adapter import AdapterFile, BlockSpec, gguf_layout, is_gguf, read_adapter
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused

GOLDEN = Path(__file__).parent / "golden" / "gguf"
FILES = sorted(GOLDEN.glob("*/*.gguf"))
PLAIN = [path for path in FILES if path.stem != "q8_0"]


def read(path: Path) -> AdapterFile:
    return read_adapter(LocalFolder(path.parent), path.name)


def case_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", PLAIN, ids=case_of)
def test_headers_are_written_as_the_converter_writes_them(path: Path):
    file = read(path)
    tensors = [TensorPlan(spec.key, spec.dtype, spec.shape) for spec in file.tensors.values()]
    layout = gguf_layout("a.gguf", tensors, file.metadata)
    assert path.read_bytes().startswith(layout.header)
    assert layout.starts == tuple(spec.start for spec in file.tensors.values())
    assert layout.size == max(spec.stop for spec in file.tensors.values())


@pytest.mark.parametrize("path", FILES, ids=case_of)
def test_tensors_are_where_the_package_finds_them(path: Path):
    gguf = pytest.importorskip("gguf")
    file, data = read(path), path.read_bytes()
    theirs = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in theirs] == list(file.tensors)
    for tensor in theirs:
        spec = file.tensors[tensor.name]
        assert data[spec.start : spec.stop] == tensor.data.tobytes()
        assert spec.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (tensor.tensor_type.name == "Q8_0") == isinstance(spec, BlockSpec)


def test_numbers_of_arrays_are_read():
    assert read(GOLDEN / "qwen2" / "f32.gguf").metadata["adapter.alora.invocation_tokens"] == (
        3,
        1,
        4,
    )


def test_the_package_reads_what_is_laid_out(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    values = {
        "blk.0.attn_q.weight.lora_a": np.arange(10, dtype=np.float32).reshape(2, 5),
        "blk.0.ffn_up_exps.weight.lora_b": np.arange(6, dtype=np.float16).reshape(1, 3, 2),
    }
    dtypes = {"float32": "F32", "float16": "F16"}
    tensors = [TensorPlan(key, dtypes[str(v.dtype)], v.shape) for key, v in values.items()]
    metadata: dict[str, Any] = {"general.architecture": "llama", "x": 0.5, "n": 7, "t": (1, 2, 3)}
    layout = gguf_layout("a.gguf", tensors, metadata)
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for start, value in zip(layout.starts, values.values(), strict=True):
        data[start : start + value.nbytes] = value.tobytes()
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    reader = gguf.GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in metadata} == metadata | {"t": [1, 2, 3]}
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, values[tensor.name])
    assert is_gguf(LocalFolder(path), "a.gguf")
    assert not is_gguf(LocalFolder(GOLDEN / "llama" / "base"), "config.json")


@pytest.mark.parametrize("key, dtype, shape, text", [
    ("a" * 64, "F32", (1,), "63 bytes"),
    ("a", "F64", (1,), "--dtype"),
    ("a", "F32", (1, 1, 1, 1, 1), "4 dimensions"),
    ("a", "F32", (), "dimensions"),
    ("a", "F32", (2, 0), "none of them 0"),
])  # fmt: skip
def test_tensors_that_ggml_cannot_store_are_refused(key: str, dtype: str, shape: tuple, text: str):
    with pytest.raises(Refused, match=text):
        gguf_layout("a.gguf", [TensorPlan(key, dtype, shape)], {})


def test_all_tensors_that_ggml_cannot_store_are_listed():
    with pytest.raises(MultipleErrors) as caught:
        gguf_layout("a.gguf", [TensorPlan("a", "F64", (1,)), TensorPlan("b", "F32", ())], {})
    assert len(caught.value.errors) == 2


def at(data: bytes, text: bytes, skip: int, form: str, value: int) -> bytes:
    """The file with another number, `skip` bytes behind a text in it."""
    place = data.index(text) + len(text) + skip
    size = struct.calcsize("<" + form)
    return data[:place] + struct.pack("<" + form, value) + data[place + size :]


ATTACKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a model": (lambda d: d.replace(b"\0adapter", b"\0modelXX"), "'modelXX'"),
    "another kind": (lambda d: d.replace(b"\0lora", b"\0loha"), "'loha'"),
    "no kind": (lambda d: d.replace(b"adapter.type", b"adapter.typo"), "adapter.type is None"),
    "a type of blocks": (lambda d: at(d, b"blk.0.ffn_up.weight.lora_a", 20, "I", 2), "q8_0"),
    "too long": (lambda d: d + b"x", "other bytes"),
    "cut off": (lambda d: d[:-1], "in a file of"),
    "cut in the header": (lambda d: d[:300], "fits into"),
    "cut in an array": (lambda d: at(d, b"invocation_tokens", 8, "Q", 1 << 40), "fits into"),
    "empty": (lambda d: b"", "begins with"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_files_that_are_no_adapters_are_refused(name: str, tmp_path: Path):
    change, text = ATTACKS[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(change((GOLDEN / "qwen2" / "f32.gguf").read_bytes()))
    with pytest.raises(AdapterkitError, match=text):
        read(path)
