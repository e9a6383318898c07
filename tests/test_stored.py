"""Hashes and comparisons of stored bytes, whatever the pieces in which the bytes come."""

import hashlib
import random

import pytest

from adapterkit.core.checkpoint import reader
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.hashes import MARK, RunningHash
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import same_bytes

DATA = random.Random(0).randbytes(1000)
ENDS = [("empty", 20), ("a", 120), ("b", 121), ("b", 121), ("c", 700), ("d", 1000), ("last", 1000)]


@pytest.mark.parametrize("size", [1, 7, 20, 120, 121, 999, 1000, 2000])
def test_a_running_hash_has_the_marks_of_the_whole(size):
    running = RunningHash(ENDS)
    for at in range(0, len(DATA), size):
        running.update(DATA[at : at + size])
    running.update(b"")
    assert running.hexdigest() == hashlib.sha256(DATA).hexdigest()
    marks = {key: hashlib.sha256(DATA[:end]).hexdigest()[:MARK] for key, end in ENDS}
    assert running.marks == marks


def test_a_file_without_tensors():
    running = RunningHash()
    running.update(DATA)
    assert (running.hexdigest(), running.marks) == (hashlib.sha256(DATA).hexdigest(), {})


def test_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "COMPARED", 64)
    (tmp_path / "file").write_bytes(DATA + DATA[:-1] + b"\0")
    folder = LocalFolder(tmp_path)
    spec = TensorSpec("key", "U8", (1000,), "file", 0, 1000)
    other = TensorSpec("key", "U8", (1000,), "file", 1000, 2000)
    assert same_bytes((folder, spec))
    assert same_bytes((folder, spec), (folder, spec))
    assert not same_bytes((folder, spec), (folder, spec), (folder, other))
    start = TensorSpec("key", "U8", (900,), "file", 0, 900)
    assert same_bytes((folder, start), (folder, TensorSpec("", "U8", (900,), "file", 1000, 1900)))
    for dtype, shape in (("I8", (900,)), ("U8", (30, 30))):
        assert not same_bytes(
            (folder, start), (folder, TensorSpec("key", dtype, shape, "file", 0, 900))
        )
    nothing = TensorSpec("key", "U8", (0,), "file", 5, 5)
    assert same_bytes((folder, nothing), (folder, TensorSpec("", "U8", (0,), "file", 9, 9)))
