"""A tiny Llama in each format, and a LoRA on some of its layers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import oracle, quantized_llama
from tests.support.formats import TOUCHED
from tests.support.quantized_llama import FORMS


@pytest.fixture
def base(cached_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """The tiny Llama in a format."""
    return lambda name: cached_folder(
        f"formats-{name}", lambda folder: quantized_llama.base(FORMS[name], folder)
    )


@pytest.fixture
def lora(cached_folder: Callable[..., Path]) -> Path:
    config = {"target_modules": list(TOUCHED), "size": 0.3}
    return cached_folder(
        "formats-lora", lambda folder: oracle.train(quantized_llama.llama(), folder, **config)
    )
