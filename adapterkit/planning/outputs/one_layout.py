"""Adapters of several parts of a pipeline as one, whose modules have the part's name in front, and
what is made of them in the layout of the first one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.commands import ONE_PART
from adapterkit.engines.converted_folder import MadeAdapter
from adapterkit.errors import Problems, Refused, listed
from adapterkit.formats.detect import detect
from adapterkit.formats.library import format_named
from adapterkit.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.formats.peft.layout import read_layout
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import StrPath
from adapterkit.plan import Plan
from adapterkit.planning.convert.plan import plan_written, written_file
from adapterkit.planning.inputs.converted_adapter import (
    contents_of,
    in_adapter_layout,
    with_own_hints,
    with_part_names,
)
from adapterkit.planning.inputs.model_checkpoint import SAFETENSORS
from adapterkit.verbs.convert import COMPONENTS, ConvertOptions


@dataclass(frozen=True)
class Together:
    """Adapters in PEFT's layout for one job that makes one of them, and how that is written."""

    folders: list[Folder]
    first: Contents | None = None  # whose layout it has; None: PEFT's
    file: str | None = None  # the name of an output that is one file

    def written(self, plan: Plan) -> Plan:
        """The plan of the job, its output in the layout of the first adapter."""
        if self.first is None:
            return plan
        made, first = MadeAdapter(plan), self.first
        form, names = format_named(first.format), first.architectures
        options = ConvertOptions(to=form.name, architecture=names[0] if len(names) == 1 else None)
        read = read_layout(detect(made).form, made)
        # hashes in the metadata are of other tensors, and titles of one of several
        kept = first.metadata if len(self.folders) == 1 else {}
        contents = replace(
            read,
            modules=tuple(map(_in_part, read.modules)),
            facts=first.facts,
            metadata={key: value for key, value in kept.items() if "hash" not in key},
            refitted=True,
        )
        written = written_file(contents, form, options, None, None, True)
        convert = plan_written(made, contents, written, options, None, self.file)
        behind = lambda files: {(number + 1, name): one for (number, name), one in files.items()}
        return replace(
            convert,
            verb=plan.verb,
            options=plan.options,
            folders=(made, *plan.folders),
            headers=convert.headers | behind(plan.headers),
            identities=convert.identities | behind(plan.identities),
            decisions=plan.decisions | {"to": form.name},
            models=tuple(number + 1 for number in plan.models),
            is_file=self.file is not None,
        )


def together(sources: Sequence[Folder], out: StrPath) -> Together:
    """Adapters in any format for one job. Its output is a file in the layout of the first one where
    `out` is, and of adapters of several parts; else PEFT's. `Refused` beside these for adapters
    that do not say of which part they are, and for layouts that are not written so."""
    file = Path(out).name if str(out).endswith(SAFETENSORS) and not is_on_hub(out) else None
    every = [_contents(source) for source in sources]
    parts = {part for one in every if one is not None for part in one.components}
    if not sources or (file is None and len(parts) < 2):
        return Together([in_adapter_layout(source) for source in sources])
    errors = Problems()
    what, expected, hint = "PEFT's layout in one file", "a folder", "give --out without an ending"
    if len(parts) > 1:
        what = f"an adapter of one model beside those of {listed(sorted(parts - {LANGUAGE}))}"
        expected = "adapters whose keys say of which part they are"
        hint = ONE_PART
    named: list[tuple[Folder, Contents]] = []
    for source, contents in zip(sources, every, strict=True):
        if contents is None or (len(parts) > 1 and LANGUAGE in contents.components):
            errors.add(what, expected, hint, where=source.label)
        else:
            named.append((source, contents))
    errors.raise_all()
    first = named[0][1]
    form = format_named(first.format)
    if not form.writes or form.file.config or is_on_hub(out):
        raise Refused(
            f"{form.title} is not written" + " on the Hub" * is_on_hub(out),
            expected="a format of one file, written here",
            where=sources[0].label,
            hint="convert it first\n"
            "adapterkit convert ADAPTER --to diffusers --out converted.safetensors",
        )
    return Together([with_part_names(*one) for one in named], first, file)


def _contents(source: Folder) -> Contents | None:
    """What an adapter in another layout than PEFT's holds; None for that."""
    if {CONFIG, "config.json"} & {*source.files()}:
        return None
    return with_own_hints(lambda: contents_of(source))


def _in_part(module: AdapterModule) -> AdapterModule:
    """A module of the part whose name is in front of its own."""
    part, _, name = module.name.partition(".")
    return replace(module, component=part, name=name) if part in COMPONENTS else module
