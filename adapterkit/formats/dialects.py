"""What a reader of PEFT's layout wants besides: experts one by one or stacked, names as the base's
file has them, one rank and scale; and what it does not read."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.formats.adapter import COPY, PARAMETER, VALUE
from adapterkit.formats.experts import Stack, split_experts, stack_experts
from adapterkit.formats.record import EXPERTS, FACTORS, Contents, Module
from adapterkit.formats.schema import Format
from adapterkit.formats.tensors import StoredReader
from adapterkit.formats.uniform import uniform
from adapterkit.formats.write import unsupported
from adapterkit.weights.names import Names

SINGLE = re.compile(r"\.experts\.\d+\.")  # in the name of a module of one expert
GIVE_BASE = "give --base, the model that the adapter is for"
MERGE = "merge it: adapterkit merge BASE ADAPTER --out DIR"


@dataclass(frozen=True)
class Model:
    """The base of an adapter: its file, the names of its parameters, its stacks of experts."""

    base: Checkpoint
    names: Names
    stacks: Mapping[str, Stack]


def arranged(
    contents: Contents, form: Format, model: Model | None, reader: StoredReader
) -> Contents:
    """The contents as the dialect has them; `Refused` with all that its readers do not take, and
    where it depends on a base that is not given."""
    words = form.adapter
    modules, notes = _without_copies(contents.modules, form)
    contents = replace(contents, modules=tuple(modules), notes=(*contents.notes, *notes))
    refuse_all([*_undecided(contents, model), *refusals(contents, form)])
    modules = _experts(modules, words.experts, model, reader, contents.folders[0].label)
    if words.names == "base":
        if model is None:
            notes = ["names of modules were not compared with a base: --base does so"]
        else:
            modules, notes = _stored_names(modules, model), []
        contents = replace(contents, notes=(*contents.notes, *notes))
    if form.scale.uniform:
        modules = uniform(modules)
    if model is not None:  # the order in which PEFT nests them
        order = {name: at for at, name in enumerate(model.stacks)}
        modules = sorted(modules, key=lambda m: order.get(m.name, -1) if m.kind == EXPERTS else -1)
    return replace(contents, modules=tuple(modules))


def _without_copies(modules: Sequence[Module], form: Format) -> tuple[list[Module], list[str]]:
    """Without the base's own weights that PEFT saves beside an embedding's factors, where the
    dialect has none."""
    copies = [m.path for m in modules if m.kind == COPY]
    if not copies or not form.kinds:
        return list(modules), []
    note = f"left out, as the base has them: the weights of {listed(copies)}"
    return [m for m in modules if m.kind != COPY], [note]


def _undecided(contents: Contents, model: Model | None) -> list[AdapterkitError]:
    """Refusals of factors of parameters of which the file leaves open which they are of, or which
    way round."""
    modules = list(dict.fromkeys(m.path for m in contents.modules if m.kind == PARAMETER))
    if not modules:
        return []
    return [
        Refused(
            f"which factors of {listed(modules)} are whose, and which way round",
            expected="stacks of experts that the file or the base tells apart (PEFT's keys name "
            "the nesting, not the parameters)",
            where=contents.folders[0].label,
            hint=GIVE_BASE if model is None else MERGE,
        )
    ]


def refusals(contents: Contents, form: Format) -> list[AdapterkitError]:
    """Refusals of settings, kinds and trained modules that the dialect's readers do not take."""
    where = contents.folders[0].label
    errors: list[AdapterkitError] = [
        Refused(
            f"{name} = {shown(json.dumps(contents.config[name]))}: {one.why}",
            expected=f"what {form.title} reads",
            where=where,
            hint=one.hint,
        )
        for name, one in form.adapter.refuse.items()
        if name in contents.config and one.value.search(json.dumps(contents.config[name]))
    ]
    if form.kinds:
        errors += unsupported(contents, form)
    saved = form.adapter.saved
    values = [
        m.path for m in contents.modules if m.kind == VALUE and m.name.split(".")[-1] not in saved
    ]
    if saved and values:
        errors.append(
            Refused(
                f"values trained in place of the base's, in {len(values)} modules: "
                f"{listed(values)}",
                expected=f"those of {' or '.join(saved)} alone, which {form.title} reads",
                where=where,
                hint=MERGE,
            )
        )
    return errors


def _experts(
    modules: Sequence[Module],
    layout: str,
    model: Model | None,
    reader: StoredReader,
    where: str,
) -> list[Module]:
    """Experts in the layout that the dialect has."""
    stacked = [m for m in modules if m.kind == EXPERTS]
    single = [m for m in modules if SINGLE.search(m.name)]
    foreign = {"stacks": single, "each": stacked, "base": stacked}[layout]
    if model is None:
        if foreign:
            raise Refused(
                f"{len(foreign)} modules of experts in another layout: "
                f"{listed([m.path for m in foreign])}",
                expected="the model, whose file tells which module of an expert is which part of a "
                "stack",
                where=where,
                hint=GIVE_BASE,
            )
        return list(modules)
    if not (stacked or single):
        return list(modules)
    whole = stack_experts(modules, model.stacks.values(), reader)
    if layout == "stacks":
        return whole
    return split_experts(
        whole, model.stacks, reader, all_of_them=layout == "each", complete=layout == "base"
    )


def _stored_names(modules: Sequence[Module], model: Model) -> list[Module]:
    """The modules under the names that the base's file has for them. `Refused` with all that have
    none there, or several."""
    errors: list[AdapterkitError] = []
    ends: dict[str, list[str]] = {}
    for key in model.base.tensors:
        module = key.rpartition(".")[0]
        ends.setdefault(module.rpartition(".")[2], []).append(module)
    result = []
    for module in modules:
        names = _names_in_file(module, model, ends)
        if len(names) == 1:
            result.append(replace(module, name=names[0]))
            continue
        errors.append(
            Refused(
                f"{shown(module.path)}: {listed(names) if names else 'no module of that name'}",
                expected="one module of the base",
                where=model.base.folder.label,
                hint="check --base: it is not the model that the adapter was trained on",
            )
        )
    refuse_all(errors)
    return result


def _names_in_file(module: Module, model: Model, ends: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules of the base's file that a module may be."""
    name = module.name
    if module.kind == EXPERTS:  # a parameter
        return [name] if name in model.stacks else []
    if module.kind != FACTORS or f"{name}.weight" in model.base.tensors:
        return [name]
    parameter = model.names.parameter(f"{name}.weight")
    if parameter is not None:
        if parameter.is_alias or not parameter.whole:
            return [name]  # a tied head, or part of a fused weight: both go by the model's names
        return [parameter.slots[0].key.removesuffix(".weight")]
    return _longest_end(name, list(dict.fromkeys(ends.get(name.rpartition(".")[2], []))))


def _longest_end(name: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that share the most last words with a name."""
    words = name.split(".")[::-1]

    def shared(candidate: str) -> int:
        pairs = zip(words, candidate.split(".")[::-1], strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(words))

    lengths = {candidate: shared(candidate) for candidate in candidates}
    most = max(lengths.values(), default=0)
    if any(word.isdecimal() for word in words[most:]):  # another layer
        return []
    return [candidate for candidate, length in lengths.items() if length == most]
