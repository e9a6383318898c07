"""A file in a format of the TOML files, as neutral contents: every key has a role, or the file is
refused with the whole list."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from adapterkit.adapters.adapter_config import HUB_ID
from adapterkit.checkpoint.folder import Folder, place_of
from adapterkit.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.formats.capabilities import refused_by_name
from adapterkit.formats.files.containers import Container, PlanReader
from adapterkit.formats.files.keys import Raw, raws_of
from adapterkit.formats.files.templates import words_of
from adapterkit.formats.library import architectures
from adapterkit.formats.modules.experts import unstacked
from adapterkit.formats.modules.fusing import Fusion, split, telling_rows
from adapterkit.formats.modules.kinds import ALPHA, CORES, EXPERTS, FACTORS, LIMITED, SHAPE, SIZED
from adapterkit.formats.modules.merged_linear import (
    GROUPED,
    check_whole,
    groups_in,
    trained,
    ungrouped,
)
from adapterkit.formats.modules.names import Size, in_style, likely, names_of, of_type
from adapterkit.formats.modules.parts import matrix_shape, rank_of, shape_problem, with_magnitudes
from adapterkit.formats.modules.record import (
    LANGUAGE,
    AdapterModule,
    Contents,
    Modules,
    StoredAlpha,
)
from adapterkit.formats.modules.rows import Heads
from adapterkit.formats.modules.tensors import STEPS, Expression, from_spec, stored
from adapterkit.formats.modules.tied import with_heads
from adapterkit.formats.modules.wide_inputs import check_shape
from adapterkit.formats.scales import Scales
from adapterkit.formats.schema import MODEL, Format

BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Reading:
    """What a caller says of a source."""

    alpha: float | None = None  # of all modules, where the format leaves it to the reader
    architecture: str | None = None
    modules: Sequence[str] = ()  # of the base, by which underscored names are told
    heads: Heads | None = None  # of the base, or of the source's config
    model_type: str | None = None  # likewise
    tied: bool | None = None  # whether the base has one weight for embeddings and head
    component: str | None = None  # the only one whose values are read, where the names have it


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
    errors = Problems()
    where = place_of(folder, container.file)
    reader = PlanReader((folder,) * (number + 1))
    candidates = _candidates(form, reading, container)
    Problems(refused_by_name(form, container.tensors, where)).raise_all()
    raws = raws_of(form, container, candidates, errors, where)
    errors.raise_all()
    chosen, attempt = _resolve(form, raws, candidates, container, reading, where)
    resolved = [one for one in attempt.resolved if one[1] == reading.component] or attempt.resolved
    numbers, wanted = (ALPHA, SHAPE), [raw for raw, *_ in resolved]
    reader.prefetch(raw.roles[role] for raw in wanted for role in numbers if role in raw.roles)
    scales = Scales(form, container.metadata, config, reading.alpha, reader, where)
    found: list[tuple[AdapterModule, Fusion | None, list[str]]] = []
    for raw, component, names, fusion in resolved:
        with errors.collected():
            found.append(_module(form, raw, component, names, fusion, scales, where))
    reader.prefetch(
        spec for module, fusion, _ in found if fusion for spec in telling_rows(module, fusion)
    )
    modules: list[AdapterModule] = []
    for module, fusion, names in found:
        with errors.collected():
            if fusion is None:
                modules.append(replace(module, name=names[0]))
            else:
                modules += split(module, names, fusion, reader)
    errors += _twice(modules, where)
    if reading.alpha is not None and scales.declares:
        errors.add(
            f"--alpha {reading.alpha:g} does not apply: the file says its alphas itself",
            "a file without alphas",
            "remove --alpha",
            where=where,
        )
    errors.raise_all()
    modules, notes = with_heads(modules, form, reading.tied)
    return Contents(
        form.name,
        (folder,),
        tuple(modules),
        tuple(chosen),
        attempt.namings,
        container.metadata,
        _base(scales.settings),
        words_of(form.metadata.write, container.metadata),
        {(number, container.file): container.header_sha256},
        [*_unchecked(form, attempt.resolved, reading), *notes, *scales.notes],
    )


def _candidates(form: Format, reading: Reading, container: Container) -> list[str]:
    """The architectures that the names may be of."""
    known = list(form.names.architectures)
    key = form.names.architecture_key
    if key:
        if container.metadata.get(key) not in known:
            raise Refused(
                f"the metadata have {key} {shown(repr(container.metadata.get(key)))}",
                expected=", ".join(known),
                where=container.file,
                hint="convert the adapter that it was made from",
            )
        return [container.metadata[key]]
    if reading.architecture is None:
        return _of_type(known, reading.model_type, form.title)
    if reading.architecture not in architectures():
        raise Refused(
            f"there is no architecture {shown(reading.architecture)}",
            expected=", ".join(architectures()),
            where="--architecture",
            hint="remove --architecture to detect it by the names",
        )
    return [reading.architecture]


def _of_type(known: list[str], model_type: str | None, title: str) -> list[str]:
    """The architectures that a model of this type may have. `Refused` where each of them says
    whose they are, and none that it is this one's."""
    models = {name: architectures()[name].detect.models for name in known}
    fits = of_type(known, model_type)
    if model_type is None or not known or fits or not all(models.values()):
        return fits or known
    if not fits:
        raise Refused(
            f"this is an adapter for a model of type {shown(model_type)}",
            expected=", ".join(sorted({one for own in models.values() for one in own})),
            where="config.json",
            hint=f"other models' names in {title} are not known",
        )
    return fits


