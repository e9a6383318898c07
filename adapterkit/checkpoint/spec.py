"""What a checkpoint holds, from its headers and its index alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from adapterkit.checkpoint.folder import Folder, belonging_to, inside
from adapterkit.checkpoint.header import Header, TensorSpec, header_length, parse_header
from adapterkit.checkpoint.strict import strict_json
from adapterkit.errors import AdapterkitError, Damaged, MultipleErrors, Refused, refuse_all, shown

FIRST_READ = 65536  # most headers of a shard fit, so one read does
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TRAINER = (
    "training_args.",
    "optimizer.",
    "scheduler.",
    "scaler.",
    "rng_state",
    "random_states",
)  # of a Trainer's pickles: no weights
NOT_A_MODEL = "adapter_model"  # what a PEFT adapter's weights are called
# Windows takes these for devices, with any extension
DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)),
}
MAX_JSON = 50_000_000
MAX_DEPTH = 100  # of lists and objects inside each other
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
    """A model checkpoint: its shards' headers by file name, every tensor by key, and its JSON
    files."""

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
    """What could be read of a folder's headers and JSON, and what was wrong with the rest of it."""

    folder: Folder
    number: int = 0  # which input its tensors are of
    shards: dict[str, Header | None] = field(default_factory=dict)  # None: cannot be read
    config: dict = field(default_factory=dict)
    index: dict | None = None  # the index file's content
    index_name: str | None = None
    errors: list[AdapterkitError] = field(default_factory=list)
    whole: bool = True  # no file of the weights is missing, and all could be read
    readable: bool = True  # nor is there a JSON file beside them that cannot be read

    @property
    def headers(self) -> list[Header]:
        return [header for header in self.shards.values() if header is not None]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.key: spec for header in self.headers for spec in header.tensors}

    def header(self, name: str) -> Header | None:
        """Read one shard's header, or note why it cannot be."""
        self.shards[name] = None
        try:
            self.shards[name] = read_header(self.folder, name, self.number)
        except (Refused, Damaged) as error:
            self.note(error)
            self.whole = self.readable = False
        return self.shards[name]

    def json(self, name: str) -> dict | None:
        """A JSON file of the folder, or None, with a note where it is there."""
        if name not in self.folder.files():
            return None
        try:
            return read_json(self.folder, name)
        except (Refused, Damaged) as error:
            self.note(error)
            self.readable = False
            return None

    def note(self, error: AdapterkitError) -> None:
        self.errors += error.errors if isinstance(error, MultipleErrors) else (error,)

    def checkpoint(self) -> Checkpoint:
        """What could be read, taken for a checkpoint."""
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
    """Read the headers of a checkpoint folder; `Refused` or `Damaged` with all offenders if it is
    not whole."""
    with belonging_to(folder):
        seen = scan_checkpoint(folder, number)
        refuse_all(seen.errors)
    return seen.checkpoint()


def scan_checkpoint(folder: Folder, number: int = 0) -> Scan:
    """As much of a checkpoint folder as can be read, with everything for which `open_checkpoint`
    refuses it."""
    seen = Scan(folder, number)
    named = _weight_files(seen)
    for name in _likely_files(folder) if named is None else named:
        seen.header(name)
    if named is None:
        seen.whole = False
    else:
        seen.errors += _stored_twice(seen) + _index_errors(seen)
        _share_strings(seen)
    seen.config = seen.json("config.json") or {}
    seen.readable = seen.readable and seen.whole
    layout = other_layout(seen.tensors) if "config.json" not in folder.files() else None
    if layout is not None:
        seen.note(no_model(next(iter(seen.shards)), layout, folder.name))
    seen.errors += _config_errors(seen.config, len(seen.tensors), f"{folder.name}/config.json")
    return seen


def read_header(folder: Folder, name: str, number: int = 0) -> Header:
    """One safetensors file's header, in one read where it is short; `number` marks which input its
    tensors are of."""
    size = folder.files()[name]
    raw = folder.read(name, 0, min(FIRST_READ, size))
    length = header_length(raw[:64], size, name)
    if length > len(raw):
        raw += folder.read(name, len(raw), length)
    if len(raw) < length:
        raise Damaged(
            f"{len(raw)} bytes where {length} were promised", where=name, hint="copy the file again"
        )
    return parse_header(raw[:length], size, name, number)


