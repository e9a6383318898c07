"""Open a GGUF file as a checkpoint: config, parameters and tokenizer as transformers reads them,
blocks decoded by the `gguf` package. Tensors and metadata that it would ignore are refused.

Two kinds need no transformers model. For some architectures a table names all parameters, because
their checkpoints use the loaded model's names. Image and video models have the publisher's names,
reversed shapes and no metadata, as ComfyUI-GGUF (loader.py, tools/convert.py) and
stable-diffusion.cpp (src/model_io/gguf_io.cpp) write them.
"""

import json
import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from adapterkit.bases.gguf.config import check_counts, config_arguments, config_of
from adapterkit.bases.gguf.file import (
    GgufFile,
    check_types,
    gguf_package,
    is_read_by_transformers,
    quiet_transformers,
)
from adapterkit.bases.gguf.header import (
    EMBEDDING,
    FLOATS,
    HEAD,
    MAX_ERRORS,
    GgufFiles,
    GgufHeader,
    read_model,
)
from adapterkit.bases.gguf.parts import find_slots, in_slot_shapes, is_joined
from adapterkit.bases.gguf.tables import (
    EXPERT,
    NameTable,
    TableNames,
    model_by_table,
    sizes_of,
    table_of,
)
from adapterkit.bases.gguf.tensors import as_stored, model_tensors, tensor_names, tensors_by_table
from adapterkit.bases.gguf.weight import is_written
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import WARNING, Problems, shown
from adapterkit.core.lazy import torch
from adapterkit.core.records import Json
from adapterkit.core.weights.names import plain_names
from adapterkit.core.weights.parameters import SlottedCheckpoint
from adapterkit.core.weights.safe_config import LOCAL, closed
from adapterkit.core.weights.skeleton import Skeleton

UNSIZED = ("gemma4",)  # transformers reads their files only in one model's sizes, without experts
MOST_SQUARES = 1_000_000_000  # which takes half a second
LOCAL_SETTINGS = ("is_local", "local_files_only", "name_or_path")  # of a tokenizer's config
SHAPE = "comfy.gguf.orig_shape."  # of a tensor that is kept in rows of 256 values


@dataclass(frozen=True)
class GgufCheckpoint(SlottedCheckpoint):
    """The model of one GGUF file, or of a split one; its parameters are `GgufWeight`s."""

    headers: dict[str, GgufHeader] = field(default_factory=dict)  # by file

    in_safetensors = False
    # it may have a layer under no name that is known
    otherwise = "; if it was, merge into the original checkpoint and convert that to GGUF"

    @classmethod
    def of(
        cls,
        folder: Folder,
        headers: dict[str, GgufHeader],
        tensors: dict[str, TensorSpec],
        config: Json | None = None,
    ) -> Self:
        shards = {name: one.header for name, one in headers.items()}
        return cls(folder, shards, tensors, None, None, config or {}, {}, headers=headers)


class GgufModel(NamedTuple):
    """A GGUF file as a checkpoint, and the files of the model folder that it replaces."""

    checkpoint: GgufCheckpoint
    # to write it in: BF16 for blocks, whose own error exceeds the rounding; else the file's first
    # of `FLOATS`
    dtype: str
    model: Any  # transformers' own, without data
    texts: dict[str, bytes]  # the tokenizer's files
    notes: list[str]


def open_gguf(
    files: GgufFiles, number: int = 0, *, tokenizer: bool = False, by_table: bool = False
) -> GgufModel:
    """Open a GGUF file as a checkpoint; `Refused` or `Damaged` with all problems if it cannot be
    read completely. `number`: its index among the job's inputs; `tokenizer`: create its files too.

    `by_table`: if transformers does not read the architecture, use the table's parameters, keep the
    names of other tensors, and return a config that cannot run the model."""
    gguf = gguf_package()
    header, headers = read_model(files)
    kinds = {entry.type for entry in header.tensors}
    check_types(gguf, kinds)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers(), closed():
        file = GgufFile(files.folder, files.names[0], header, Path(scratch))
        table = None
        if by_table:
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
    checkpoint = GgufCheckpoint.of(file.folder, headers, {})
    if table is not None:
        model = model_by_table(file, table, checkpoint)
        names = TableNames(table, model, file.architecture)
        slots = find_slots(names, file.entries)
        own = {slot.key for each in slots.values() for slot in each}
        tensors = in_slot_shapes(tensors_by_table(file, names, number, own), slots)
        config = model.base.config
        return replace(checkpoint, config=config, tensors=tensors, slots=slots), model
    arguments = config_arguments(file)
    config = config_of(file, arguments)
    checkpoint = replace(checkpoint, config=config)
    model = Skeleton(checkpoint, config["architectures"][0])
    names = tensor_names(file, model, arguments)
    return replace(checkpoint, tensors=model_tensors(file, model, names, number)), model


