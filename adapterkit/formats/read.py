"""A file in a format of the TOML files, as neutral contents: every key has a role, or the file is
refused with the whole list."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Refused, listed, refuse_all, shown
from adapterkit.formats.capabilities import refused_by_name
from adapterkit.formats.containers import Container, PlanReader
from adapterkit.formats.fusing import Fusion, split
from adapterkit.formats.kinds import (
    LIMITED,
    axes_at_least,
    is_complete,
    rank_of,
    shape_problem,
    with_magnitudes,
)
from adapterkit.formats.library import architectures, formats
from adapterkit.formats.metadata import words_of
from adapterkit.formats.names import likely, names_of
from adapterkit.formats.numbered import unstacked
from adapterkit.formats.record import FACTORS, LANGUAGE, Contents, Module, StoredAlpha
from adapterkit.formats.rows import Heads
from adapterkit.formats.scales import ALPHA, Scales
from adapterkit.formats.schema import KINDS, MODEL, Format
from adapterkit.formats.steps import STEPS
from adapterkit.formats.tensors import Expression, Stored, from_spec
from adapterkit.formats.widths import SHAPE, check_shape

INTEGERS = ("I64", "I32")  # as diffusers writes alphas for kohya's names


@dataclass(frozen=True)
class Reading:
    """What a caller says of a source."""

    alpha: float | None = None  # of all modules, where the format leaves it to the reader
    architecture: str | None = None
    modules: Sequence[str] = ()  # of the base, by which underscored names are told
    heads: Heads | None = None  # of the base, or of the source's config


@dataclass(frozen=True)
class Raw:
    """The tensors of one module of a file, by role, before its name is understood."""

    prefix: str  # of its keys
    head: str  # the key without prefix and suffix
    kind: str
    roles: Mapping[str, TensorSpec]

    @property
    def key(self) -> str:
        return next(iter(self.roles.values())).key


def read(
    form: Format,
    folder: Folder,
    container: Container,
    config: Mapping,
    reading: Reading,
    number: int = 0,
) -> Contents:
    """The contents of a file. `Refused` with every key that has no role, every module that is not
    whole, and every name that is unknown or ambiguous."""
    errors: list[AdapterkitError] = []
    where = f"{folder.label}/{container.file}"
    reader = PlanReader((folder,) * (number + 1))
    candidates = _candidates(form, reading, container)
    refuse_all(refused_by_name(form, container.tensors, where))
    raws = _raws(form, container, candidates, errors, where)
    refuse_all(errors)
    chosen, (resolved, _, naming) = _resolve(form, raws, candidates, container, reading, where)
    reader.prefetch(raw.roles[ALPHA] for raw in raws if ALPHA in raw.roles)
    scales = Scales(form, container.metadata, config, reading.alpha, reader, where)
    modules: list[Module] = []
    for raw, component, names, fusion in resolved:
        module = _module(form, raw, component, scales, errors, where)
        if module is None:
            continue
        try:
            if fusion is None:
                modules.append(replace(module, name=names[0]))
            else:
                modules += split(module, names, fusion, reader)
        except AdapterkitError as error:
            errors.append(error)
    errors += _twice(modules, where)
    if reading.alpha is not None and scales.declares:
        errors.append(
            Refused(
                f"--alpha {reading.alpha:g}",
                expected="the alphas that the file says itself",
                where=where,
                hint="leave --alpha out",
            )
        )
    refuse_all(errors)
    return Contents(
        form.name,
        (folder,),
        tuple(modules),
        tuple(chosen),
        naming,
        container.metadata,
        dict(config),
        words_of(form.metadata.write, container.metadata),
        {(number, container.file): container.header_sha256},
    )


def _candidates(form: Format, reading: Reading, container: Container) -> list[str]:
    """The architectures that the names may be of."""
    known = [name for name in form.names.architectures if name in architectures()]
    key = form.names.architecture_key
    if key:
        if container.metadata.get(key) not in known:
            raise Refused(
                f"{key} {shown(repr(container.metadata.get(key)))}",
                expected=", ".join(known),
                where=container.file,
                hint="convert the adapter that it was made from",
            )
        return [container.metadata[key]]
    if reading.architecture is None:
        return known
    if reading.architecture not in architectures():
        raise Refused(
            f"architecture {shown(reading.architecture)}",
            expected=", ".join(architectures()),
            where="--architecture",
            hint="leave it out to have it found by the names",
        )
    return [reading.architecture]


def _raws(
    form: Format,
    container: Container,
    candidates: Sequence[str],
    errors: list[AdapterkitError],
    where: str,
) -> list[Raw]:
    """The tensors of the file by module and kind; keys without a role join the errors."""
    prefixes = _prefixes(form, candidates)
    heads: dict[tuple[str, str], dict[str, tuple[TensorSpec, dict[str, str]]]] = {}
    unknown, twice = [], []
    for key, spec in container.tensors.items():
        place = _place(form, _respelled(form, key), prefixes)
        if place is None:
            unknown.append(key)
            continue
        prefix, head, suffix, roles = place
        home = heads.setdefault((prefix, head), {})
        if suffix in home:
            twice.append(key)
        home[suffix] = (spec, roles)
    if unknown:
        errors.append(
            Refused(
                f"{len(unknown)} keys that are no part of {form.title}: {listed(sorted(unknown))}",
                expected="keys with a role, each of them",
                where=where,
                hint="adapterkit convert --list tells what each format holds",
            )
        )
    if twice:
        errors.append(
            Refused(
                f"{listed(twice)}, and other keys of the same role",
                expected="each once",
                where=where,
                hint="remove one of them",
            )
        )
    raws = []
    for (prefix, head), tensors in heads.items():
        raws += _kinds(prefix, head, tensors, errors, where)
    return raws


def _prefixes(form: Format, candidates: Sequence[str]) -> list[str]:
    """The prefixes of all keys, the longest first."""
    tables = [form.names.components, *(form.components(name) for name in candidates)]
    prefixes = {prefix for table in tables for own in table.values() for prefix in own}
    return sorted(prefixes or {""}, key=lambda prefix: (-len(prefix), prefix))


def _component(form: Format, architecture: str | None, prefix: str) -> str | None:
    """The component whose keys have this prefix; None where there is none."""
    components = form.components(architecture) or {LANGUAGE: ("",)}
    return next((name for name, own in components.items() if prefix in own), None)


@lru_cache(maxsize=64)
def _suffixes(form_name: str) -> list[tuple[re.Pattern[str], dict[str, str]]]:
    """(pattern of a key, kind -> role), the longest suffix first."""
    suffixes: dict[str, dict[str, str]] = {}
    for kind, roles in formats()[form_name].kinds.items():
        for role, texts in roles.items():
            for text in texts:
                suffixes.setdefault(text, {})[kind] = role
    ordered = sorted(suffixes.items(), key=lambda item: (-len(item[0]), item[0]))
    return [(_pattern(text), roles) for text, roles in ordered]


def _pattern(suffix: str) -> re.Pattern[str]:
    """The keys that end so; `{adapter}` may be an adapter's name."""
    end = re.escape(suffix).replace(r"\{adapter\}", r"(?:\.\w+)?")
    return re.compile(f"(.*?){end}")


