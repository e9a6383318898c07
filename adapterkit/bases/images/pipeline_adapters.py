"""Assign adapters to the components of a diffusers pipeline."""

import math
import os
from collections.abc import Mapping
from typing import Protocol, cast

from adapterkit.adapters.formats.detect import part_folders
from adapterkit.adapters.formats.modules.record import LANGUAGE, Contents
from adapterkit.adapters.formats.planning.as_plain import as_component, contents_of
from adapterkit.bases.images.pipeline import PART, Pipeline, PipelineComponent
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.checkpoint.folder import Folder, WithSubfolders
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.commands import LIST_FORMATS
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed
from adapterkit.core.inputs.adapter_door import in_adapter_layout, is_plain
from adapterkit.core.inputs.sources import open_unconverted, weight_of
from adapterkit.core.options import Sources, StrPath, weighted
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.names import Names

Split = list[tuple[dict[str, Folder], float]]  # adapters by their parts, and their weights
Shapes = Mapping[str, tuple[int, ...]]  # of a module's weight, by module


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def base_of_conversion(source: Folder, pipeline: Pipeline, component: str | None) -> Checkpoint:
    """The base that converts an adapter: its only component, otherwise the denoiser."""
    if component is None:
        contents = contents_of(source, pipeline.denoiser)
        names = contents.components if contents is not None else ()
        component = names[0] if len(names) == 1 else None
        if component == LANGUAGE or (contents is None and CONFIG in source.files()):
            component = _fitting(source, _shapes_of(source, contents), pipeline, of_a_kind=True)
    if component is not None:
        return pipeline.part(component).as_base
    if pipeline.denoiser is None:
        raise pipeline.unknown("a pipeline without a denoiser that can be read")
    return pipeline.denoiser


def split_adapters(adapters: Sources, pipeline: Pipeline) -> Split:
    """The adapters for a pipeline by component; `Refused` with every unreadable or unsuitable
    one."""
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
    """An adapter for a pipeline in PEFT's layout, by component. Files of a pipeline assign it by
    their names, folders `unet/`, `text_encoder/`, ... by these. For one model, the option
    (`transformer_2:ADAPTER`) names the component, or names and shapes fit only one. `Refused` for
    components that the pipeline lacks, and if several or none fit."""
    named = PART.fullmatch(os.fspath(source))
    named = named if named and named[1] in pipeline.parts else None
    folder, name = open_unconverted(named[2] if named else source), named[1] if named else None
    contents = None if is_plain(folder) else contents_of(folder, pipeline.denoiser)
    if contents is None and CONFIG in folder.files():
        name = name or _fitting(folder, _shapes_of(folder, None), pipeline)
        return {name: _in_layout(folder, pipeline.parts[name])}
    if contents is not None and contents.components == (LANGUAGE,):
        name = name or _fitting(folder, _shapes_of(folder, contents), pipeline)
    if name is not None:
        return {name: _for_named(folder, contents, pipeline.parts[name])}
    components = contents.components if contents is not None else _folders(folder)
    parts: dict[str, Folder] = {}
    errors = Problems()
    for component in components:
        with errors.collected():
            part = pipeline.part(component)
            if contents is not None:
                parts[component] = _converted(folder, contents, component, part)
            else:
                inner = cast(WithSubfolders, folder).subfolder(component)
                parts[component] = _in_layout(inner, part)
    errors.raise_all()
    return parts


def _folders(folder: Folder) -> tuple[str, ...]:
    """The folders of an adapter that has one for each component."""
    names = part_folders(folder)
    if not names:
        raise Refused(
            "this is no adapter of a known format",
            expected=f"one file, or folders with {CONFIG} for parts of the pipeline",
            where=folder.label,
            hint=LIST_FORMATS,
            code="AK501",
        )
    return names


def _for_named(folder: Folder, contents: Contents | None, part: PipelineComponent) -> Folder:
    """An adapter for the component that the option names."""
    if contents is None or len(contents.components) != 1:
        names = _folders(folder) if contents is None else contents.components
        raise Refused(
            f"an adapter of {listed(names)} for {part.name} alone",
            expected="an adapter of one model",
            where=folder.label,
            hint=f"give it without {part.name}: in front",
            code="AK103",
        )
    component = contents.components[0] or part.name
    return _converted(folder, contents, component, part)


def _converted(
    folder: Folder, contents: Contents, component: str, part: PipelineComponent
) -> Folder:
    return as_component(folder, contents, component, part.as_base if part.is_denoiser else None)


def _in_layout(folder: Folder, part: PipelineComponent) -> Folder:
    return folder if is_plain(folder) else in_adapter_layout(folder, part.folder, for_merge=True)


def _shapes_of(folder: Folder, contents: Contents | None) -> Shapes:
    """The shapes that an adapter of one model changes, in PEFT's layout if there are no contents;
    `Refused` if it cannot be read."""
    if contents is not None:
        return {m.name: _shape(m.parts.get("a"), m.parts.get("b")) for m in contents.modules}
    adapter, scan, _ = scan_adapter(folder)
    scan.errors.raise_all()
    values = {name.rpartition(".")[0]: spec.shape for name, spec in adapter.replaced.items()}
    return values | {lora.module: _shape(lora.a, lora.b) for lora in adapter.loras}


def _shape(a: _Shaped | None, b: _Shaped | None) -> tuple[int, ...]:
    """The shape of the delta of two factors; () if unknown."""
    return () if a is None or b is None else (b.shape[0], *a.shape[1:])


def _fitting(folder: Folder, shapes: Shapes, pipeline: Pipeline, *, of_a_kind: bool = False) -> str:
    """The one component that has all these modules, otherwise most of them, whose merge then names
    the missing ones. `of_a_kind`: any of several denoisers will do."""
    counts = {name: _count(part, shapes) for name, part in pipeline.parts.items()}
    most = [name for name, count in counts.items() if count == max(counts.values()) > 0]
    are_alike = of_a_kind and all(pipeline.parts[name].is_denoiser for name in most)
    if len(most) == 1 or (most and are_alike):
        return most[0]
    raise Refused(
        f"an adapter whose modules fit {listed(most)}" if most else "an adapter that fits no part",
        expected=f"one that fits one of {', '.join(pipeline.parts)}",
        where=folder.label,
        hint=f"say for which it is: {most[0]}:{folder.label}"
        if most
        else "check that the adapter was trained on a model of this pipeline",
        code="AK401",
    )


def _count(part: PipelineComponent, shapes: Shapes) -> int:
    """Count those of these modules that the component has, by its keys or its model's names."""
    try:
        base = decoded_view(open_checkpoint(part.folder))
    except AdapterkitError:
        return 0  # not in safetensors
    wanted = {f"{name}.weight": math.prod(shape) for name, shape in shapes.items()}
    found = {name: base.tensors.get(name) for name in wanted}
    if not any(found.values()) and part.is_text_encoder:
        names = Names(base, tuple(wanted))
        found = {name: names.parameter(name) for name in wanted}
    return sum(
        spec is not None and wanted[name] in (1, math.prod(spec.shape))
        for name, spec in found.items()
    )
