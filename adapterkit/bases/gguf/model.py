"""A GGUF file as a checkpoint: config, parameters and tokenizer as transformers reads them, blocks
decoded by the `gguf` package.

What transformers would leave out without a word is refused.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from adapterkit.bases.gguf.config import check_counts, config_arguments, config_of
from adapterkit.bases.gguf.file import (
    GgufFile,
    check_types,
    gguf_package,
    is_read_by_transformers,
    quiet_transformers,
)
from adapterkit.bases.gguf.header import FLOATS, GgufFiles, GgufHeader, read_model
from adapterkit.bases.gguf.parts import find_slots, is_joined, seen_so
from adapterkit.bases.gguf.tables import NameTable, TableNames, model_by_table
from adapterkit.bases.gguf.tensors import model_tensors, tensor_names, tensors_by_table
from adapterkit.core.errors import WARNING, shown
from adapterkit.core.weights.parameters import SlottedCheckpoint
from adapterkit.core.weights.safe_config import LOCAL, closed
from adapterkit.core.weights.skeleton import Skeleton

TableOf: TypeAlias = Callable[[str], NameTable | None]
UNSIZED = ("gemma4",)  # of which transformers reads files of one model's sizes, and no experts
MOST_SQUARES = 1_000_000_000  # which takes half a second
LOCAL_SETTINGS = ("is_local", "local_files_only", "name_or_path")  # of a tokenizer's config


@dataclass(frozen=True)
class GgufCheckpoint(SlottedCheckpoint):
    """The model of one GGUF file, or of the parts of a split one: its parameters are
    `GgufWeight`s."""

    headers: dict[str, GgufHeader] = field(default_factory=dict)  # by file

    in_safetensors = False
    # it may have a layer under no name that is known
    otherwise = "; if it was, merge into the original checkpoint and convert that to GGUF"


class GgufModel(NamedTuple):
    """A GGUF file as a checkpoint, and the files of a model's folder that it stands for."""

    checkpoint: GgufCheckpoint
    # to write it in: BF16 for blocks, whose own error exceeds the rounding; else the file's first
    # of `FLOATS`
    dtype: str
    model: Any  # transformers' own, without data
    texts: dict[str, bytes]  # the tokenizer's files
    notes: list[str]


def open_gguf(
    files: GgufFiles, number: int = 0, *, tokenizer: bool = False, table_of: TableOf | None = None
) -> GgufModel:
    """Read a GGUF file as a checkpoint; `Refused` or `Damaged`, all at once, where that cannot be
    done in full. `number`: which input of the job it is; `tokenizer`: make its files, too.

    `table_of` an architecture that transformers does not read: its parameters are those of the
    table then, other tensors have their own names, and the config is not one to run the model."""
    gguf = gguf_package()
    header, headers = read_model(files)
    kinds = {entry.type for entry in header.tensors}
    check_types(gguf, kinds)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers(), closed():
        file = GgufFile(files.folder, files.names[0], header, Path(scratch))
        table = None
        if table_of is not None:
            table = table_of(file.architecture)
            read = is_read_by_transformers(file.architecture) and file.architecture not in UNSIZED
            if table is not None and read and not is_joined(table, file.entries):
                table = None
        checkpoint, model = _read(file, headers, number, table)
        texts = _tokenizer_files(file) if tokenizer else {}
    dtype = next((kind for kind in FLOATS if kind in kinds), "F32")
    dtype = dtype if kinds <= {*FLOATS} else "BF16"
    return GgufModel(checkpoint, dtype, model.model, texts, file.notes)


def _read(
    file: GgufFile, headers: dict[str, GgufHeader], number: int, table: NameTable | None
) -> tuple[GgufCheckpoint, Skeleton]:
    """The checkpoint, and its model without data."""
    check_counts(file)
    shards = {name: header.header for name, header in headers.items()}
    checkpoint = GgufCheckpoint(file.folder, shards, {}, None, None, {}, {}, headers=headers)
    if table is not None:
        model = model_by_table(file, table, checkpoint)
        names = TableNames(table, model, file.architecture)
        slots = find_slots(names, file.entries)
        own = {slot.key for each in slots.values() for slot in each}
        tensors = seen_so(tensors_by_table(file, names, number, own), slots)
        config = model.base.config
        return replace(checkpoint, config=config, tensors=tensors, slots=slots), model
    arguments = config_arguments(file)
    config = config_of(file, arguments)
    checkpoint = replace(checkpoint, config=config)
    model = Skeleton(checkpoint, config["architectures"][0])
    names = tensor_names(file, model, arguments)
    return replace(checkpoint, tensors=model_tensors(file, model, names, number)), model


def _tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """The files of the tokenizer that transformers makes from the metadata; none, with a note,
    where it cannot."""
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in file.header.metadata:
        file.notes.append("no tokenizer in the file")
        return {}
    out = file.scratch / "tokenizer"
    try:
        if (work := _squares(file.header)) > MOST_SQUARES:
            raise ValueError(f"its tokens are too long, of {work:,} letters squared in all")
        with file.shown_to_transformers() as copy:
            source = str(file.scratch)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=copy.name, **LOCAL)
        tokenizer.save_pretrained(str(out))
    except (Exception, RecursionError) as error:  # transformers' code, on any metadata
        kind = shown(file.header.metadata["tokenizer.ggml.model"])
        file.notes.append(
            f"{WARNING}no tokenizer, as transformers cannot make one of kind {kind}: {shown(error)}"
        )
        return {}
    texts = {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
    if "tokenizer_config.json" in texts:
        settings = json.loads(texts["tokenizer_config.json"])
        settings = {key: value for key, value in settings.items() if key not in LOCAL_SETTINGS}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        texts["tokenizer_config.json"] = text.encode()
    return texts


def _squares(header: GgufHeader) -> int:
    """The sum of each token's length squared: steps in which transformers makes merges of them."""
    key, total = "tokenizer.ggml.tokens", 0
    at, stop = header.spans.get(key, (0, 0))
    at += 8 + len(key) + 16  # its name; types, and how many there are
    while at < stop:
        length = int.from_bytes(header.raw[at : at + 8], "little")
        total, at = total + length**2, at + 8 + length
    return total


def loads_in_float32(model: object, key: str, dtype: str) -> bool:
    """Whether transformers loads a parameter in float32 whatever the model's dtype."""
    names = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == "F16":
        names |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    return any(f".{name}." in f".{key}." for name in names)
