"""One opened GGUF file, and the ways to ask the `gguf` package and transformers about it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import Problems, Refused, shown
from adapterkit.gguf.header import Entry, GgufHeader
from adapterkit.optional import optional
from adapterkit.records import Settings


@dataclass
class GgufFile:
    """A file with its parsed header, and what transformers is shown of it."""

    folder: Folder
    name: str
    header: GgufHeader
    copy: Path  # the header, and a hole in place of the data
    notes: list[str] = field(default_factory=list)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.header.tensors}

    @property
    def architecture(self) -> str:
        return self.header.architecture

    @cached_property
    def errors(self) -> Problems:
        """What is wrong with it."""
        return Problems(where=self.name, hint="use the original checkpoint instead")

    def call_transformers(self, subject: str, function: Callable[[], Any]) -> Any:
        """Run transformers' code on the header; it may fail in any way on metadata that it does not
        expect."""
        import transformers

        try:
            return function()
        except (Exception, RecursionError) as error:
            cause = f"{type(error).__name__}: {shown(error)}"
            raise Refused(
                f"transformers {transformers.__version__} cannot read the {subject}: {cause}",
                expected="an architecture that it knows, with its metadata; "
                f"this is {shown(self.architecture)!r}",
                where=self.name,
                hint="update transformers, or use the original checkpoint",
            ) from error


def gguf_package() -> Any:
    """The `gguf` package, an optional dependency."""
    expected = "gguf 0.17 or later, which decodes the blocks"
    return optional("gguf", install='"adapterkit[gguf]"', expected=expected)


def decodable(gguf: Any, kind: Any) -> bool:
    """Whether the package decodes blocks of a type to floats."""
    import numpy as np

    if kind.name not in ("F32", "F16"):
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, KeyError):  # a type that the package knows by name only
            return False
    return True


def conversion_rules() -> Settings:
    """The architectures that transformers reads by conversion rules: name -> function of a
    config."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # an older transformers, which has the table of names only
        return {}
    return GGUF_ARCHS


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' log messages and progress bars."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
