"""What `inspect` found, for people: a table for a terminal and a heatmap of the deltas' norms."""

import math
import re
from pathlib import Path
from typing import Any

from adapterkit.errors import AdapterkitError, Failed, Refused, shown

MOST = 20  # kinds of problems that are listed; all of them are in the JSON
GROUP = ["modules", "count", "kind", "rank", "alpha", "scale"]
MODULE = ["module", "rank", "scale", "trained", "norm", "relative", "effective_rank"]


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    lines = [f"{result['kind']} {shown(result['name'])}"]
    metrics = _metrics(result) + (_adapter_metrics(result) if result["kind"] == "adapter" else [])
    lines += [f"  {name:16} {shown(text)}" for name, text in metrics if text]
    modules = result["modules"]
    if modules:
        lines += ["", *_columns(GROUP, result["groups"])]
    if modules and result["statistics"]:
        related = any(module["relative"] is not None for module in modules)
        lines += [
            "",
            *_columns([name for name in MODULE if related or name != "relative"], modules),
        ]
    elif modules:
        why = "from the Hub without --download" if "repo" in result["origin"] else "with --headers"
        lines += ["", f"norms and effective ranks: not read {why}"]
    return "\n".join([*lines, "", *_problems(result["problems"])])


def _metrics(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what every kind has; an empty text is left out."""
    count = len(result["shards"])
    kinds = ", ".join(f"{name} {held['parameters']:,}" for name, held in result["dtypes"].items())
    architecture, tied, quantization = (
        result[key] or {} for key in ("architecture", "tied", "quantization")
    )
    names = [*architecture.get("classes", []), architecture.get("model_type")]
    metrics = [
        ("architecture", ", ".join(str(name) for name in names if name)),
        ("parameters", f"{result['parameters']:,}" + (f" ({kinds})" if kinds else "")),
        ("bytes", f"{result['bytes']:,} in {count} file{'s' if count != 1 else ''}"),
        ("quantization", quantization.get("found", "none" if result["kind"] == "base" else "")),
    ]
    if tied:
        said = {True: "yes", False: "no", None: "the config does not say"}[tied["config"]]
        metrics.append(("tied", f"{said}; a head is {'' if tied['head_stored'] else 'not '}stored"))
    return metrics


def _adapter_metrics(result: dict[str, Any]) -> list[tuple[str, str]]:
    saved = result["modules_to_save"]
    return [
        (
            "format",
            " ".join(
                str(result[key]) for key in ("format", "peft_type", "peft_version") if result[key]
            ),
        ),
        ("base", str(result["base"] or "not said")),
        (
            "flags",
            ", ".join(
                f"{name} {value}"
                for name, value in result["flags"].items()
                if value not in (None, False, "none", [])
            ),
        ),
        ("modules_to_save", ", ".join(map(str, saved)) if isinstance(saved, list) else str(saved)),
        ("replaced", ", ".join(result["replaced"])),
        (
            "trained tokens",
            ", ".join(
                f"{tokens['module']} ({len(tokens['rows'])} rows)" for tokens in result["tokens"]
            ),
        ),
    ]


def _columns(names: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Rows as aligned columns: the first to the left, the others to the right."""
    cells = [
        [name.replace("_", " ") for name in names],
        *([_cell(row, name) for name in names] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [
        [cell.rjust(width) for cell, width in zip(row, widths, strict=True)][1:] for row in cells
    ]
    return [
        "  ".join([row[0].ljust(widths[0]), *others])
        for row, others in zip(cells, right, strict=True)
    ]


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if name == "module":
        value = _name(row)
    if value is None:
        return "?"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _name(module: dict[str, Any]) -> str:
    """A module's name, with its parameter's where that is not plain `weight`, or its wrapper's level."""
    if module["parameter"] is not None:
        return module["parameter"].removesuffix(".weight")
    return module["module"] + (f" (level {module['depth']})" if module["depth"] else "")


def _problems(problems: list[dict[str, str]]) -> list[str]:
    """Problems in their four parts; those that differ in names with dots and in numbers only are counted."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\S+\.\S+|\d+", "#", problem["found"]), []).append(problem)
    lines = [f"problems: {len(problems) or 'none'}"]
    for same in list(kinds.values())[:MOST]:
        found, expected, where, hint = (
            same[0][part] for part in ("found", "expected", "where", "do")
        )
        lines.append(f"- {AdapterkitError(found, expected=expected, where=where, hint=hint)}")
        lines += [f"  and {len(same) - 1} more like it"] * (len(same) > 1)
    return lines + [f"and {len(kinds) - MOST} more kinds of problems; --json lists all"] * (
        len(kinds) > MOST
    )


# -- the picture ----------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """`Refused` before any work where the picture could not be drawn."""
    if path.suffix != ".png" or not path.parent.is_dir():
        expected = "a file name ending in .png, in a folder that exists"
        raise Refused(shown(path), expected=expected, where="--plot", hint="give another name")
    try:
        import matplotlib  # noqa: F401, only to see before any work whether it is there
    except ImportError as error:
        hint = "pip install 'adapterkit[plot]'"
        raise Refused(
            "matplotlib is not installed",
            expected="matplotlib 3.8 or newer",
            where="--plot",
            hint=hint,
        ) from error


def draw(result: dict[str, Any], path: Path) -> None:
    """A heatmap of the deltas' norms, relative where they are known: a row per layer, a column per kind of module."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    relative = any(module["relative"] is not None for module in result["modules"])
    if not any(module["norm"] is not None for module in result["modules"]):
        expected = "an adapter with at least one"
        raise Refused(
            "no norms to draw",
            expected=expected,
            where=result["name"],
            hint="see its problems without --plot",
        )
    rows, columns, values = grid(result["modules"], "relative" if relative else "norm")
    figure = Figure(
        figsize=(min(4 + 0.4 * len(columns), 60), min(2.5 + 0.22 * len(rows), 60)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("lightgrey")  # no such module, or no number
    picture = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), map(_label, columns), rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), map(_label, rows))
    figure.colorbar(picture, label="‖delta‖ / ‖W‖" if relative else "‖delta‖")
    axes.set_title(_label(result["name"]))
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise Failed(
            f"cannot write: {error.strerror}", where=str(path), hint="check the disk and the folder"
        ) from error


def grid(modules: list[dict[str, Any]], key: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows (names up to the layer's number), columns (what follows it), and values, NaN where there is none."""
    places = [_place(_name(module)) for module in modules]
    rows = list(dict.fromkeys(row for row, _ in places))
    columns = list(dict.fromkeys(column for _, column in places))
    values = [[math.nan] * len(columns) for _ in rows]
    for (row, column), module in zip(places, modules, strict=True):
        if module[key] is not None:
            values[rows.index(row)][columns.index(column)] = module[key]
    return rows, columns, values


def _place(name: str) -> tuple[str, str]:
    found = re.match(r"((?:.*?\.)?\d+)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _label(name: str) -> str:
    return shown(name).replace(
        "$", r"\$"
    )  # matplotlib takes what stands between two of them for a formula
