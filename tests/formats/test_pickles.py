"""Pickles: refused with the command that rewrites them; else each tensor as it was, or an error."""

import io
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from adapterkit.adapters.formats.files.pickles import (
    Unpickling,
    is_pickle,
    pickles_of,
    rewrite,
    rewritten_name,
    unsafe,
)
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.errors import AdapterkitError, Damaged, Refused
from adapterkit.core.inputs.sources import open_unconverted

pytestmark = pytest.mark.quick

STATE = {
    "layers.0.lora_a.weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "scalar": torch.tensor(4.0, dtype=torch.float64),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "turned": torch.arange(6).reshape(2, 3).T,
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def save(tmp_path):
    def save(value, **options):
        path = tmp_path / "adapter.pt"
        torch.save(value, path, **options)
        return path

    return save


def rewritten(path):
    out = path.with_suffix(".safetensors")
    out.unlink(missing_ok=True)
    left_out = rewrite(path, out)
    return load_file(out), left_out


def check(tensors):
    assert list(tensors) and tensors.keys() == STATE.keys()
    for key, tensor in STATE.items():
        assert torch.equal(tensors[key], tensor) and tensors[key].dtype == tensor.dtype


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_every_tensor_arrives(save, wrap, archive):
    tensors, left_out = rewritten(save(wrap(STATE), _use_new_zipfile_serialization=archive))
    check(tensors)
    assert left_out == []


def test_tied_tensors_arrive_complete(save):
    shared = torch.arange(8.0)
    tensors, _ = rewritten(save({"a": shared, "b": shared[2:4], "c": shared}))
    assert tensors["b"].tolist() == [2, 3]
    assert torch.equal(tensors["a"], tensors["c"])


@pytest.mark.parametrize("value, left_out", [
    ({"model": STATE}, []),
    ({"state_dict": STATE, "epoch": 3, "optimizer_states": [{"a": torch.ones(1)}]},
     ["epoch", "optimizer_states"]),
    ({"module": {"model": STATE, "step": 1}, "args": {}}, ["args", "step"]),
])  # fmt: skip
def test_the_state_dict_that_trainers_wrap(save, value, left_out):
    tensors, names = rewritten(save(value))
    check(tensors)
    assert names == left_out


@pytest.mark.parametrize("value, words", [
    ({}, "nothing"),
    ([torch.ones(1)], "a list"),
    (torch.ones(1), "a Tensor"),
    ({"a": torch.ones(1), "epoch": 3}, "tensors next to epoch"),
    ({"model": STATE, "module": STATE}, "model, module"),
    ({"model": {}}, "model"),
    ({"epoch": 3}, "epoch"),
    ({"model": {"model": {"model": {"model": {"model": STATE}}}}}, "model"),
    ({3: torch.ones(1)}, "the key '3', a int"),
    ({"a": torch.ones(2, 2).to_sparse()}, "'a' is not a plain tensor"),
    ({"a": torch.ones(2, device="meta")}, "'a' is not a plain tensor"),
    ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "'a' is not a plain tensor"),
    ({"a": torch.ones(2, dtype=torch.complex128)}, "'a' is torch.complex128"),
])  # fmt: skip
def test_other_values_are_refused(save, value, words):
    with pytest.raises(Refused, match=re.escape(f"adapter.pt: {words}")):
        rewritten(save(value))


