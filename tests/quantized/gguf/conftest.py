"""A GGUF file of a tiny Llama."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def tiny(cached_folder: Callable[..., Path]) -> Path:
    """A llama of floats."""
    from tests.support.gguf_files import llama, write  # skips where gguf is not installed

    def make(folder: Path) -> None:
        _, message, tensors = llama()
        write(folder / "tiny.gguf", "llama", message, tensors)

    return cached_folder("gguf-tiny", make) / "tiny.gguf"
