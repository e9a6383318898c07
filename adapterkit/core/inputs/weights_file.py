"""Read and write the file of weights with which adapters are added.

It has one number for each adapter, others for modules or directions of their deltas, and the
adapters' names. You or a fit write it; every command that takes weights reads it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.checkpoint.fingerprint import difference
from adapterkit.core.checkpoint.folder import WEIGHTS, Folder, original
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.checkpoint.hub_ids import portable_name
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import WARNING, AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.inputs.sources import (
    named_in_file,
    open_source,
    open_unconverted,
    open_weighted,
    weight_of,
)
from adapterkit.core.options import Sources, StrPath, weighted
from adapterkit.core.records import (
    FINITE,
    NAME,
    TEXT,
    Check,
    Json,
    Settings,
    check_of,
    list_of,
    read,
    table_of,
)

SCHEMA = 1
Per = Literal["adapter", "layer", "module", "direction"]
Weight = float | tuple[float, ...]  # of a delta, or of each of its singular triplets
HINT = "docs/which-weights.md has the schema"
OPTION = "--weights"


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter's name, and the sha256 of its files by name, if known."""

    name: str = field(metadata={"check": NAME})
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightsBase:
    """A base's name, and its fingerprint (`core/checkpoint/fingerprint.py`), if known."""

    name: str = field(metadata={"check": NAME})
    fingerprint: str | None = None


def _number(value: Any) -> float:
    return float(FINITE.read(value))


def _weight(value: Any) -> Weight:
    return NUMBERS.read(value) if isinstance(value, list | tuple) else _number(value)


def _adapter(value: Any) -> NamedAdapter:
    return check_of(NamedAdapter).read({"name": value} if isinstance(value, str) else value)


NUMBERS = list_of(Check("a finite number", _number), "a list of numbers")
PER_ADAPTER = list_of(Check("a finite number, or a list of them", _weight), "a list of numbers")


@dataclass(frozen=True)
class WeightsFile:
    """Weights c of adapters on modules: Δ' = Σᵢ cᵢ Δᵢ, each Δᵢ with its adapter's own scale.

    `default`: one for each adapter, on all modules that are not in `modules`, which has one for
    each adapter too. If `per` is "direction", that may be a list, one for each singular triplet of
    the adapter's delta, largest first (`kernels/lowrank/directions.py`). `per` is the granularity
    at which the weights were chosen; a layer's weight is written for each of its modules. `fit`:
    their origin, for human readers."""

    adapters: tuple[NamedAdapter, ...] = field(
        metadata={"check": list_of(Check("a name, or a table with one", _adapter))}
    )
    default: tuple[float, ...] = field(metadata={"check": NUMBERS})
    modules: Mapping[str, tuple[Weight, ...]] = field(
        default_factory=dict, metadata={"check": table_of(TEXT, PER_ADAPTER)}
    )
    per: Per = "module"
    base: WeightsBase | None = None
    fit: dict | None = None
    schema: int = SCHEMA

    def weights_of(self, number: int, module: str) -> Weight:
        """The weight of an adapter, numbered from 0, on a module."""
        return self.modules.get(module, self.default)[number]

    def in_receipt(self) -> Json:
        """The entry in a receipt's options: names without paths, and without `fit`, which may be
        anything."""
        named = [replace(one, name=portable_name(one.name)) for one in self.adapters]
        base = self.base and replace(self.base, name=portable_name(self.base.name))
        weights = replace(self, adapters=named, base=base, fit=None)
        return {"weights_file": json.loads(text(weights))}

    def notes_on_base(self, fingerprint: str, base: str) -> list[str]:
        """A warning if the weights were chosen on another base."""
        chosen = self.base.fingerprint if self.base else None
        if self.base is None or chosen is None or not difference(chosen, fingerprint):
            return []
        return [
            f"{WARNING}the weights were chosen on {shown(self.base.name)} (fingerprint {chosen}), "
            f"not on {shown(base)} ({fingerprint})"
        ]


