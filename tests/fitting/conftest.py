"""A base and adapters for it; as in the statistics' tests, models of which each part is large."""

import pytest

from tests.statistics.conftest import large as large
from tests.statistics.conftest import tokens_here as tokens_here
from tests.support import oracle
from tests.support.texts import save_tokenizer


@pytest.fixture
def base(cached_folder):
    def build(folder):
        oracle.save_base(oracle.llama(), folder, "fp32")
        save_tokenizer(folder)

    return cached_folder("fit-base", build)


@pytest.fixture
def adapters(cached_folder):
    def build(folder):
        for seed, name in enumerate("abc"):
            oracle.train(oracle.llama(), folder / name, seed=seed, size=0.2, r=4,
                         target_modules=["q_proj", "down_proj"])  # fmt: skip

    folder = cached_folder("fit-adapters", build)
    return [folder / name for name in "abc"]