def read_json(folder: Folder, name: str) -> dict:
    """A JSON object from a file of the folder; `Damaged` if it is none (a key twice, or more than
    50 MB)."""
    size = folder.files().get(name, 0)
    try:
        if size > MAX_JSON:
            raise ValueError(f"{size} bytes, more than {MAX_JSON}")
        value = strict_json(folder.read(name, 0, size))
        _check_depth(value)
    except ValueError as error:
        raise Damaged(
            f"not JSON: {shown(error)}",
            expected="a JSON object",
            where=f"{folder.name}/{name}",
            hint="fix the file",
        ) from error
    if not isinstance(value, dict):
        raise Damaged(
            f"a JSON {type(value).__name__}",
            expected="a JSON object",
            where=name,
            hint="fix the file",
        )
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for v in level
            if isinstance(v, list | dict)
            for inner in (v.values() if isinstance(v, dict) else v)
        ]
    if level:
        raise ValueError("nested too deeply")


def _config_errors(config: dict, stored: int, where: str) -> list[AdapterkitError]:
    """What is wrong with the few values of a config that decide which model is built, sub-configs
    included."""
    errors: list[AdapterkitError] = []
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        errors.append(
            Damaged(
                "architectures",
                expected="a list of class names",
                where=where,
                hint="fix the config",
            )
        )
    if not isinstance(config.get("model_type"), str | None):
        errors.append(Damaged("model_type", expected="a text", where=where, hint="fix the config"))
    for key in LAYER_COUNTS & config.keys():
        layers, most = config[key], max(1000, stored)
        if isinstance(layers, int) and layers > most:
            found = f"{key} = {layers}, with {stored} stored tensors"
            errors.append(
                Damaged(found, expected=f"at most {most}", where=where, hint="fix the config")
            )
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            errors += _config_errors(value, stored, where)
    return errors


def pickles(folder: Folder) -> list[str]:
    """The folder's own pickles that may hold weights."""
    here = (name for name in folder.files() if "/" not in name and name.endswith(PICKLES))
    return sorted(name for name in here if not name.startswith(TRAINER))


def weight_files(folder: Folder) -> list[str]:
    """The folder's own safetensors files that are no adapter's."""
    here = (name for name in folder.files() if "/" not in name and name.endswith(".safetensors"))
    return sorted(name for name in here if not name.startswith(NOT_A_MODEL))


def _likely_files(folder: Folder) -> list[str]:
    """Where nothing says which files hold the model: the one with the standard name, else all of
    them."""
    here = weight_files(folder)
    return [name for name in SINGLE if name in here][:1] or here


def _weight_files(seen: Scan) -> list[str] | None:
    """The files that hold the weights: those that an index names, else the one file, else a
    complete numbered set.

    None, with a note, where it cannot be told which.
    """
    folder = seen.folder
    here = [name for name in folder.files() if "/" not in name]
    seen.index_name = _index_name(seen, here)
    if seen.index_name is not None:
        seen.index = seen.json(seen.index_name)
        return _indexed(seen, seen.index, seen.index_name) if seen.index is not None else None
    weights = weight_files(folder)
    for name in SINGLE:
        if name in weights:
            return [name]
    if len(weights) == 1:
        return weights
    if not weights:
        seen.note(_no_weights(folder, here))
        return None
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name) for name in weights]
    if all(numbered):
        wholes = {(m[1], int(m[3])) for m in numbered if m}
        if len(wholes) == 1 and len(weights) == next(iter(wholes))[1]:
            return weights
    error = Refused(
        f"{len(weights)} safetensors files and no index: "
        f"{', '.join(shown(w) for w in weights[:6])}",
        expected=(
            "model.safetensors.index.json, or one file, or a complete set "
            "name-0000i-of-0000n.safetensors"
        ),
        where=folder.name,
        hint="add the index, or remove the files that are not part of the model",
    )
    seen.note(error)
    return None


