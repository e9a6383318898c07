"""Read a file in a format of the TOML files as neutral contents; if a key has no role, the file is
refused with the whole list."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from adapterkit.adapters.formats.base_model import BaseFacts
from adapterkit.adapters.formats.capabilities import refused_by_name
from adapterkit.adapters.formats.detect import Container
from adapterkit.adapters.formats.files.keys import Raw, raws_of
from adapterkit.adapters.formats.files.templates import words_of
from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.adapters.formats.library import architectures
from adapterkit.adapters.formats.modules.experts import unstacked
from adapterkit.adapters.formats.modules.fusing import Fusion, deciding_rows, split
from adapterkit.adapters.formats.modules.kinds import (
    ALPHA,
    CORES,
    EXPERTS,
    FACTORS,
    LIMITED,
    SHAPE,
    SIZED,
)
from adapterkit.adapters.formats.modules.merged_linear import (
    check_whole,
    groups_in,
    trained,
    ungrouped,
)
from adapterkit.adapters.formats.modules.names import (
    ComponentNames,
    Match,
    Size,
    in_style,
    likely,
    names_of,
    of_type,
)
from adapterkit.adapters.formats.modules.parts import (
    matrix_shape,
    misfits,
    rank_of,
    with_magnitudes,
)
from adapterkit.adapters.formats.modules.record import (
    BASE,
    LANGUAGE,
    AdapterModule,
    Contents,
    StoredAlpha,
)
from adapterkit.adapters.formats.modules.tensors import GROUPED, STEPS, from_spec
from adapterkit.adapters.formats.modules.tied import with_heads
from adapterkit.adapters.formats.modules.wide_inputs import check_shape
from adapterkit.adapters.formats.peft.eight_bits import notes_on
from adapterkit.adapters.formats.scales import Scales
from adapterkit.adapters.formats.schema import MODEL, Format
from adapterkit.core.adapter.adapter_config import HUB_ID
from adapterkit.core.checkpoint.folder import Folder, place_of
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.weights.plan_reader import PlanReader

WHICH = "give --base, the model it was trained on, or --architecture"


@dataclass(frozen=True)
class Reading:
    """Options for reading a source."""

    alpha: float | None = None  # of all modules, if the format does not store it
    architecture: str | None = None
    modules: Sequence[str] = ()  # of the base, to resolve underscored names
    # without one, from the source's config
    base: BaseFacts = field(default_factory=BaseFacts)
    component: str | None = None  # the only one to read, if the names have it
    file: SingleFileModel | None = None  # modules that are named as in it keep these names


@dataclass(frozen=True)
class NamedModule:
    """A module of the file, and the modules of the model behind its name."""

    raw: Raw
    component: str
    names: list[str]
    fusion: Fusion | None = None  # how they share its rows
    key: str = ""  # its name in the base's single file, if it has one


@dataclass(frozen=True)
class Attempt:
    """The modules of a file, named by one architecture."""

    resolved: list[NamedModule]
    unknown: Sequence[str] = ()  # keys that it does not have
    # architecture -> component -> the column of the rules that its names are in
    namings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read(
    format: Format, folder: Folder, container: Container, config: Mapping, reading: Reading
) -> Contents:
    """The contents of a file. `Refused` with every key without a role, every incomplete module, and
    every unknown or ambiguous name."""
    errors = Problems(where=place_of(folder, container.file), code="AK102")
    where = errors.where
    reader = PlanReader((folder,))
    names = _Names(format, container, reading, where)
    candidates = names.candidates()
    Problems(refused_by_name(format, container.tensors, where)).raise_all()
    raws = raws_of(format, container, candidates, errors)
    errors.raise_all()
    chosen, attempt = names.resolve(raws, candidates)
    resolved = [one for one in attempt.resolved if one.component == reading.component]
    resolved = resolved or attempt.resolved
    numbers = (one.raw.roles.get(role) for one in resolved for role in (ALPHA, SHAPE))
    reader.prefetch(spec for spec in numbers if spec is not None)
    scales = Scales(format, container.metadata, config, reading.alpha, reader, where)
    found: list[tuple[AdapterModule, NamedModule]] = []
    for one in resolved:
        with errors.collected():
            found.append(_module(format, one, scales, where))
    reader.prefetch(
        spec
        for module, one in found
        if one.fusion and not one.key
        for spec in deciding_rows(module, one.fusion)
    )
    modules: list[AdapterModule] = []
    for module, one in found:
        with errors.collected():
            if one.key:
                modules.append(replace(module, name=one.key, component=LANGUAGE))
            elif one.fusion is None:
                modules.append(replace(module, name=one.names[0]))
            else:
                modules += split(module, one.names, one.fusion, reader)
    _check_once(modules, errors)
    if reading.alpha is not None and scales.declares:
        errors.add(
            f"--alpha {reading.alpha:g} does not apply: the file has its alphas",
            "a file without alphas",
            "remove --alpha",
        )
    errors.raise_all()
    notes: list[str] = []
    if format.ties:
        modules, notes = with_heads(modules, format, reading.base.tied)
    base = scales.settings.get("base")
    return Contents(
        format.name,
        (folder,),
        tuple(modules),
        tuple(chosen),
        attempt.namings,
        container.metadata,
        # a path on some machine is none
        {BASE: base} if base is not None and HUB_ID.fullmatch(base) else {},
        words_of(format.metadata.write, container.metadata),
        {(0, container.file): container.header_sha256},
        [*names.unchecked(attempt.resolved), *notes, *scales.notes, *notes_on(container.tensors)],
    )


@dataclass(frozen=True)
class _Names:
    """Maps the names in a file to modules of the model."""

    format: Format
    container: Container
    reading: Reading
    where: str

    def candidates(self) -> list[str]:
        """The architectures that the names may belong to."""
        known = list(self.format.names.architectures)
        key, asked = self.format.names.architecture_key, self.reading.architecture
        if key:
            name = self.container.metadata.get(key)
            if name not in known:
                raise Refused(
                    f"the metadata have {key} {shown(repr(name))}",
                    expected=", ".join(known),
                    where=self.container.file,
                    hint="convert the adapter that it was made from",
                    code="AK103",
                )
            return [name]
        if asked is None:
            return self._of_type(known, self.reading.base.model_type)
        if asked not in architectures():
            raise Refused(
                f"there is no architecture {shown(asked)}",
                expected=", ".join(architectures()),
                where="--architecture",
                hint="remove --architecture to detect it by the names",
                code="AK103",
            )
        return [asked]

    def _of_type(self, known: list[str], model_type: str) -> list[str]:
        """The architectures that a model of this type may have. `Refused` if each of them lists its
        types, and none lists this one."""
        models = {name: architectures()[name].detect.models for name in known}
        fits = of_type(known, model_type)
        if fits or not model_type or not known or not all(models.values()):
            return fits or known
        raise Refused(
            f"this is an adapter for a model of type {shown(model_type)}",
            expected=", ".join(sorted({one for own in models.values() for one in own})),
            where="config.json",
            hint=f"other models' names in {self.format.title} are not known",
            code="AK502",
        )

    def resolve(self, raws: Sequence[Raw], candidates: Sequence[str]) -> tuple[list[str], Attempt]:
        """The architectures with these names, and each module's name in the model."""
        format, modules = self.format, self.reading.modules
        if not candidates:
            return [], self._without_rules(raws)
        if format.names.unlisted:
            naming = format.namings(None)[0]
            attempts = [self._named(name, naming, raws) for name in candidates]
            attempt = max(attempts, key=lambda own: sum(bool(one.fusion) for one in own.resolved))
            self._check_stacks(attempt)
            return [], attempt
        attempts = {name: self._attempt(name, raws) for name in candidates}
        fits = [name for name, attempt in attempts.items() if not attempt.unknown]
        closest = min(attempts, key=lambda name: len(attempts[name].unknown))
        if not fits and modules:
            attempts[closest] = self._by_base(closest, attempts[closest], raws)
            fits = [closest] if not attempts[closest].unknown else []
        if not fits and MODEL in format.names.naming and (format.names.style == "dots" or modules):
            return [], self._without_rules(raws)
        if not fits:
            unknown = attempts[closest].unknown
            raise Refused(
                f"{len(unknown)} of {len(raws)} modules are not in {closest}, whose names fit "
                f"best: {listed(unknown)}",
                expected=f"modules of {', '.join(candidates)}",
                where=self.where,
                hint=WHICH if self.reading.file is None else CHECK_BASE,
                code="AK502",
            )
        sizes = {name: list(_sizes(attempts[name].resolved)) for name in fits}
        fits = likely(sizes, self.container.metadata)
        if modules:
            counts = {name: _known(attempts[name].resolved, {*modules}) for name in fits}
            fits = [name for name in fits if counts[name] == max(counts.values())]
        if self.reading.base.family in fits:
            fits = [self.reading.base.family]
        results = [_meaning(attempts[name].resolved) for name in fits]
        if any(result != results[0] for result in results):
            raise Refused(
                f"{' and '.join(fits)} both have these names, for other modules",
                expected="names of one architecture",
                where=self.where,
                hint=WHICH,
                code="AK502",
            )
        namings = {name: attempts[name].namings[name] for name in fits}
        return fits, replace(attempts[fits[0]], namings=namings)

    def _by_base(self, name: str, attempt: Attempt, raws: Sequence[Raw]) -> Attempt:
        """The attempt, with unlisted modules that the base has under the model's name: it may have
        more blocks than known models."""
        if MODEL not in self.format.namings(name) or not attempt.resolved:
            return attempt
        spelled: dict[str, list[str]] = {}
        for module in self.reading.modules:
            spelled.setdefault(in_style(module, self.format.names.style), []).append(module)
        left, resolved, unknown = {*attempt.unknown}, list(attempt.resolved), list[str]()
        for raw in (raw for raw in raws if raw.key in left):
            component, own = self._component(name, raw.prefix), spelled.get(raw.head, [])
            if component is None or len(own) != 1:
                unknown.append(raw.key)
            else:
                resolved.append(NamedModule(raw, component, own))
        return replace(attempt, resolved=resolved, unknown=unknown)

    def _component(self, architecture: str | None, prefix: str) -> str | None:
        """The component whose keys have this prefix, or None."""
        components = self.format.components(architecture) or {LANGUAGE: ("",)}
        return next((name for name, own in components.items() if prefix in own), None)

    def _attempt(self, name: str, raws: Sequence[Raw]) -> Attempt:
        """The modules named by one architecture, each component's in the naming that fits best."""
        parts: dict[str | None, list[Raw]] = {}
        for raw in raws:
            parts.setdefault(self._component(name, raw.prefix), []).append(raw)
        best = [
            min(
                (self._named(name, naming, part) for naming in self.format.namings(name)),
                key=lambda way: len(way.unknown),
            )
            for part in parts.values()
        ]
        return Attempt(
            [one for way in best for one in way.resolved],
            [key for way in best for key in way.unknown],
            {name: {c: naming for way in best for c, naming in way.namings[name].items()}},
        )

    def _named(self, name: str, naming: str, raws: Sequence[Raw]) -> Attempt:
        """The modules named by an architecture in one naming."""
        names, style = self.format.names, self.format.names.style
        resolved: list[NamedModule] = []
        unknown: list[str] = []
        spelled: dict[ComponentNames, dict[str, str]] = {}

        def in_base(own: ComponentNames | None, module: str) -> str:
            """The base's name of a module that rules spell differently."""
            if own is None or not own.renames:
                return module
            if own not in spelled:
                modules = self.reading.modules
                in_rules = {own.in_rules(one): one for one in modules}
                spelled[own] = in_rules | {one: one for one in modules}
            known = spelled[own]
            return known.get(module) or known.get(own.in_rules(module), module)

        for raw in raws:
            component = self._component(name, raw.prefix)
            own = None if component is None else names_of(name, component, naming, style)
            matches = [] if own is None else own.find(raw.head)
            if names.unlisted and not matches:
                head = in_base(own, raw.head)
                resolved.append(NamedModule(raw, component or LANGUAGE, [head]))
                continue
            if own is None or component is None or len(matches) != 1:
                unknown.append(raw.key)
                continue
            match = matches[0]
            if match.rule.embedding and raw.kind == FACTORS:
                raw = replace(raw, kind="embedding")
            fusion = None
            if naming != MODEL:
                fusion = Fusion(match.rule, naming, self.reading.base.heads)
            place = own.stacked(match.rule)
            if place is None:
                key = self._key(name, component, naming, match)
                models = [in_base(own, model) for model in own.models(match)]
                resolved.append(NamedModule(raw, component, models, fusion, key))
                continue
            members = unstacked(raw.roles)
            if members is None:
                unknown.append(raw.key)
            for number, roles in enumerate(members or ()):
                one = replace(match, values=(*match.values, (place, str(number))))
                member = replace(raw, roles=roles)
                models = [in_base(own, model) for model in own.models(one)]
                resolved.append(NamedModule(member, component, models, fusion))
        namings = {one.component: naming for one in resolved}
        return Attempt(resolved, unknown, {name: namings})

    def _key(self, architecture: str, component: str, naming: str, match: Match) -> str:
        """The key in the base's single file of a module with the same name there; "" for others."""
        file = self.reading.file
        part = file.parts.get(component) if file is not None else None
        if part is None or naming == MODEL or part.naming != naming:
            return ""
        return part.prefix + str(names_of(architecture, component, naming).text(match))

    def _check_stacks(self, attempt: Attempt) -> None:
        """Refuse unknown names in formats with the model's names: stacks of unequal heights."""
        if attempt.unknown:
            raise Refused(
                f"{len(attempt.unknown)} stacks have tensors of different heights: "
                f"{listed(attempt.unknown)}",
                expected="in each, a matrix for every expert, or one for all",
                where=self.where,
                hint="save the adapter again",
                code="AK302",
            )

    def _without_rules(self, raws: Sequence[Raw]) -> Attempt:
        """Modules with the model's own names, with dots or (given the base) underscores."""
        errors = Problems(
            where=self.where, hint="give --base, the model it was trained on", code="AK402"
        )
        style = self.format.names.style
        resolved: list[NamedModule] = []
        for raw in raws:
            names = [raw.head]
            if style != "dots":
                names = [name for name in self.reading.modules if in_style(name, style) == raw.head]
            if len(names) != 1:
                problem = listed(names) if names else "no module of that name"
                errors.add(f"{shown(raw.head)}: {problem}", "one module of the base")
            resolved.append(NamedModule(raw, self._component(None, raw.prefix) or "", names))
        errors.raise_all()
        return Attempt(resolved)

    def unchecked(self, resolved: Sequence[NamedModule]) -> list[str]:
        """Notes on checks that need a base, if there is none: convolutions flattened to linear
        factors, names of a model inside a larger one."""
        if self.reading.modules:
            return []
        is_grouped = self.format.steps.get(FACTORS) == (GROUPED,)
        bare = [one.raw.head for one in resolved if one.fusion is None and is_grouped]
        first = self.format.namings
        architectures = self.format.names.architectures
        spaces = {names_of(name, LANGUAGE, first(name)[0]).inside for name in architectures} - {""}
        inner = [one.raw.head for one in resolved if one.raw.head.startswith((*spaces,))]
        texts = {
            "taken for linear layers; give --base if they may be convolutions": bare,
            "modules inside a larger model; give --base for their names in it": inner,
        }
        return [f"{text}: {listed(heads)}" for text, heads in texts.items() if heads]


