"""Convert an adapter to the names in a single-file image or video model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from adapterkit.adapters.formats.capabilities import FIT_ON_BASE
from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import Detection
from adapterkit.adapters.formats.extra_deltas import AddedDelta, written
from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.adapters.formats.library import format_named
from adapterkit.adapters.formats.modules.fusing import Fusion, norm_problems
from adapterkit.adapters.formats.modules.kinds import FACTORS, VALUE
from adapterkit.adapters.formats.modules.names import Match, has_modules, names_of
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents, Modules
from adapterkit.adapters.formats.modules.tensors import reshaped, transposed
from adapterkit.adapters.formats.peft.layout import KEPT, write_layout
from adapterkit.adapters.formats.planning.plan import plan_written
from adapterkit.adapters.formats.planning.source import (
    AdapterConversion,
    read_contents,
    with_axes_of,
)
from adapterkit.adapters.formats.schema import MODEL, PEFT
from adapterkit.adapters.formats.task import tasks_of
from adapterkit.adapters.formats.write import in_names_of
from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.commands import CHECK_BASE, ONE_PART
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.core.weights.plan_reader import PlanReader

MATRIX = ("",)  # its name is the parameter's
# kinds that are added unchanged, and the possible names of their parameters
ADDED = ("loha", "lokr", "oft", "full", "modulation", FACTORS)
PLAIN = (FACTORS, {"a", "b"})
NOT_PLAIN = ("mid", "input_magnitude")
WEIGHTS, BIASES, TABLES = ("weight", "scale"), ("bias",), ("modulation", "scale_shift_table")


def plan_in_names_of(model: SingleFileModel, source: Folder, detection: Detection) -> Plan:
    """Convert an adapter into PEFT's layout, with the names of the model's file, which fuses
    modules. Modules of components that are not in the file keep the component's name in front.
    Other deltas go to a second file. `Refused` with everything that cannot be done."""
    options = ConvertOptions(to=PEFT, architecture=model.architecture)
    contents = read_contents(AdapterConversion(source, detection, options, file=model))
    plain, added = _InFile(contents, model).converted()
    return _plan(source, contents, plain, added, options)


def plan_with_others(source: Folder, contents: Contents, options: ConvertOptions) -> Plan | None:
    """Convert one component into PEFT's layout, with other deltas in a second file; None if all
    modules are standard LoRA."""
    modules = [replace(module, component=LANGUAGE) for module in contents.modules]
    plain, others = _split(modules)
    added = [one for module in others for one in _deltas_of(module, None)]
    kept = {key: value for key, value in contents.config.items() if key in KEPT}
    contents = replace(contents, config=kept)  # of a plain adapter
    return _plan(source, contents, plain, added, options) if others else None


def _plan(
    source: Folder,
    contents: Contents,
    plain: Modules,
    added: Sequence[AddedDelta],
    options: ConvertOptions,
) -> Plan:
    """LoRA factors in PEFT's layout, and deltas of other kinds in a second file."""
    contents = replace(contents, modules=tuple(plain), architectures=())
    more = []
    if added:
        tensors, metadata = written(added)
        more.append(
            OutputFile.computed(ADDED_DELTAS, tasks_of(tensors), metadata, safetensors_order=True)
        )
    layout = write_layout(contents, format_named(PEFT), rebuilt=True, values=True)
    return plan_written(source, contents, layout, options, more=tuple(more))


def _split(modules: Modules) -> tuple[list[AdapterModule], list[AdapterModule]]:
    """Modules that PEFT's layout stores together, and those of other kinds."""
    ranked = [m for m in modules if m.kind == FACTORS and not {*m.parts} & {*NOT_PLAIN}]
    is_mixed = any("magnitude" in m.parts for m in ranked)
    own = {id(m) for m in ranked if "magnitude" in m.parts or not is_mixed}
    plain = [m for m in modules if id(m) in own or m.kind not in ADDED]
    return plain, [m for m in modules if id(m) not in own and m.kind in ADDED]


def _deltas_of(named: AdapterModule, rows: range | None) -> Iterator[AddedDelta]:
    """The deltas of a module of another kind, for one parameter each."""
    roles = {"diff_b": BIASES, "table": TABLES}
    if named.kind not in ("full", "modulation"):
        yield AddedDelta(named, WEIGHTS, rows)
        return
    for role, part in named.parts.items():
        shape = part.shape if len(part.shape) > 1 else (*part.shape, 1)
        parts = {"diff": reshaped(part, shape)}
        own = replace(named, kind="full", parts=parts)
        yield AddedDelta(own, roles.get(role, WEIGHTS), rows)


