"""A pipeline of diffusers: a folder of models, each in a folder of its own, which model_index.json
names; and the parts of an adapter for it."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

from adapterkit.adapters.keys import CONFIG
from adapterkit.adapters.peft import scan_adapter
from adapterkit.checkpoint.folder import Folder, LocalFolder, WithSubfolders
from adapterkit.checkpoint.shards import pickles, weight_files
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import AdapterkitError, MultipleErrors, Problems, Refused, listed, shown
from adapterkit.formats.detect import part_folders
from adapterkit.formats.modules.record import LANGUAGE, Contents
from adapterkit.options import Sources, StrPath, weighted
from adapterkit.planning.inputs.converted_adapter import (
    as_component,
    contents_of,
    in_adapter_layout,
    is_plain,
)
from adapterkit.planning.inputs.sources import open_unconverted, weight_of
from adapterkit.weights.decoded import decoded_view
from adapterkit.weights.names import Names

INDEX = "model_index.json"
PART = re.compile(r"([a-z0-9_]+):(.+)", re.DOTALL)  # unet:ADAPTER
DENOISER = re.compile(r"unet|prior|decoder|transformer(_\d+)?")
TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")
Split = list[tuple[dict[str, Folder], float]]  # adapters by their parts, and their weights
Shapes = Mapping[str, tuple[int, ...]]  # of a module's weight, by module


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def is_pipeline(folder: Folder) -> bool:
    files = folder.files()
    return INDEX in files and "config.json" not in files


@dataclass(frozen=True)
class PipelinePart:
    """A model of a pipeline."""

    name: str  # of its folder
    pipeline: Folder

    @cached_property
    def folder(self) -> Folder:
        return cast(WithSubfolders, self.pipeline).subfolder(self.name)

    @property
    def is_denoiser(self) -> bool:
        return DENOISER.fullmatch(self.name) is not None

    @cached_property
    def as_base(self) -> Checkpoint:
        """What conversions of its adapters ask; its names are the model's."""
        return open_checkpoint(self.folder, 1)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors in this block name the part."""
        try:
            yield
        except AdapterkitError as error:
            for one in error.errors if isinstance(error, MultipleErrors) else (error,):
                one.problem = f"{self.name}: {one.problem}"
            raise


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, its models by name, and what its index names and is not there."""

    folder: Folder
    parts: Mapping[str, PipelinePart]
    absent: tuple[str, ...]

    @property
    def denoiser(self) -> Checkpoint | None:
        """The model that most adapters are for; None where none has the name and can be read."""
        for part in filter(lambda part: part.is_denoiser, self.parts.values()):
            with suppress(AdapterkitError):
                return part.as_base
        return None

    def part(self, name: str) -> PipelinePart:
        """`Refused` for a name that is none of a part with weights."""
        if name in self.parts:
            return self.parts[name]
        state = "is not there, though its index names it" if name in self.absent else "has none"
        raise self.unknown(f"{shown(name)}: the pipeline {state}")

    def unknown(self, problem: str) -> Refused:
        return Refused(
            problem,
            expected=f"one of {', '.join(self.parts)}",
            where=self.folder.label,
            hint="give the whole pipeline that the adapter is for",
        )


def read_pipeline(folder: Folder) -> Pipeline:
    """The pipeline in a folder; `Refused` or `Damaged` for an index that names no models, and for
    parts that are links: what they lead to is not the pipeline's."""
    index, files, errors = read_json(folder, INDEX), folder.files(), Problems(where=folder.label)
    named = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    parts, absent = {}, []
    for name in named:
        if any(file.startswith(f"{name}/") for file in files):
            part = PipelinePart(name, folder)
            if weight_files(part.folder) or pickles(part.folder):
                parts[name] = part
        elif isinstance(folder, LocalFolder) and (folder.root / name).is_symlink():
            hint = "copy what it leads to into the folder"
            errors.add(f"{shown(name)} is a link", "folders of the pipeline itself", hint)
        else:
            absent.append(name)
    errors.raise_all()
    if not parts:
        raise Refused(
            f"{INDEX} names no model that is there",
            expected="a pipeline of diffusers, with its models",
            where=folder.label,
            hint="download all of it",
        )
    return Pipeline(folder, parts, tuple(absent))


def base_of_conversion(source: Folder, pipeline: Pipeline, component: str | None) -> Checkpoint:
    """The part that tells of an adapter what its conversion asks of a base: that of the one
    component, else the denoiser."""
    if component is None:
        is_plain_layout = CONFIG in source.files()
        contents = None if is_plain_layout else contents_of(source, pipeline.denoiser)
        names = contents.components if contents is not None else ()
        component = names[0] if len(names) == 1 else None
        if is_plain_layout or component == LANGUAGE:
            component = _fitting(source, _shapes_of(source, contents), pipeline)
    if component is not None:
        return pipeline.part(component).as_base
    if pipeline.denoiser is None:
        raise pipeline.unknown("a pipeline without a denoiser that can be read")
    return pipeline.denoiser


