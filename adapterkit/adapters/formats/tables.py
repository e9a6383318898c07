"""The folder of the TOML files that describe formats, architectures and engines."""

import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from adapterkit.core.errors import Damaged, shown

R = TypeVar("R")


@cache
def folder() -> Path:
    """The folder of the TOML files: in the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "_formats"
    return installed if installed.is_dir() else package.parent / "formats"


def files(inside: str = "") -> list[Path]:
    """The TOML files of the folder, or of one inside it."""
    return sorted((folder() / inside).glob("*.toml"))


def read_files(record: Callable[[str, dict], R], inside: str = "") -> dict[str, R]:
    """The records of a folder of TOML files, by name."""
    return {path.stem: _read(path, record) for path in files(inside)}


def _read(path: Path, record: Callable[[str, dict], R]) -> R:
    """The record of a file; `Damaged` with the problems in it."""
    try:
        return record(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, re.error) as error:  # no TOML, no UTF-8, too
        raise Damaged(
            shown(error),
            expected="the words of `adapters/formats/schema.py`, each with a value of its type",
            where=path.name,
            hint="fix the file",
            code="AK204",
        ) from error
