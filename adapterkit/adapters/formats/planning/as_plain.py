"""Read an adapter in any format as one in PEFT's layout: a folder overlay with its conversion.
Those of several components of a pipeline become one; module names begin with the component's."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from adapterkit.adapters.formats.convert import COMPONENTS, ConvertOptions
from adapterkit.adapters.formats.detect import Detection, detect, in_another_layout
from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.adapters.formats.library import format_named
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.peft.eight_bits import notes_on
from adapterkit.adapters.formats.peft.expert_order import is_of_unsloth, order_of, with_given
from adapterkit.adapters.formats.peft.layout import read_layout, write_layout
from adapterkit.adapters.formats.planning.plan import (
    plan_contents,
    plan_convert,
    plan_written,
    written_file,
)
from adapterkit.adapters.formats.planning.single_file import plan_in_names_of, plan_with_others
from adapterkit.adapters.formats.planning.source import AdapterConversion, read_contents, selected
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, PEFT
from adapterkit.core.adapter.config import INCOMPLETE, SLOWEST
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import ONE_PART, command
from adapterkit.core.engine.planned_folder import converted_folder, made_adapter
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.options import StrPath
from adapterkit.core.plan import Plan
from adapterkit.core.weights.decoded import decoded_view

T = TypeVar("T")
PER_EXPERT = "peft-per-expert"
OF_ONE_EXPERT = re.compile(r"\.experts\.(\d+|gate_proj|up_proj|w[123])\.")  # in a key


def converted(
    folder: Folder,
    base: Folder | None,
    file: SingleFileModel | None,
    *,
    for_merge: bool,
    expert_layout: str | None,
) -> Folder:
    """As `in_adapter_layout`, for an adapter that is not standard LoRA, or a base that is a
    single-file image model."""
    try:
        detection = detect(folder)
    except AdapterkitError as error:
        if CONFIG in folder.files() or isinstance(error, Refused):
            return folder
        raise
    if file is not None:
        plan = with_own_hints(lambda: plan_in_names_of(file, folder, detection))
        return converted_folder(folder, detection.format.name, detection.container.file, plan)
    peft_type = detection.config.get("peft_type", "LORA")
    if peft_type != "LORA" or any(map(detection.config.get, INCOMPLETE)):
        from adapterkit.adapters.formats.planning.other_types import is_exact, needed_base

        if is_exact(detection.config):
            return _exact(folder, detection, needed_base(folder, detection.config, base))
    is_read = detection.format.layout == ADAPTER_LAYOUT and detection.format.adapter.is_read_by_peft
    if for_merge and detection.config.get("peft_type") in ("LOHA", "LOKR"):
        return _with_others(folder, detection)
    if is_read and not notes_on(detection.container.tensors):
        config = with_given(detection.config, expert_layout)
        is_explicit = config is not detection.config and is_of_unsloth(config, folder)
        if order_of(config) != SLOWEST and not is_explicit:
            return folder
    checkpoint = None if base is None else read_checkpoint(base, 1)
    is_axis = detection.format.adapter.stacks == "axis"
    is_each = is_axis and any(map(OF_ONE_EXPERT.search, detection.container.tensors))
    options = ConvertOptions(to=PER_EXPERT if is_each else PEFT, expert_layout=expert_layout)
    plan = with_own_hints(lambda: plan_convert(folder, options, checkpoint, detection=detection))
    return converted_folder(folder, detection.format.name, detection.container.file, plan)


def _exact(folder: Folder, detection: Detection, base: Folder | None) -> Folder:
    """An adapter of another type or variant as the LoRA that it is; `base`: if it depends on it."""
    checkpoint = None if base is None else decoded_view(read_checkpoint(base, 1))
    plain = AdapterConversion(folder, detection, ConvertOptions(to=PEFT))
    contents = with_own_hints(lambda: read_contents(replace(plain, base=checkpoint)))
    plan = with_own_hints(lambda: plan_contents(plain, contents))
    plan = replace(plan, notes=tuple(contents.notes))  # not on its other files
    return converted_folder(folder, detection.format.name, detection.container.file, plan)


def _with_others(folder: Folder, detection: Detection) -> Folder:
    """An adapter of another type in PEFT's layout, for a merge."""
    options = ConvertOptions(to=PEFT)
    read = lambda: read_contents(AdapterConversion(folder, detection, options))
    plan = with_own_hints(lambda: plan_with_others(folder, read(), options))
    if plan is None:
        return folder
    plan = replace(plan, notes=())  # on its other files, which no merge copies
    return converted_folder(folder, detection.format.name, detection.container.file, plan)


def with_own_hints(read: Callable[[], T]) -> T:
    """Read or plan something, with the hints of errors changed to fit any verb."""
    try:
        return read()
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            one.hint = conversion_hint(one.hint, PEFT)
        raise


def with_part_names(folder: Folder, contents: Contents) -> Overlay:
    """An adapter as a folder in PEFT's layout, the names of its modules with that of their
    component in front."""
    modules = tuple(replace(m, name=m.path, component="") for m in contents.modules)
    plain = replace(contents, modules=modules, architectures=(), config={}, metadata={})
    format = format_named(PEFT)
    layout = write_layout(plain, format, rebuilt=True, values=True)
    plan = plan_written(folder, plain, layout, ConvertOptions(to=format.name))
    file, parts = next(file for _, file in plan.headers), ", ".join(contents.components)
    return converted_folder(folder, contents.format, file, plan, parts)


