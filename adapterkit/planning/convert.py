"""The plan of a conversion: a source in any format that is read, a file in any that is written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters.adapter_config import hub_id
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused, listed, refuse_all, shown
from adapterkit.formats.adapter import read_layout, write_layout
from adapterkit.formats.configs import config_bytes
from adapterkit.formats.containers import PlanReader
from adapterkit.formats.detect import Detection, detect
from adapterkit.formats.dialects import Model, arranged, without_copies
from adapterkit.formats.experts import split_experts, stacks_of
from adapterkit.formats.fitted import Fit, fits_of
from adapterkit.formats.kind_adapter import KINDS
from adapterkit.formats.kinds import EXPERTS
from adapterkit.formats.library import format_named
from adapterkit.formats.models import base_of
from adapterkit.formats.read import Reading, read
from adapterkit.formats.record import LANGUAGE, Contents
from adapterkit.formats.rows import Heads, model_heads
from adapterkit.formats.schema import Format
from adapterkit.formats.tensors import Stored
from adapterkit.formats.write import File, Written, write
from adapterkit.formats.zeros import without_zeros
from adapterkit.gguf.adapter import gguf_layout
from adapterkit.plan import Computed, Plan, Task
from adapterkit.planning.base_shapes import parameter_problems, shape_problems
from adapterkit.planning.cards import adapter_card
from adapterkit.planning.carried import carried_files
from adapterkit.planning.folder_files import Files
from adapterkit.planning.input_files import identities
from adapterkit.planning.kind_deltas import kind_of
from adapterkit.planning.lossy import lowered, read_fitted
from adapterkit.planning.unpickled import UnpickledFolder
from adapterkit.tasks.common import CopiedTensor
from adapterkit.tasks.converted import ConvertedTensor, ConvertedTensors
from adapterkit.tasks.fitted import FittedTensors
from adapterkit.weights.names import Names

ADAPTER_LAYOUT = "adapter"
LAYOUTS = {"gguf": gguf_layout}  # of containers that are not safetensors


@dataclass(frozen=True)
class Options:
    """The options of the command; fields have their names."""

    to: str
    alpha: float | None = None
    rank: int | None = None
    dtype: str | None = None
    lossy: bool = False
    prefix_only: str | None = None
    architecture: str | None = None


def plan_convert(
    source: Folder,
    options: Options,
    base: Checkpoint | None = None,
    file: str | None = None,
    detection: Detection | None = None,  # of the source, where it is known
) -> Plan:
    """Everything a conversion will do, or `Refused` with all that cannot be done. `file`: the name
    of the one file that is wanted; without it, a folder as the format has it."""
    form = format_named(options.to)
    if file is not None and form.file.config:
        raise Refused(
            f"{form.title} in one file",
            expected=f"a folder, with {form.file.config[0]} beside the weights",
            where="--out",
            hint="give --out without an ending",
        )
    detection = detection or detect(source)
    model = model_of(base, detection, form)
    contents = read_contents(source, detection, options, base, model)
    refuse_all([*shape_problems(contents, base), *parameter_problems(contents, model)])
    if not contents.modules:
        raise Refused(
            "an adapter of no module",
            expected="tensors of at least one",
            where=source.label,
            hint="save the adapter again",
        )
    source_modules = _shapes(contents)
    contents = without_zeros(contents, form)
    contents = lowered(contents, form, rank=options.rank, lossy=options.lossy, base=base)
    contents = _in_dialect(contents, form, model)
    rebuilt = contents.format != form.name or source_modules != _shapes(contents)
    written = written_file(contents, form, options, base, model, rebuilt)
    notes: list[str] = []
    name = file or form.file.name
    folders = contents.folders if base is None else (*contents.folders, base.folder)
    tasks = _together(_tasks(written.tensors))
    lay_out = LAYOUTS.get(form.file.container)
    shard = Computed(
        name,
        tasks,
        dict(written.metadata),
        safetensors_order=lay_out is None,
        lay_out=lay_out,
    )
    files: Files = {}
    if file is None:
        within = detection.form.layout == ADAPTER_LAYOUT
        files = _files(contents, written, within=within, notes=notes)
    decisions = {
        "from": contents.format,
        "to": form.name,
        "architecture": written.architecture or (contents.architectures or (None,))[0],
        "modules": len(written.modules),
        "folded": dict(written.folded),
    }
    receipt_options = {k: v for k, v in vars(options).items() if v not in (None, False)}
    notes = [
        *_pickle_note(source),
        *contents.notes,
        *(note.replace("{file}", name) for note in written.notes),
        *_folded_note(form, written),
        *notes,
    ]
    return Plan(
        "convert",
        receipt_options,
        folders,
        dict(contents.headers),
        identities(folders, contents.headers),
        (shard,),
        files,
        decisions,
        tuple(notes),
        models=() if base is None else (len(folders) - 1,),
    )


def _shapes(contents: Contents) -> list[tuple]:
    """What a config says of each module."""
    return [(m.name, m.kind, m.rank, m.alpha, tuple(m.parts)) for m in contents.modules]


def model_of(base: Checkpoint | None, detection: Detection, form: Format) -> Model | None:
    """The model of a base where a conversion from or to PEFT's layout can need it."""
    needs_none = ADAPTER_LAYOUT not in (detection.form.layout, form.layout)
    if base is None or not base.tensors or needs_none:  # of a config alone no names are known
        return None
    task = detection.config.get("task_type")
    if not isinstance(task, str | None):
        raise Refused(
            f"task_type {shown(repr(task))}",
            expected="a text",
            where=detection.container.file,
            hint="keep the config that was saved with the file beside it",
        )
    names = Names(base, task=task, build_model=True)
    return Model(base, names, stacks_of(names))


