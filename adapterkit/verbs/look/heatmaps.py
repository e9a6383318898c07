"""Norms and ranks of adapters' modules, layers by modules: as numbers, as a page, in a terminal."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.errors import Failed, Refused, shown
from adapterkit.core.output.writer import unfinished_name
from adapterkit.core.records import Json
from adapterkit.verbs.look.pages.page import MARK
from adapterkit.verbs.look.pages.pictures import Scale

SHADES = "·░▒▓█"  # from little to much
NUMBER = re.compile(r"\.\d+(?=\.)")  # of a layer, in a name


def module_label(module: Json) -> str:
    """A module's name with its parameter's unless that is `weight`, or with its wrapper's level."""
    if module["parameter"] is not None:
        return module["parameter"].removesuffix(".weight")
    return module["module"] + (f" (level {module['depth']})" if module["depth"] else "")


def place_of(label: str) -> tuple[str, str]:
    """A module's layer and its name there; of one outside of layers "" and its whole name."""
    parts = label.split(".")
    at = next((n for n, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return ("", label) if at is None else (".".join(parts[: at + 1]), ".".join(parts[at + 1 :]))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that counts layers as numbers."""
    return [
        (0, int(part), "") if part.isascii() and part.isdecimal() else (1, 0, part)
        for part in name.split(".")
    ]


def grid_of(labels: Iterable[str]) -> tuple[dict[str, tuple[str, str]], list[str], list[str]]:
    """The place of each module, and the layers and the names in them in natural order: rows and
    columns."""
    places = {label: place_of(label) for label in labels}
    rows, columns = zip(*places.values(), strict=True) if places else ((), ())
    return places, sorted({*rows}, key=natural), sorted({*columns}, key=natural)


def heatmaps_of(adapters: Mapping[str, Json]) -> Json:
    """Of adapters as `inspect` has them: rows (layers), columns (modules), and for each adapter and
    measure a table."""
    modules = (module for one in adapters.values() for module in one["modules"])
    places, rows, columns = grid_of(map(module_label, modules))
    tables = []
    for name, one in adapters.items():
        modules = {places[module_label(module)]: module for module in one["modules"]}
        total = math.hypot(*(module["norm"] or 0.0 for module in modules.values()))
        related = any(module["relative"] is not None for module in modules.values())
        for measure in ("relative" if related else "norm", "effective_rank", "share"):
            cell = lambda m, of=measure, total=total: _value(m, of, total)
            values = [[cell(modules.get((row, column))) for column in columns] for row in rows]
            tables.append({"adapter": name, "measure": measure, "values": values})
    return {"rows": rows, "columns": columns, "tables": tables}


def _value(module: Json | None, measure: str, total: float) -> float | None:
    if module is None or measure != "share":
        return None if module is None else module[measure]
    return (module["norm"] / total) ** 2 if module["norm"] is not None and total else None


def blocks(maps: Json, width: int) -> list[str]:
    """The first table as lines for a terminal: a line a module, a column a layer, of more layers
    than fit the mean of several; and what it means."""
    table = maps["tables"][0]
    flat = [v for row in table["values"] for v in row if v is not None]
    scale = Scale.of(flat, log=True)
    if not flat or scale.high == 0:
        return []
    label = max(map(len, maps["columns"]))
    group = math.ceil(len(maps["rows"]) / max(width - label - 4, 8))
    lines = []
    for column, values in zip(maps["columns"], zip(*table["values"], strict=True), strict=True):
        parts = [values[n : n + group] for n in range(0, len(values), group)]
        lines.append(f"  {shown(column):{label}}  {''.join(_shade(p, scale) for p in parts)}")
    what = "‖delta‖/‖W‖" if table["measure"] == "relative" else "‖delta‖"
    ends = f"{maps['rows'][0] or 'outside of layers'} to {maps['rows'][-1]}"
    text = f"{what} from {scale.low:.3g} {SHADES[0]} to {scale.high:.3g} {SHADES[-1]}, {ends}"
    return [*lines, f"  {text}" + (f", {group} layers a column" if group > 1 else "")]


def _shade(values: tuple[float | None, ...], scale: Scale) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return " "
    share = scale.share(sum(known) / len(known))
    return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]


def check_page(path: Path, flag: str, overwrite: bool) -> None:
    """`Refused` for a place of a page that is no file to write, or holds something else, without
    `overwrite` an older page too."""
    if path.suffix != ".html" or not os.path.isdir(path.parent) or os.path.isdir(path):
        expected, hint = "a file name ending in .html, in a folder that exists", "give another name"
        raise Refused(shown(path), expected=expected, where=flag, hint=hint, code="AK601")
    if os.path.exists(path):  # and not where the system takes no such name
        with path.open("rb") as file:
            is_page = MARK.encode() in file.read(1000)
        if not is_page or not overwrite:
            raise Refused(
                f"{shown(path)} exists" + " and is no page of adapterkit" * (not is_page),
                expected="a new file, or an older page, which --overwrite replaces",
                where=flag,
                hint="give another name" + ", or --overwrite" * is_page,
                code="AK601",
            )


def write_page(path: Path, text: str) -> None:
    """Write it, whole or not at all; `Failed` where that cannot be."""
    try:
        replace_file(path, text.encode(), path.with_name(unfinished_name(path.name)), durable=False)
    except Failed as error:
        error.hint = "check the disk and the folder"
        raise
