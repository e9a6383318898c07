"""The plan of a conversion: a source in any format that is read, a file in any that is written."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from adapterkit import dtypes
from adapterkit.adapters.adapter_config import hub_id
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Problems, Refused, listed, shown
from adapterkit.formats.base import NamedBase, facts_of
from adapterkit.formats.detect import Detection, detect
from adapterkit.formats.files.containers import PlanReader
from adapterkit.formats.library import format_named
from adapterkit.formats.modules.experts import split_experts
from adapterkit.formats.modules.kinds import EXPERTS
from adapterkit.formats.modules.record import Contents
from adapterkit.formats.modules.tensors import is_made_by
from adapterkit.formats.peft.dialects import arranged, renamed, without_copies
from adapterkit.formats.peft.layout import write_layout
from adapterkit.formats.schema import ADAPTER_LAYOUT, Format
from adapterkit.formats.write import FormatFile, write
from adapterkit.gguf.adapter import gguf_layout
from adapterkit.plan import OutputFile, Plan
from adapterkit.planning.convert.base_shapes import parameter_problems, shape_problems
from adapterkit.planning.convert.folder import files_of, left_beside
from adapterkit.planning.convert.lossy import lowered, without_zeros
from adapterkit.planning.convert.source import (
    heads_of,
    modules_of,
    named_base,
    read_contents,
)
from adapterkit.planning.convert.tasks import tasks_of
from adapterkit.planning.inputs.input_identity import identities
from adapterkit.planning.inputs.unpickled_folder import UnpickledFolder
from adapterkit.verbs.convert import ConvertOptions

LAYOUTS = {"gguf": gguf_layout}  # of containers that are not safetensors


def plan_convert(
    source: Folder,
    options: ConvertOptions,
    base: Checkpoint | None = None,
    file: str | None = None,
    detection: Detection | None = None,  # of the source, where it is known
) -> Plan:
    """Everything a conversion will do, or `Refused` with all that cannot be done. `file`: the name
    of the one file that is wanted; without it, a folder as the format has it."""
    form = format_named(options.to)
    detection = detection or detect(source)
    model = named_base(base, detection, form)
    _check_target(form, file)
    contents = read_contents(source, detection, options, base, model)
    _check_source(contents, base, model)
    adapted = without_zeros(contents, form)
    adapted = lowered(adapted, form, rank=options.rank, lossy=options.lossy, base=base)
    adapted = _in_dialect(adapted, form, model)
    is_rebuilt = contents.format != form.name or _shapes(contents) != _shapes(adapted)
    written = _written(adapted, form, options, base, model, is_rebuilt)
    return _plan(source, adapted, written, options, base, file)


def _check_target(form: Format, file: str | None) -> None:
    """`Refused` for one file of a format that has settings beside its weights, or whose weights
    are in files with another ending."""
    ending = Path(form.file.name).suffix
    if file is not None and not form.file.config and Path(file).suffix != ending:
        raise Refused(
            f"{form.title} in a file named {shown(file)}",
            expected=f"a name with {ending}",
            where="--out",
            hint=f"give --out {shown(Path(file).with_suffix(ending))}",
        )
    if file is not None and form.file.config:
        raise Refused(
            f"{form.title} in one file",
            expected=f"a folder, with {form.file.config[0]} beside the weights",
            where="--out",
            hint="give --out without an ending",
        )


def _check_source(contents: Contents, base: Checkpoint | None, model: NamedBase | None) -> None:
    """`Refused` for factors that do not fit the base, and for no modules at all."""
    Problems([*shape_problems(contents, base), *parameter_problems(contents, model)]).raise_all()
    if not contents.modules:
        raise Refused(
            "an adapter of no module",
            expected="tensors of at least one",
            where=contents.folders[0].label,
            hint="save the adapter again",
        )


def _shapes(contents: Contents) -> list[tuple]:
    """What a config says of each module."""
    return [(m.name, m.kind, m.rank, m.alpha, tuple(m.parts)) for m in contents.modules]


def _in_dialect(contents: Contents, form: Format, model: NamedBase | None) -> Contents:
    """The contents as a dialect of PEFT's layout has them, for the base that is given."""
    if form.layout != ADAPTER_LAYOUT:
        return contents
    name = hub_id(model.checkpoint.folder) if model is not None else None
    if name is not None:
        contents = replace(contents, config={**contents.config, "base_model_name_or_path": name})
    if contents.format == form.name and model is None:
        return contents
    return arranged(contents, form, model, PlanReader(contents.folders))


