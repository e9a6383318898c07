"""Dialects of PEFT's layout, for readers such as servers: experts one by one or stacked, the names
in the base's file, one rank and scale; and refusals of settings that they do not read."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from adapterkit.adapters.formats.base_model import NamedBase, model_heads
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.experts import split_experts, stack_experts
from adapterkit.adapters.formats.modules.kinds import (
    COPY,
    EXPERTS,
    FACTORS,
    PARAMETER,
    PLAIN,
    TOKENS,
    VALUE,
)
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents, Modules
from adapterkit.adapters.formats.modules.tensors import Expression, gathered, zeros
from adapterkit.adapters.formats.modules.uniform_rank import uniform
from adapterkit.adapters.formats.schema import AdapterSchema, Format
from adapterkit.adapters.formats.write import unsupported
from adapterkit.core.commands import MERGE
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.weights.reader import TensorReader

SINGLE = re.compile(r"\.experts\.\d+\.")  # in the name of a module of one expert
DENOISERS = ("transformer", "unet")  # their experts are separate modules
GIVE_BASE = "give --base, the model that the adapter is for"


def arranged(
    contents: Contents, format: Format, model: NamedBase | None, reader: TensorReader
) -> Contents:
    """The contents in the dialect; `Refused` with everything that its readers do not accept, and if
    it depends on a base that is not given."""
    words = format.adapter
    modules, notes = without_copies(contents.modules, format)
    contents = replace(contents, modules=tuple(modules), notes=(*contents.notes, *notes))
    _refusals(contents, format, model).raise_all()
    if model is not None:
        modules = renamed(modules, model, in_file=False)
    modules, notes = _experts(contents, modules, format, model, reader)
    contents = replace(contents, notes=(*contents.notes, *notes))
    where = contents.folders[0].label
    added = _zeros_for_missing(modules, words, model, where)
    if words.names == "base" and model is not None:
        modules = _named_as_in_file(modules, added, model)
    elif words.names == "base":
        modules = [replace(m, name=words.renames.get(m.name, m.name)) for m in modules]
        note = "module names were not checked: give --base to compare them with the model"
        contents = replace(contents, notes=(*contents.notes, note))
    else:
        modules += added
    modules = _split_rows(modules, words, model, where)
    if format.scale.uniform:
        before, modules = modules, uniform(modules)
        contents = replace(contents, notes=(*contents.notes, *_uniform_notes(before, modules)))
    # the order in which PEFT nests them
    if model is not None and any(module.kind == EXPERTS for module in modules):
        order = {name: at for at, name in enumerate(model.stacks)}
        modules = sorted(modules, key=lambda m: order.get(m.name, -1) if m.kind == EXPERTS else -1)
    return replace(contents, modules=tuple(modules))


def _uniform_notes(before: Modules, after: Modules) -> list[str]:
    """Notes on how many modules were padded, and into how many b's a scale was folded."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if b.kind in PLAIN]
    padded = sum(a.rank != b.rank for a, b in pairs)
    folded = sum(not math.isclose(a.scale, b.scale, rel_tol=1e-12) for a, b in pairs)
    notes = []
    if padded:
        notes.append(f"one rank, {pairs[0][1].rank}: {padded} modules are padded with zeros")
    if folded:
        notes.append(f"one scale, {pairs[0][1].scale:g}: that of {folded} modules is folded into b")
    return notes


def without_copies(modules: Modules, format: Format) -> tuple[list[AdapterModule], list[str]]:
    """The modules without the base's own weights, which PEFT saves next to an embedding's factors,
    if the dialect does not store them."""
    copies = [m.path for m in modules if m.kind == COPY]
    if not copies or not format.kinds:
        return list(modules), []
    note = f"left out, because the base has them: the weights of {listed(copies)}"
    return [m for m in modules if m.kind != COPY], [note]


