"""An opened GGUF file, and calls of the `gguf` package and transformers on it."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterkit.bases.gguf.header import (
    EMBEDDING,
    HEAD,
    TYPES,
    Entry,
    GgufFiles,
    GgufHeader,
    model_of,
    read_model,
)
from adapterkit.bases.gguf.weight import is_written
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.errors import Damaged, Problems, Refused, shown
from adapterkit.core.lazy import optional
from adapterkit.core.records import Settings

COPY = "model.gguf"
OTHER_NAMES = ("qwen2moe", "qwen3moe", "t5encoder")  # that transformers reads as others


@dataclass
class GgufFile:
    """A file with its parsed header, and the copy of it that transformers reads."""

    folder: Folder
    name: str
    header: GgufHeader
    scratch: Path  # a folder for copies
    notes: list[str] = field(default_factory=list)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.header.tensors}

    @contextlib.contextmanager
    def transformers_copy(self, header: bytes | None = None) -> Iterator[Path]:
        """Write a copy with a header (by default the file's own) and a hole instead of the data."""
        path = self.scratch / COPY
        with path.open("wb") as stream:
            stream.write(self.header.raw if header is None else header)
            stream.truncate(self.header.size)
        yield path
        path.unlink()

    @property
    def architecture(self) -> str:
        return self.header.architecture

    @cached_property
    def errors(self) -> Problems:
        """The problems found in the file."""
        return Problems(where=self.name, hint="use the original checkpoint instead")

    def call_transformers(self, subject: str, function: Callable[[], Any]) -> Any:
        """Run transformers' code on the header; it may fail in any way on unexpected metadata."""
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
                code="AK405",
            ) from error


def gguf_package() -> Any:
    """The `gguf` package, an optional dependency."""
    expected = "gguf 0.17 or later, with which transformers reads the metadata"
    return optional("gguf", install="gguf", expected=expected)


def number_of(architecture: str) -> Any:
    """The package's number for an architecture; None if the package does not know it."""
    return {name: n for n, name in gguf_package().MODEL_ARCH_NAMES.items()}.get(architecture)


def has_head(architecture: str) -> bool | None:
    """Return whether llama.cpp loads a head in addition to the embedding; None for an architecture
    that the package does not know."""
    gguf, number = gguf_package(), number_of(architecture)
    return None if number is None else gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[number]


def check_models(folder: Folder, names: Iterable[str]) -> None:
    """`Damaged` if llama.cpp would not load the models in these files: their counts or splits are
    wrong, or the head does not suit the architecture or has a wrong shape."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(model_of(name), []).append(name)
    for files in models.values():
        header, _ = read_model(GgufFiles(folder, files))
        shapes = {entry.name: entry.shape for entry in header.tensors}
        expected = shapes.get(EMBEDDING)
        with contextlib.suppress(Refused):  # without the package
            expected = None if has_head(header.architecture) is False else expected
        if shapes.get(HEAD) not in (None, expected):
            raise Damaged(
                f"{HEAD} {shapes[HEAD]}, which llama.cpp does not load",
                expected=f"{expected or 'none'} in a model of {shown(header.architecture)}",
                where=files[0],
                hint="merge again; --tied fold changes both sides of a tied embedding",
                code="AK207",
            )


def check_types(gguf: Any, kinds: Iterable[str]) -> None:
    """`Refused` if neither adapterkit nor the package decodes one of these types."""
    import numpy as np

    unknown = []
    for kind in sorted(kind for kind in kinds if not is_written(kind)):
        _, _, width = TYPES[kind]
        try:
            gguf.dequantize(np.zeros((1, width), np.uint8), gguf.GGMLQuantizationType[kind])
        except (NotImplementedError, KeyError):  # a type that the package knows by name only
            unknown.append(kind)
    if unknown:
        raise Refused(
            f"blocks of {', '.join(unknown)}",
            expected="types that the gguf package decodes",
            hint="update the gguf package: pip install -U gguf",
            code="AK207",
        )


def conversion_rules() -> Settings:
    """Architectures that transformers reads with conversion rules: name -> function of a config."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # an older transformers, which has the table of names only
        return {}
    return GGUF_ARCHS


def is_read_by_transformers(architecture: str) -> bool:
    """Return whether transformers reads files of an architecture."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {name.replace("-", "_") for name in (*GGUF_SUPPORTED_ARCHITECTURES, *OTHER_NAMES)}
    return architecture in conversion_rules() or architecture.replace("-", "_") in known


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log messages and progress bars."""
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
