"""Detect a source's format from its keys, metadata and settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import cast

from adapterkit.adapters.formats.files.configs import read_config
from adapterkit.adapters.formats.files.pickles import pickles_of, rewritten_name, unsafe
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.peft.eight_bits import decoded
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.adapter.keys import CONFIG as ADAPTER_CONFIG
from adapterkit.core.checkpoint.folder import Folder, WithSubfolders, belonging_to
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.commands import LIST_FORMATS, command
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.records import Json, Settings
from adapterkit.core.registry import load
from adapterkit.doors import ADAPTERS, CONTAINERS

PICKLE = "pickle"
ENDINGS = {".safetensors": "safetensors", ".gguf": "gguf"}


@dataclass(frozen=True)
class Container:
    """A file's tensors by key, its metadata, and the hash of the bytes read."""

    file: str
    tensors: Mapping[str, TensorSpec]
    metadata: Settings
    header_sha256: str


def open_container(folder: Folder, file: str) -> Container:
    """The tensors of a safetensors or GGUF file. Raises `Damaged` or `Refused`."""
    with belonging_to(folder):
        for ending, container in CONTAINERS.items():
            if file.endswith(ending):
                adapter = load(container["adapter"])(folder, file, 0)
                return Container(file, adapter.tensors, adapter.metadata, adapter.header.sha256)
        header = read_header(folder, file)
    tensors = decoded({spec.key: spec for spec in header.tensors})
    return Container(file, tensors, header.metadata, header.sha256)


@dataclass(frozen=True)
class Detection:
    """A source's format, its file, and the headers read from it."""

    format: Format
    container: Container
    config: Settings = field(default_factory=dict)
    parts: tuple[str, ...] = ()  # folders of a pipeline's components; this is the first one's


def detect(folder: Folder) -> Detection:
    """The format of a source. Raises `Refused` if no known format fits, `Damaged` if its file
    cannot be read."""
    containers: dict[str, Container] = {}
    damage: AdapterkitError | None = None
    matches: list[Detection] = []
    for format in formats().values():
        file = _file(folder, format)
        if file is None:
            continue
        if file not in containers:
            try:
                containers[file] = open_container(folder, file)
            except AdapterkitError as error:
                damage = error
                continue
        config = _config(folder, format)
        if _is_of(format, containers[file], config):
            matches.append(Detection(format, containers[file], config))
    if matches:
        highest = max(match.format.detect.priority for match in matches)
        first, *others = [match for match in matches if match.format.detect.priority == highest]
        if others:
            names = ", ".join(match.format.name for match in (first, *others))
            raise Refused(
                f"the file has keys of {names}",
                expected="those of one format",
                where=folder.label,
                hint="use the file as its tool saved it",
                code="AK501",
            )
        return first
    if damage is not None:
        raise damage
    if parts := part_folders(folder):
        first = detect(cast(WithSubfolders, folder).subfolder(parts[0]))
        return replace(first, parts=parts)
    keys = [key for container in containers.values() for key in container.tensors]
    pickled = pickles_of(folder)
    if pickled:
        raise unsafe(pickled[0], folder.label)
    if not keys and (refusal := load(ADAPTERS["shards alone"])(folder)):
        raise refusal
    some = f"keys such as {', '.join(map(shown, keys[:3]))}" if keys else "no file that may be one"
    is_model = "config.json" in folder.files()
    raise Refused(
        f"this is no adapter of a known format: {some}",
        expected=f"an adapter in one of {len(formats())} formats",
        where=folder.label,
        hint="this is the folder of a model: give an adapter" if is_model else LIST_FORMATS,
        code="AK501",
    )


def part_folders(folder: Folder) -> tuple[str, ...]:
    """The folders of an adapter in PEFT's layout with one folder per component of a pipeline; empty
    for other adapters."""
    ends = f"/{ADAPTER_CONFIG}"
    names = [name.removesuffix(ends) for name in folder.files() if name.endswith(ends)]
    here = any("/" not in name and name.endswith(tuple(ENDINGS)) for name in folder.files())
    return () if here else tuple(sorted(name for name in names if "/" not in name))


def in_another_layout(folder: Folder) -> Detection | None:
    """The format of an adapter that is not in PEFT's layout; None for anything else."""
    if "config.json" in folder.files():
        return None
    try:
        detection = detect(folder)
    except AdapterkitError:
        return None
    return detection if detection.format.layout == "keys" else None


def no_model(detection: Detection, where: str) -> Refused:
    """The refusal of an adapter given as a model."""
    name, format = shown(detection.container.file), detection.format
    return Refused(
        f"{name} is an adapter in the format {format.name}",
        expected="a model, or an adapter of one model",
        where=where,
        hint="give it as the adapter, for a pipeline one component\n"
        + command("adapterkit merge", "ORIGINAL", where, out="merged"),
        code="AK206",
    )


def _file(folder: Folder, format: Format) -> str | None:
    """The file of a source that may hold an adapter of this format; pickles are rewritten."""
    is_pickle = format.file.container == PICKLE
    container = "safetensors" if is_pickle else format.file.container
    fits = [
        name
        for name in folder.files()
        if "/" not in name and ENDINGS.get(PurePosixPath(name).suffix) == container
    ]
    if len(fits) == 1:
        return fits[0]
    own = rewritten_name(format.file.name) if is_pickle else format.file.name
    return own if own in fits else None


def _config(folder: Folder, format: Format) -> Settings:
    """The settings of a source, from all its config files."""
    config: Json = {}
    for name in format.file.config:
        if name in folder.files():
            config = read_config(folder, name) | config
    return config


def _is_of(format: Format, container: Container, config: Settings) -> bool:
    words, keys = format.detect, container.tensors
    if not (words.keys or words.config or words.metadata):
        return False
    return (
        all(
            any(
                pattern.search(key) and words.axes in (0, len(spec.shape))
                for key, spec in keys.items()
            )
            for pattern in words.keys
        )
        and not any(pattern.search(key) for pattern in words.no_keys for key in keys)
        and all(name in config for name in words.config)
        and not any(name in config for name in words.no_config)
        and all(
            pattern.search(json.dumps(config.get(name))) for name, pattern in words.settings.items()
        )
        and all(
            pattern.search(container.metadata.get(key, ""))
            for key, pattern in words.metadata.items()
        )
    )
