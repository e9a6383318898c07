"""What an output folder holds besides weights: config, tokenizer, custom code, generation config, index, model card."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.adapter import CONFIG, Adapter
from adapterkit.checkpoint import layout
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.spec import Checkpoint, read_json
from adapterkit.checkpoint.stage import RECEIPT, check_name
from adapterkit.errors import AdapterkitError, Refused, shown
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
TOKENIZER = re.compile(
    r"(tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.(spm|tiktoken)"
    r"|spiece\.model|sentencepiece.*\.model|chat_template.*)"
)


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
    """Which file holds which key; of computed files it is known when they are written how long they are."""

    def content(grown: int) -> bytes:
        layouts = [
            replace(shard.layout, file=name) for name, shard in zip(names, shards, strict=True)
        ]
        return layout.index(layouts, base.index, grown)

    return (
        FromMetrics(lambda metrics, grown: content(grown))
        if any(isinstance(s, Computed) for s in shards)
        else content(0)
    )


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_files(
    adapters: list[Adapter], choice: str | None, notes: list[str]
) -> dict[str, CopyFile]:
    """The tokenizer saved beside an adapter, if there is one: training may have added tokens to it."""
    if choice == "base":
        return {}
    found = {
        a.number: {n for n in a.folder.files() if "/" not in n and TOKENIZER.fullmatch(n)}
        for a in adapters
    }
    found = {number: names for number, names in found.items() if names}
    if choice == "adapter" and not found:
        raise Refused(
            "no tokenizer beside any adapter",
            expected="tokenizer files in an adapter's folder",
            where="--tokenizer adapter",
            hint="leave --tokenizer out",
        )
    if not found:
        return {}
    by_number = {a.number: a for a in adapters}
    first = next(iter(found))
    one, apart = _tokenizer(by_number[first], found[first]), set()
    for number, files in found.items():
        other = _tokenizer(by_number[number], files)
        fast = "tokenizer.json" in one and "tokenizer.json" in other
        there = (one.keys() | other.keys()) - (
            {*REPEATED} - (one.keys() & other.keys()) if fast else set()
        )
        differing = sorted(name for name in there if one.get(name) != other.get(name))
        apart |= {name for name in differing if name in SIDES}
        if set(differing) - SIDES:
            names = f"{by_number[first].name} and {by_number[number].name}"
            raise Refused(
                f"{names} have different tokenizers: {', '.join(map(shown, differing))}",
                expected="one tokenizer",
                where="adapters",
                hint="give --tokenizer base, and copy the one you want afterwards",
            )
    notes.append(
        f"tokenizer: from {by_number[first].name}"
        + (f" (they differ in {', '.join(sorted(apart))})" if apart else "")
    )
    return {name: CopyFile(first, name) for name in sorted(found[first])}


# Settings of a saved tokenizer that change no token: where it came from, and what the training's calls had set
CALLS = ("model_max_length", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
PLACES = (
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "vocab_file",
    "is_local",
    "local_files_only",
)
SIDES = {
    "padding_side",
    "truncation_side",
}  # of batches and long texts: what training set is no other tokenizer, but is noted
REPEATED = (
    "special_tokens_map.json",
    "added_tokens.json",
)  # repeat what a fast tokenizer's other files say


def _tokenizer(adapter: Adapter, names: set[str]) -> dict[str, Any]:
    """What a tokenizer's files say that makes its tokens: by file, and by setting where the file is JSON."""
    found: dict[str, Any] = {}
    for name in names:
        if name not in ("tokenizer.json", "tokenizer_config.json"):
            found[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
            continue
        try:
            said = read_json(adapter.folder, name)
        except AdapterkitError:  # not ours to judge: it is compared as it stands
            found[name] = adapter.folder.read(name, 0, adapter.folder.files()[name])
            continue
        if name == "tokenizer.json":
            found[name] = {
                key: value for key, value in said.items() if key not in ("truncation", "padding")
            }
        else:
            found |= {
                key: value
                for key, value in said.items()
                if key not in (*CALLS, *PLACES, "chat_template")
            }
            template = said.get("chat_template")
            if isinstance(template, str) and "chat_template.jinja" not in names:
                found["chat_template.jinja"] = template.encode()
            elif not isinstance(template, str | None):
                found["chat_template"] = template
    return found


def model_card(base: Checkpoint, adapters: list[Adapter], weights: list[float]) -> str:
    """A README.md with the Hub's metadata for a merged model; nothing from the inputs is interpreted, names are quoted as JSON."""
    ids = [hub_or_name(base.folder)] + [hub_or_name(a.folder) for a in adapters]
    header = [
        "---",
        "base_model:",
        *(f"- {json.dumps(i)}" for i in ids),
        "base_model_relation: merge",
    ]
    header += [
        *_kept(base),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- lora",
        "- adapterkit",
        "---",
    ]
    rows = [
        f"| {cell(hub_or_name(a.folder))} | {w:g} | {len(a.loras)} | {a.config.get('r', '')} |"
        for a, w in zip(adapters, weights, strict=True)
    ]
    body = [
        "",
        f"# {cell(ids[0])} merged with {', '.join(cell(i) for i in ids[1:])}",
        "",
        f"Made by adapterkit {__version__} from the files: W' = round(W + Σ weight · scale · b @ a), each weight rounded once.",
        f"What was done to each tensor, and the hash of every file, stands in `{RECEIPT}`; `adapterkit verify .` checks it.",
        "",
        f"Base: {cell(ids[0])}",
        "",
        "| adapter | weight | modules | r |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(header + body)


def hub_or_name(folder: Folder) -> str:
    return str(folder.origin.get("repo") or folder.name)


def cell(text: str) -> str:
    return "".join(c if c.isalnum() or c in " ._-/" else " " for c in text)


def _kept(base: Checkpoint) -> list[str]:
    """The licence, language and pipeline of the base's card: they hold for the merged model too."""
    if "README.md" not in base.files:
        return []
    text = base.folder.read("README.md", 0, min(base.files["README.md"], 65536)).decode(
        "utf-8", "replace"
    )
    front = text.split("---")[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = re.findall(
        r"^(license|license_name|license_link|pipeline_tag|language): *([\w .:/\-]+)$",
        front,
        re.MULTILINE,
    )
    return [f"{key}: {json.dumps(value.strip())}" for key, value in found]


def check_output_apart(out: Path, folders: Iterable[Folder]) -> None:
    """`Refused` when the output is an input, inside one, around one, or a link to one, or cannot be a folder."""
    check_name(out)
    final = out.resolve()
    if out.is_symlink():
        raise Refused(
            "the output is a link",
            expected="a new folder",
            where=str(out),
            hint="choose another --out",
        )
    there = next(path for path in (final, *final.parents) if os.path.exists(path))
    if not there.is_dir():
        found = (
            "a file of that name"
            if there == final
            else f"{shown(there.name)} is a file, and no folder to make one in"
        )
        raise Refused(
            found, expected="a folder to make", where=str(out), hint="choose another --out"
        )
    for folder in folders:
        if not isinstance(folder, LocalFolder):
            continue
        root = (folder.root / folder.only if folder.only else folder.root).resolve()
        if final == root or root in final.parents or final in root.parents:
            raise Refused(
                f"the output {final.name} is, holds, or lies inside the input {folder.name}",
                expected="an output apart from the inputs",
                where="--out",
                hint="choose another --out",
            )