def _index_name(seen: Scan, here: list[str]) -> str | None:
    """The index file, the standard name before a variant's; noted where other readers would take
    something else."""
    indexes = sorted(name for name in here if name.endswith(".safetensors.index.json"))
    standard = [f"{single}.index.json" for single in SINGLE if f"{single}.index.json" in indexes]
    if standard or any(single in here for single in SINGLE):
        return standard[0] if standard else None
    if len(indexes) > 1:
        error = Refused(
            f"several indexes: {', '.join(map(shown, indexes))}",
            expected="one, or model.safetensors.index.json among them",
            where=seen.folder.name,
            hint="move the files of the other variants away",
        )
        seen.note(error)
    return indexes[0] if indexes else None


def _indexed(seen: Scan, index: dict, name: str) -> list[str] | None:
    """Those files of an index that can be opened, the others noted; None where it names no
    files."""
    where, files = f"{seen.folder.name}/{name}", seen.folder.files()
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        seen.note(
            Damaged(
                "no weight_map",
                expected="a map of keys to file names",
                where=where,
                hint="restore the index",
            )
        )
        return None
    if not isinstance(index.get("metadata", {}), dict):
        seen.note(
            Damaged(
                "metadata that is no JSON object",
                expected="a map",
                where=where,
                hint="restore the index",
            )
        )
    names = sorted(set(weight_map.values()))
    wrong = {file: error for file in names if (error := _shard_name_error(file, files, where))}
    seen.errors += wrong.values()
    seen.whole = not wrong
    for single in SINGLE:
        if single in files and single not in names and name == f"{single}.index.json":
            seen.note(_two_models(single, where))
    twins: dict[str, list[str]] = {}
    for file in names:
        twins.setdefault(file.casefold(), []).append(file)
    for group in [group for group in twins.values() if len(group) > 1]:
        found = f"file names that differ only in case: {', '.join(map(shown, group))}"
        seen.note(
            Refused(
                found,
                expected="names that any file system keeps apart",
                where=where,
                hint="rename one",
            )
        )
    return [file for file in names if file not in wrong]


def _shard_name_error(file: str, files: dict[str, int], where: str) -> AdapterkitError | None:
    """What is wrong with a file name that an index gives, on any operating system."""
    try:
        inside(file, where)
    except Refused as error:
        return error
    plain = "/" not in file and ":" not in file and file == file.rstrip(". ")
    if not plain or file.split(".")[0].casefold() in DEVICES:
        return Refused(
            f"file name {shown(file)!r}",
            expected="a plain name of the folder itself",
            where=where,
            hint="restore the index",
        )
    if file.startswith(NOT_A_MODEL) or not file.endswith(".safetensors"):
        return Refused(
            f"{shown(file)} as a shard",
            expected="safetensors files of a model",
            where=where,
            hint="restore the index",
        )
    if file not in files:
        return Damaged(
            f"no file {shown(file)}",
            expected="every file the index names",
            where=where,
            hint="download it",
        )
    return None


def _two_models(single: str, where: str) -> Refused:
    return Refused(
        f"{single} beside an index that does not name it",
        expected="one of them (transformers would load the single file, the index says otherwise)",
        where=where,
        hint="move away the one that is not the model",
    )


def _index_errors(seen: Scan) -> list[AdapterkitError]:
    """Where the index, if there is one, and the files that could be read contradict each other."""
    if seen.index is None:
        return []
    where, tensors, weight_map = (
        f"{seen.folder.name}/{seen.index_name}",
        seen.tensors,
        seen.index["weight_map"],
    )
    errors: list[AdapterkitError] = []
    for key, file in weight_map.items():
        spec = tensors.get(key)
        if seen.shards.get(file) is not None and (spec is None or spec.file != file):
            found = f"{shown(key)} is not in {shown(file)}"
            errors.append(
                Damaged(
                    found,
                    expected="an index that matches its files",
                    where=where,
                    hint="restore the index",
                )
            )
    for key in [key for key in tensors if key not in weight_map]:
        found = f"{shown(key)} in {shown(tensors[key].file)}"
        errors.append(
            Damaged(
                found,
                expected="every stored key in the index",
                where=where,
                hint="restore the index",
            )
        )
    return errors


