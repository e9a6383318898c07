"""Plan a conversion: from any format that is read to any that is written."""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.adapters.formats.base_model import NamedBase
from adapterkit.adapters.formats.convert import Convert, ConvertOptions
from adapterkit.adapters.formats.detect import Detection, detect
from adapterkit.adapters.formats.engines import adapter_card
from adapterkit.adapters.formats.files.configs import config_bytes
from adapterkit.adapters.formats.library import format_named, formats
from adapterkit.adapters.formats.modules.experts import split_experts
from adapterkit.adapters.formats.modules.kinds import EXPERTS, PARAMETER
from adapterkit.adapters.formats.modules.record import Contents
from adapterkit.adapters.formats.modules.tensors import is_made_by
from adapterkit.adapters.formats.peft.dialects import arranged, renamed, without_copies
from adapterkit.adapters.formats.peft.layout import write_layout
from adapterkit.adapters.formats.planning.lossy import lowered, without_zeros
from adapterkit.adapters.formats.planning.source import (
    AdapterConversion,
    parameter_problems,
    read_contents,
    shape_problems,
    with_matrices,
)
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, Format
from adapterkit.adapters.formats.task import tasks_of
from adapterkit.adapters.formats.write import FormatFile, write
from adapterkit.core import dtypes
from adapterkit.core.adapter.adapter_config import hub_id
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.input_identity import identities
from adapterkit.core.inputs.sources import open_base, open_model, open_unconverted
from adapterkit.core.lazy import torch
from adapterkit.core.options import StrPath
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.plan import CopyFile, Files, OutputFile, Plan
from adapterkit.core.registry import load
from adapterkit.core.weights.plan_reader import PlanReader

MOST = 100_000_000  # bytes of one file
# weights, and no state of a trainer
TRAINED = re.compile(
    r"(?!optimizer|scheduler|scaler|rng_state|training_args)[^/]+\.(safetensors|bin|pth?)"
)


def files_of(contents: Contents, written: FormatFile, notes: list[str]) -> Files:
    """The files of a folder except its weights; notes list those that are copied or left out."""
    files: Files = {}
    format = written.format
    if written.settings is not None:
        name = format.file.config[0]
        files[name] = config_bytes(name, written.settings)
    if format.layout != ADAPTER_LAYOUT:
        return files
    if formats()[contents.format].layout == format.layout:
        known = {*files, *(file for _, file in contents.headers), format.file.name}
        files = {**_carried(contents.folders[0], format, known, notes), **files}
    if "README.md" not in files:
        base = (written.settings or {}).get("base_model_name_or_path")
        card = adapter_card(base, [], f"converted from {contents.format}")
        files["README.md"] = card.encode()
    return files


def _carried(
    source: Folder, format: Format, written: Collection[str], notes: list[str]
) -> dict[str, CopyFile]:
    """The source's files that the target's format copies; the others join the notes. `written`: the
    files that the conversion writes itself, and the source's of those names."""
    files, left = {}, []
    for name, size in sorted(source.files().items()):
        if name in written or name == RECEIPT:
            continue
        if size <= MOST and any(pattern.fullmatch(name) for pattern in format.file.carry):
            files[name] = CopyFile(0, name)
        else:
            left.append(name)
    if files:
        notes.append(f"copied: {listed(list(files))}")
    if left:
        left.sort(key=lambda name: not TRAINED.fullmatch(name))
        notes.append(f"not copied: {listed(left)}")
    return files


FILES = (".safetensors", ".gguf")  # endings of an output that is one file
LAYOUTS = {"gguf": "bases.gguf.adapter:gguf_layout"}  # of containers that are not safetensors


def plan_conversion(convert: Convert) -> Plan:
    """The plan of a conversion."""
    target = Path(convert.out)
    is_file = target.suffix in FILES and not is_on_hub(convert.out)
    source = open_unconverted(convert.src, convert.allow_pickle)
    base = None if convert.base is None else base_for(convert.base, source, convert.component)
    options, name = convert.only(ConvertOptions), target.name if is_file else None
    plan = plan_convert(source, options, base, name)
    if any("repo" in folder.origin for folder in plan.folders):  # on the Hub
        from adapterkit.bases.hub.output.inputs import plan_in_parts

        plan = plan_in_parts(plan)
    return replace(plan, is_file=is_file)