def _refusals(contents: Contents, format: Format, model: NamedBase | None) -> Problems:
    """Refuse settings, kinds and trained modules that the dialect's readers do not accept, and
    factors whose parameters or orientation the file leaves open."""
    errors = Problems(where=contents.folders[0].label, code="AK503")
    undecided = list(dict.fromkeys(m.path for m in contents.modules if m.kind == PARAMETER))
    if undecided and contents.format != format.name:
        errors.add(
            f"the file leaves open which parameters the factors of {listed(undecided)} belong to, "
            "or their orientation",
            "stacks of experts that the file or the base identifies (PEFT's keys name the "
            "nesting, not the parameters)",
            GIVE_BASE if model is None else MERGE,
            code="AK402",
        )
    for name, one in format.adapter.refuse.items():
        value = json.dumps(contents.config.get(name))
        if name in contents.config and one.value.search(value):
            expected = f"settings that {format.title} reads"
            errors.add(f"{name} = {shown(value)}: {one.why}", expected, one.hint)
    if not format.kinds:
        return errors
    saved = format.adapter.saved
    values = [
        m.path
        for m in contents.modules
        if m.kind == TOKENS or (m.kind == VALUE and m.name.rpartition(".")[2] not in saved)
    ]
    if values:
        errors.add(
            f"{len(values)} modules are fully trained: {listed(values)}",
            f"low-rank factors{''.join(f', {name}' for name in saved)}: {format.title} "
            "reads no others",
            MERGE,
        )
    others = (VALUE, TOKENS, PARAMETER, EXPERTS)  # experts: once they are in the dialect's layout
    own = tuple(m for m in contents.modules if m.kind not in others)
    errors += unsupported(replace(contents, modules=own), format, MERGE)
    return errors


def _experts(
    contents: Contents,
    modules: Modules,  # of the contents
    format: Format,
    model: NamedBase | None,
    reader: TensorReader,
) -> tuple[list[AdapterModule], Sequence[str]]:
    """Experts in the dialect's layout, and notes on it."""
    layout, has_axis = format.adapter.experts, format.adapter.stacks == "axis"
    stacked = [m for m in modules if m.kind == EXPERTS]
    single = [m for m in modules if SINGLE.search(m.name) and m.component not in DENOISERS]
    foreign = {"stacks": single, "each": stacked, "base": stacked}[layout]
    if has_axis:
        foreign = []
    if model is None:
        if foreign:
            raise Refused(
                f"{len(foreign)} modules of experts are in another layout: "
                f"{listed([m.path for m in foreign])}",
                expected="the model, because its file maps modules of experts to rows of stacks",
                where=contents.folders[0].label,
                hint=GIVE_BASE,
                code="AK402",
            )
        whole = list(modules)
    elif not (stacked or single):
        return list(modules), ()
    else:
        whole = stack_experts(modules, model.stacks.values(), reader)
    notes: Sequence[str] = ()
    if has_axis and (stacked or single):
        from adapterkit.adapters.formats.peft.axis_stacks import with_shared

        whole, notes = with_shared(whole, reader)
    is_kept = bool(notes) or (has_axis and formats()[contents.format].adapter.stacks == "axis")
    if model is None or layout == "stacks" or is_kept:
        return whole, notes
    is_all, is_complete = layout == "each" and not has_axis, layout == "base"
    own = split_experts(whole, model.stacks, reader, all_of_them=is_all, complete=is_complete)
    return own, notes


def _named_as_in_file(modules: Modules, added: Modules, model: NamedBase) -> list[AdapterModule]:
    """The modules under the names in the base's file. Added ones may not be in it: they stay next
    to the modules that they were added to."""
    own = renamed(modules, model, in_file=True)
    homes = {
        before.name.rpartition(".")[0]: after.name.rpartition(".")[0]
        for before, after in zip(modules, own, strict=True)
    }
    for module in added:
        home, _, leaf = module.name.rpartition(".")
        own.append(replace(module, name=f"{homes[home]}.{leaf}"))
    return own


def _split_rows(
    modules: Modules, words: AdapterSchema, model: NamedBase | None, where: str
) -> list[AdapterModule]:
    """Joined projections of linear attention as one module each, with the same a. `Refused` without
    a base that has the numbers of heads."""
    result = []
    for module in modules:
        home, _, leaf = module.name.rpartition(".")
        own = words.split.get(leaf) if module.kind == FACTORS else None
        if own is None:
            result.append(module)
            continue
        heads = None if model is None else model_heads(model.checkpoint.config)
        if heads is None or heads.linear is None:
            raise Refused(
                f"{shown(module.path)} is split, and its heads are unknown",
                expected="the model, whose config has them",
                where=where,
                hint=GIVE_BASE,
                code="AK402",
            )
        key, b = heads.linear.key * heads.linear.size, module.parts["b"]
        sets = (range(key), range(key, 2 * key), range(2 * key, module.out))
        result += [
            replace(module, name=f"{home}.{name}", parts={**module.parts, "b": gathered(b, rows)})
            for name, rows in zip(own, sets, strict=True)
        ]
    return result