def _sizes(resolved: Sequence[NamedModule]) -> Iterator[Size]:
    """Rows and inputs of the model's modules, from the shapes of their factors."""
    for one in resolved:
        kind, roles = one.raw.kind, one.raw.roles
        if kind not in SIZED or set(roles) & {*CORES}:
            continue
        rows, inputs = matrix_shape(kind, {role: from_spec(spec) for role, spec in roles.items()})
        if kind == FACTORS:
            inputs = roles["a"].shape[1]
        own = one.fusion.rule.rows if one.fusion is not None else ()
        shares = [share if isinstance(share, int) else 1 for share in own or (1,) * len(one.names)]
        for module, share in zip(one.names, shares, strict=True):
            yield Size(module, Fraction(rows * share, sum(shares)), inputs)


def _known(resolved: Sequence[NamedModule], modules: Collection[str]) -> int:
    """The number of names that are modules of the base."""
    return sum(name in modules for one in resolved for name in one.names)


def _meaning(resolved: Sequence[NamedModule]) -> dict[tuple[str, ...], object]:
    """An architecture's reading of the keys: modules, and the order of their rows."""
    return {
        (one.raw.key, one.component, *one.names): one.fusion
        and one.fusion.rule.steps.get(one.fusion.naming)
        for one in resolved
    }


