"""What a file of weights says, as numbers and on a report's page."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from adapterkit.core.records import Json, Settings
from adapterkit.verbs.look.heatmaps import grid_of
from adapterkit.verbs.look.pages.page import paragraph, table

if TYPE_CHECKING:
    from adapterkit.core.inputs.weights_file import Weight, WeightsFile

FIT = ("files", "losses", "steps", "written", "seconds")  # what a fit says of itself


def weights_document(weights: "WeightsFile", names: Sequence[str]) -> Json:
    """Weights by layer and module, of directions their mean; and losses, where a fit wrote them."""
    places, rows, columns = grid_of(weights.modules)
    at = {place: weights.modules[name] for name, place in places.items()}
    cell = lambda place, number: _mean(at[place][number]) if place in at else None
    tables = [
        {"adapter": name, "values": [[cell((r, c), number) for c in columns] for r in rows]}
        for number, name in enumerate(names)
    ]
    known = {key: value for key, value in (weights.fit or {}).items() if key in FIT}
    return {
        "per": weights.per,
        "default": list(weights.default),
        "rows": rows,
        "columns": columns,
        "tables": tables,
        "fit": known or None,
    }


def _mean(weight: "Weight") -> float:
    return fmean(weight or (0.0,)) if isinstance(weight, tuple) else weight


def losses_table(fit: Settings | None) -> str:
    """The losses held out of a fit: a line for all that was compared, a column for each file."""
    rows = fit.get("losses") if fit else None
    is_table = isinstance(rows, list) and all(
        isinstance(row, dict) and {"row", "files", "value"} <= row.keys() for row in rows
    )
    if not fit or not rows or not is_table:
        return ""
    files = [str(name) for name in fit.get("files") or range(1, len(rows[0]["files"]) + 1)]
    lines = [
        (str(row["row"]), *(f"{loss:.4f}" for loss in (*row["files"], row["value"])))
        for row in rows
    ]
    written = fit.get("written")
    reason = paragraph(str(written["reason"])) if isinstance(written, dict) else ""
    heads = ["held out", *files, "all"]
    return table(heads, lines, caption="losses, the weights of a row in place") + reason