def _written(
    contents: Contents,
    form: Format,
    options: ConvertOptions,
    base: Checkpoint | None,
    model: NamedBase | None,
    is_rebuilt: bool,
) -> FormatFile:
    """The file of these contents in a format; `is_rebuilt`: its modules are not the source's."""
    dtype = dtypes.parse(options.dtype) if options.dtype else None
    if form.layout == ADAPTER_LAYOUT:
        stacks = model.stacks if model is not None else None
        is_rebuilt = is_rebuilt or "r" not in contents.config  # without the source's ranks
        return write_layout(contents, form, dtype=dtype, stacks=stacks, rebuilt=is_rebuilt)
    modules, notes = without_copies(contents.modules, form)
    file = write(
        _in_file(replace(contents, modules=tuple(modules)), form, model),
        form,
        architecture=options.architecture,
        dtype=dtype,
        heads=heads_of(base, contents.config),
        base=None if base is None else facts_of(base.config, base.tensors),
    )
    if form.names.style == "underscores" and file.architecture is None and model is not None:
        known = set(modules_of(base, model))
        unknown = [m.path for m in file.modules if m.name not in known]
        if unknown:
            raise Refused(
                f"{len(unknown)} modules that the base does not have: {listed(unknown)}",
                expected="modules of the base, by which names with underscores are read again",
                where=contents.folders[0].label,
                hint="give the base that it was trained on",
            )
    return replace(file, notes=[*notes, *file.notes])


def _in_file(contents: Contents, form: Format, model: NamedBase | None) -> Contents:
    """Modules as the base's file has them where a format names those: single experts, other
    names."""
    if model is not None and form.names.file:
        modules = renamed(contents.modules, model, in_file=True)
        contents = replace(contents, modules=tuple(modules))
    stacks = [m.path for m in contents.modules if m.kind == EXPERTS]
    if not stacks or not form.names.architectures:
        return contents
    if model is None:
        raise Refused(
            f"{len(stacks)} stacks of experts: {listed(stacks)}",
            expected="the model, whose file tells which module of an expert is which part of a "
            "stack",
            where=contents.folders[0].label,
            hint="give --base MODEL, with its weights",
        )
    modules = split_experts(contents.modules, model.stacks, PlanReader(contents.folders))
    return replace(contents, modules=tuple(modules))


def _plan(
    source: Folder,
    contents: Contents,
    written: FormatFile,
    options: ConvertOptions,
    base: Checkpoint | None,
    file: str | None,
) -> Plan:
    """The plan that writes a file of these contents, alone or in a folder."""
    form = written.form
    name = file or form.file.name
    folders = contents.folders if base is None else (*contents.folders, base.folder)
    lay_out = LAYOUTS.get(form.file.container)
    shard = OutputFile.computed(
        name,
        tasks_of(written.tensors),
        dict(written.metadata),
        safetensors_order=lay_out is None,
        lay_out=lay_out,
    )
    beside: list[str] = []
    files = files_of(contents, written, beside) if file is None else {}
    notes = (
        *_pickle_note(source),
        *contents.notes,
        *(note.replace("{file}", name) for note in written.notes),
        *_folded_note(written),
        *_rounded_note(written),
        *left_beside(contents, written.form),
        *beside,
    )
    decisions = {
        "from": contents.format,
        "to": form.name,
        "architecture": written.architecture or (contents.architectures or (None,))[0],
        "modules": len(written.modules),
        "folded": dict(written.folded),
    }
    return Plan(
        verb="convert",
        options={key: value for key, value in vars(options).items() if value not in (None, False)},
        folders=folders,
        headers=dict(contents.headers),
        identities=identities(folders, contents.headers),
        shards=(shard,),
        files=files,
        decisions=decisions,
        notes=notes,
        models=() if base is None else (len(folders) - 1,),
    )


def _pickle_note(source: Folder) -> list[str]:
    if not isinstance(source, UnpickledFolder) or not source.left_out:
        return []
    return [f"not converted: {source.pickle} also holds {listed(source.left_out)}"]


def _folded_note(written: FormatFile) -> list[str]:
    if not written.folded:
        return []
    scales = sorted(set(written.folded.values()))
    return [
        f"{written.form.title} has no scale field: {listed(scales)} was multiplied into B of "
        f"{len(written.folded)} modules"
    ]


def _rounded_note(written: FormatFile) -> list[str]:
    """That scales were multiplied into factors of few bits, and what that rounds away."""
    rounded = [
        tensor
        for tensor in written.tensors
        if tensor.dtype in ("BF16", "F16")
        and any(is_made_by(e, "scale") and not _is_power(e.arguments[0]) for e in tensor.expression)
    ]
    if not rounded:
        return []
    largest = max(torch.finfo(dtypes.torch_dtype(tensor.dtype)).eps / 2 for tensor in rounded)
    return [
        f"factors of {len({tensor.module for tensor in rounded})} modules are rounded to "
        f"{'/'.join(sorted({tensor.dtype for tensor in rounded}))} after a scale was multiplied in "
        f"(by {largest:.2g} of a value at most): --dtype fp32 keeps them"
    ]


def _is_power(factor: float) -> bool:
    """Whether it is a power of 2, which shifts the exponent alone."""
    return math.frexp(abs(factor))[0] == 0.5