def _base(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The base that the settings name, as a PEFT config has it; a path on some machine is none."""
    base = settings.get("base")
    return {BASE: base} if base is not None and HUB_ID.fullmatch(base) else {}


def _component(form: Format, architecture: str | None, prefix: str) -> str | None:
    """The component whose keys have this prefix; None where there is none."""
    components = form.components(architecture) or {LANGUAGE: ("",)}
    return next((name for name, own in components.items() if prefix in own), None)


# (module of the file, component, modules of the model, how they share its rows)
Resolved = list[tuple[Raw, str, list[str], Fusion | None]]


@dataclass(frozen=True)
class Attempt:
    """The modules of a file by the names of one architecture."""

    resolved: Resolved
    unknown: Sequence[str] = ()  # keys that it does not have
    # architecture -> component -> the column of the rules that its names are in
    namings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def _unchecked(form: Format, resolved: Resolved, reading: Reading) -> list[str]:
    """The note on factors that only a base can tell from a convolution's, and there is none."""
    is_grouped = form.steps.get(FACTORS) == (GROUPED,)
    bare = [raw.head for raw, _, _, fusion in resolved if fusion is None and is_grouped]
    if not bare or reading.modules:
        return []
    return [f"taken for linear layers, which --base would tell from convolutions: {listed(bare)}"]


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
    if form.names.unlisted:
        naming = form.namings(None)[0]
        attempts = [_named(form, name, naming, raws, reading.heads) for name in candidates]
        attempt = max(attempts, key=lambda one: sum(rule is not None for *_, rule in one.resolved))
        Problems(_unstackable(attempt, where)).raise_all()
        return [], attempt
    attempts = {name: _attempt(form, name, raws, reading.heads) for name in candidates}
    fits = [name for name, attempt in attempts.items() if not attempt.unknown]
    is_plain = MODEL in form.names.naming
    if not fits and is_plain and (form.names.style == "dots" or reading.modules):
        return [], Attempt(_without_rules(form, raws, reading, where))
    if not fits:
        name = min(attempts, key=lambda name: len(attempts[name].unknown))
        unknown = attempts[name].unknown
        raise Refused(
            f"{len(unknown)} of {len(raws)} modules are not in {name}, whose names fit best: "
            f"{listed(unknown)}",
            expected=f"modules of {', '.join(candidates)}",
            where=where,
            hint="give --base, the model it was trained on, or --architecture",
        )
    sizes = {name: list(_sizes(attempts[name].resolved)) for name in fits}
    fits = likely(sizes, container.metadata)
    if reading.modules:
        known = set(reading.modules)
        counts = {n: _known(attempts[n].resolved, known) for n in fits}
        fits = [n for n in fits if counts[n] == max(counts.values())]
    results = [
        {
            (raw.key, component, *names): fusion and fusion.rule.steps.get(fusion.naming)
            for raw, component, names, fusion in attempts[name].resolved
        }
        for name in fits
    ]
    if any(result != results[0] for result in results):
        raise Refused(
            f"{' and '.join(fits)} both have these names, for other modules",
            expected="names of one architecture",
            where=where,
            hint="give --base, the model it was trained on, or --architecture",
        )
    namings = {name: attempts[name].namings[name] for name in fits}
    return fits, replace(attempts[fits[0]], namings=namings)


def _sizes(resolved: Resolved) -> Iterator[Size]:
    """Rows and inputs of the model's modules, by the shapes of their factors."""
    for raw, _, modules, fusion in resolved:
        if raw.kind not in SIZED or set(raw.roles) & {*CORES}:
            continue
        rows, inputs = matrix_shape(raw.kind, {r: from_spec(spec) for r, spec in raw.roles.items()})
        if raw.kind == FACTORS:
            inputs = raw.roles["a"].shape[1]
        own = fusion.rule.rows if fusion is not None else ()
        shares = [share if isinstance(share, int) else 1 for share in own or (1,) * len(modules)]
        for module, share in zip(modules, shares, strict=True):
            yield Size(module, Fraction(rows * share, sum(shares)), inputs)


def _unstackable(attempt: Attempt, where: str) -> list[AdapterkitError]:
    """The refusal of what is unknown where names besides the rules' are the model's: stacks."""
    if not attempt.unknown:
        return []
    return [
        Refused(
            f"{len(attempt.unknown)} stacks have tensors of different heights: "
            f"{listed(attempt.unknown)}",
            expected="in each, a matrix for every expert, or one for all",
            where=where,
            hint="save the adapter again",
        )
    ]


def _known(resolved: Resolved, modules: Collection[str]) -> int:
    """How many of the names are modules of the base."""
    return sum(name in modules for _, _, names, _ in resolved for name in names)


def _attempt(form: Format, name: str, raws: Sequence[Raw], heads: Heads | None) -> Attempt:
    """The modules by the names of one architecture, each component's in the naming that fits
    best."""
    parts: dict[str | None, list[Raw]] = {}
    for raw in raws:
        parts.setdefault(_component(form, name, raw.prefix), []).append(raw)
    best = [
        min(
            (_named(form, name, naming, part, heads) for naming in form.namings(name)),
            key=lambda way: len(way.unknown),
        )
        for part in parts.values()
    ]
    return Attempt(
        [one for way in best for one in way.resolved],
        [key for way in best for key in way.unknown],
        {name: {c: naming for way in best for c, naming in way.namings[name].items()}},
    )


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
        if form.names.unlisted and not matches:
            resolved.append((raw, component or LANGUAGE, [raw.head], None))
            continue
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
    namings = {component: naming for _, component, _, _ in resolved}
    return Attempt(resolved, unknown, {name: namings})


def _without_rules(form: Format, raws: Sequence[Raw], reading: Reading, where: str) -> Resolved:
    """Modules whose names are the model's, with dots or, by the base's modules, underscores."""
    resolved: Resolved = []
    errors = Problems()
    for raw in raws:
        component = _component(form, None, raw.prefix)
        with errors.collected():
            resolved.append((raw, component or "", [_from_base(form, raw, reading, where)], None))
    errors.raise_all()
    return resolved


def _from_base(form: Format, raw: Raw, reading: Reading, where: str) -> str:
    """The module of an underscored name among the base's; dotted names are the model's."""
    if form.names.style == "dots":
        return raw.head
    fits = [name for name in reading.modules if in_style(name, form.names.style) == raw.head]
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
    names: list[str],
    fusion: Fusion | None,
    scales: Scales,
    where: str,
) -> tuple[AdapterModule, Fusion | None, list[str]]:
    """The module of a file, still under the file's name, and the modules of the model that it is.
    `Refused` where shapes or the alpha are not right."""
    parts = {
        role: _neutral(form, raw.kind, role, from_spec(spec))
        for role, spec in raw.roles.items()
        if role != ALPHA
    }
    parts = with_magnitudes(parts, form.kinds[raw.kind])
    embedding = raw.kind == "embedding"
    kind = {"embedding": FACTORS, "norm": "full"}.get(raw.kind, raw.kind)
    if kind == EXPERTS and len(parts["a"].shape) == 2:  # one of a stack
        kind = FACTORS
    groups = 1
    if kind == FACTORS and form.steps.get(kind) == (GROUPED,):
        groups = groups_in(parts)
        if fusion is None:
            check_whole(groups, raw.head, where)
        elif fusion.rule.parts:
            fusion, names = trained(fusion, names, scales.settings, groups, where)
        if groups > 1:
            own = (1,) * groups if fusion is None else fusion.shares(where)
            parts = dict(ungrouped(parts, own, where))
    expected = shape_problem(kind, parts)
    if expected:
        shapes = ", ".join(f"{role} {part.shape}" for role, part in sorted(parts.items()))
        raise Refused(
            f"{shown(raw.head)}: {shapes}",
            expected=expected,
            where=where,
            hint="save the adapter again",
        )
    rank = rank_of(kind, parts)
    spec = raw.roles.get(ALPHA)
    check_shape(parts, scales.reader, where)
    if kind == LIMITED:
        alpha = 0.0 if spec is None else scales.number(spec)
    elif rank is None:
        alpha = 1.0
    else:
        alpha = scales.alpha(component, raw.head, rank // groups, spec) * groups
    held = None if spec is None else StoredAlpha(stored(spec), alpha)
    module = AdapterModule(
        component, raw.head, kind, parts, alpha, rank or 1, embedding, stored_alpha=held
    )
    return module, fusion, names


def _neutral(form: Format, kind: str, role: str, value: Expression) -> Expression:
    """A stored tensor as the neutral form has it."""
    for step in form.steps.get(f"{kind}.{role}", form.steps.get(role, ())):
        value = STEPS[step].read(value)
    return value


def _twice(modules: Modules, where: str) -> list[AdapterkitError]:
    """Modules of the model that two modules of the file stand for."""
    seen: set[tuple[str, str, str]] = set()
    errors = Problems(where=where)
    for module in modules:
        key = (module.component, module.name, module.kind)
        if key in seen:
            errors.add(
                f"{shown(module.path)} is there twice, under two names",
                "each module once",
                "remove one of them",
            )
        seen.add(key)
    return errors
