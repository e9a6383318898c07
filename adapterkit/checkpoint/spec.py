"""What a checkpoint holds, from its headers and its index alone."""

import json
import math
import re
from dataclasses import dataclass

from adapterkit.checkpoint.folder import Folder, inside
from adapterkit.checkpoint.header import Header, TensorSpec, header_length, parse_header
from adapterkit.errors import AdapterkitError, Damaged, Refused, refuse_all, shown

FIRST_READ = 65536  # most headers of a shard fit, so one read does
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON = 50_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A model checkpoint: its shards' headers by file name, every tensor by key, and its JSON files."""

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


def open_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """Read the headers of a checkpoint folder; `Refused` or `Damaged` with all offenders if it is not whole."""
    files = folder.files()
    names, index, index_name = _weight_files(folder, files)
    shards = {name: read_header(folder, name, number) for name in names}
    tensors: dict[str, TensorSpec] = {}
    errors: list[AdapterkitError] = []
    for name, header in shards.items():
        for spec in header.tensors:
            if spec.key in tensors:
                errors.append(_twice(folder, spec, tensors[spec.key].file))
            tensors[spec.key] = spec
    if index is not None:
        errors += _index_errors(folder, index, index_name or "", tensors)
    refuse_all(errors)
    config = read_json(folder, "config.json") if "config.json" in files else {}
    return Checkpoint(folder, shards, tensors, index, index_name, config, files)


def read_header(folder: Folder, name: str, number: int = 0) -> Header:
    """One safetensors file's header, in one read where it is short; `number` marks which input its tensors are of."""
    size = folder.files()[name]
    raw = folder.read(name, 0, min(FIRST_READ, size))
    length = header_length(raw[:64], size, name)
    if length > len(raw):
        raw += folder.read(name, len(raw), length)
    if len(raw) < length:
        raise Damaged(f"{len(raw)} bytes where {length} were promised", where=name, do="copy the file again")
    return parse_header(raw[:length], size, name, number)


def read_json(folder: Folder, name: str) -> dict:
    """A JSON object from a file of the folder; `Damaged` if it is none (duplicate keys, NaN and 50 MB are too)."""

    def unique(pairs: list) -> dict:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    size = folder.files().get(name, 0)
    try:
        if size > MAX_JSON:
            raise ValueError(f"{size} bytes")
        value = json.loads(folder.read(name, 0, size).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"not JSON: {shown(error)}", expected="a JSON object", where=f"{folder.name}/{name}", do="mend the file"
        ) from error
    if not isinstance(value, dict):
        raise Damaged(f"a JSON {type(value).__name__}", expected="a JSON object", where=name, do="mend the file")
    return value


def _weight_files(folder: Folder, files: dict[str, int]) -> tuple[list[str], dict | None, str | None]:
    """The files that hold the weights: those that an index names, else the one file, else a complete numbered set."""
    here = [name for name in files if "/" not in name]
    indexes = [name for name in here if name.endswith(".safetensors.index.json")]
    for name in sorted(indexes, key=lambda n: (n != "model.safetensors.index.json", n))[:1]:
        index = read_json(folder, name)
        return _indexed(folder, files, index, name), index, name
    weights = sorted(name for name in here if name.endswith(".safetensors"))
    for name in SINGLE:
        if name in weights:
            return [name], None, None
    if len(weights) == 1:
        return weights, None, None
    if not weights:
        raise _no_weights(folder, here)
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name) for name in weights]
    if all(numbered):
        wholes = {(m[1], int(m[3])) for m in numbered if m}
        if len(wholes) == 1 and len(weights) == next(iter(wholes))[1]:
            return weights, None, None
    raise Refused(
        f"{len(weights)} safetensors files and no index: {', '.join(shown(w) for w in weights[:6])}",
        expected="model.safetensors.index.json, or one file, or a complete set name-0000i-of-0000n.safetensors",
        where=folder.name,
        do="add the index, or remove the files that are not part of the model",
    )


def _indexed(folder: Folder, files: dict[str, int], index: dict, name: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise Damaged("no weight_map of keys to files", where=f"{folder.name}/{name}", do="restore the index")
    errors: list[AdapterkitError] = []
    names = sorted(set(weight_map.values()))
    for file in names:
        try:
            if len(inside(file, f"{folder.name}/{name}").parts) != 1:
                raise Refused(f"file name {shown(file)!r}", expected="a file of the folder itself", where=name)
            if file not in files:
                raise Damaged(
                    f"no file {shown(file)}", expected="every file the index names", where=folder.name, do="download it"
                )
        except AdapterkitError as error:
            errors.append(error)
    twins = {n.casefold() for n in names}
    if len(twins) != len(names):
        errors.append(Refused("file names that differ only in case", where=name, do="rename one of them"))
    refuse_all(errors)
    return names


def _index_errors(folder: Folder, index: dict, name: str, tensors: dict[str, TensorSpec]) -> list[AdapterkitError]:
    where = f"{folder.name}/{name}"
    errors: list[AdapterkitError] = []
    for key, file in index["weight_map"].items():
        spec = tensors.get(key)
        if spec is None or spec.file != file:
            found = f"{shown(key)} is not in {shown(file)}"
            errors.append(Damaged(found, expected="an index that matches its files", where=where, do="restore the index"))
    for key in tensors.keys() - index["weight_map"].keys():
        found = f"{shown(key)} in {shown(tensors[key].file)}"
        errors.append(Damaged(found, expected="every stored key in the index", where=where, do="restore the index"))
    return errors


def _twice(folder: Folder, spec: TensorSpec, other: str) -> AdapterkitError:
    return Damaged(
        f"{shown(spec.key)} in both {shown(other)} and {shown(spec.file)}",
        expected="each tensor once",
        where=folder.name,
        do="remove the file that is not part of the model",
    )


def _no_weights(folder: Folder, here: list[str]) -> AdapterkitError:
    pickles = [name for name in here if name.endswith(PICKLES)]
    if pickles:
        return Refused(
            f"weights as pickles: {', '.join(shown(p) for p in pickles[:6])}",
            expected="safetensors files",
            where=folder.name,
            do="convert them: AutoModel.from_pretrained(DIR).save_pretrained(OUT), or on the Hub use the convert Space",
        )
    return Refused("no safetensors files", expected="a model checkpoint", where=folder.name, do="check the path")


def count(spec: TensorSpec) -> int:
    """Number of elements."""
    return math.prod(spec.shape)