def _shape_of(name: str, first: str, words: AdapterSchema, model: NamedBase) -> tuple[int, ...]:
    """The shape of a weight, or the one that a server gives it if the model's code lacks it: that
    of a layer whose `first` module has the same shape; empty if there is none."""

    def shape(module: str) -> tuple[int, ...]:
        parameter = model.names.parameter(f"{module}.weight")
        return () if parameter is None else parameter.shape

    home, _, leaf = name.rpartition(".")
    if shape(name) or leaf not in words.alike:
        return shape(name)
    own, end = shape(f"{home}.{first}"), f".{leaf}.weight"
    others = [one.removesuffix(end) for one in model.names.all() if one.endswith(end)]
    found = (shape(f"{x}.{leaf}") for x in others if shape(f"{x}.{first}") == own)
    like = words.alike[leaf]
    return next(found, ()) or (_shape_of(f"{home}.{like}", first, words, model) if like else ())


def _zeros_for_missing(
    modules: Modules, words: AdapterSchema, model: NamedBase | None, where: str
) -> list[AdapterModule]:
    """Zeros for modules that readers need together with others, for example k and v with q.
    `Refused` with all missing ones whose shapes no base gives."""
    known = {m.name: m for m in modules if m.kind == FACTORS}
    added: list[AdapterModule] = []
    lacking: list[str] = []
    for module in known.values():
        home, _, leaf = module.name.rpartition(".")
        group = next((group for group in words.together if leaf in group), ())
        present = [name for name in group if f"{home}.{name}" in known]
        if not present or present[0] != leaf:
            continue  # once for each group
        for name in (f"{home}.{other}" for other in group if other not in present):
            if model is None:
                lacking.append(name)
            elif shape := _shape_of(name, leaf, words, model):  # else the model has no such one
                out, width = shape
                dtype = module.parts["a"].dtype
                parts: dict[str, Expression] = {
                    "a": zeros((module.rank, width), dtype),
                    "b": zeros((out, module.rank), dtype),
                }
                added.append(replace(module, name=name, parts=parts, stored_alpha=None))
    if lacking:
        raise Refused(
            f"{len(lacking)} modules are missing next to others: {listed(lacking)}",
            expected="these too, with zeros if necessary, because the server reads them together",
            where=where,
            hint=GIVE_BASE,
            code="AK503",
        )
    return added


def renamed(modules: Modules, model: NamedBase, *, in_file: bool) -> list[AdapterModule]:
    """The modules under the names in the base's file, or in the loaded model. `Refused` with every
    one that has no name in the file, or several possible ones."""
    names = model.checkpoint.tensors if in_file else model.names.all()
    errors = Problems(where=model.checkpoint.folder.label, code="AK401")
    result = []
    taken: dict[tuple[str, str, int], str] = {}  # -> the module's name in the adapter
    # single experts are modules of the file alone
    sources = (names,) if in_file else (names, model.checkpoint.tensors)
    tables = [defaultdict(list) for _ in sources]  # modules by the last words of their names
    for table, source in zip(tables, sources, strict=True):
        for name in dict.fromkeys(name.rpartition(".")[0] for name in source):
            table[name.rpartition(".")[2]].append(name)
    for module in modules:
        own = _names_of(module, model, names, in_file)
        for table in tables:
            last = module.name.rpartition(".")[2]
            own = own or _longest_end(module.name, table[last])
        if not own and not in_file:  # a layer without a weight of its own
            own = [module.name]
        key = (own[0] if own else "", module.kind, module.depth)
        if len(own) == 1 and taken.setdefault(key, module.name) == module.name:
            result.append(replace(module, name=own[0]))
            continue
        problem = listed(own) if own else "no module of that name"
        if len(own) == 1:
            problem += ", and another module of the adapter is it too"
        errors.add(
            f"{shown(module.path)}: {problem}",
            "one module of the base",
            "check --base: it is not the model that the adapter was trained on",
        )
    errors.raise_all()
    return result


def _names_of(
    module: AdapterModule, model: NamedBase, names: Collection[str], in_file: bool
) -> list[str]:
    """The base's modules that this one can be, by its own name or by an earlier one."""
    name = module.name
    if module.kind == EXPERTS:  # a parameter
        return [name] if name in model.stacks else []
    if module.kind != FACTORS or f"{name}.weight" in names:
        return [name]
    if not in_file and f"{name}.weight" in model.by_key:
        return [model.by_key[f"{name}.weight"].removesuffix(".weight")]
    parameter = model.names.parameter(f"{name}.weight")
    if parameter is None:
        return []
    if not in_file:
        return [parameter.name.removesuffix(".weight")]
    if parameter.is_alias or not parameter.is_full_tensor:
        return [name]  # a tied head, or part of a fused weight: both go by the model's names
    return [parameter.slots[0].key.removesuffix(".weight")]


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
