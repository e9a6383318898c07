"""The formats and architectures that the package has: TOML files, read once."""

import tomllib
from functools import cache
from pathlib import Path

from adapterkit.errors import Refused, did_you_mean, shown
from adapterkit.formats.schema import Architecture, Format, architecture_from, format_from

ARCHITECTURES = "architectures"


@cache
def folder() -> Path:
    """Where the TOML files are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_formats"
    return installed if installed.is_dir() else package.parent / "formats"


def names() -> list[str]:
    """The names of all formats, without reading them."""
    return sorted(path.stem for path in folder().glob("*.toml"))


@cache
def formats() -> dict[str, Format]:
    """Every format by name. `ValueError` for a file with an unknown word."""
    return {path.stem: format_from(path.stem, _table(path)) for path in _files(folder())}


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture by name. `ValueError` for a file with an unknown word."""
    files = _files(folder() / ARCHITECTURES)
    return {path.stem: architecture_from(path.stem, _table(path)) for path in files}


def format_named(name: str) -> Format:
    """The format of that name; `Refused` for another."""
    known = formats()
    if name not in known:
        raise Refused(
            f"format {shown(repr(name))}",
            expected=", ".join(name for name, one in known.items() if one.writes),
            where="--to",
            hint=did_you_mean([name], known) or "adapterkit convert --list tells what each holds",
        )
    return known[name]


def _files(place: Path) -> list[Path]:
    return sorted(place.glob("*.toml"))


def _table(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))
