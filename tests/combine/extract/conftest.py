"""Saved bases, mixtures of experts, and warnings as errors."""

import functools
import warnings
from pathlib import Path

import pytest

from tests.support import oracle
from tests.support.extraction import BUILDS, mixture, tuned


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def saved(cached_folder):
    """The tiny model of that name as a base."""

    def make(name: str, dtype: str = "fp32") -> Path:
        return cached_folder(
            f"extract-{name}-{dtype}",
            lambda folder: oracle.save_base(BUILDS[name](), folder, dtype),
        )

    return make


@pytest.fixture
def experts(cached_folder, tmp_path):
    """A base with stacks of experts, and a fine-tune of it that `change` makes."""

    def make(kind: str, change, **sizes) -> tuple[Path, Path, functools.partial]:
        build = functools.partial(mixture, kind, **sizes)
        base = cached_folder(
            f"extract-{kind}-{sizes}", lambda folder: oracle.save_base(build(), folder, "fp32")
        )
        return base, tuned(base, build, tmp_path / "tuned", change), build

    return make