@dataclass(frozen=True)
class _InFile:
    """An adapter's modules during their conversion to the file's names."""

    contents: Contents
    model: SingleFileModel

    def converted(self) -> tuple[list[AdapterModule], list[AddedDelta]]:
        """LoRA factors, and deltas that are added unchanged."""
        modules = self._in_parts()
        self._check_names(modules)
        plain, others = _split(modules)
        apart = self._apart(plain)
        others += (module for module in plain if id(module) in apart)
        plain = [module for module in plain if id(module) not in apart]
        errors, added = Problems(where=self.contents.folders[0].label), list[AddedDelta]()
        for module in others:
            with errors.collected():
                added += self._added(module)
        errors.raise_all()
        return self._named(plain), added

    def _found(self, module: AdapterModule) -> tuple[Match, str] | None:
        """The rule that names a module in the file, and the name; None if the file has none for its
        kind."""
        part = self.model.parts.get(module.component)
        if part is None:
            return None
        names = names_of(self.model.architecture, module.component, part.naming)
        named = names.named(module.name)
        is_matrix = named is not None and part.naming in named[0].rule.matrix
        return None if is_matrix and (module.kind, {*module.parts}) != PLAIN else named

    def _check_names(self, modules: Modules) -> None:
        """`Refused` if the file's components have none of the modules. The merge reports single
        missing modules, unless they are left out."""
        there = [m for m in modules if m.component in self.model.parts]
        if there and not any(map(self._found, there)):
            raise Refused(
                f"{len(there)} of {len(modules)} modules are not in {self.model.architecture}, as "
                f"the base is: {listed([m.path for m in there])}",
                expected=f"modules of {', '.join(self.model.parts)}",
                where=self.contents.folders[0].label,
                hint=CHECK_BASE,
                code="AK502",
            )

    def _named(self, modules: Modules) -> list[AdapterModule]:
        """The modules of the file for these, fused."""
        found = [self._found(module) is not None for module in modules]
        there = [*compress(modules, found)]
        reader = PlanReader(self.contents.folders)
        architecture, namings = self.model.architecture, self.model.namings
        format = self.model.names
        own = in_names_of(there, format, architecture, namings, None, None, reader)
        named = [self._valued(replace(m, name=key, component=LANGUAGE)) for m, key in own]
        named = with_axes_of(self.model.tensors, named)
        rest = compress(modules, (not one for one in found))
        return named + [replace(m, name=m.path, component=LANGUAGE) for m in rest]

    def _valued(self, module: AdapterModule) -> AdapterModule:
        """A fully trained module with the file's names of tensors."""
        if module.kind != VALUE:
            return module
        there = self.model.tensors
        leaf = next((one for one in WEIGHTS if f"{module.name}.{one}" in there), WEIGHTS[0])
        return replace(
            module,
            parts={leaf if role == "weight" else role: p for role, p in module.parts.items()},
        )

    def _added(self, module: AdapterModule) -> Iterator[AddedDelta]:
        """The deltas of a module, with their parameters and rows in the file."""
        named = self._found(module)
        if named is None:
            yield from _deltas_of(self._named([module])[0], None)
            return
        part, (match, text) = self.model.parts[module.component], named
        own = replace(module, name=part.prefix + text, component=LANGUAGE)
        if part.naming in match.rule.matrix:
            parts = {"a": transposed(module.parts["b"]), "b": transposed(module.parts["a"])}
            yield AddedDelta(replace(own, parts=parts), MATRIX)
        elif part.naming == MODEL or len(match.rule.model) == 1:
            yield from _deltas_of(self._named([module])[0], None)
        else:
            yield from _deltas_of(own, self._rows(module, match, own.name))

    def _rows(self, module: AdapterModule, match: Match, name: str) -> range:
        """The rows of this module in the file's module."""
        tensors = self.model.tensors
        spec = tensors.get(f"{name}.weight") or tensors.get(f"{name}_weight")  # OpenCLIP's in_proj
        fusion = Fusion(match.rule, self.model.namings[module.component])
        rows = None if spec is None else fusion.rows(spec.shape[0], module)[match.part]
        Problems(norm_problems([module])).raise_all()
        if not isinstance(rows, range):
            raise Refused(
                f"{shown(module.path)}: {module.kind} of some rows of {shown(name)}",
                expected="plain factors, or a delta of consecutive rows",
                hint=FIT_ON_BASE,
                code="AK401",
            )
        return rows

    def _apart(self, modules: Modules) -> set[int]:
        """Ids of LoRA factors that are added unchanged: those of a transposed matrix, and DoRA on
        some of the modules that the file fuses, because its magnitudes belong to their rows."""
        found = [(module, *named) for module in modules if (named := self._found(module))]
        fused = Counter((m.component, text) for m, _, text in found if "magnitude" in m.parts)
        return {
            id(m)
            for m, match, text in found
            for naming in [self.model.namings[m.component]]
            if naming in match.rule.matrix
            or (naming != MODEL and 0 < fused[m.component, text] < len(match.rule.model))
        }

    def _in_parts(self) -> list[AdapterModule]:
        """The modules; an adapter of one unnamed component gets its name."""
        model, modules = self.model, list(self.contents.modules)
        bare = [m for m in modules if m.component == LANGUAGE and m.name not in model.modules]
        if not bare:
            return modules
        names = [m.name for m in bare]
        parts = [
            one for one in model.parts if has_modules(model.architecture, [(one, n) for n in names])
        ]
        if len(parts) != 1:
            what = f"modules of {' or '.join(parts) or 'no part of the file'}: {listed(names)}"
            raise Refused(
                what,
                expected=f"modules of one of {', '.join(model.parts)} ({model.architecture})",
                where=self.contents.folders[0].label,
                hint=ONE_PART if parts else CHECK_BASE,
                code="AK401",
            )
        own = {id(m) for m in bare}
        return [replace(m, component=parts[0]) if id(m) in own else m for m in modules]