def _respelled(form: Format, key: str) -> str:
    """The key in the format's own spelling."""
    for pattern, replacement in form.names.renames.items():
        key = re.sub(pattern, replacement, key)
    return key


def _place(
    form: Format, key: str, prefixes: Sequence[str]
) -> tuple[str, str, str, dict[str, str]] | None:
    """Prefix, name, suffix and roles of a key; None where it has none."""
    for pattern, roles in _suffixes(form.name):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        for prefix in prefixes:
            if match[1].startswith(prefix) and len(match[1]) > len(prefix):
                name = match[1].removeprefix(prefix)
                return prefix, name, "/".join(sorted(set(roles.values()))), roles
    return None


def _kinds(
    prefix: str,
    head: str,
    tensors: Mapping[str, tuple[TensorSpec, dict[str, str]]],
    errors: list[AdapterkitError],
    where: str,
) -> list[Raw]:
    """The deltas of one module; a key that several kinds have goes to the one that others tell."""
    kinds = {kind for _, roles in tensors.values() for kind in roles}
    sets = {
        kind: {roles[kind]: spec for spec, roles in tensors.values() if kind in roles}
        for kind in KINDS
        if kind in kinds
    }
    complete = {kind: roles for kind, roles in sets.items() if is_complete(kind, roles)}
    used: set[str] = set()
    raws = []
    for kind, roles in complete.items():
        own = {role: spec for role, spec in roles.items() if spec.key not in used}
        if is_complete(kind, own):
            raws.append(Raw(prefix, head, kind, own))
            used |= {spec.key for spec in own.values()}
    missing = sorted(spec.key for spec, _ in tensors.values() if spec.key not in used)
    if missing:
        errors.append(
            Refused(
                f"{shown(head)} has {listed(missing)} alone",
                expected="all tensors of a module: both factors",
                where=where,
                hint="save the adapter again",
            )
        )
    for raw in raws:
        for role, spec in raw.roles.items():
            numbers = dtypes.FLOATS + INTEGERS if role in (ALPHA, SHAPE) else dtypes.FLOATS
            too_few = len(spec.shape) < axes_at_least(role)
            if spec.dtype not in numbers or 0 in spec.shape or too_few:
                errors.append(
                    Refused(
                        f"{shown(spec.key)} is {spec.dtype} {spec.shape}",
                        expected="F32, F16, BF16 or F64, with axes, and not empty",
                        where=where,
                        hint="save it as floats, gathered from all shards",
                    )
                )
    return raws


