"""Bases, the same in bitsandbytes' formats, and a LoRA."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import oracle
from tests.support.bnb import KINDS, MODELS, quantized, wide


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str, **how) -> Path:
        build, dtype = MODELS[name]
        label = "-".join(["bnb", name, *how])
        return cached_folder(label, lambda folder: oracle.save_base(build(), folder, dtype, **how))

    return make


@pytest.fixture
def packed(
    cached_folder: Callable[..., Path], base: Callable[..., Path]
) -> Callable[[str, str], Path]:
    """A model in a format, by our hands."""

    def make(name: str, kind: str) -> Path:
        return (
            cached_folder(
                f"bnb-{name}-{kind}",
                lambda folder: quantized(base(name), folder / "q", **KINDS[kind][0]),
            )
            / "q"
        )

    return make


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Path:
    return cached_folder(
        "bnb-lora", lambda folder: oracle.train(wide(), folder, target_modules=["v_proj"])
    )
