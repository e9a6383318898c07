"""Formats and architectures in the package: TOML files, each read once."""

from collections.abc import Collection, Iterable
from functools import cache

from adapterkit.adapters.formats.schema import Architecture, Format, architecture_from, format_from
from adapterkit.adapters.formats.tables import files, read_files
from adapterkit.core.commands import LIST_FORMATS
from adapterkit.core.errors import Damaged, Refused, alternatives, did_you_mean, listed, shown

ARCHITECTURES = "architectures"


def names() -> list[str]:
    """The names of all formats, without reading them."""
    return [path.stem for path in files()]


@cache
def described() -> dict[str, Format]:
    """Every format by name, without numpy and therefore without checked steps; for the help."""
    return read_files(format_from)


@cache
def formats() -> dict[str, Format]:
    """Every format by name. `Damaged` for a file with an unknown word or step."""
    # here, so that the help is printed without numpy
    from adapterkit.adapters.formats.modules.tensors import GROUPED, STEPS

    known = described()
    for name, format in known.items():
        _check_steps(format.steps.values(), (*STEPS, GROUPED), f"{name}.toml")
    return known


@cache
def single_file_format() -> Format:
    """The format of single-file image and video models: the prefix of each component."""
    return read_files(format_from, "checkpoints")["one-file"]


def written_formats() -> list[str]:
    """The names of the formats that can be written."""
    return [name for name, one in described().items() if one.writes]


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture by name. `Damaged` as for formats."""
    from adapterkit.adapters.formats.modules.row_permutations import ORDERS

    known = read_files(architecture_from, ARCHITECTURES)
    for name, one in known.items():
        rules = [rule for words in one.components.values() for rule in words.rules]
        tables = [table for rule in rules for table in (rule.steps, rule.columns)]
        steps = [own for table in tables for own in table.values()]
        _check_steps(steps, ORDERS, f"{ARCHITECTURES}/{name}.toml")
    return known


def format_named(name: str) -> Format:
    """The format of that name; `Refused` if there is none."""
    known = formats()
    if name not in known:
        raise Refused(
            f"there is no format {shown(repr(name))} to write",
            expected=alternatives(name, written_formats()),
            where="--to",
            hint=did_you_mean([name], known) or LIST_FORMATS,
            code="AK103",
        )
    return known[name]


def _check_steps(steps: Iterable[Iterable[str]], known: Collection[str], where: str) -> None:
    unknown = sorted({step for own in steps for step in own} - set(known))
    if unknown:
        raise Damaged(
            f"there are no steps {listed(unknown)}",
            expected=f"some of {', '.join(known)}",
            where=where,
            hint=did_you_mean(unknown, known) or "add it to adapters/formats/modules/tensors.py",
            code="AK204",
        )