# (module of the file, component, modules of the model, how they share its rows)
Resolved = list[tuple[Raw, str, list[str], Fusion | None]]


class Attempt(NamedTuple):
    """The modules of a file by the names of one architecture."""

    resolved: Resolved
    unknown: Sequence[str] = ()  # keys that it does not have
    naming: str | None = None  # the column of its rules that they are in


def _resolve(
    form: Format,
    raws: Sequence[Raw],
    candidates: Sequence[str],
    container: Container,
    reading: Reading,
    where: str,
) -> tuple[list[str], Attempt]:
    """The architectures whose names these are, and each module's in the model."""
    if not candidates:
        return [], Attempt(_without_rules(form, raws, reading, where))
    attempts = {name: _attempt(form, name, raws, reading.heads) for name in candidates}
    fits = [name for name, attempt in attempts.items() if not attempt.unknown]
    is_plain = MODEL in form.names.naming
    if not fits and is_plain and (form.names.style == "dots" or reading.modules):
        return [], Attempt(_without_rules(form, raws, reading, where))
    if not fits:
        name, (_, unknown, _) = min(attempts.items(), key=lambda item: len(item[1].unknown))
        raise Refused(
            f"{len(unknown)} of {len(raws)} modules are not in {name}, whose names fit best: "
            f"{listed(unknown)}",
            expected=f"modules of {', '.join(candidates)}",
            where=where,
            hint="give --base, the model it was trained on, or --architecture",
        )
    inputs = {
        name: [
            (module, raw.roles["a"].shape[1])
            for raw, _, modules, _ in attempts[name].resolved
            for module in modules
            if raw.kind == FACTORS
        ]
        for name in fits
    }
    fits = likely(inputs, container.metadata)
    if reading.modules:
        known = set(reading.modules)
        counts = {n: _known(attempts[n].resolved, known) for n in fits}
        fits = [n for n in fits if counts[n] == max(counts.values())]
    results = [
        [(raw.key, component, names) for raw, component, names, _ in attempts[name].resolved]
        for name in fits
    ]
    if any(result != results[0] for result in results):
        raise Refused(
            f"names that {' and '.join(fits)} have, for other modules",
            expected="names of one architecture",
            where=where,
            hint="give --architecture",
        )
    return fits, attempts[fits[0]]


def _known(resolved: Resolved, modules: Collection[str]) -> int:
    """How many of the names are modules of the base."""
    return sum(name in modules for _, _, names, _ in resolved for name in names)


def _attempt(form: Format, name: str, raws: Sequence[Raw], heads: Heads | None) -> Attempt:
    """The modules by the names of one architecture in the naming that fits best."""
    ways = [_named(form, name, naming, raws, heads) for naming in form.namings(name)]
    return min(ways, key=lambda way: len(way.unknown))


