"""An output that is there already: what its receipt says, and whether its files are there."""

import json
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.checkpoint.strict import MAX_JSON
from adapterkit.core.errors import Damaged, listed
from adapterkit.core.records import Json


def parse_receipt(data: bytes) -> Json:
    """What a receipt says; empty for bytes that are none, without a list of files."""
    try:
        receipt = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else {}


def receipt_at(path: Path) -> Json:
    """The receipt in a file; empty where there is none."""
    try:
        return parse_receipt(read_small(path, MAX_JSON))
    except (OSError, ValueError):
        return {}


def lacking(receipt: Mapping[str, Any], size_of: Callable[[str], int | None]) -> list[str]:
    """The files of a receipt that are not there with their sizes."""
    return [
        name
        for name, entry in receipt["files"].items()
        if not isinstance(entry, dict) or size_of(name) != entry.get("size", -1)
    ]


def size_at(path: Path) -> int | None:
    """Bytes of a file, where it leads to if it is a link; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name that no system has, too
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def incomplete(names: Sequence[str], where: str) -> Damaged:
    """The error of an output that was finished, and lacks files now."""
    return Damaged(
        f"the finished output lacks files, or has them with other sizes: {listed(names)}",
        expected="all files of its receipt",
        where=where,
        hint="put them back, or make it again with --overwrite",
        code="AK607",
    )
