"""What people type for a base or an adapter, and the folder it means."""

import math
import os
from pathlib import Path

from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.errors import Refused, shown


def open_source(text: str | os.PathLike) -> Folder:
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


def weighted(text: str | os.PathLike) -> tuple[str, float]:
    """A source and its weight: `PATH=0.7` unless the whole text exists as a path; 1 where none is given."""
    text = os.fspath(text)
    if Path(text).exists() or "=" not in text:
        return text, 1.0
    source, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or not source:
        raise Refused(
            f"{shown(text)}: {shown(number)!r} is no weight",
            expected="SOURCE or SOURCE=NUMBER",
            do="check the path and weight",
        )
    return source, weight
