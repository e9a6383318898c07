"""Read the source of a conversion, using its base for names of modules, heads and experts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from adapterkit.adapters.formats.base_model import BaseFacts, NamedBase
from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import Detection, detect
from adapterkit.adapters.formats.image_model import SingleFileModel, family_of
from adapterkit.adapters.formats.library import format_named
from adapterkit.adapters.formats.modules.fusing import Fusion, split
from adapterkit.adapters.formats.modules.kinds import FACTORS, PARAMETER
from adapterkit.adapters.formats.modules.record import (
    BASE,
    LANGUAGE,
    AdapterModule,
    Contents,
    Modules,
)
from adapterkit.adapters.formats.modules.tensors import reshaped
from adapterkit.adapters.formats.modules.wide_inputs import base_inputs
from adapterkit.adapters.formats.peft.kinds import KINDS
from adapterkit.adapters.formats.peft.layout import read_layout
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, MODEL, Format
from adapterkit.core import dtypes
from adapterkit.core.adapter.targets import has_end
from adapterkit.core.checkpoint.folder import Folder, WithSubfolders
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.weights.names import TRANSPOSED
from adapterkit.core.weights.plan_reader import PlanReader


@dataclass(frozen=True)
class AdapterConversion:
    """A source in its format, with the options and the base of its conversion."""

    source: Folder
    detection: Detection
    options: ConvertOptions
    base: Checkpoint | None = None
    file: SingleFileModel | None = None  # a single-file base, to keep its names

    @cached_property
    def format(self) -> Format:
        """The format to write."""
        return format_named(self.options.to)

    @cached_property
    def model(self) -> NamedBase | None:
        """The model of the base if a conversion from or to PEFT's layout may need it."""
        detection, base = self.detection, self.base
        if base is None or not base.tensors:  # of a config alone no names are known
            return None
        if ADAPTER_LAYOUT not in (detection.format.layout, self.format.layout):
            return None
        task = detection.config.get("task_type")
        if not isinstance(task, str | None):
            raise Refused(
                f"task_type {shown(repr(task))}",
                expected="a text",
                where=detection.container.file,
                hint="keep the config in the folder of the file",
                code="AK204",
            )
        return NamedBase(base, task)

    @cached_property
    def modules(self) -> list[str]:
        """The modules of the base by its keys, and by the names of its model if known."""
        names = set() if self.base is None else set(self.base.tensors)
        if self.model is not None:
            names |= set(self.model.names.all())
        return sorted({name.rpartition(".")[0] for name in names})

    @cached_property
    def facts(self) -> BaseFacts:
        """Facts about the model, from the base or else from the config in the source's folder."""
        if self.base is None:
            return BaseFacts.of(self.detection.config)
        config = self.base.config
        family = None if "model_type" in config else family_of(self.base)
        return BaseFacts.of(config, self.base.tensors, family)


def shape_problems(contents: Contents, base: Checkpoint) -> list[AdapterkitError]:
    """Refuse factors whose product has another shape than the base's weight of that name.

    Quantized weights, and layers that control adapters widen, are not compared.
    """
    wide = {module for _, module in base_inputs(contents.architectures)}
    errors = Problems(where=base.folder.label, code="AK401")
    for module in contents.modules:
        spec = base.tensors.get(f"{module.name}.weight")
        if module.kind != FACTORS or spec is None or module.name in wide:
            continue
        if spec.dtype in dtypes.FLOATS and not _fits(module, spec.shape):
            a, b = module.parts["a"].shape, module.parts["b"].shape
            errors.add(
                f"{shown(module.path)}: factors of shapes {a} and {b}",
                f"those of the base's weight {spec.shape}",
                "give the base that it was trained on, with layers of the same kinds",
            )
    return errors


def parameter_problems(contents: Contents, model: NamedBase) -> list[AdapterkitError]:
    """Refuse factors that target_parameters names but that belong to no parameter of the model."""
    targets = tuple(contents.config.get("target_parameters") or ())
    errors = Problems(where=model.checkpoint.folder.label, code="AK401")
    for module in (module for module in contents.modules if module.kind == PARAMETER):
        names = (f"{module.name}.{leaf}" for leaf in model.names.children(module.name) or ())
        parameters = [model.names.parameter(name) for name in names if name.endswith(targets)]
        shapes = [one.shape for one in parameters if one is not None]
        a, b = module.parts["a"].shape, module.parts["b"].shape
        matrix = sorted((*a[1:], *b[:1], *b[2:]))  # either way round
        if not any(sorted(shape[-2:]) == matrix for shape in shapes):
            known = f"those of {' or '.join(map(str, shapes))}" if shapes else "no such factors"
            errors.add(
                f"{shown(module.path)}: factors of shapes {a} and {b} for a parameter",
                f"{known}: the base's parameters that target_parameters names",
                "give the base that it was trained on, with layers of the same kinds",
            )
    return errors


def with_matrices(contents: Contents, model: NamedBase) -> Contents:
    """Turn factors of a parameter that is its module's only matrix, such as a router's `weight`
    (out, in), into factors of the module, because PEFT orients the two alike."""
    targets = contents.config.get("target_parameters") or ()

    def is_matrix(module: AdapterModule) -> bool:
        names = (f"{module.name}.{leaf}" for leaf in model.names.children(module.name) or ())
        own = [name for name in names if any(has_end(name, target) for target in targets)]
        matrix = model.names.parameter(f"{module.name}.weight")
        is_known = matrix is not None and own == [matrix.name] and len(matrix.shape) == 2
        return is_known and model.names.layer(module.name) != TRANSPOSED

    modules = (
        replace(m, kind=FACTORS) if m.kind == PARAMETER and is_matrix(m) else m
        for m in contents.modules
    )
    return replace(contents, modules=tuple(modules))


