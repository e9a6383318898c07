"""What a checkpoint holds, from its headers and its index alone."""

import re
from dataclasses import dataclass, field

from adapterkit.checkpoint.folder import Folder, belonging_to
from adapterkit.checkpoint.header import Header, TensorSpec, read_header
from adapterkit.checkpoint.shards import find_shards, likely_shards
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import AdapterkitError, Damaged, Problems, Refused, shown

# of these as many modules are built, also where a config is only looked at
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
    """A model checkpoint: its shards' headers by file name, every tensor by key, its JSON files."""

    folder: Folder
    shards: dict[str, Header]  # in the order of their files
    tensors: dict[str, TensorSpec]
    index: dict | None  # the index file's content
    index_name: str | None
    config: dict
    files: dict[str, int]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass
class Scan:
    """What could be read of a folder's headers and JSON, and what is wrong with the rest."""

    folder: Folder
    number: int = 0  # which input its tensors are of
    shards: dict[str, Header | None] = field(default_factory=dict)  # None: cannot be read
    config: dict = field(default_factory=dict)
    index: dict | None = None  # the index file's content
    index_name: str | None = None
    errors: Problems = field(default_factory=Problems)
    complete: bool = True  # all files of the weights are there and can be read
    readable: bool = True  # so are the JSON files beside them

    @property
    def headers(self) -> list[Header]:
        return [header for header in self.shards.values() if header is not None]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.key: spec for header in self.headers for spec in header.tensors}

    def header(self, name: str) -> Header | None:
        """Read one shard's header; adds an error and returns None where it cannot be read."""
        self.shards[name] = None
        try:
            self.shards[name] = read_header(self.folder, name, self.number)
        except (Refused, Damaged) as error:
            self.errors.include(error)
            self.complete = self.readable = False
        return self.shards[name]

    def json(self, name: str) -> dict | None:
        """A JSON file of the folder; None without one, and, with an error, if it cannot be read."""
        if name not in self.folder.files():
            return None
        try:
            return read_json(self.folder, name)
        except (Refused, Damaged) as error:
            self.errors.include(error)
            self.readable = False
            return None

    def checkpoint(self) -> Checkpoint:
        """A checkpoint of what could be read."""
        shards = {name: header for name, header in self.shards.items() if header is not None}
        return Checkpoint(
            self.folder,
            shards,
            self.tensors,
            self.index,
            self.index_name,
            self.config,
            self.folder.files(),
        )


def open_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """A checkpoint folder's headers; raises `Refused` or `Damaged` with all that is wrong with
    it."""
    with belonging_to(folder):
        scan = scan_checkpoint(folder, number)
        scan.errors.raise_all()
    return scan.checkpoint()


def scan_checkpoint(folder: Folder, number: int = 0) -> Scan:
    """As much of a checkpoint folder as can be read, with all for which it cannot be opened."""
    scan, files = Scan(folder, number), find_shards(folder)
    scan.index, scan.index_name, scan.errors = files.index, files.index_name, files.errors
    scan.complete = files.complete and files.names is not None
    for name in likely_shards(folder) if files.names is None else files.names:
        scan.header(name)
    if files.names is not None:
        scan.errors += _stored_twice(scan) + _index_errors(scan)
        _share_strings(scan)
    scan.config = scan.json("config.json") or {}
    scan.readable = scan.readable and scan.complete
    scan.errors += _config_errors(scan.config, len(scan.tensors), f"{folder.name}/config.json")
    return scan


def _config_errors(config: dict, stored: int, where: str) -> list[AdapterkitError]:
    """Values of a config and its sub-configs that decide which model is built, and cannot be
    right."""
    errors = Problems(where=where, hint="fix the config", kind=Damaged)
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


def _index_errors(scan: Scan) -> list[AdapterkitError]:
    """Contradictions between the index, if there is one, and the files that could be read."""
    if scan.index is None:
        return []
    where = f"{scan.folder.name}/{scan.index_name}"
    tensors, weight_map = scan.tensors, scan.index["weight_map"]
    errors = Problems(where=where, hint="restore the index", kind=Damaged)
    for key, file in weight_map.items():
        spec = tensors.get(key)
        if scan.shards.get(file) is not None and (spec is None or spec.file != file):
            errors.add(f"{shown(key)} is not in {shown(file)}", "an index that matches its files")
    for key in [key for key in tensors if key not in weight_map]:
        errors.add(f"{shown(key)} in {shown(tensors[key].file)}", "every stored key in the index")
    return errors


def _share_strings(scan: Scan) -> None:
    """Put the headers' own strings into the index: as read, each name of a file is a new string."""
    if scan.index is not None:
        tensors = scan.tensors
        pairs = ((tensors.get(key), key, file) for key, file in scan.index["weight_map"].items())
        scan.index["weight_map"] = {
            s.key if s else key: s.file if s and s.file == file else file for s, key, file in pairs
        }


def _stored_twice(scan: Scan) -> list[AdapterkitError]:
    """Keys that several files hold."""
    files: dict[str, str] = {}  # of each key
    errors = Problems(where=scan.folder.name)
    for spec in (spec for header in scan.headers for spec in header.tensors):
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