def test_all_offenders_at_once(save):
    with pytest.raises(Refused, match="2 problems"):
        rewritten(save({3: torch.ones(1), "a": torch.ones(1).to_sparse()}))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_does_not_run(save, tmp_path, archive, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "ran"
    path = save({"a": Code(str(target))}, _use_new_zipfile_serialization=archive)
    with pytest.raises(Damaged, match="does not read it"):
        rewritten(path)
    assert not target.exists()


def test_a_small_file_that_unfolds_is_refused(save):
    with pytest.raises(Damaged, match=r"a file of \d+ bytes has \d+ bytes of tensors"):
        rewritten(save({"a": torch.ones(1).expand(10**6, 10**6)}))


def test_compressed_members_are_refused(save):
    """Mapped, their packed bytes would be taken for numbers."""
    path = save(STATE)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    path.write_bytes(packed.getvalue())
    with pytest.raises(Damaged, match="compressed members"):
        rewritten(path)


@pytest.mark.parametrize("archive", [True, False])
def test_damaged_files_are_refused(save, archive):
    path = save(STATE, _use_new_zipfile_serialization=archive)
    good, rng, taken = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(good)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(1, 4) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            rewritten(path)
            taken += 1
        except AdapterkitError as error:
            assert "hint:" in str(error)
    assert taken < 300


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x80", pickle.dumps({"a": 1}), b"PK\3\4" + b"\0" * 30]
)
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "adapter.pt"
    path.write_bytes(data)
    with pytest.raises(AdapterkitError):
        rewritten(path)


def test_the_refusal_holds_a_command_that_rewrites_the_file(save):
    path = save({"a": torch.arange(3.0)})
    error = unsafe(path.name, str(path.parent))
    assert "--allow-pickle" in error.hint
    prose, text = error.hint.split("\n")
    assert prose.endswith("or rewrite it")
    python, option, code = shlex.split(text)
    assert (python, option) == ("python", "-c")
    subprocess.run([sys.executable, "-c", code], cwd=path.parent, check=True)
    assert load_file(path.with_suffix(".safetensors"))["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name, rewritten", [
    ("a.pt", "a.safetensors"),
    ("a.PTH", "a.safetensors"),
    ("adapter_model.bin", "adapter_model.safetensors"),
    ("lit_model.pth.lora", "lit_model.safetensors"),
    ("a.b.ckpt", "a.b.safetensors"),
])  # fmt: skip
def test_names_of_pickles(name, rewritten):
    assert is_pickle(name)
    assert rewritten_name(name) == rewritten


@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf", "pt", ".pt", "a.lora", "a.pt.x"])
def test_names_of_others(name):
    assert not is_pickle(name)


def test_a_folder_has_a_safetensors_file_in_place_of_its_pickle(save):
    path = save({"model": STATE, "epoch": 3})
    (path.parent / "adapter_config.json").write_text("{}", "utf-8")
    (path.parent / "training_args.bin").write_bytes(b"x")
    for source in (path, path.parent):
        folder = open_unconverted(source, allow_pickle=True)
        assert isinstance(folder, Overlay) and isinstance(folder.maker, Unpickling)
        assert {"adapter.safetensors", "adapter_config.json"} <= folder.files().keys()
        assert path.name not in folder.files()
        check(load_file(folder.path("adapter.safetensors")))
        size = folder.files()["adapter.safetensors"]
        data = folder.path("adapter.safetensors").read_bytes()
        assert len(data) == size
        assert folder.read("adapter.safetensors", 8, 20) == data[8:20]
        assert folder.read("adapter_config.json", 0, 9) == b"{}"
        assert folder.maker.left_out == ["epoch"]
        assert pickle.loads(pickle.dumps(folder)).files() == folder.files()


def test_without_permission_a_pickle_stays_one(save):
    path = save(STATE)
    assert isinstance(open_unconverted(path), LocalFolder)
    assert pickles_of(LocalFolder(path.parent)) == [path.name]


def test_a_pickle_next_to_a_safetensors_file_is_ignored(save):
    path = save(STATE)
    (path.parent / "adapter_model.safetensors").write_bytes(b"x")
    assert isinstance(open_unconverted(path.parent, allow_pickle=True), LocalFolder)


def test_several_pickles_are_refused(save):
    path = save(STATE)
    path.with_name("b.pth").write_bytes(path.read_bytes())
    with pytest.raises(Refused, match=r"2 pickles: adapter\.pt, b\.pth"):
        open_unconverted(path.parent, allow_pickle=True)
