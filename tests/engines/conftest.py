"""What several files of this suite start from."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.golden.inputs import create_inputs


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, cached_folder: Callable[..., Path]
) -> Iterator[Path]:
    """The inputs of the golden jobs, among them a base of several files; the current folder."""
    path = tmp_path_factory.mktemp("engines")
    shutil.copytree(cached_folder("golden", create_inputs), path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path