def base_for(text: StrPath, source: Folder, component: str | None = None) -> Checkpoint:
    """The base; for a pipeline, the component that the adapter is for."""
    base = kind_of(open_model(text))
    own = base.own("base of a conversion")
    return own(base, source, component) if own else open_base(text)


def plan_convert(
    source: Folder,
    options: ConvertOptions,
    base: Checkpoint | None = None,
    file: str | None = None,
    detection: Detection | None = None,  # of the source, if known
) -> Plan:
    """Plan a conversion, or raise `Refused` with everything that cannot be done. `file`: the name
    of a single output file; otherwise a folder in the format's layout."""
    format = format_named(options.to)
    conversion = AdapterConversion(source, detection or detect(source), options, base)
    if file is not None:
        _check_target(format, file)
    return plan_contents(conversion, read_contents(conversion), file)


def plan_contents(
    conversion: AdapterConversion, contents: Contents, file: str | None = None
) -> Plan:
    """The plan of a conversion whose source was read."""
    format, options, base = conversion.format, conversion.options, conversion.base
    _check_source(contents, conversion)
    adapted = contents
    has_parameters = any(module.kind == PARAMETER for module in contents.modules)
    if has_parameters and format.layout != ADAPTER_LAYOUT and conversion.model is not None:
        adapted = with_matrices(contents, conversion.model)
    adapted = without_zeros(adapted, format)
    adapted = lowered(adapted, format, rank=options.rank, lossy=options.lossy, base=base)
    if format.layout == ADAPTER_LAYOUT:
        adapted = _in_dialect(adapted, format, conversion.model)
    is_rebuilt = contents.format != format.name or _shapes(contents) != _shapes(adapted)
    written = written_file(conversion, adapted, is_rebuilt)
    return plan_written(conversion.source, adapted, written, options, base, file)


def _check_target(format: Format, file: str) -> None:
    """`Refused` for a single file of a format that needs settings next to its weights, or whose
    weights are in files with another ending."""
    ending = Path(format.file.name).suffix
    if not format.file.config and Path(file).suffix == ending:
        return
    if format.file.config:
        problem, hint = f"{format.title} in one file", "give --out without an ending"
        expected = f"a folder, with {format.file.config[0]} next to the weights"
    else:
        problem, expected = f"{format.title} in a file named {shown(file)}", f"a name with {ending}"
        hint = f"give --out {shown(Path(file).with_suffix(ending))}"
    raise Refused(problem, expected=expected, where="--out", hint=hint, code="AK102")


def _check_source(contents: Contents, conversion: AdapterConversion) -> None:
    """`Refused` for factors that do not fit the base, and for an adapter without modules."""
    base, model = conversion.base, conversion.model
    problems = [] if base is None else shape_problems(contents, base)
    problems += [] if model is None else parameter_problems(contents, model)
    Problems(problems).raise_all()
    if not contents.modules:
        raise Refused(
            "an adapter of no module",
            expected="tensors of at least one",
            where=contents.folders[0].label,
            hint="save the adapter again",
            code="AK105",
        )


def _shapes(contents: Contents) -> list[tuple]:
    """The facts about each module that a config depends on."""
    return [(m.name, m.kind, m.rank, m.alpha, tuple(m.parts)) for m in contents.modules]


def _in_dialect(contents: Contents, format: Format, model: NamedBase | None) -> Contents:
    """The contents in a dialect of PEFT's layout, for the given base."""
    name = hub_id(model.checkpoint.folder) if model is not None else None
    if name is not None:
        contents = replace(contents, config={**contents.config, "base_model_name_or_path": name})
    if contents.format == format.name and model is None:
        return contents
    return arranged(contents, format, model, PlanReader(contents.folders))


def written_file(conversion: AdapterConversion, contents: Contents, is_rebuilt: bool) -> FormatFile:
    """The file of these contents; `is_rebuilt`: its modules are not the source's."""
    format, options, model = conversion.format, conversion.options, conversion.model
    dtype = dtypes.parse(options.dtype) if options.dtype else None
    if format.layout == ADAPTER_LAYOUT:
        is_rebuilt = is_rebuilt or "r" not in contents.config  # without the source's ranks
        return write_layout(contents, format, dtype=dtype, model=model, rebuilt=is_rebuilt)
    modules, notes = without_copies(contents.modules, format)
    file = write(
        _in_file(replace(contents, modules=tuple(modules)), format, model),
        format,
        architecture=options.architecture,
        dtype=dtype,
        base=None if conversion.base is None else conversion.facts,
    )
    if format.names.style == "underscores" and file.architecture is None and model is not None:
        known = set(conversion.modules)
        unknown = [m.path for m in file.modules if m.name not in known]
        if unknown:
            raise Refused(
                f"{len(unknown)} modules that the base does not have: {listed(unknown)}",
                expected="modules of the base, by which names with underscores are read again",
                where=contents.folders[0].label,
                hint="give the base that it was trained on",
                code="AK401",
            )
    return replace(file, notes=[*notes, *file.notes])


