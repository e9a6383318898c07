"""Norms and ranks of adapters' modules, layers by modules: as numbers, and in a terminal."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from adapterkit.core.errors import shown
from adapterkit.core.records import Json

SHADES = "·░▒▓█"  # from little to much
NUMBER = re.compile(r"\.\d+(?=\.)")  # of a layer, in a name


class Scale(NamedTuple):
    """Map values to shares of a colour, from the smallest to the largest."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], log: bool = False) -> "Scale":
        """The scale of these values; a logarithmic one ignores zeros."""
        used = [value for value in values if value > 0 or not log]
        return cls(min(used), max(used), log) if used else cls(0.0, 0.0, False)

    def share(self, value: float) -> float:
        if self.high == self.low:
            return 1.0 if value >= self.high else 0.0
        if self.log:
            if value <= 0:
                return 0.0
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)


def module_label(module: Json) -> str:
    """A module's name, with its parameter's unless that is `weight`, or with its wrapper's
    level."""
    if module["parameter"] is not None:
        return module["parameter"].removesuffix(".weight")
    return module["module"] + (f" (level {module['depth']})" if module["depth"] else "")


def place_of(label: str) -> tuple[str, str]:
    """A module's layer and its name there; outside of layers, "" and its whole name."""
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
    """The cell of each module, and the layers and the names in natural order: rows and columns."""
    places = {label: place_of(label) for label in labels}
    rows, columns = zip(*places.values(), strict=True) if places else ((), ())
    return places, sorted({*rows}, key=natural), sorted({*columns}, key=natural)


def heatmaps_of(adapters: Mapping[str, Json]) -> Json:
    """Heatmaps of adapters as `inspect` returns them: rows (layers), columns (modules), and a table
    for each adapter and measure."""
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
    """The first table as lines for a terminal, with a legend: a line per module, a column per
    layer, or per group of layers (their mean) if there are more than fit."""
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