def read_contents(
    source: Folder,
    detection: Detection,
    options: Options,
    base: Checkpoint | None,
    model: Model | None = None,
) -> Contents:
    """The source's contents, of the components that are asked for."""
    form = detection.form
    if form.layout == ADAPTER_LAYOUT:
        kind = kind_of(source, detection.config)
        if kind is not None and kind.name.upper() not in KINDS:
            contents = read_fitted(form, source, kind, rank=options.rank, base=base)
        else:
            names, stacks = (model.names, model.stacks) if model is not None else (None, None)
            contents = read_layout(form, source, names=names, stacks=stacks)
    else:
        reading = Reading(
            options.alpha,
            options.architecture,
            modules_of(base, model),
            heads_of(base, detection.config),
            model_type_of(base, detection.config),
        )
        contents = read(form, source, detection.container, detection.config, reading)
    return _selected(contents, options.prefix_only)


def modules_of(base: Checkpoint | None, model: Model | None = None) -> list[str]:
    """The modules of a base by its keys, and by the names of its model where that is known."""
    names = set() if base is None else set(base.tensors)
    if model is not None:
        names |= set(model.names.all())
    return sorted({name.rpartition(".")[0] for name in names})


def heads_of(base: Checkpoint | None, config: Mapping[str, Any]) -> Heads | None:
    """Numbers of heads, by the base's config or the source's."""
    return model_heads(config if base is None else base.config)


def model_type_of(base: Checkpoint | None, config: Mapping[str, Any]) -> str | None:
    """The type of the model, by the base's config or the source's."""
    model_type = (config if base is None else base.config).get("model_type")
    return model_type if isinstance(model_type, str) else None


def _selected(contents: Contents, component: str | None) -> Contents:
    """The contents of one component; bare modules are taken for it."""
    if component is None:
        return contents
    if contents.components == (LANGUAGE,):
        modules = [replace(m, component=component) for m in contents.modules]
    else:
        modules = [m for m in contents.modules if m.component == component]
    if not modules:
        raise Refused(
            f"no component {component}",
            expected=f"one of {listed(contents.components)}",
            where="--prefix-only",
            hint="choose one of them",
        )
    return replace(contents, modules=tuple(modules))


def _in_dialect(contents: Contents, form: Format, model: Model | None) -> Contents:
    """The contents as a dialect of PEFT's layout has them, for the base that is given."""
    if form.layout != ADAPTER_LAYOUT:
        return contents
    name = hub_id(model.base.folder) if model is not None else None
    if name is not None:
        contents = replace(contents, config={**contents.config, "base_model_name_or_path": name})
    if contents.format == form.name and model is None:
        return contents
    return arranged(contents, form, model, PlanReader(contents.folders))


