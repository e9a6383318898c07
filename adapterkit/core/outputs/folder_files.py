"""Files of an output folder besides its weights and its receipt, in the order of writing: what
makes the folder loadable is last."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint import layout
from adapterkit.core.checkpoint.shards import INDEX, index_filename, stem_of
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.plan import CopyFile, Files, FromMetrics, OutputFile
from adapterkit.core.records import Json

WEIGHTS = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .tflite .ot .npz".split()
)
NOT_COPIED = {RECEIPT, "README.md", "config.json", CONFIG, "training_args.bin"}


def model_files(
    base: Checkpoint,
    config: Json,
    shards: Sequence[OutputFile],
    card: str,
    *,
    tokenizer: Mapping[str, CopyFile] | None = None,
    folder: str = "",
    omit: Collection[str] = (),
) -> Files:
    """A model's files: the base's own, also those in subfolders, with this config, card and index.

    `tokenizer`: an adapter's instead of the base's; `folder`: where in the output; `omit`: the
    base's files that do not hold for the output."""
    prefix = f"{folder}/" if folder else ""
    files: Files = {}
    layers = _layer_folders(base) if "modules.json" in base.files else ()
    for name in base.files:
        if (not is_weights(name) or name.startswith(layers)) and name not in NOT_COPIED:
            files[name] = CopyFile(0, name)
    files |= tokenizer or {}
    files["README.md"] = card.encode()
    names = [shard.file.removeprefix(prefix) for shard in shards]
    if len(shards) > 1 or (base.index is not None and any(name in base.shards for name in names)):
        files[base.index_name or index_filename(stem_of(base.shards))] = _index(base, names, shards)
    if "config.json" in base.files:
        files["config.json"] = (
            CopyFile(0, "config.json") if config == base.config else as_json(config)
        )
    return {prefix + name: file for name, file in files.items() if name not in omit}


def is_weights(name: str) -> bool:
    """Whether a file holds weights, in any format, or is their index."""
    return name.endswith((*WEIGHTS, ".index.json")) or INDEX.fullmatch(name) is not None


def _layer_folders(base: Checkpoint) -> tuple[str, ...]:
    """Subfolders with further layers of the model and weights of their own: those that the
    modules.json of sentence-transformers names (`2_Dense/`)."""
    try:
        layers = nested_json(base.folder.read("modules.json", 0, base.files["modules.json"]))
    except ValueError:
        return ()
    entries = layers if isinstance(layers, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return tuple(f"{path}/" for path in paths if isinstance(path, str) and path)


def _index(base: Checkpoint, names: list[str], shards: Sequence[OutputFile]) -> bytes | FromMetrics:
    """The index: each key's file, and the total size, which is known once computed files are
    written."""
    content = partial(_index_content, names, shards, base.index)
    is_final = not any(shard.tasks for shard in shards)
    return content({}, 0) if is_final else FromMetrics(content)


def _index_content(
    names: Sequence[str],
    shards: Sequence[OutputFile],
    original: Json | None,
    metrics: dict[str, dict],
    grown: int,
) -> bytes:
    layouts = [replace(shard.layout, file=name) for name, shard in zip(names, shards, strict=True)]
    return layout.index(layouts, original, grown)


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