def _share_strings(seen: Scan) -> None:
    """Put the headers' own strings into the index: as it is read, each name of a file is a string
    of its own."""
    if seen.index is not None:
        tensors = seen.tensors
        pairs = ((tensors.get(key), key, file) for key, file in seen.index["weight_map"].items())
        seen.index["weight_map"] = {
            s.key if s else key: s.file if s and s.file == file else file for s, key, file in pairs
        }


def _stored_twice(seen: Scan) -> list[AdapterkitError]:
    files: dict[str, str] = {}  # of each key
    errors: list[AdapterkitError] = []
    for spec in (spec for header in seen.headers for spec in header.tensors):
        if spec.key in files:
            found = f"{shown(spec.key)} in both {shown(files[spec.key])} and {shown(spec.file)}"
            hint = "remove the file that is not part of the model"
            errors.append(
                Damaged(found, expected="each tensor once", where=seen.folder.name, hint=hint)
            )
        files[spec.key] = spec.file
    return errors


def _no_weights(folder: Folder, here: list[str]) -> AdapterkitError:
    if any(name.startswith(NOT_A_MODEL) for name in here):
        return Refused(
            "an adapter's weights and no model's",
            expected="a model checkpoint",
            where=folder.name,
            hint="give the base first, then the adapters",
        )
    pickled = pickles(folder)
    if pickled:
        return Refused(
            f"weights as pickles: {', '.join(shown(p) for p in pickled[:6])}",
            expected="safetensors files",
            where=folder.name,
            hint=(
                "convert them: AutoModel.from_pretrained(DIR).save_pretrained(OUT), or on the Hub "
                "use the convert Space"
            ),
        )
    if any(name.endswith(".gguf") for name in here):
        hint = "adapterkit dequantize MODEL.gguf --out DIR"
        return Refused("a GGUF file", expected="safetensors files", where=folder.name, hint=hint)
    return Refused(
        "no safetensors files",
        expected="a model checkpoint",
        where=folder.name,
        hint="check the path",
    )


# Keys of LoRAs that are not in PEFT's layout: with a pipeline's part in front, or with underscores
# for dots
OTHER_LAYOUTS = {
    "diffusers": re.compile(
        r"^(unet|transformer(_2)?|text_encoder(_\d)?|prior|controlnet)\.(.+\.)?(lora|lora_\w+|\w+_lora)\."
    ),
    "kohya": re.compile(
        r"^lora_(unet|te\d?|transformer|prior)_\w+\.(lora_(down|up)\.weight|alpha)$"
    ),
}


MOST_LORAS = 8  # files of a folder that are looked into for them


def other_layout(keys: Iterable[str]) -> str | None:
    """In whose layout keys are a LoRA's, if it is not PEFT's."""
    known = list(OTHER_LAYOUTS.items())
    return next((layout for key in keys for layout, pattern in known if pattern.match(key)), None)


def other_lora(folder: Folder) -> tuple[str, str] | None:
    """A file of the folder that holds a LoRA in another layout than PEFT's, and whose layout it
    is."""
    names = weight_files(folder) if "config.json" not in folder.files() else []
    for name in names if len(names) <= MOST_LORAS else ():
        header = Scan(folder).header(name)
        layout = other_layout(spec.key for spec in header.tensors) if header is not None else None
        if layout is not None:
            return name, layout
    return None


def no_model(file: str, layout: str, where: str) -> Refused:
    """What to say where a LoRA of another layout is met."""
    hint = (
        "use it with diffusers (load_lora_weights); PEFT's layout is what save_pretrained of the "
        "trained part writes"
    )
    expected = "a model, or an adapter in PEFT's layout with adapter_config.json"
    return Refused(
        f"{shown(file)} is a LoRA in the layout of {layout}",
        expected=expected,
        where=where,
        hint=hint,
    )
