"""A GGUF file as a checkpoint: config, parameters and tokenizer as transformers reads them, blocks
decoded by the `gguf` package.

What transformers would leave out without a word is refused.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import WARNING, Refused, shown
from adapterkit.gguf.config import check_counts, config_arguments, config_of
from adapterkit.gguf.file import GgufFile, decodable, gguf_package, quiet_transformers
from adapterkit.gguf.header import read_gguf
from adapterkit.gguf.tensors import model_tensors, tensor_names
from adapterkit.weights.skeleton import Skeleton

COPY = "model.gguf"
FLOATS = ("BF16", "F16", "F32")  # ggml's types that are floats: the first of them in a file decides
LOCAL_SETTINGS = ("is_local", "local_files_only", "name_or_path")  # of a tokenizer's config


class GgufModel(NamedTuple):
    """A GGUF file as a checkpoint of `GgufWeight`s, and the files of a model's folder that it
    stands for."""

    checkpoint: Checkpoint
    # to write it in: BF16 for blocks, whose own error exceeds the rounding; else the file's
    dtype: str
    model: Any  # transformers' own, without data
    texts: dict[str, bytes]  # the tokenizer's files
    notes: list[str]


def open_gguf(folder: Folder, name: str) -> GgufModel:
    """Read a GGUF file as a checkpoint; `Refused` or `Damaged`, all at once, where that cannot be
    done in full."""
    gguf = gguf_package()
    block_sizes = {
        int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if decodable(gguf, kind)
    }
    header = read_gguf(folder, name, block_sizes)
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise Refused(
            "this is one file of a split model",
            expected="a whole model",
            where=name,
            hint="join them first: llama-gguf-split --merge FIRST OUT",
        )
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        copy = Path(scratch, COPY)
        with copy.open("wb") as stream:
            stream.write(header.raw)
            stream.truncate(folder.files()[name])
        file = GgufFile(folder, name, header, copy)
        checkpoint, model = _read(file)
        texts = _tokenizer_files(file)
    kinds = {gguf.GGMLQuantizationType(entry.kind).name for entry in header.tensors}
    dtype = next((kind for kind in FLOATS if kind in kinds), "F32")
    dtype = dtype if kinds <= {*FLOATS} else "BF16"
    return GgufModel(checkpoint, dtype, model.model, texts, file.notes)


def _read(file: GgufFile) -> tuple[Checkpoint, Skeleton]:
    """The checkpoint, and its model without data."""
    check_counts(file)
    arguments = config_arguments(file)
    config = config_of(file, arguments)
    shards = {file.name: file.header.header}
    empty = Checkpoint(file.folder, shards, {}, None, None, config, {})
    model = Skeleton(empty, config["architectures"][0])
    tensors = model_tensors(file, model, tensor_names(file, model, arguments))
    return Checkpoint(file.folder, shards, tensors, None, None, config, {}), model


def _tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """The files of the tokenizer that transformers makes from the metadata; none, with a note,
    where it cannot."""
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in file.header.metadata:
        file.notes.append("no tokenizer in the file")
        return {}
    out = file.copy.parent / "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.copy.parent), gguf_file=file.copy.name, local_files_only=True
        )
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


def loads_in_float32(model: object, key: str, dtype: str) -> bool:
    """Whether transformers loads a parameter in float32 whatever the model's dtype."""
    names = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == "F16":
        names |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    return any(f".{name}." in f".{key}." for name in names)
