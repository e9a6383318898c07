"""Read a checkpoint's headers and index: its tensors, their shapes and their files."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from adapterkit.core.checkpoint.folder import Folder, belonging_to
from adapterkit.core.checkpoint.header import Header, TensorSpec, read_header
from adapterkit.core.checkpoint.shards import find_shards, likely_shards, noted
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, shown

# numbers of modules to build, even if a config is only inspected
COUNTS = re.compile(r"((?<!max_)depths?|layers?|blocks|per_block|num_labels)$")
MOST_LABELS = 100_000
LAYER_COUNTS = {
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model checkpoint, or its readable part: its shards' headers by file name, every tensor by
    key, its JSON files; and the errors of the rest."""

    folder: Folder
    shards: dict[str, Header]  # in the order of their files
    tensors: dict[str, TensorSpec]
    index: dict | None  # the index file's content
    index_name: str | None
    config: dict
    files: dict[str, int]
    errors: Problems = field(default_factory=Problems)
    unread: tuple[str, ...] = ()  # files of weights whose headers cannot be read
    complete: bool = True  # all files of the weights are there and can be read
    readable: bool = True  # so are the JSON files next to them

    in_safetensors: ClassVar[bool] = True  # else in a container that is written unchanged
    otherwise: ClassVar[str] = ""  # a hint for an adapter of unknown modules

    @property
    def name(self) -> str:
        return self.folder.name

    def names_layer(self, module: str) -> bool:
        """Return whether the rules of the model's family call a module a layer."""
        return False


def open_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """Return a checkpoint folder's headers; raises `Refused` or `Damaged` with every problem.
    `number`: its index among the job's inputs."""
    with belonging_to(folder):
        checkpoint = scan_checkpoint(folder, number)
        checkpoint.errors.raise_all()
    return checkpoint


def scan_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """Return the readable part of a checkpoint folder, with every error that keeps it from being
    opened."""
    errors = Problems()
    names, index, index_name = find_shards(folder, errors)
    scan = scan_files(folder, likely_shards(folder) if names is None else names, number, errors)
    if names is not None:
        errors += _stored_twice(scan) if len(scan.shards) > 1 else []
        if index is not None:
            errors += _index_errors(scan, index["weight_map"], f"{folder.name}/{index_name}")
            index = index | {"weight_map": _shared_strings(scan.tensors, index["weight_map"])}
    has_config = "config.json" in scan.files
    config = noted(errors, read_json, folder, "config.json") if has_config else None
    named = () if names is None or index is None else index["weight_map"].values()
    complete = names is not None and scan.complete and {*named} <= {*names}
    readable = complete and (config is not None or not has_config)
    errors += _config_errors(config or {}, len(scan.tensors), f"{folder.name}/config.json")
    whole = {"config": config or {}, "complete": complete, "readable": readable}
    return replace(scan, index=index, index_name=index_name, **whole)


def scan_files(
    folder: Folder, names: Iterable[str], number: int, errors: Problems, config: dict | None = None
) -> Checkpoint:
    """Return the readable headers of these files; the errors of the others are added to
    `errors`."""
    read = {name: noted(errors, read_header, folder, name, number) for name in names}
    shards = {name: header for name, header in read.items() if header is not None}
    tensors = {spec.key: spec for header in shards.values() for spec in header.tensors}
    unread, files = tuple(name for name in read if name not in shards), folder.files()
    more = {"unread": unread, "complete": not unread, "readable": not unread}
    return Checkpoint(folder, shards, tensors, None, None, config or {}, files, errors, **more)


def _config_errors(config: dict, stored: int, where: str) -> list[AdapterkitError]:
    """Return errors of values in a config and its sub-configs that decide which model is built and
    cannot be right."""
    errors = Problems(where=where, hint="fix the config", kind=Damaged, code="AK202")
    names = config.get("architectures")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_list:
        errors.add("architectures", "a list of class names")
    if not isinstance(config.get("model_type"), str | None):
        errors.add("model_type", "a text")
    for key in sorted(LAYER_COUNTS & config.keys()):
        if not isinstance(config[key], int | None):
            errors.add(key, "a whole number")
    for key, value in config.items():
        for one in value if isinstance(value, list) else [value]:
            limit = MOST_LABELS if key == "num_labels" else max(1000, stored)
            if isinstance(one, int) and one > limit and COUNTS.search(key):
                errors.add(f"{shown(key)} = {one}, with {stored} tensors", f"at most {limit}")
            if isinstance(one, dict):
                errors += _config_errors(one, stored, where)
    return errors


def _index_errors(
    scan: Checkpoint, weight_map: dict[str, str], where: str
) -> list[AdapterkitError]:
    """Return contradictions between the index and the readable files."""
    tensors = scan.tensors
    errors = Problems(where=where, hint="restore the index", kind=Damaged, code="AK202")
    for key, file in weight_map.items():
        spec = tensors.get(key)
        if file in scan.shards and (spec is None or spec.file != file):
            errors.add(f"{shown(key)} is not in {shown(file)}", "an index that matches its files")
    for key in [key for key in tensors if key not in weight_map]:
        errors.add(f"{shown(key)} in {shown(tensors[key].file)}", "every stored key in the index")
    return errors


def _shared_strings(tensors: dict[str, TensorSpec], weight_map: dict[str, str]) -> dict[str, str]:
    """Return an index with the headers' own strings, because every name as read is a new string."""
    pairs = ((tensors.get(key), key, file) for key, file in weight_map.items())
    return {s.key if s else key: s.file if s and s.file == file else file for s, key, file in pairs}


def _stored_twice(scan: Checkpoint) -> list[AdapterkitError]:
    """Return the errors of keys that several files contain."""
    files: dict[str, str] = {}  # of each key
    errors = Problems(where=scan.folder.name, code="AK202")
    for spec in (spec for header in scan.shards.values() for spec in header.tensors):
        if spec.key in files:
            problem = f"{shown(spec.key)} in both {shown(files[spec.key])} and {shown(spec.file)}"
            errors.add(
                problem,
                "each tensor once",
                "remove the file that is not part of the model",
                kind=Damaged,
            )
        files[spec.key] = spec.file
    return errors
