"""What people type for a base or an adapter, and the folder it means."""

import os
from typing import Any

from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.options import StrPath, finite, unweighted, weighted


def open_source(text: StrPath) -> Folder:
    """The folder that a path, or a Hub id `org/name[@revision][:subfolder]`, means; a path that exists is taken whole."""
    if os.path.exists(text):
        return LocalFolder(text)
    from adapterkit import hub

    hub_id = hub.parse(os.fspath(text))
    if hub_id is None:
        raise Refused(
            f"no such path: {shown(os.fspath(text))}",
            expected="a folder, a .safetensors or .gguf file, or a Hub id org/name[@revision][:subfolder]",
            do="check the path",
        )
    return hub.HubFolder(hub_id)


def open_weighted(adapters: Any, name: str = "adapters") -> list[tuple[Folder, float]]:
    """The folders of adapters, with their weights, in whatever form they are given; `Refused` with all that cannot be opened."""
    opened: list[tuple[Folder, float]] = []
    errors: list[AdapterkitError] = []
    for source, weight in weighted(adapters, name):
        try:
            text, said = (os.fspath(source), weight) if weight is not None else weight_of(source)
            opened.append((open_source(text), said))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return opened


def open_all(**lists: Any) -> list[list[Folder]]:
    """The folders of several lists of sources without weights, by the options' names; `Refused` with all that cannot be opened."""
    opened: list[list[Folder]] = []
    errors: list[AdapterkitError] = []
    for name, sources in lists.items():
        try:
            opened.append([folder for folder, _ in open_weighted([(s, 1.0) for s in unweighted(sources, name)], name)])
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return opened


def weight_of(source: StrPath) -> tuple[str, float]:
    """A source and its weight: `PATH=0.7` unless the whole text exists as a path; 1 where none is given."""
    text = os.fspath(source)
    if os.path.exists(text) or "=" not in text:
        return text, 1.0
    path, _, number = text.rpartition("=")
    weight = finite(number)
    if weight is None or not path:
        raise Refused(
            f"{shown(text)}: {shown(number)!r} is no weight",
            expected="SOURCE or SOURCE=NUMBER",
            do="check the path and weight",
        )
    return path, weight