def split_adapters(adapters: Sources, pipeline: Pipeline) -> Split:
    """The adapters for a pipeline by its parts; `Refused` with all that cannot be read, or that fit
    none."""
    split: Split = []
    errors = Problems()
    for source, weight in weighted(adapters):
        with errors.collected():
            if weight is None:
                source, weight = weight_of(source)
            split.append((_parts_of(source, pipeline), weight))
    errors.raise_all()
    return split


def _parts_of(source: StrPath, pipeline: Pipeline) -> dict[str, Folder]:
    """An adapter for a pipeline as one in PEFT's layout for each part that it changes: in files of
    a pipeline by their names, in folders `unet/`, `text_encoder/`, ... by these; of a single model
    for the part that is told (`transformer_2:ADAPTER`), or whose names and shapes alone fit.
    `Refused` for parts that the pipeline does not have, and where several or none fit."""
    told = PART.fullmatch(os.fspath(source))
    told = told if told and told[1] in pipeline.parts else None
    folder, name = open_unconverted(told[2] if told else source), told[1] if told else None
    if CONFIG in folder.files():
        name = name or _fitting(folder, _shapes_of(folder, None), pipeline)
        return {name: _in_layout(folder, pipeline.parts[name])}
    contents = contents_of(folder, pipeline.denoiser)
    if contents is not None and contents.components == (LANGUAGE,):
        name = name or _fitting(folder, _shapes_of(folder, contents), pipeline)
    if name is not None:
        return {name: _told(folder, contents, pipeline.parts[name])}
    components = contents.components if contents is not None else _folders(folder)
    parts: dict[str, Folder] = {}
    errors = Problems()
    for component in components:
        with errors.collected():
            part = pipeline.part(component)
            if contents is not None:
                parts[component] = _converted(folder, component, part)
            else:
                inner = cast(WithSubfolders, folder).subfolder(component)
                parts[component] = _in_layout(inner, part)
    errors.raise_all()
    return parts


def _folders(folder: Folder) -> tuple[str, ...]:
    """The folders of an adapter that has one for each part."""
    names = part_folders(folder)
    if not names:
        raise Refused(
            "this is no adapter of a known format",
            expected=f"one file, or folders with {CONFIG} for parts of the pipeline",
            where=folder.label,
            hint="adapterkit convert --list tells what each format looks like",
        )
    return names


def _told(folder: Folder, contents: Contents | None, part: PipelinePart) -> Folder:
    """An adapter for the part that it is said to be for."""
    if contents is None or len(contents.components) != 1:
        names = _folders(folder) if contents is None else contents.components
        raise Refused(
            f"an adapter of {listed(names)} for {part.name} alone",
            expected="an adapter of one model",
            where=folder.label,
            hint=f"give it without {part.name}: in front",
        )
    component = contents.components[0] or part.name
    return _converted(folder, component, part)


def _converted(folder: Folder, component: str, part: PipelinePart) -> Folder:
    return as_component(folder, component, part.as_base if part.is_denoiser else None)


def _in_layout(folder: Folder, part: PipelinePart) -> Folder:
    return folder if is_plain(folder) else in_adapter_layout(folder, part.folder)


def _shapes_of(folder: Folder, contents: Contents | None) -> Shapes:
    """What an adapter of one model changes, in PEFT's layout where there are no contents; `Refused`
    for one that cannot be read."""
    if contents is not None:
        return {m.name: _shape(m.parts.get("a"), m.parts.get("b")) for m in contents.modules}
    adapter, scan, _ = scan_adapter(folder)
    scan.errors.raise_all()
    values = {name.rpartition(".")[0]: spec.shape for name, spec in adapter.replaced.items()}
    return values | {lora.module: _shape(lora.a, lora.b) for lora in adapter.loras}


def _shape(a: _Shaped | None, b: _Shaped | None) -> tuple[int, ...]:
    """The shape of the delta of two factors; () where it is not known."""
    return () if a is None or b is None else (b.shape[0], *a.shape[1:])


def _fitting(folder: Folder, shapes: Shapes, pipeline: Pipeline) -> str:
    """The one part that has all these modules, or else the most of them; its merge tells which it
    lacks."""
    counts = {name: _count(part, shapes) for name, part in pipeline.parts.items()}
    most = [name for name, count in counts.items() if count == max(counts.values()) > 0]
    if len(most) == 1:
        return most[0]
    raise Refused(
        f"an adapter whose modules fit {listed(most)}" if most else "an adapter that fits no part",
        expected=f"one that fits one of {', '.join(pipeline.parts)}",
        where=folder.label,
        hint=f"say for which it is: {most[0]}:{folder.label}"
        if most
        else "check that the adapter was trained on a model of this pipeline",
    )


def _count(part: PipelinePart, shapes: Shapes) -> int:
    """How many of these modules the part has, by its keys, or by the names of its model."""
    try:
        base = decoded_view(open_checkpoint(part.folder))
    except AdapterkitError:
        return 0  # not in safetensors
    wanted = {f"{name}.weight": math.prod(shape) for name, shape in shapes.items()}
    found = {name: base.tensors.get(name) for name in wanted}
    if not any(found.values()) and TEXT_ENCODER.fullmatch(part.name):
        names = Names(base, tuple(wanted))
        found = {name: names.parameter(name) for name in wanted}
    return sum(
        spec is not None and wanted[name] in (1, math.prod(spec.shape))
        for name, spec in found.items()
    )