def read_weights(folder: Folder) -> WeightsFile:
    """The weights in a folder that is one file; `Refused` with every problem."""
    names = list(folder.files())
    if len(names) != 1:
        problem, hint = f"a folder with {len(names)} files", "name the file itself"
        raise Refused(
            problem, expected="one file of weights", where=folder.label, hint=hint, code="AK112"
        )
    return weights_in(read_json(folder, names[0]), folder.label)


def weights_in(table: Settings, where: str) -> WeightsFile:
    """The weights in a table from a file or a receipt; `Refused` with every problem."""
    errors = Problems(_problems(table, where))
    with errors.collected():
        weights = read(WeightsFile, table, where, hint=HINT)
    errors.raise_all()
    return weights


def write_weights(weights: WeightsFile, path: str | os.PathLike[str]) -> None:
    """Write the file atomically; `Refused` if it could not be read again."""
    weights_in(json.loads(text(weights)), str(path))
    path = Path(path)
    replace_file(path, text(weights).encode(), path.with_name(f".{path.name}.{os.getpid()}.part"))


def text(weights: WeightsFile) -> str:
    """The JSON text: a line for each adapter and each module, modules sorted by name, numbers in
    their shortest exact form."""
    modules = [f"{_line(name)}: {_line(its)}" for name, its in sorted(weights.modules.items())]
    fields = {
        "schema": _line(weights.schema),
        "base": weights.base and _line(_given(vars(weights.base))),
        "adapters": _block("[]", [_line(_given(vars(one))) for one in weights.adapters]),
        "per": _line(weights.per),
        "default": _line(weights.default),
        "modules": _block("{}", modules) if modules else None,
        "fit": weights.fit and json.dumps(weights.fit, indent=1, ensure_ascii=False),
    }
    rows = [f'"{name}": {value}' for name, value in fields.items() if value]
    return _block("{}", [row.replace("\n", "\n ") for row in rows]) + "\n"


def digests(folder: Folder) -> dict[str, str]:
    """The sha256 of an adapter's weights and settings, by their file names in its own format. The
    files are read completely, unless the Hub has their hashes."""
    source = original(folder)
    names = [name for name in source.files() if name == CONFIG or name.endswith(WEIGHTS)]
    hashes = {name: source.hashes.get(name) for name in sorted(names) if "/" not in name}
    return {name: known or sha256_of_file(source.path(name)) for name, known in hashes.items()}


def named_adapter(name: str, folder: Folder) -> NamedAdapter:
    """The adapter in a folder, by the last component of its path or its Hub id."""
    return NamedAdapter(portable_name(name), digests(folder))


def open_with_weights(
    adapters: Sources, weights: StrPath | None, opener: Callable[[StrPath], Folder]
) -> tuple[list[tuple[Folder, float]], WeightsFile | None]:
    """The adapters with their weights, and the file of weights, if one is named. Then the adapters
    are those of the file, in its order, and may be omitted. `Refused` if they differ from the
    file's, or have weights of their own."""
    if weights is None:
        return open_weighted(adapters, opener), None
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label)
    opened = []
    sources = sources_of(adapters, weights, file, errors)
    for source, named in zip(sources, file.adapters, strict=True):
        with errors.collected():
            adapter = opener(source)
            check_same(named, adapter, folder.label)
            opened.append(adapter)
    errors.raise_all()
    return list(zip(opened, file.default, strict=True)), file


def weighted_sources(
    adapters: Sources, weights: StrPath | None
) -> tuple[Sources, WeightsFile | None]:
    """As `open_with_weights`, for adapters that are opened later."""
    if weights is None:
        return adapters, None
    _, file = open_with_weights(adapters, weights, open_unconverted)
    assert file is not None
    sources = sources_of(adapters, weights, file, Problems())
    return list(zip(sources, file.default, strict=True)), file


