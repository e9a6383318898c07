"""Collect the files of an output folder besides weights and receipt, in the order of writing. The
file that makes the folder loadable is last."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint import layout
from adapterkit.core.checkpoint.shards import INDEX, TOKENIZER, index_filename, stem_of
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import nested_json, read_json
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.plan import CopyFile, Files, FromMetrics, OutputFile
from adapterkit.core.records import Json

WEIGHTS = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .tflite .ot .npz".split()
)
NOT_COPIED = {RECEIPT, "README.md", "config.json", CONFIG, "training_args.bin"}
# Settings of a saved tokenizer that change no token: its origin, and settings of the training's
# calls
CALLS = ("model_max_length", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
PLACES = (
    "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "is_local",
    "local_files_only",
)  # fmt: skip
# sides of padding and truncation: a difference is noted, but makes no other tokenizer
SIDES = {"padding_side", "truncation_side"}
# files that repeat the content of a fast tokenizer's other files
REPEATED = ("special_tokens_map.json", "added_tokens.json")


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

    `tokenizer`: an adapter's, to replace the base's; `folder`: the subfolder in the output; `omit`:
    the base's files that are not valid for the output."""
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
    """Return whether a file contains weights in any format, or is their index."""
    return name.endswith((*WEIGHTS, ".index.json")) or INDEX.fullmatch(name) is not None


def _layer_folders(base: Checkpoint) -> tuple[str, ...]:
    """Subfolders with further layers of the model and their own weights, as listed in the
    modules.json of sentence-transformers (`2_Dense/`)."""
    try:
        layers = nested_json(base.folder.read("modules.json", 0, base.files["modules.json"]))
    except ValueError:
        return ()
    entries = layers if isinstance(layers, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return tuple(f"{path}/" for path in paths if isinstance(path, str) and path)


def _index(base: Checkpoint, names: list[str], shards: Sequence[OutputFile]) -> bytes | FromMetrics:
    """The index: each key's file, and the total size, which is known after computed files are
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


def tokenizer_files(
    adapters: list[Adapter], choice: str | None, notes: list[str]
) -> dict[str, CopyFile]:
    """The tokenizer saved with an adapter, if there is one, because training may have added tokens
    to it."""
    if choice == "base":
        return {}
    files_of = {
        a.number: {n for n in a.folder.files() if "/" not in n and TOKENIZER.fullmatch(n)}
        for a in adapters
    }
    files_of = {number: names for number, names in files_of.items() if names}
    if choice == "adapter" and not files_of:
        raise Refused(
            "no adapter has a tokenizer",
            expected="tokenizer files in an adapter's folder",
            where="--tokenizer adapter",
            hint="remove --tokenizer",
            code="AK305",
        )
    if not files_of:
        return {}
    by_number = {a.number: a for a in adapters}
    first = next(iter(files_of))
    one, noted = _tokenizer(by_number[first], files_of[first]), set()
    for number, files in files_of.items():
        other = _tokenizer(by_number[number], files)
        fast = "tokenizer.json" in one and "tokenizer.json" in other
        names = (one.keys() | other.keys()) - (
            {*REPEATED} - (one.keys() & other.keys()) if fast else set()
        )
        differing = sorted(name for name in names if one.get(name) != other.get(name))
        noted |= {name for name in differing if name in SIDES}
        if set(differing) - SIDES:
            names = f"{by_number[first].name} and {by_number[number].name}"
            raise Refused(
                f"{names} have different tokenizers: {', '.join(map(shown, differing))}",
                expected="one tokenizer",
                where="adapters",
                hint="give --tokenizer base, and copy the one you want afterwards",
                code="AK305",
            )
    notes.append(
        f"tokenizer: from {by_number[first].name}"
        + (f" (they differ in {', '.join(sorted(noted))})" if noted else "")
    )
    return {name: CopyFile(first, name) for name in sorted(files_of[first])}


def _without(settings: Json, *keys: str) -> Json:
    return {key: value for key, value in settings.items() if key not in keys}


def _tokenizer(adapter: Adapter, names: set[str]) -> Json:
    """The contents of a tokenizer's files that determine its tokens: by file, or by setting for
    JSON."""
    contents: Json = {}
    for name in names:
        settings: Json | None = None
        if name in ("tokenizer.json", "tokenizer_config.json"):
            with contextlib.suppress(AdapterkitError):  # an unreadable file is compared as bytes
                settings = read_json(adapter.folder, name)
        if settings is None:
            contents[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
        elif name == "tokenizer.json":
            contents[name] = _without(settings, "truncation", "padding")
        else:
            contents |= _without(settings, *CALLS, *PLACES, "chat_template")
            template = settings.get("chat_template")
            if isinstance(template, str) and "chat_template.jinja" not in names:
                contents["chat_template.jinja"] = template.encode()
            elif not isinstance(template, str | None):
                contents["chat_template"] = template
    return contents
