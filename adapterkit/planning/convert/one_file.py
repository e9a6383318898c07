"""An adapter of an image or video model under the names that the model has in its one file."""

from dataclasses import replace

from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import Refused, listed
from adapterkit.formats.capabilities import kind_of
from adapterkit.formats.detect import Detection
from adapterkit.formats.files.containers import PlanReader
from adapterkit.formats.library import format_named
from adapterkit.formats.modules.names import fitting
from adapterkit.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.formats.one_file import OneFileModel
from adapterkit.formats.peft.layout import KEPT, write_layout
from adapterkit.formats.write import in_names_of
from adapterkit.plan import Plan
from adapterkit.planning.convert.lossy import lowered, without_zeros
from adapterkit.planning.convert.plan import plan_written
from adapterkit.planning.convert.source import read_contents
from adapterkit.verbs.convert import ConvertOptions

LAYOUT = "peft"


def plan_in_names_of(model: OneFileModel, source: Folder, detection: Detection) -> Plan:
    """The conversion of an adapter into PEFT's layout, its modules named as in the model's file:
    what the file fuses is one module. Those of parts that are not in the file keep the part's name
    in front. `Refused` with all that cannot be done."""
    form = format_named(LAYOUT)
    options = ConvertOptions(to=LAYOUT, architecture=model.architecture)
    contents = read_contents(source, detection, options, None, file=model)
    contents = in_file_names(contents, model)
    contents = lowered(without_zeros(contents, form), form, rank=None)
    return plan_written(source, contents, write_layout(contents, form, rebuilt=True), options)


def in_file_names(contents: Contents, model: OneFileModel) -> Contents:
    """The contents with the modules of the file instead of the model's; `Refused` for modules that
    it has no name for."""
    modules = _in_parts(contents, model)
    there = [m for m in modules if m.component in model.parts]
    named = in_names_of(
        there,
        model.names,
        model.architecture,
        model.namings,
        None,
        None,
        PlanReader(contents.folders),
    )
    own = [replace(module, name=key, component=LANGUAGE) for module, key in named]
    own += [
        replace(m, name=m.path, component=LANGUAGE)
        for m in modules
        if m.component not in model.parts
    ]
    config = contents.config
    if kind_of(contents) is not None:  # its patterns are of other names
        config = {key: value for key, value in config.items() if key in KEPT}
    return replace(contents, modules=tuple(own), config=config, architectures=())


def _in_parts(contents: Contents, model: OneFileModel) -> list[AdapterModule]:
    """The modules, of an adapter of one part that does not say which with that part."""
    bare = [m for m in contents.modules if m.component == LANGUAGE and m.name not in model.modules]
    if not bare:
        return list(contents.modules)
    names = [m.name for m in bare]
    parts = [
        part for part in model.parts if fitting([(part, n) for n in names], [model.architecture])
    ]
    if len(parts) != 1:
        several = f"modules of {' or '.join(parts)}" if parts else "modules of no part of the file"
        raise Refused(
            f"{several}: {listed(names)}",
            expected=f"modules of one of {', '.join(model.parts)} ({model.architecture})",
            where=contents.folders[0].label,
            hint="say which: adapterkit convert ADAPTER --to diffusers --prefix-only PART"
            if parts
            else "check that the adapter was trained on this base",
        )
    own = {id(m) for m in bare}
    return [replace(m, component=parts[0]) if id(m) in own else m for m in contents.modules]
