"""A heatmap of the deltas' norms, by layer and module."""

import math
import re
from pathlib import Path

from adapterkit.errors import Failed, Refused, shown
from adapterkit.optional import optional
from adapterkit.records import Json
from adapterkit.reports.tables import module_label


def check_plot(path: Path) -> None:
    """`Refused` if the file's name or folder is invalid, or matplotlib is not installed."""
    if path.suffix != ".png" or not path.parent.is_dir():
        expected = "a file name ending in .png, in a folder that exists"
        raise Refused(shown(path), expected=expected, where="--plot", hint="give another name")
    # before any work: is it installed?
    install, expected = '"adapterkit[plot]"', "matplotlib 3.8 or newer"
    optional("matplotlib", install=install, expected=expected, where="--plot")


def draw(result: Json, path: Path) -> None:
    """Draw the deltas' norms, relative ones if known: a row per layer, a column per module kind.

    `Refused` where no module has a norm, `Failed` where the file cannot be written.
    """
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


def grid(modules: list[Json], key: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows (names up to the layer's number), columns (their rest), and values (NaN: no module)."""
    places = [_place(module_label(module)) for module in modules]
    rows = list(dict.fromkeys(row for row, _ in places))
    columns = list(dict.fromkeys(column for _, column in places))
    values = [[math.nan] * len(columns) for _ in rows]
    for (row, column), module in zip(places, modules, strict=True):
        if module[key] is not None:
            values[rows.index(row)][columns.index(column)] = module[key]
    return rows, columns, values


def _place(name: str) -> tuple[str, str]:
    match = re.match(r"((?:.*?\.)?\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else ("", name)


def _label(name: str) -> str:
    return shown(name).replace("$", r"\$")  # matplotlib reads $...$ as a formula
