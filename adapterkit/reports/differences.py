"""The table that diff prints."""

from typing import Any

from adapterkit import dtypes
from adapterkit.errors import shown

NOISE = (
    2.0**-44
)  # of ‖b‖ ‖a‖: what float64 arithmetic on factors may leave of a difference of nothing
TITLES = ("changed", "", "relative", "max abs", "cosine", "differ", "rank")


def table(document: dict[str, Any]) -> list[str]:
    """The document's changes as lines: a table of what changed, then - what only A has and + what only B has, then settings."""
    rows = [TITLES, *(_cells(row) for row in document["changed"])] if document["changed"] else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{c:<{w}}" if i < 2 else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    for sign, side in (("-", "removed"), ("+", "added")):
        lines += [
            f"{sign} {row['name']}  {_both_sides(row | {'why': side, 'a': row, 'b': row})}"
            for row in document[side]
        ]
    return lines + [_setting_text(row) for row in document["config"]]


def _setting_text(row: dict[str, Any]) -> str:
    a = "not set" if row["change"] == "added" else shown(repr(row["a"]))
    b = "not set" if row["change"] == "removed" else shown(repr(row["b"]))
    return f"{shown(row['name'])}: {a} -> {b}" + ("" if row["decides"] else "  (does not count)")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    share = row["differing"]
    return (
        row["name"],
        _both_sides(row),
        _error_text(row),
        "-" if row["max_abs"] is None else f"{row['max_abs']:.2e}",
        "-" if row["cosine"] is None else f"{row['cosine']:.6f}",
        "-" if share is None else f"{share:.2%}" if share >= 1e-4 else f"{share:.0e}",
        _rank_text(row["rank"]),
    )


def _both_sides(row: dict[str, Any]) -> str:
    """What the row compares: kind, dtype or rank and scale, and shape; of the second side what is not the same."""
    one, other = _what(row["a"]), _what(row["b"])
    differing = other if row["a"]["shape"] != row["b"]["shape"] else other[:1]
    words = [*one, *(["->", *differing] if one != other else [])]
    words += (
        [f"({row['rows_only_a']} only in A, {row['rows_only_b']} only in B)"]
        if row["why"] == "rows"
        else []
    )
    return " ".join(words if row["kind"] == "tensor" else [row["kind"], *words])


def _what(side: dict[str, Any]) -> list[str]:
    values = side["dtype"] if "dtype" in side else f"r {side['rank']} scale {side['scale']:g}"
    return [values, "x".join(map(str, side["shape"])) or "scalar"]


def _error_text(row: dict[str, Any]) -> str:
    if row["relative_error"] is not None:
        return f"{row['relative_error']:.2e}"
    measured = (
        row["why"] not in ("shape", "dtype") and row["a"].get("dtype", "F32") in dtypes.FLOATS
    )
    return "-" if not measured else "inf" if row["norm"] == 0 else "nan"


def _rank_text(rank: dict | None) -> str:
    if rank is None:
        return "-"
    return (
        f">{rank['above']}"
        if rank["needed"] is None
        else f"{'~' * rank['estimate']}{rank['needed']}"
    )