def contents_of(folder: Folder, base: Checkpoint | None = None) -> Contents | None:
    """The contents of an adapter that is not in PEFT's layout, or None. `base`: its model, or the
    denoiser of its pipeline."""
    detection = in_another_layout(folder)
    if detection is None:
        return None
    return read_contents(AdapterConversion(folder, detection, ConvertOptions(to=PEFT), base))


def as_component(
    folder: Folder, contents: Contents, name: str, base: Checkpoint | None = None
) -> Overlay:
    """One component of a pipeline's adapter as a folder in PEFT's layout, other deltas in a second
    file. `base`: that model of the pipeline."""
    detection, own = detect(folder), selected(contents, name)
    options = ConvertOptions(to=PEFT, component=name)
    plan = plan_with_others(folder, own, options)
    plan = plan or plan_contents(AdapterConversion(folder, detection, options, base), own)
    return converted_folder(folder, detection.format.name, detection.container.file, plan, name)


def plan_in_layout(first: Contents, plan: Plan, file: str | None, *, is_alone: bool) -> Plan:
    """The plan of a job, its output in the layout of its first adapter; `is_alone`: it has only
    one."""
    made = made_adapter(plan)
    format, names = format_named(first.format), first.architectures
    options = ConvertOptions(to=format.name, architecture=names[0] if len(names) == 1 else None)
    conversion = AdapterConversion(made, detect(made), options)
    read = read_layout(conversion.detection.format, made)
    # hashes in the metadata are of other tensors, and titles of one of several
    kept = first.metadata if is_alone else {}
    contents = replace(
        read,
        modules=tuple(map(_in_part, read.modules)),
        facts=first.facts,
        metadata={key: value for key, value in kept.items() if "hash" not in key},
        refitted=True,
    )
    written = written_file(conversion, contents, True)
    convert = plan_written(made, contents, written, options, None, file)
    behind = lambda files: {(number + 1, name): one for (number, name), one in files.items()}
    return replace(
        convert,
        verb=plan.verb,
        options=plan.options,
        folders=(made, *plan.folders),
        headers=convert.headers | behind(plan.headers),
        identities=convert.identities | behind(plan.identities),
        decisions=plan.decisions | {"to": format.name},
        models=tuple(number + 1 for number in plan.models),
        is_file=file is not None,
    )


def open_parts(
    sources: Sequence[Folder], out: StrPath, file: str | None
) -> tuple[list[Folder], Contents] | None:
    """The adapters in PEFT's layout, and the contents of the first one, whose layout the output
    has: `file`, or one of adapters of several components; None if it is PEFT's."""
    every = [_contents(source) for source in sources]
    parts = {part for one in every if one is not None for part in one.components}
    if not sources or (file is None and len(parts) < 2):
        return None
    errors = Problems(code="AK503")
    what, expected, hint = "PEFT's layout in one file", "a folder", "give --out without an ending"
    if len(parts) > 1:
        what = f"an adapter of one model next to those of {listed(sorted(parts - {LANGUAGE}))}"
        expected = "adapters whose keys name their component"
        hint = ONE_PART
    named: list[tuple[Folder, Contents]] = []
    for source, contents in zip(sources, every, strict=True):
        if contents is None or (len(parts) > 1 and LANGUAGE in contents.components):
            errors.add(what, expected, hint, where=source.label)
        else:
            named.append((source, contents))
    errors.raise_all()
    first = named[0][1]
    format = format_named(first.format)
    if not format.writes or format.file.config or is_on_hub(out):
        raise Refused(
            f"{format.title} is not written" + " on the Hub" * is_on_hub(out),
            expected="a format of one file, written here",
            where=sources[0].label,
            hint="convert it first\n"
            "adapterkit convert ADAPTER --to diffusers --out converted.safetensors",
            code="AK503",
        )
    return [with_part_names(*one) for one in named], first


def _contents(source: Folder) -> Contents | None:
    """The contents of an adapter in another layout than PEFT's, or None."""
    if {CONFIG, "config.json"} & {*source.files()}:
        return None
    return with_own_hints(lambda: contents_of(source))


def _in_part(module: AdapterModule) -> AdapterModule:
    """A module of the component that its name begins with."""
    part, _, name = module.name.partition(".")
    return replace(module, component=part, name=name) if part in COMPONENTS else module


# options of `convert` that other verbs lack or use otherwise, and their values in hints
_OF_CONVERT = re.compile(r"--(alpha|architecture|allow-pickle|component|lossy|rank)\b")
_VALUES = {"alpha": "A", "architecture": "NAME", "component": "PART", "rank": 16}


def conversion_hint(hint: str, to: str, base: str | None = None) -> str:
    """A hint of a conversion, for any verb: its first alternative of options of `convert` becomes a
    command. `base`: the text for a given base."""
    if "\n" in hint:
        return hint
    first = next((one for one in hint.split(", or ") if "--" in one), "")
    names = _OF_CONVERT.findall(first)
    if not names and not (base and "--base" in first):
        return hint
    options = {"base": base or ("BASE" if "--base" in first else None)}
    options |= {name: _VALUES.get(name, True) for name in names}
    text = command("adapterkit convert", "ADAPTER", to=to, **options, out=f"for-{to}")
    return f"convert it first\n{text}"
