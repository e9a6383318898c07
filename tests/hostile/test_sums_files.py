"""Files of sums in the folder of an interrupted run, and tokens of GGUF files, that are not of
their form."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.errors import Damaged
from adapterkit.verbs.stats.sums_files import SumsFile, sums_files

HI = "000000.sums.safetensors"


def write(path: Path, **metadata: str) -> Path:
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({"0.vector": torch.ones(2)}, path, metadata)
    return path


@pytest.mark.parametrize("sums", ["x", "7", "{}", "[7]", "[{}]", '[{"modules": 7}]', "[" * 9000])
def test_sums_that_are_no_list_of_sums_are_damaged(tmp_path: Path, sums: str):
    file = SumsFile.read(write(tmp_path / HI, sums=sums))
    with pytest.raises(Damaged, match="the metadata on sums") as caught:
        _ = file.records
    assert caught.value.expected and caught.value.hint and caught.value.code == "AK607"


@pytest.mark.parametrize("visits", ["x", "1e3", "9" * 5000, ""])
def test_visits_that_are_no_number_are_damaged(tmp_path: Path, visits: str):
    with pytest.raises(Damaged, match="the metadata on sums"):
        _ = SumsFile.read(write(tmp_path / HI, visits=visits)).visits


def test_a_sum_without_its_tensors_is_damaged(tmp_path: Path):
    file = SumsFile.read(write(tmp_path / HI, sums=json.dumps([{"modules": ["a"]}])))
    with pytest.raises(Damaged, match="the metadata on sums"):
        file.sum(0)


def test_files_and_folders_of_other_names_and_pipes_are_not_there(tmp_path: Path):
    write(tmp_path / HI)
    write(tmp_path / "3" / f"2@{HI}")
    for name in ("evil", "x@y"):
        write(tmp_path / name / HI)
    write(tmp_path / f"x@{HI}")
    os.mkfifo(tmp_path / "000001.sums.safetensors")
    assert [file.name for file in sums_files(tmp_path)] == [HI, f"2@{HI}"]


def test_the_header_of_a_pipe_is_damaged(tmp_path: Path):
    os.mkfifo(tmp_path / HI)
    with pytest.raises(Damaged, match="no file"):
        read_header(LocalFolder(tmp_path), HI)


def test_a_gguf_token_of_100000_letters_makes_no_tokenizer(tmp_path: Path, monkeypatch):
    import adapterkit
    from tests.support import gguf_files, oracle

    gguf = pytest.importorskip("gguf")

    class Writer(gguf.GGUFWriter):
        def add_tokenizer_model(self, model: str) -> None:
            super().add_tokenizer_model("llama")

        def add_token_merges(self, merges: object) -> None:
            self.add_token_scores([0.0] * len(tokens))

    tokens = [*gguf_files.TOKENS[:-1], "a" * 100_000]
    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    path = tmp_path / "m.gguf"
    gguf_files.write(path, "llama", *gguf_files.of_llama(oracle.llama()), tokens=tokens)
    began = time.process_time()
    plan = adapterkit.dequantize(path, out=tmp_path / "out", dry_run=True)
    assert any("its tokens are too long" in warning for warning in plan.warnings)
    assert time.process_time() - began < 5  # 5 s more without the limit
