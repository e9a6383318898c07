"""The table that inspect prints."""

import re
from typing import Any

from adapterkit.errors import AdapterkitError, shown

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
        value = module_label(row)
    if value is None:
        return "?"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def module_label(module: dict[str, Any]) -> str:
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