def _named(
    form: Format, name: str, naming: str, raws: Sequence[Raw], heads: Heads | None
) -> Attempt:
    """The modules by an architecture's names in one naming."""
    style = form.names.style
    resolved: Resolved = []
    unknown: list[str] = []
    for raw in raws:
        component = _component(form, name, raw.prefix)
        names = None if component is None else names_of(name, component, naming, style)
        matches = [] if names is None else names.find(raw.head)
        if names is None or component is None or len(matches) != 1:
            unknown.append(raw.key)
            continue
        match = matches[0]
        if match.rule.embedding and raw.kind == FACTORS:
            raw = replace(raw, kind="embedding")
        fusion = None if naming == MODEL else Fusion(match.rule, naming, heads)
        place = names.stacked(match.rule)
        if place is None:
            resolved.append((raw, component, names.models(match), fusion))
            continue
        members = unstacked(raw.roles)
        if members is None:
            unknown.append(raw.key)
        for number, roles in enumerate(members or ()):
            own = replace(match, values=(*match.values, (place, str(number))))
            resolved.append((replace(raw, roles=roles), component, names.models(own), fusion))
    return Attempt(resolved, unknown, naming)


def _without_rules(form: Format, raws: Sequence[Raw], reading: Reading, where: str) -> Resolved:
    """Modules whose names are the model's, with dots or, by the base's modules, underscores."""
    resolved: Resolved = []
    errors: list[AdapterkitError] = []
    for raw in raws:
        component = _component(form, None, raw.prefix)
        try:
            resolved.append((raw, component or "", [_from_base(form, raw, reading, where)], None))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return resolved


def _from_base(form: Format, raw: Raw, reading: Reading, where: str) -> str:
    """The module of an underscored name among the base's; dotted names are the model's."""
    if form.names.style == "dots":
        return raw.head
    fits = [name for name in reading.modules if name.replace(".", "_") == raw.head]
    if len(fits) != 1:
        raise Refused(
            f"{shown(raw.head)}: {listed(fits) if fits else 'no module of that name'}",
            expected="one module of the base",
            where=where,
            hint="give --base, the model it was trained on",
        )
    return fits[0]


def _module(
    form: Format,
    raw: Raw,
    component: str,
    scales: Scales,
    errors: list[AdapterkitError],
    where: str,
) -> Module | None:
    """The module of a file, still under the file's name; None where something is wrong."""
    parts = {
        role: _neutral(form, raw.kind, role, from_spec(spec))
        for role, spec in raw.roles.items()
        if role != ALPHA
    }
    parts = with_magnitudes(parts, form.kinds[raw.kind])
    embedding = raw.kind == "embedding"
    kind = {"embedding": FACTORS, "norm": "full"}.get(raw.kind, raw.kind)
    expected = shape_problem(kind, parts)
    if expected:
        shapes = ", ".join(f"{role} {part.shape}" for role, part in sorted(parts.items()))
        errors.append(
            Refused(
                f"{shown(raw.head)}: {shapes}",
                expected=expected,
                where=where,
                hint="save the adapter again",
            )
        )
        return None
    rank = rank_of(kind, parts)
    stored = Stored(raw.roles[ALPHA]) if ALPHA in raw.roles else None
    try:
        check_shape(parts, scales.reader, where)
        if kind == LIMITED:
            alpha = 0.0 if stored is None else scales.number(stored)
        else:
            alpha = 1.0 if rank is None else scales.alpha(component, raw.head, rank, stored)
    except AdapterkitError as error:
        errors.append(error)
        return None
    held = None if stored is None else StoredAlpha(stored, alpha)
    return Module(component, raw.head, kind, parts, alpha, rank or 1, embedding, stored_alpha=held)


def _neutral(form: Format, kind: str, role: str, value: Expression) -> Expression:
    """A stored tensor as the neutral form has it."""
    for step in form.steps.get(f"{kind}.{role}", form.steps.get(role, ())):
        value = STEPS[step].read(value)
    return value


def _twice(modules: Sequence[Module], where: str) -> list[AdapterkitError]:
    """Modules of the model that two modules of the file stand for."""
    seen: set[tuple[str, str, str]] = set()
    errors: list[AdapterkitError] = []
    for module in modules:
        key = (module.component, module.name, module.kind)
        if key in seen:
            errors.append(
                Refused(
                    f"{shown(module.path)} twice, under two names",
                    expected="each module once",
                    where=where,
                    hint="remove one of them",
                )
            )
        seen.add(key)
    return errors
