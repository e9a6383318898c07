"""GGUF files whose parameters are known without a model: a table names them, and by transformers'
sources the names of a checkpoint are those of the loaded model."""

from pathlib import Path

from adapterkit.bases.gguf.blocks import is_written
from adapterkit.bases.gguf.config import check_counts
from adapterkit.bases.gguf.file import GgufFile
from adapterkit.bases.gguf.header import EMBEDDING, HEAD, GgufFiles, GgufHeader, read_model
from adapterkit.bases.gguf.model import GgufCheckpoint, TableOf
from adapterkit.bases.gguf.tables import EXPERT, SIZES
from adapterkit.bases.gguf.tensors import as_stored
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import torch
from adapterkit.core.records import Json
from adapterkit.core.weights.names import plain_names


def open_plain_gguf(files: GgufFiles, table_of: TableOf) -> GgufCheckpoint | None:
    """A GGUF file as a checkpoint, with the parameters that its architecture's table names; other
    tensors have their own names. None where a model has to say more: of stacks of experts, of keys
    that the loader renames, of types that are only read.

    The config has the sizes of the file alone."""
    header, headers = read_model(files)
    table = table_of(header.architecture)
    if table is None or not all(is_written(entry.type) for entry in header.tensors):
        return None
    config = _config(header, table.models[0])
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
    shards = {name: one.header for name, one in headers.items()}
    return GgufCheckpoint(files.folder, shards, tensors, None, None, config, {}, headers=headers)


def _config(header: GgufHeader, model_type: str) -> Json | None:
    """The config of a model of that type; None without a number of heads."""
    config: Json = {"model_type": model_type}
    for key, names in SIZES.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if type(value) is int:
            config |= dict.fromkeys(names, value)
    heads = config.get("num_attention_heads", 0)
    if min(heads, config.get("num_key_value_heads", heads)) < 1:
        return None
    entries = {entry.name: entry for entry in header.tensors}
    if EMBEDDING in entries:
        config["vocab_size"] = entries[EMBEDDING].shape[0]
    return config | {"tie_word_embeddings": HEAD not in entries}