def sources_of(
    adapters: Sources, weights: StrPath, file: WeightsFile, errors: Problems
) -> list[StrPath]:
    """The sources of a file's adapters, by the file's own names if none are given. `Refused`, with
    `errors`, for other adapters and for adapters with weights of their own."""
    pairs = [
        weight_of(source) if weight is None else (source, weight)
        for source, weight in weighted(adapters)
    ]
    own = [f"{source}={weight:g}" for source, weight in pairs if weight != 1.0]
    if own:
        errors.add(
            f"weights in {listed(own)} and in {OPTION}",
            "weights from one source",
            f"remove the weights of the adapters, or {OPTION}",
            where="options",
            code="AK112",
        )
    sources: list[StrPath] = [source for source, _ in pairs]
    if not sources:
        folder = Path(weights).parent if os.path.exists(weights) else None
        found = {one.name: named_in_file(one.name, folder) for one in file.adapters}
        if lacking := [name for name, source in found.items() if source is None]:
            problem = f"adapters that are not next to the file of weights: {listed(lacking)}"
            hint = "name all adapters of the file, in its order"
            errors.add(
                problem, "folders of these names there, or ids of the Hub", hint, code="AK112"
            )
        errors.raise_all()
        sources = [found[one.name] or "" for one in file.adapters]
    if len(sources) != len(file.adapters):
        errors.add(
            f"adapters: {len(sources)}, but the file has weights of {len(file.adapters)}",
            f"in this order: {listed([one.name for one in file.adapters])}",
            "name those of the file, or none, if they are next to it",
            code="AK112",
        )
    errors.raise_all()
    return sources


def check_same(named: NamedAdapter, adapter: Folder, where: str) -> None:
    """Refuse an adapter whose files differ from those that the weights were chosen for."""
    if not named.files:
        return
    own = digests(adapter)
    other = sorted(name for name in {*named.files, *own} if named.files.get(name) != own.get(name))
    if other:
        raise Refused(
            f"{adapter.label} is not the adapter {shown(named.name)} for which the weights were "
            f"chosen: {listed(other)} differ",
            expected="files with the sha256 in the file of weights",
            where=where,
            hint="name the adapters of the file in its order; if this one is right, remove its "
            "`files` from the file",
            code="AK112",
        )


def _problems(table: Settings, where: str) -> list[AdapterkitError]:
    """Problems of the schema's version and of the lengths of a table's lists. Other values are
    refused when the record is created."""
    if not isinstance(table, Mapping):
        return []  # refused when the record is created
    errors, schema = Problems(where=where, hint=HINT, code="AK112"), table.get("schema", SCHEMA)
    if isinstance(schema, int) and not 1 <= schema <= SCHEMA:
        errors.add(
            f"schema is {schema}", f"at most {SCHEMA}", "update adapterkit, or write it again"
        )
    count, default = _size(table.get("adapters")), _size(table.get("default"))
    if count == 0:
        errors.add("adapters is empty", "the names of one or more")
    elif None not in (count, default) and count != default:
        errors.add(f"the length of default is {default}", f"{count}, one for each adapter")
    modules, per = table.get("modules"), table.get("per", "module")
    its = modules if isinstance(modules, Mapping) else {}
    sizes = {name: _size(weights) for name, weights in its.items()}
    wrong = [name for name, size in sizes.items() if None not in (size, count) and size != count]
    if wrong:
        errors.add(
            f"other numbers of weights: {listed([f'{one} has {sizes[one]}' for one in wrong])}",
            f"{count}, one for each adapter",
        )
    lists = [
        name
        for name in its
        if sizes[name] and any(_size(weight) is not None for weight in its[name])
    ]
    if lists and per != "direction":
        problem = f"lists of weights, though per is {per}: {listed(lists)}"
        errors.add(problem, 'one number for each adapter, or "per": "direction"')
    if its and per == "adapter":
        problem = f"weights of modules, though per is adapter: {listed(list(its))}"
        errors.add(problem, 'no modules, or "per": "module"')
    return errors


def _size(value: object) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None


def _given(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value}


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(brackets: str, rows: Sequence[str]) -> str:
    return f"{brackets[0]}\n " + ",\n ".join(rows) + f"\n{brackets[1]}"