def with_axes_of(tensors: Mapping[str, TensorSpec], modules: Modules) -> list[AdapterModule]:
    """Give 1x1 kernels as many axes as the base's weight of that name has: linear layers of one
    model are such convolutions in another, for example proj_in of U-Nets."""
    own: list[AdapterModule] = []
    for module in modules:
        spec, parts = tensors.get(f"{module.name}.weight"), dict(module.parts)
        if spec is not None and module.kind == FACTORS and "mid" not in parts:
            points = (1,) * (len(spec.shape) - 2)
            if {*spec.shape[2:], *parts["a"].shape[2:]} == {1}:  # else the axes are the same
                parts |= {n: reshaped(parts[n], (*parts[n].shape[:2], *points)) for n in "ab"}
        own.append(replace(module, parts=parts))
    return own


def _fits(module: AdapterModule, shape: tuple[int, ...]) -> bool:
    """True if a (r, in, *kernel) and b (out, r) make a weight of that shape or its transpose:
    GPT-2's linear layers and embeddings are stored transposed."""
    rows, columns = module.parts["b"].shape[0], module.parts["a"].shape[1:]
    if "mid" in module.parts:  # which has the kernel
        columns = (columns[0], *module.parts["mid"].shape[2:])
    if shape == (rows, *columns):
        return True
    is_flat = len(shape) == 2 and len(columns) >= 1
    return is_flat and shape == (math.prod(columns), rows)


def read_contents(conversion: AdapterConversion) -> Contents:
    """The source's contents, limited to the requested components."""
    detection, base = conversion.detection, conversion.base
    if detection.parts:
        contents = _of_parts(conversion.source, detection.parts)
    elif detection.format.layout == ADAPTER_LAYOUT:
        contents = _of_peft(conversion)
        if isinstance(base, SingleFileModel):
            contents = in_model_names(contents, base)
    else:
        contents = _of_keys(conversion)
        if base is not None:
            modules = with_axes_of(base.tensors, contents.modules)
            contents = replace(contents, modules=tuple(modules))
    component = conversion.options.component
    return contents if component is None else selected(contents, component)


def _of_peft(conversion: AdapterConversion) -> Contents:
    """The contents of an adapter in PEFT's layout, of any type."""
    source, options = conversion.source, conversion.options
    format, config = conversion.detection.format, conversion.detection.config
    if config.get("peft_type", "LORA") not in ("LORA", *KINDS):
        from adapterkit.adapters.formats.planning.other_types import read_other

        return read_other(conversion)
    model, layout = conversion.model, options.expert_layout
    return read_layout(format, source, model=model, expert_layout=layout)


def _of_keys(conversion: AdapterConversion) -> Contents:
    """The contents of a file in a format of keys."""
    # here, as PEFT's layout is read without it
    from adapterkit.adapters.formats.read import Reading, read

    detection, options = conversion.detection, conversion.options
    reading = Reading(
        options.alpha,
        options.architecture or getattr(conversion.base, "architecture", None),
        conversion.modules,
        conversion.facts,
        options.component,
        conversion.file,
    )
    return read(detection.format, conversion.source, detection.container, detection.config, reading)


def _of_parts(source: Folder, parts: Sequence[str]) -> Contents:
    """The contents of folders in PEFT's layout, one per component of a pipeline."""
    errors = Problems()
    own: dict[str, Contents] = {}
    for number, part in enumerate(parts):
        with errors.collected():
            folder = cast(WithSubfolders, source).subfolder(part)
            own[part] = read_layout(detect(folder).format, folder, number)
    errors.raise_all()
    base = [one.config.get(BASE) for one in own.values()]
    return Contents(
        next(iter(own.values())).format,
        tuple(folder for one in own.values() for folder in one.folders),
        tuple(replace(m, component=part) for part, one in own.items() for m in one.modules),
        config={BASE: base[0]} if base[0] and len({*base}) == 1 else {},
        headers={file: sha256 for one in own.values() for file, sha256 in one.headers.items()},
        notes=[f"{part}: {note}" for part, one in own.items() for note in one.notes],
    )


def selected(contents: Contents, component: str) -> Contents:
    """The contents of one component; modules without a component count as its own."""
    if contents.components == (LANGUAGE,):
        modules = [replace(m, component=component) for m in contents.modules]
    else:
        modules = [m for m in contents.modules if m.component == component]
    if not modules:
        raise Refused(
            f"no component {component}",
            expected=f"one of {listed(contents.components)}",
            where="--component",
            hint="choose one of them",
            code="AK401",
        )
    return replace(contents, modules=tuple(modules))


def in_model_names(contents: Contents, model: SingleFileModel) -> Contents:
    """Translate the names of a model's file in an adapter into names of the model, and split fused
    modules; others stay. `Refused` for modules that no rule names."""
    reader = PlanReader(contents.folders)
    errors, modules = Problems(where=contents.folders[0].label), list[AdapterModule]()
    for module in contents.modules:
        if module.name not in model.modules:
            modules.append(module)
            continue
        with errors.collected():
            modules += _of_model(module, model, reader)
    errors.raise_all()
    names = (model.architecture,)
    return replace(contents, modules=tuple(modules), architectures=names)


def _of_model(module: AdapterModule, model: SingleFileModel, reader: PlanReader) -> Modules:
    """The modules of the model for one of its file."""
    for component, names, match in model.found(module.name):
        own, models = replace(module, component=component), names.models(match)
        if names.naming == MODEL:
            return [replace(own, name=models[0])]
        return split(own, models, Fusion(match.rule, names.naming), reader)
    raise Refused(
        f"{shown(module.name)} is no module that {model.architecture} names",
        expected=f"modules of {', '.join(model.parts)}",
        hint="leave it out with --exclude",
        code="AK502",
    )
