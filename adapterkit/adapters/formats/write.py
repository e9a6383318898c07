"""Write neutral contents as the tensors, metadata and settings of a file in a format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from adapterkit.adapters.formats.base_model import BaseFacts, architecture_of, model_heads
from adapterkit.adapters.formats.capabilities import OTHER_FORMAT, hint_for, lacking, word_of
from adapterkit.adapters.formats.files.templates import filled, settings_of, words_for
from adapterkit.adapters.formats.library import architectures
from adapterkit.adapters.formats.modules.experts import stack
from adapterkit.adapters.formats.modules.fusing import Fusion, fuse, inputs_of, norm_problems
from adapterkit.adapters.formats.modules.kinds import ALPHA, MAGNITUDES, SIZED, VALUE
from adapterkit.adapters.formats.modules.names import (
    Size,
    has_modules,
    in_style,
    likely,
    names_of,
    of_type,
)
from adapterkit.adapters.formats.modules.parts import magnitude_in_file, matrix_shape
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents, Modules
from adapterkit.adapters.formats.modules.row_permutations import Heads
from adapterkit.adapters.formats.modules.tensors import COLUMN, STEPS, constant, reshaped
from adapterkit.adapters.formats.modules.tied import without_heads
from adapterkit.adapters.formats.modules.uniform_rank import uniform
from adapterkit.adapters.formats.modules.wide_inputs import with_widths
from adapterkit.adapters.formats.scales import has_alpha, place_scales
from adapterkit.adapters.formats.schema import MODEL, Format
from adapterkit.adapters.formats.task import ConvertedTensor
from adapterkit.core import dtypes
from adapterkit.core.commands import LIST_FORMATS, ONE_PART
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.records import Json, Settings
from adapterkit.core.weights.plan_reader import PlanReader

NUMBERS = ("{rank}", "{alpha}")  # templates of metadata


@dataclass(frozen=True)
class FormatFile:
    """A file in a format: its tensors, its metadata, and its settings in a config."""

    format: Format
    tensors: Sequence[ConvertedTensor]
    metadata: Settings
    modules: Modules  # as they are written: fused, scales folded
    architecture: str | None = None
    folded: Mapping[str, float] = field(default_factory=dict)  # module -> scale folded into b
    notes: Sequence[str] = ()
    settings: Settings | None = None


def write(
    contents: Contents,
    format: Format,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    base: BaseFacts | None = None,
) -> FormatFile:
    """The file of these contents. `Refused` with everything that the format cannot store."""
    if not format.writes:
        raise Refused(
            f"{format.title} is read only",
            expected="a format that is written",
            where="--to",
            hint=LIST_FORMATS,
            code="AK103",
        )
    Problems(unsupported(contents, format)).raise_all()
    if format.names.architecture_key and not architecture:
        same_format = contents.format == format.name
        architecture = (
            contents.architectures[0]
            if same_format
            else architecture_of(base, format.names.architectures, format.title)
        )
    name, modules, words = _placed(contents, format, architecture, base)
    _check_components(modules, format, name)
    reader, same_format = PlanReader(contents.folders), contents.format == format.name
    modules = with_widths(modules, format, [name] if name else contents.architectures)
    notes: list[str] = []
    if format.ties:
        modules, notes = without_heads(modules, format, base, reader)
    namings = _namings(contents, format, name, modules)
    heads = model_heads(contents.config) if base is None else base.heads
    fused = in_names_of(modules, format, name, namings, heads, base, reader)
    final = [module for module, _ in fused]
    if format.scale.uniform:
        final = uniform(final)
    final, folded, declared = place_scales(final, format, same_format=same_format)
    settings = settings_of(format, final, contents.config)
    tensors = [
        tensor
        for module, (_, key) in zip(final, fused, strict=True)
        for tensor in _tensors(module, key, format, dtype, same_format)
    ]
    words = {"architecture": name, **words}
    if format.scale.place == "shared":
        words, declared = words | declared, {}
    metadata = _metadata(contents, format, final, words) | declared
    if format.file.container == "safetensors":
        tensors.sort(key=lambda one: (dtypes.SERIAL.index(one.dtype), one.key))
    notes = [*notes, *([format.note] if format.note else [])]
    notes += _perhaps_absent(modules, format, namings) if base is None else []
    if declared:
        notes.append(
            f"the scales are in the metadata ({format.scale.key}): readers that ignore it apply "
            "scale 1"
        )
    return FormatFile(format, tensors, metadata, final, name, folded, notes, settings)


def _metadata(contents: Contents, format: Format, modules: Modules, words: Json) -> Json:
    """The metadata from the format's templates, with the source's that stay, in their order, within
    a format. `words`: more for the templates."""
    metadata: Json = {}
    if format.metadata.write:
        metadata = filled(format.metadata.write, words_for(contents.facts, modules) | words)
    if contents.format != format.name:
        return metadata
    metadata |= {
        key: value
        for key, value in contents.metadata.items()
        if any(pattern.search(key) for pattern in format.metadata.carry)
        and not (contents.refitted and format.metadata.write.get(key) in NUMBERS)
    }
    return {key: metadata[key] for key in [*contents.metadata, *metadata] if key in metadata}


def _perhaps_absent(modules: Modules, format: Format, namings: Mapping[str, str]) -> list[str]:
    """Notes on modules that some models lack in the format, if no base identifies the model."""
    notes = []
    for name in format.names.architectures:
        known, absent = architectures()[name], []
        if not known.detect.models:
            continue
        for module in modules:
            if module.component in known.components and module.component in namings:
                names = names_of(name, module.component, namings[module.component])
                named = names.named(module.name)
                absent += [module.path] if named is not None and not named[1] else []
        if absent:
            notes.append(
                f"{listed(absent)}: {format.title} has no such modules for "
                f"{', '.join(known.detect.models)}; give --base if the model is another"
            )
    return notes


def unsupported(
    contents: Contents, format: Format, otherwise: str = OTHER_FORMAT
) -> list[AdapterkitError]:
    """Refuse kinds and roles that the format has no keys for, and an invocation that it does not
    store; `otherwise`: the hint if no option helps."""
    errors = Problems(where=contents.folders[0].label if contents.folders else "", code="AK503")
    if contents.facts.get("invocation") and "{invocation}" not in format.metadata.write.values():
        errors.add(
            "this is an activated LoRA, which acts on the tokens after its invocation only",
            f"one that acts on all: {format.title} stores no invocation",
            OTHER_FORMAT,
        )
    absent: dict[str, list[AdapterModule]] = {}
    for module in contents.modules:
        kind = word_of(module, format)
        for what in lacking(module, format, contents):
            what = "fully trained values" if what == VALUE else what
            name = f"{what} of {kind}" if what in module.parts else what
            absent.setdefault(name, []).append(module)
    for what, modules in absent.items():
        errors.add(
            f"{format.title} cannot store {what}, in {len(modules)} modules: "
            f"{listed([m.path for m in modules])}",
            f"kinds that {format.title} stores: {', '.join(format.kinds)}",
            hint_for(modules, format, contents, otherwise),
        )
    return errors


def _placed(
    contents: Contents, format: Format, architecture: str | None, base: BaseFacts | None
) -> tuple[str | None, list[AdapterModule], dict[str, str]]:
    """The architecture whose names the file uses (None: the model's own names), the modules with
    their components, and the words of all possible architectures."""
    needed = bool(format.names.architectures)
    modules = list(contents.modules)
    bare = [m for m in modules if m.component == LANGUAGE]
    components = format.names.components
    if not needed and (not components or not bare or LANGUAGE in components):
        return None, modules, {}
    if format.names.unlisted:
        own = of_type(format.names.architectures, None if base is None else base.model_type)
        if base is None and architecture is None:
            _check_spelled(contents, format)
        return architecture or (*own, *format.names.architectures)[0], modules, {}
    if LANGUAGE in components and len(bare) == len(modules) and architecture is None:
        return None, modules, {}
    among = [architecture] if architecture else list(contents.architectures)
    if not among:
        among = list(format.names.architectures) if needed else list(architectures())
    if needed:
        among = [name for name in among if name in format.names.architectures]
    among = [name for name in among if name in architectures()]
    options = [(name, placed) for name in among for placed in _components(modules, name)]
    sizes = [
        Size(m.name, Fraction(matrix_shape(m.kind, m.parts)[0]), size)
        for m in modules
        if m.kind in SIZED and (size := inputs_of(m)) is not None
    ]
    fits = likely({name: sizes for name, _ in options}, contents.metadata)
    of_base = [] if base is None else [name for name in fits if name == base.family]
    fits = of_base or fits
    options = [option for option in options if option[0] in fits]
    keys = {
        tuple(_keys(format, name, _namings(contents, format, name, placed), placed))
        for name, placed in options
    }
    if not fits or (needed and len(bare) == len(modules) and architecture is None and not of_base):
        from adapterkit.adapters.formats.language import check_images

        check_images(contents, format, fits)
    if len(keys) != 1:
        raise Refused(
            f"modules of {', '.join(fits)}"
            if fits
            else f"these names match none of the models that {format.title} supports: "
            f"{listed([m.path for m in modules])}",
            expected="one of " + ", ".join(format.names.architectures or sorted(architectures())),
            where=contents.folders[0].label,
            hint="give --architecture" + (", or --component" if bare else "")
            if fits or bare
            else "choose another format, or give --architecture for a model of the list",
            code="AK502",
        )
    words = [architectures()[name].words.items() for name, _ in options]
    common = {key: text for key, text in words[0] if all((key, text) in own for own in words)}
    return (options[0][0] if needed else None), options[0][1], common


def _check_spelled(contents: Contents, format: Format) -> None:
    """`Refused` if the names in the format depend on the model."""
    names = [names_of(name, LANGUAGE, MODEL) for name in format.names.architectures]
    modules = contents.modules
    differing = [m.path for m in modules if any(n.in_rules(m.name) != m.name for n in names)]
    if differing:
        raise Refused(
            f"{len(differing)} modules inside a larger model: {listed(differing)}",
            expected=f"the model, on which their names in {format.title} depend",
            where=contents.folders[0].label,
            hint="give --base MODEL",
            code="AK503",
        )


def _components(modules: Modules, architecture: str) -> list[list[AdapterModule]]:
    """The modules with the components of an architecture: one way, or several, or none."""
    bare = [m for m in modules if m.component == LANGUAGE]
    others = [(m.component, m.name) for m in modules if m.component != LANGUAGE]
    if not has_modules(architecture, others):
        return []
    if not bare:
        return [list(modules)]
    ways = [
        component
        for component in architectures()[architecture].components
        if has_modules(architecture, [(component, m.name) for m in bare])
    ]
    return [
        [replace(m, component=way) if m.component == LANGUAGE else m for m in modules]
        for way in ways
    ]


def _namings(
    contents: Contents, format: Format, architecture: str | None, modules: Modules
) -> dict[str, str]:
    """The naming (column of the rules) to write for each component: the source's own within a
    format, else the first that has all names."""
    if architecture is None:
        return {}
    own = contents.namings.get(architecture, {}) if contents.format == format.name else {}
    columns = {}
    for component in {module.component for module in modules}:
        names = [module.name for module in modules if module.component == component]
        known = sorted(format.namings(architecture), key=lambda n: n != own.get(component))
        columns[component] = next(
            (
                naming
                for naming in known
                if all(map(names_of(architecture, component, naming).named, names))
            ),
            known[0],
        )
    return columns


def _keys(
    format: Format, architecture: str, namings: Mapping[str, str], modules: Modules
) -> list[str | None]:
    """The names that modules would have in the file."""
    keys: list[str | None] = []
    for module in modules:
        prefixes = format.components(architecture).get(module.component, ("",))
        naming = namings[module.component]
        names = names_of(architecture, module.component, naming, format.names.style)
        named = names.named(module.name)
        keys.append(None if named is None else prefixes[0] + named[1])
    return keys


def _check_components(modules: Modules, format: Format, architecture: str | None) -> None:
    """`Refused` for components that the format has no keys for, or for equal names."""
    components = format.components(architecture)
    used = sorted({module.component for module in modules})
    errors = Problems(
        where="--to", hint="give --component COMPONENT, one after the other", code="AK503"
    )
    if not components and len(used) > 1:
        errors.add(
            f"the adapter has components {listed(used)}",
            f"one: {format.title} is for a single model",
            ONE_PART,
        )
    homes: dict[str, list[str]] = {}
    for name in used if components else ():
        if name in components:
            homes.setdefault(components[name][0], []).append(name)
            continue
        errors.add(
            f"the adapter has {f'component {shown(name)}' if name else 'modules of no component'}",
            f"{listed([name or 'modules of no component' for name in components])}, which "
            f"{format.title} holds",
            "give --component to convert the other part alone"
            if any(components)
            else "leave out --component: it is for one model",
        )
    for names in homes.values():
        if len(names) > 1:
            problem = f"the adapter has components {listed(names)}"
            errors.add(problem, f"one of them: {format.title} names their modules alike")
    errors.raise_all()


def in_names_of(
    modules: Modules,
    format: Format,
    architecture: str | None,
    namings: Mapping[str, str],  # by component
    heads: Heads | None,
    base: BaseFacts | None,
    reader: PlanReader,
) -> list[tuple[AdapterModule, str]]:
    """The modules of a file in a format, fused in its layout, with their keys without suffix.
    `Refused` for modules without a name, or that cannot be fused."""
    components = format.components(architecture)
    prefix = lambda module: components.get(module.component, ("",))[0]
    if architecture is None:
        Problems(error for module in modules for error in norm_problems([module])).raise_all()
        return [(m, prefix(m) + in_style(m.name, format.names.style)) for m in modules]
    groups: dict[tuple[str, str, str], _Group] = {}
    lacking, tied = [], []
    plain: list[tuple[AdapterModule, str]] = []
    for module in modules:
        naming = namings[module.component]
        names = names_of(architecture, module.component, naming, format.names.style)
        named = names.named(module.name)
        if named is None and format.names.unlisted:
            text = names.unlisted(module.name)
            plain.append((replace(module, name=text), prefix(module) + text))
            if any(one.search(module.name) for one in format.names.absent):
                lacking.append(module.path)
            continue
        if named is None or not named[1]:
            lacking.append(module.path)
            continue
        match, text = named
        rule, part = match.rule, match.part
        if naming == MODEL:
            rule, part = replace(rule, model=(rule.model[part],), rows=()), 0
        place = names.stacked(match.rule)
        if place is not None:
            part = int(dict(match.values)[place])
        key = (module.component, text, module.kind)
        own = groups.setdefault(key, _Group(Fusion(rule, naming, heads), place is not None))
        own.members[part] = module
        if match.rule.untied and base is not None and base.tied:
            tied.append(module.path)
    errors = Problems()
    if tied or lacking:
        errors = _unnamed(format, architecture, tied, lacking)
    whole = []
    for (_, text, _), group in groups.items():
        with errors.collected():
            module = group.fused_module(text, base, reader)
            whole.append((replace(module, name=text), prefix(module) + text))
    errors.raise_all()
    return whole + plain


@dataclass(frozen=True)
class _Group:
    """Modules of the model that are one module of the file."""

    fusion: Fusion
    is_stack: bool
    members: dict[int, AdapterModule] = field(default_factory=dict)  # by their places

    def fused_module(self, name: str, base: BaseFacts | None, reader: PlanReader) -> AdapterModule:
        """The file's module of that name."""
        if not self.is_stack:
            return fuse(self.members, name, self.fusion, reader)
        height = base.experts if base is not None and base.experts else max(self.members) + 1
        return stack(self.members, height, name)


def _unnamed(format: Format, architecture: str, tied: list[str], lacking: list[str]) -> Problems:
    """Refuse modules that the format cannot name."""
    errors = Problems(code="AK403")
    if tied:
        errors.add(
            f"the base has one weight for embeddings and head: {listed(tied)} cannot have "
            "factors alone",
            f"other modules, because programs that read {format.title} apply it to both, or fail",
            "merge the adapter into its base instead",
            where="--base",
        )
    if lacking:
        errors.add(
            f"{len(lacking)} modules have no name there: {listed(lacking)}",
            f"modules that {format.title} names for {architecture}",
            OTHER_FORMAT,
            where="--to",
        )
    return errors


def _tensors(
    module: AdapterModule, key: str, format: Format, dtype: str | None, same_format: bool
) -> list[ConvertedTensor]:
    """The tensors of a module under their keys."""
    kind = word_of(module, format)
    suffixes = format.kinds[kind]
    written = []
    for role, part in module.parts.items():
        value, steps = part, format.steps.get(f"{kind}.{role}", format.steps.get(role, ()))
        if role in MAGNITUDES:
            value = magnitude_in_file(module, role, column=COLUMN in steps)
        for step in reversed(steps):
            value = STEPS[step].write(value)
        suffix = suffixes[role][0].replace("{adapter}", "")
        own = dtype if dtype and value.dtype in dtypes.FLOATS else value.dtype
        written.append(ConvertedTensor(key + suffix, value, own, module.path))
    if has_alpha(module, format, same_format):
        held, value = module.stored_alpha, constant(module.alpha)
        if held is not None and held.number == module.alpha:  # as the source has it
            value = reshaped(held.expression, ())
        written.append(ConvertedTensor(key + suffixes[ALPHA][0], value, value.dtype, module.path))
    return written
