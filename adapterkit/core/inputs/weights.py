"""Adapters with the weights that a file has for them."""

import os
from collections.abc import Callable
from pathlib import Path

from adapterkit.core.adapter.weights_file import NamedAdapter, WeightsFile, digests, read_weights
from adapterkit.core.checkpoint.fingerprint import difference
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.errors import WARNING, Problems, Refused, listed, shown
from adapterkit.core.inputs.sources import (
    named_in_file,
    open_source,
    open_unconverted,
    open_weighted,
    weight_of,
)
from adapterkit.core.options import Sources, StrPath, weighted

OPTION = "--weights"
Weighted = tuple[list[tuple[Folder, float]], WeightsFile | None]


def open_with_weights(
    adapters: Sources, weights: StrPath | None, opener: Callable[[StrPath], Folder]
) -> Weighted:
    """The adapters with their weights, and the file of these, if one is named: then the adapters
    are those of the file, in its order, and may be left out. `Refused` where they are others, or
    have weights of their own."""
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
    """As `open_with_weights`, of adapters that are opened later."""
    if weights is None:
        return adapters, None
    _, file = open_with_weights(adapters, weights, open_unconverted)
    assert file is not None
    sources = sources_of(adapters, weights, file, Problems())
    return list(zip(sources, file.default, strict=True)), file


def sources_of(
    adapters: Sources, weights: StrPath, file: WeightsFile, errors: Problems
) -> list[StrPath]:
    """The sources of a file's adapters: those that it names if none are given. `Refused` with these
    errors for others, and for adapters with weights of their own."""
    pairs = [
        weight_of(source) if weight is None else (source, weight)
        for source, weight in weighted(adapters)
    ]
    own = [f"{source}={weight:g}" for source, weight in pairs if weight != 1.0]
    if own:
        errors.add(
            f"{listed(own)}, and {OPTION}",
            "weights from one place",
            f"remove the weights of the adapters, or {OPTION}",
            where="options",
            code="AK112",
        )
    sources: list[StrPath] = [source for source, _ in pairs]
    if not sources:
        folder = Path(weights).parent if os.path.exists(weights) else None
        found = {one.name: named_in_file(one.name, folder) for one in file.adapters}
        if lacking := [name for name, source in found.items() if source is None]:
            problem = f"{listed(lacking)}: not next to the file of weights"
            hint = "name the adapters of the weights in their order"
            errors.add(
                problem, "adapters next to it, by name, or ids of the Hub", hint, code="AK112"
            )
        errors.raise_all()
        sources = [found[one.name] or "" for one in file.adapters]
    if len(sources) != len(file.adapters):
        errors.add(
            f"{len(sources)} adapters, and weights of {len(file.adapters)}",
            f"in this order: {listed([one.name for one in file.adapters])}",
            "name those of the file, or none",
            code="AK112",
        )
    errors.raise_all()
    return sources


def check_same(named: NamedAdapter, adapter: Folder, where: str) -> None:
    """`Refused` where an adapter's files are others than those that weights were chosen for."""
    if not named.files:
        return
    own = digests(adapter)
    other = sorted(name for name in {*named.files, *own} if named.files.get(name) != own.get(name))
    if other:
        raise Refused(
            f"{adapter.label} is not the adapter {shown(named.name)} of the weights: "
            f"{listed(other)} differ",
            expected="files with the sha256 that the weights say",
            where=where,
            hint="name the adapters of the weights in their order; without `files` in the file of "
            "weights any will do",
            code="AK112",
        )


def notes_on_base(weights: WeightsFile, fingerprint: str, base: str) -> list[str]:
    """A warning where weights were chosen on another base."""
    chosen = weights.base.fingerprint if weights.base else None
    if weights.base is None or chosen is None or not difference(chosen, fingerprint):
        return []
    return [
        f"{WARNING}the weights were chosen on {shown(weights.base.name)} (fingerprint {chosen}), "
        f"not on {shown(base)} ({fingerprint})"
    ]
