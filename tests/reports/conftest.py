"""Fixtures of the read-only verbs."""

import shutil

import pytest
from safetensors.torch import save_file

from tests.support import oracle
from tests.support.inspections import SHARD


@pytest.fixture
def pair(tmp_path):
    """Two files of these tensors, and their paths."""

    def save(a, b):
        for name, tensors in (("a", a), ("b", b)):
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors"
            )
        return tmp_path / "a.safetensors", tmp_path / "b.safetensors"

    return save


@pytest.fixture
def sharded(cached_folder, tmp_path):
    source = cached_folder(
        "inspect-sharded",
        lambda folder: oracle.save_base(oracle.llama(), folder, max_shard_size="30KB"),
    )
    shutil.copytree(source, tmp_path / "base")
    assert (tmp_path / "base" / SHARD).exists()
    return tmp_path / "base"