def written_file(
    contents: Contents,
    form: Format,
    options: Options,
    base: Checkpoint | None,
    model: Model | None = None,
    rebuilt: bool = True,
) -> File:
    """The file of these contents in a format; `rebuilt`: its modules are not the source's."""
    dtype = dtypes.parse(options.dtype) if options.dtype else None
    if form.layout == ADAPTER_LAYOUT:
        stacks = model.stacks if model is not None else None
        rebuilt = rebuilt or "r" not in contents.config  # without the source's ranks
        return write_layout(contents, form, dtype=dtype, stacks=stacks, rebuilt=rebuilt)
    modules, notes = without_copies(contents.modules, form)
    file = write(
        _single_experts(replace(contents, modules=tuple(modules)), form, model),
        form,
        architecture=options.architecture,
        dtype=dtype,
        heads=heads_of(base, contents.config),
        base=None if base is None else base_of(base.config, base.tensors),
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


def _single_experts(contents: Contents, form: Format, model: Model | None) -> Contents:
    """Stacks of experts as modules of single experts, where a format names those."""
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


def _tasks(tensors: Sequence[Written]) -> tuple[Task, ...]:
    """One task for each tensor, or for all that share fits."""
    groups: dict[int, list[Written]] = {}  # by the fits, which tensors of fused modules join
    owner: dict[int, int] = {}
    fits: dict[int, Fit] = {}
    tasks: list[Task] = []
    for tensor in tensors:
        own = fits_of(tensor.expression)
        if not own:
            tasks.append(_task(tensor))
            continue
        fits |= {id(fit): fit for fit in own}
        joined = {owner.setdefault(id(fit), id(fit)) for fit in own}
        home = min(joined)
        groups[home] = [one for old in sorted(joined) for one in groups.pop(old, [])] + [tensor]
        owner = {fit: home if old in joined else old for fit, old in owner.items()}
    for home, members in groups.items():
        own = tuple(fits[fit] for fit, place in owner.items() if place == home)
        outputs = tuple((one.key, one.expression, one.dtype) for one in members)
        tasks.append(FittedTensors(members[0].module, outputs, own))
    return tuple(tasks)


MANY = 8  # outputs of one stored tensor that are made together


def _together(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Tensors that are made of the same stored ones, such as experts of their stack, in one task:
    otherwise each of them would read the whole stack."""
    readers = Counter(spec for task in tasks for spec in task.reads)
    groups: dict[TensorSpec, list[ConvertedTensor]] = {}
    result: list[Task] = []
    for task in tasks:
        shared = next((spec for spec in task.reads if readers[spec] > MANY), None)
        if shared is None or not isinstance(task, ConvertedTensor):
            result.append(task)
        else:
            groups.setdefault(shared, []).append(task)
    return (*result, *(ConvertedTensors(own[0].name, tuple(own)) for own in groups.values()))


def _task(tensor: Written) -> Task:
    """A copy of bytes where nothing is computed."""
    if isinstance(tensor.expression, Stored) and tensor.dtype == tensor.expression.dtype:
        return CopiedTensor(tensor.key, tensor.expression.spec, tensor.key, checked=True)
    return ConvertedTensor(tensor.key, tensor.key, tensor.expression, tensor.dtype)


def _files(contents: Contents, written: File, *, within: bool, notes: list[str]) -> Files:
    """The files of a folder besides its weights; `within`: from one dialect of PEFT's layout to
    another, where a trainer's other files go along."""
    files: Files = {}
    form = written.form
    if written.settings is not None:
        name = form.file.config[0]
        files[name] = config_bytes(name, written.settings)
    if form.layout != ADAPTER_LAYOUT:
        return files
    if within:
        known = {*files, *(file for _, file in contents.headers), form.file.name}
        files = {**carried_files(contents.folders[0], form, known, notes), **files}
    if "README.md" not in files:
        base = (written.settings or {}).get("base_model_name_or_path")
        card = adapter_card(base, [], f"converted from {contents.format}")
        files["README.md"] = card.encode()
    return files


def _pickle_note(source: Folder) -> list[str]:
    if not isinstance(source, UnpickledFolder) or not source.left_out:
        return []
    return [f"beside the adapter {source.pickle} holds {listed(source.left_out)}: left out"]


def _folded_note(form: Format, written: File) -> list[str]:
    if not written.folded:
        return []
    scales = sorted(set(written.folded.values()))
    return [
        f"{form.title} stores no scale: that of {len(written.folded)} modules is in b now "
        f"({listed(scales)})"
    ]
