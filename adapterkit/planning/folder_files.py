"""Files of a model folder besides its shards: config, custom code, generation config, index."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint import layout
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.stage import RECEIPT
from adapterkit.plan import Computed, CopyFile, FromMetrics, Shard

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
    ".npz",
)
NOT_COPIED = {RECEIPT, "README.md", "config.json", CONFIG, "training_args.bin"}
Files = dict[str, bytes | CopyFile | FromMetrics]


def model_files(
    base: Checkpoint,
    config: dict[str, Any],
    shards: Sequence[Shard | Computed],
    card: str,
    *,
    tokenizer: dict[str, CopyFile] | None = None,
    folder: str = "",
) -> Files:
    """Every file of a model's folder besides its shards and its receipt, in the order of writing, what makes it loadable last: the
    base's own, also those in subfolders, with another config, card and index. `tokenizer`: files that come from an adapter.
    `folder`: where in the output."""
    prefix = f"{folder}/" if folder else ""
    files: Files = {}
    layers = _layer_folders(base)
    for name in base.files:
        weights = name.endswith((*WEIGHTS, ".index.json")) and not name.startswith(layers)
        if not weights and name not in NOT_COPIED:
            files[name] = CopyFile(0, name)
    files |= tokenizer or {}
    files["README.md"] = card.encode()
    names = [shard.file.removeprefix(prefix) for shard in shards]
    if len(shards) > 1 or (base.index is not None and any(name in base.shards for name in names)):
        files[base.index_name or "model.safetensors.index.json"] = _index(base, names, shards)
    if "config.json" in base.files:
        files["config.json"] = (
            CopyFile(0, "config.json") if config == base.config else as_json(config)
        )
    return {prefix + name: file for name, file in files.items()}


def _layer_folders(base: Checkpoint) -> tuple[str, ...]:
    """Subfolders that hold further layers of the model with weights of their own: those that modules.json of sentence-transformers
    names (`2_Dense/`)."""
    if "modules.json" not in base.files:
        return ()
    try:
        layers = json.loads(base.folder.read("modules.json", 0, base.files["modules.json"]))
    except ValueError:
        return ()
    paths = (
        [layer.get("path") for layer in layers if isinstance(layer, dict)]
        if isinstance(layers, list)
        else []
    )
    return tuple(f"{path}/" for path in paths if isinstance(path, str) and path)


def _index(
    base: Checkpoint, names: list[str], shards: Sequence[Shard | Computed]
) -> bytes | FromMetrics:
    """Which file holds which key; the sizes of computed files are known once they are written."""
    content = partial(_index_content, names, shards, base.index)
    is_final = not any(isinstance(shard, Computed) for shard in shards)
    return content({}, 0) if is_final else FromMetrics(content)


def _index_content(
    names: Sequence[str],
    shards: Sequence[Shard | Computed],
    original: dict[str, Any] | None,
    metrics: dict[str, dict],
    grown: int,
) -> bytes:
    layouts = [replace(shard.layout, file=name) for name, shard in zip(names, shards, strict=True)]
    return layout.index(layouts, original, grown)


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