def _tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """The tokenizer files that transformers creates from metadata; none, with a note, if it
    fails."""
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in file.header.metadata:
        file.notes.append("no tokenizer in the file")
        return {}
    out = file.scratch / "tokenizer"
    try:
        if (work := _squares(file.header)) > MOST_SQUARES:
            raise ValueError(f"its tokens are too long: their squared lengths sum to {work:,}")
        with file.transformers_copy() as copy:
            source = str(file.scratch)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=copy.name, **LOCAL)
        tokenizer.save_pretrained(str(out))
    except (Exception, RecursionError) as error:  # transformers' code, on any metadata
        kind = shown(file.header.metadata["tokenizer.ggml.model"])
        file.notes.append(
            f"{WARNING}no tokenizer, because transformers cannot make one of kind {kind}: "
            f"{shown(error)}"
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
    """The sum of squared token lengths, which is the cost of transformers' search for merges."""
    key, total = "tokenizer.ggml.tokens", 0
    at, stop = header.spans.get(key, (0, 0))
    at += 8 + len(key) + 16  # its name; types, and how many there are
    while at < stop:
        length = int.from_bytes(header.raw[at : at + 8], "little")
        total, at = total + length**2, at + 8 + length
    return total


def loads_in_float32(model: object, key: str, dtype: str) -> bool:
    """Return whether transformers loads a parameter in float32, regardless of the model's dtype."""
    names = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == "F16":
        names |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    return any(f".{name}." in f".{key}." for name in names)


def open_plain_gguf(files: GgufFiles) -> GgufCheckpoint | None:
    """Open a GGUF file with the parameters that its architecture's table names; other tensors keep
    their names. None if a model is needed: for stacks of experts, for keys that the loader renames,
    and for types that are only read.

    The config has only the sizes in the file."""
    header, headers = read_model(files)
    table = table_of(header.architecture)
    if table is None or not all(is_written(entry.type) for entry in header.tensors):
        return None
    config = _plain_config(header, table.models[0])
    if config is None or not plain_names(config):
        return None
    check_counts(GgufFile(files.folder, files.names[0], header, Path()))
    tensors: dict[str, TensorSpec] = {}
    for entry in header.tensors:
        places = set(table.places(entry.name))
        if len(places) > 1 or any(EXPERT in place.key or place.key in tensors for place in places):
            return None
        key, rows = entry.name, None
        for place in places:
            key, rows = place.key, table.rows(place, entry.shape[0], config)
        tensors[key] = as_stored(entry, key, None if rows is None else torch.argsort(rows))
    return GgufCheckpoint.of(files.folder, headers, tensors, config)


def _plain_config(header: GgufHeader, model_type: str) -> Json | None:
    """The config of a model of that type; None without a number of heads."""
    config: Json = {"model_type": model_type, **sizes_of(header)}
    heads = config.get("num_attention_heads", 0)
    if min(heads, config.get("num_key_value_heads", heads)) < 1:
        return None
    entries = {entry.name: entry for entry in header.tensors}
    if EMBEDDING in entries:
        config["vocab_size"] = entries[EMBEDDING].shape[0]
    return config | {"tie_word_embeddings": HEAD not in entries}


def open_image_gguf(files: GgufFiles, number: int = 0) -> GgufCheckpoint | None:
    """A file's tensors under their own names, as input `number` of the job; None for a llama.cpp
    model, whose metadata has a number of blocks. `Refused` for types that nothing decodes, and for
    shapes of another size."""
    header, headers = read_model(files)
    if f"{header.architecture}.block_count" in header.metadata:
        return None
    kinds = {entry.type for entry in header.tensors}
    check_types(gguf_package(), kinds)
    errors = Problems(where=files.names[0], hint="make the file again", code="AK207")
    tensors: dict[str, TensorSpec] = {}
    for entry in header.tensors:
        shape = header.arrays.get(SHAPE + entry.name, entry.shape)
        if math.prod(shape) != math.prod(entry.shape) or min(shape, default=0) < 1:
            errors.add(
                f"{shown(entry.name)} has {entry.shape} values, and its metadata state {shape}",
                "as many values",
            )
        tensors[entry.name] = as_stored(entry, shape=shape, number=number)
    Problems(errors[:MAX_ERRORS]).raise_all()
    return GgufCheckpoint.of(files.folder, headers, tensors)