def _in_file(contents: Contents, format: Format, model: NamedBase | None) -> Contents:
    """Modules with the names in the base's file, for formats that use those: single experts, other
    names."""
    if model is not None and format.names.file:
        modules = renamed(contents.modules, model, in_file=True)
        contents = replace(contents, modules=tuple(modules))
    stacks = [m.path for m in contents.modules if m.kind == EXPERTS]
    if not stacks or not format.names.architectures:
        return contents
    if model is None:
        raise Refused(
            f"{len(stacks)} stacks of experts: {listed(stacks)}",
            expected="the model, because its file maps modules of experts to rows of stacks",
            where=contents.folders[0].label,
            hint="give --base MODEL, with its weights",
            code="AK402",
        )
    modules = split_experts(contents.modules, model.stacks, PlanReader(contents.folders))
    return replace(contents, modules=tuple(modules))


def plan_written(
    source: Folder,
    contents: Contents,
    written: FormatFile,
    options: ConvertOptions,
    base: Checkpoint | None = None,
    file: str | None = None,
    more: tuple[OutputFile, ...] = (),
) -> Plan:
    """The plan that writes a file of these contents, alone or in a folder together with `more`."""
    format = written.format
    name = file or format.file.name
    folders = contents.folders if base is None else (*contents.folders, base.folder)
    entry = LAYOUTS.get(format.file.container)
    lay_out = None if entry is None else load(entry)
    shard = OutputFile.computed(
        name,
        tasks_of(written.tensors),
        dict(written.metadata),
        safetensors_order=lay_out is None,
        lay_out=lay_out,
    )
    file_notes: list[str] = []
    files = files_of(contents, written, file_notes) if file is None else {}
    decisions = {
        "from": contents.format,
        "to": format.name,
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
        shards=(shard, *more),
        files=files,
        decisions=decisions,
        notes=(*_notes(source, contents, written, name), *file_notes),
        models=() if base is None else (len(folders) - 1,),
    )


def _notes(source: Folder, contents: Contents, written: FormatFile, file: str) -> Iterator[str]:
    """Notes on modules and scales left out, folded or rounded, and the source's notes."""
    maker: Any = getattr(source, "maker", None)
    if left_out := getattr(maker, "left_out", ()):
        yield f"not converted: {maker.pickle} also holds {listed(left_out)}"
    yield from contents.notes
    yield from (note.replace("{file}", file) for note in written.notes)
    if written.folded:
        scales = listed(sorted({*written.folded.values()}))
        yield (
            f"{written.format.title} has no scale field: {scales} was multiplied into B of "
            f"{len(written.folded)} modules"
        )
    yield from _rounded_note(written)
    if not formats()[contents.format].layout == written.format.layout == ADAPTER_LAYOUT:
        known = {file for _, file in contents.headers}
        other_files = [name for name in contents.folders[0].files() if TRAINED.fullmatch(name)]
        if left := [name for name in other_files if name not in known]:  # such as a value head
            yield f"not converted: {listed(left)} next to the adapter"


def _rounded_note(written: FormatFile) -> list[str]:
    """A note on scales multiplied into factors of few bits, and the rounding error."""
    rounded = [
        tensor
        for tensor in written.tensors
        if tensor.dtype in ("BF16", "F16")
        and any(is_made_by(e, "scale") and _rounds(e.arguments[0]) for e in tensor.expression)
    ]
    if not rounded:
        return []
    largest = max(torch.finfo(dtypes.torch_dtype(tensor.dtype)).eps / 2 for tensor in rounded)
    return [
        f"factors of {len({tensor.module for tensor in rounded})} modules are rounded to "
        f"{'/'.join(sorted({tensor.dtype for tensor in rounded}))} after a scale was multiplied in "
        f"(by {largest:.2g} of a value at most): --dtype fp32 keeps them"
    ]


def _rounds(factor: float) -> bool:
    """True unless it is a power of 2, which shifts the exponent only."""
    return math.frexp(abs(factor))[0] != 0.5