def _module(
    format: Format, one: NamedModule, scales: Scales, where: str
) -> tuple[AdapterModule, NamedModule]:
    """The module of a file, still under the file's name, and its modules of the model. `Refused` if
    shapes or the alpha are wrong."""
    raw, fusion = one.raw, one.fusion
    parts = {role: from_spec(spec) for role, spec in raw.roles.items() if role != ALPHA}
    for role in parts:
        for step in format.steps.get(f"{raw.kind}.{role}", format.steps.get(role, ())):
            parts[role] = STEPS[step].read(parts[role])
    parts = with_magnitudes(parts, format.kinds[raw.kind])
    kind = {"embedding": FACTORS, "norm": "full"}.get(raw.kind, raw.kind)
    if kind == EXPERTS and len(parts["a"].shape) == 2:  # one of a stack
        kind = FACTORS
    groups = 1
    if kind == FACTORS and format.steps.get(kind) == (GROUPED,):
        groups = groups_in(parts)
        if fusion is None:
            check_whole(groups, raw.head, where)
        elif fusion.rule.parts:
            fusion, names = trained(fusion, one.names, scales.settings, groups, where)
            one = replace(one, names=names, fusion=fusion)
        if groups > 1:
            own = (1,) * groups if fusion is None else fusion.shares(where)
            parts = dict(ungrouped(parts, own, where))
    Problems(misfits(shown(raw.head), kind, parts, where)).raise_all()
    rank, spec = rank_of(kind, parts), raw.roles.get(ALPHA)
    check_shape(parts, scales.reader, where)
    if kind == LIMITED:
        alpha = 0.0 if spec is None else scales.number(spec)
    elif rank is None:
        alpha = 1.0
    else:
        alpha = scales.alpha(one.component, raw.head, rank // groups, spec) * groups
    held = None if spec is None else StoredAlpha(from_spec(spec), alpha)
    embedding = raw.kind == "embedding"
    module = AdapterModule(
        one.component, raw.head, kind, parts, alpha, rank or 1, embedding, stored_alpha=held
    )
    return module, one


def _check_once(modules: Sequence[AdapterModule], errors: Problems) -> None:
    """Report modules of the model that two modules of the file stand for."""
    seen: set[tuple[str, str, str]] = set()
    for module in modules:
        key = (module.component, module.name, module.kind)
        if key in seen:
            problem = f"{shown(module.path)} exists twice, under two names"
            errors.add(problem, "each module once", "remove one of them", code="AK302")
        seen.add(key)
