"""Pages of a report, of an adapter that `inspect` plots, and of a receipt in a notebook."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.core.errors import Refused
from adapterkit.core.options import bytes_text
from adapterkit.core.records import Json, Settings
from adapterkit.verbs.look.heatmaps import Scale, heatmaps_of
from adapterkit.verbs.look.overview.document import document_of, for_others, outcome_of
from adapterkit.verbs.look.overview.scores import scores_section
from adapterkit.verbs.look.pages import (
    band,
    check_page,
    command,
    frame,
    heatmap,
    inline,
    key,
    page,
    paragraph,
    section,
    side_by_side,
    table,
    write_page,
)
from adapterkit.verbs.look.records.report import Report

MEASURES = {
    "relative": ("‖delta‖ / ‖W‖", True),
    "norm": ("‖delta‖", True),
    "effective_rank": ("effective rank", False),
    "share": ("share of the squared norm", True),
    "delta": ("the change, relative to the weight", True),
    "survived": ("share of the delta that is in the result", False),
    "rounding": ("noise of rounding, relative to the delta", True),
    "requantization": ("noise of encoding again, relative to the delta", True),
    "changed": ("share of values that differ", False),
    "error": ("relative error", True),
    "energy": ("energy kept", False),
}
MOST_PROBLEMS = 12  # that are shown of each adapter
Cells = Sequence[Sequence[float | None]]


class Document(dict[str, Any]):
    """The numbers of a report; notebooks show its page."""

    page = ""

    def _repr_html_(self) -> str:
        return frame(self.page)


def write_report(report: Report) -> Json:
    """Write the page of a report; return its document."""
    path = Path(report.out)
    check_page(path, "--out", report.overwrite)
    document = Document(document_of(report))
    document.page = report_page(for_others(document, report))
    write_page(path, document.page)
    return document


def report_page(document: Json) -> str:
    """The HTML of a report."""
    names = [one["name"] for one in document["adapters"]]
    body = [
        f"<h1>{inline(' · '.join(names))}</h1>",
        *_verdict(document),
        section("Adapters", _adapters(document["adapters"])),
        section("Where the change is", _heatmaps(document["heatmaps"])),
        section("Singular values", _spectra(document["spectra"], document["ranks"])),
        section("Together", _pairs(document["pairs"], names)),
        section("Weights", _weights(document["weights"], names)),
        section("Outcome", _outcome(document["outcome"])),
        section("Scores", scores_section(document["scores"])),
        section(
            "How to load",
            [f"<h3>{inline(c['engine'])}</h3>{command(c['command'])}" for c in document["loading"]],
        ),
        paragraph(f"adapterkit {__version__}; --json prints the numbers of this page.", "soft"),
    ]
    return page(f"{', '.join(names)}: adapterkit report", [part for part in body if part])


def heatmap_page(result: Json) -> str:
    """The HTML of the heatmaps of an adapter as `inspect` returns it; `Refused` without any
    norm."""
    if all(module["norm"] is None for module in result["modules"]):
        raise Refused(
            "no norms to draw",
            expected="an adapter with at least one",
            where=result["name"],
            hint="see its problems without --plot",
            code="AK206",
        )
    name = result["name"]
    maps = _heatmaps(heatmaps_of({name: result}))
    return page(f"{name}: adapterkit inspect", [f"<h1>{inline(name)}</h1>", *maps])


def receipt_frame(data: Json) -> str:
    """The HTML of a receipt in a notebook."""
    return frame(page("adapterkit receipt", _outcome(outcome_of(data))))


def number(value: float | None, style: str = ".4g") -> str:
    return "–" if value is None else format(value, style)


def _verdict(document: Json) -> list[str]:
    """The problems, then the advice."""
    lines = []
    for adapter in document["adapters"]:
        problems = adapter["problems"]
        for problem in problems[:MOST_PROBLEMS]:
            text = f"{problem['problem']} (in {problem['where']}). {problem['hint']}."
            lines.append(f"<p><strong>{inline(adapter['name'])}</strong>: ")
            lines.append(f"{inline(text)}</p>")
            lines += [command(problem["command"])] if problem["command"] else []
        if len(problems) > MOST_PROBLEMS:
            lines.append(paragraph(f"and {len(problems) - MOST_PROBLEMS} more: --json lists all"))
    advice = document["advice"]
    if not lines:
        lines.append(paragraph("No problems were found."))
        lines.append(paragraph(f"Next: {advice['reason']}."))
        lines += [command(advice["command"])] if advice["command"] else []
    kind = "verdict bad" if any(a["problems"] for a in document["adapters"]) else "verdict"
    return [f'<div class="{kind}">{"".join(lines)}</div>']


def _adapters(adapters: Sequence[Json]) -> list[str]:
    rows = [
        ("format", *(f"{a['format']} {a['peft_type'] or ''}".strip() for a in adapters)),
        ("base", *(str(a["base"] or "not said") for a in adapters)),
        ("modules", *(f"{a['modules']:,}" for a in adapters)),
        ("rank", *(number(a["rank"]) if a["rank"] is not None else "differs" for a in adapters)),
        ("scale", *(number(a["scale"]) if a["scale"] is not None else "differs" for a in adapters)),
        ("size", *(bytes_text(a["bytes"]) for a in adapters)),
        ("‖delta‖, all modules", *(number(a["norm"]) for a in adapters)),
        ("‖delta‖/‖W‖, median", *(number(a["relative"]) for a in adapters)),
        ("stable rank, median", *(number(a["stable_rank"], ".3g") for a in adapters)),
        ("rank for 90 % of the energy", *(number(a["rank_90"]) for a in adapters)),
        ("rank for 99 %", *(number(a["rank_99"]) for a in adapters)),
    ]
    flags = [_flags(a["flags"]) or "none" for a in adapters]
    return [table(["", *(a["name"] for a in adapters)], [*rows, ("flags", *flags)], texts=True)]


def _flags(flags: Json) -> str:
    """Settings that differ from PEFT's defaults."""
    own = [(k, v) for k, v in flags.items() if v and v != "none" and (k, v) != ("init", True)]
    return ", ".join(name if value is True else f"{name} {value}" for name, value in own)


def _maps(
    label: str, log: bool, rows: Sequence[str], columns: Sequence[str], tables: Mapping[str, Cells]
) -> str:
    """Heatmaps of modules by layers with one scale; a sentence if all values are equal."""
    flat = [v for values in tables.values() for row in values for v in row if v is not None]
    scale = Scale.of(flat, log)
    if not flat or min(flat) == max(flat):
        return paragraph(f"{label}: {number(flat[0])} everywhere.") if flat else ""
    names = [row or "outside of layers" for row in rows]
    figures = [
        heatmap(f"{title} {label}".strip(), title, columns, names, cells, scale, number)
        for title, values in tables.items()
        for cells in [[*zip(*values, strict=True)]]
    ]
    return f"<h3>{inline(label)}</h3>{side_by_side(figures, 'maps')}{key(scale, number)}"


def _heatmaps(maps: Json) -> list[str]:
    parts = []
    for measure in dict.fromkeys(one["measure"] for one in maps["tables"]):
        label, log = MEASURES[measure]
        tables = {t["adapter"]: t["values"] for t in maps["tables"] if t["measure"] == measure}
        parts.append(_maps(label, log, maps["rows"], maps["columns"], tables))
    return [part for part in parts if part]


def _spectra(spectra: Sequence[Json], ranks: Sequence[Json]) -> list[str]:
    parts, tables = [], []
    for one in ranks:
        its = [s for s in spectra if s["adapter"] == one["adapter"]]
        if not its:
            continue
        scale = Scale.of([v for s in its for v in (*s["low"], *s["high"])], log=True)
        text = (
            f"{one['adapter']}: {number(scale.low)} to {number(scale.high)}, logarithmic; the "
            "median over the modules of each kind, and the band of 10 to 90 %."
        )
        figures = [
            band(f"{one['adapter']} singular values, {name}", name, *lines, scale)
            for s in its
            for name in [f"{s['modules']} ({s['count']})"]
            for lines in [(s["low"], s["median"], s["high"])]
        ]
        parts += [paragraph(text, "soft"), side_by_side(figures, "bands")]
        rows = [
            (str(row["rank"]), f"{row['energy']:.2%}", bytes_text(row["bytes"]))
            for row in one["rows"]
        ]
        caption = f"what resize --rank keeps of {one['adapter']}"
        tables.append(table(["rank", "energy kept", "size"], rows, caption=caption))
    return [*parts, side_by_side(tables, "side")] if tables else []


def _matrix(title: str, names: Sequence[str], values: Cells) -> str:
    rows = [
        (name, *(number(value, ".3f") for value in row))
        for name, row in zip(names, values, strict=True)
    ]
    shares = [[None if v is None else min(abs(v), 1.0) for v in row] for row in values]
    return table(["", *names], rows, caption=title, shares=shares)


def _pairs(pairs: Json | None, names: Sequence[str]) -> list[str]:
    if pairs is None:
        return []
    titles = {
        "cosines": "cosines of the deltas",
        "output_cosines": "cosines of the deltas' outputs, on the inputs of the statistics",
        "inputs": "overlap of the input spaces (rows of a)",
        "outputs": "overlap of the output spaces (columns of b)",
        "opposed": "share of elements with opposed signs",
    }
    tables = [_matrix(text, names, pairs[name]) for name, text in titles.items() if name in pairs]
    parts = [side_by_side(tables, "side")]
    layers = pairs["layers"]
    couples = [(i, j) for i in range(len(names)) for j in range(i)]
    values = [[layer["cosines"][i][j] for layer in layers] for i, j in couples]
    sizes = [[None if v is None else abs(v) for v in row] for row in values]
    layer_names = [layer["layer"] for layer in layers]
    couple_names = [f"{names[i]} · {names[j]}" for i, j in couples]
    by_layer = {"": [*zip(*sizes, strict=True)]}
    parts.append(_maps("absolute cosines by layer", False, layer_names, couple_names, by_layer))
    total = pairs["sum"]
    text = (
        f"The plain sum has the norm {number(total['norm'])}; orthogonal deltas would give "
        f"{number(total['independent'])}. It keeps this share of each adapter:"
    )
    kept = [(n, number(v, ".1%")) for n, v in zip(names, total["retention"], strict=True)]
    return [*parts, paragraph(text), table(["adapter", "kept in the sum"], kept)]


def _weights(weights: Json | None, names: Sequence[str]) -> list[str]:
    if weights is None:
        return []
    own = [(name, number(w)) for name, w in zip(names, weights["default"], strict=True)]
    others = "on all modules" if not weights["rows"] else "on modules without one of their own"
    parts = [table(["adapter", others], own)]
    tables = {one["adapter"]: one["values"] for one in weights["tables"]}
    if weights["rows"]:
        parts.append(_maps("weight", False, weights["rows"], weights["columns"], tables))
    return [*parts, _losses(weights["fit"])]


def _losses(fit: Settings | None) -> str:
    """The losses on held-out samples of a fit: a line for each candidate, a column for each
    file."""
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


def _outcome(outcome: Json | None) -> list[str]:
    if outcome is None:
        return []
    totals = outcome["totals"]
    inputs = [str(one.get("name") or one.get("repo") or "?") for one in outcome["inputs"]]
    rows = [
        ("verb", outcome["verb"]),
        ("inputs", ", ".join(inputs)),
        ("options", json.dumps(outcome["options"], ensure_ascii=False)),
        ("written", f"{bytes_text(totals['bytes_written'])} in {outcome['seconds']:.1f} s"),
        ("fingerprint", outcome["fingerprint"]),
    ]
    parts = [table(["", ""], rows, texts=True)]
    parts += [paragraph(f"warning: {text}") for text in outcome["warnings"]]
    parts += [paragraph(note, "soft") for note in outcome["notes"]]
    if choices := outcome["choices"]:
        heads = ["", "loss", "perplexity", "more than the best"]
        more = lambda row: row.get("more", {}).get("value")
        lines = [
            (row["model"], *map(number, (row["loss"]["value"], row["perplexity"], more(row))))
            for row in choices["rows"]
        ]
        parts.append(table(heads, lines, caption="the ways that were measured"))
    for metric, values in outcome["metrics"].items():
        label, log = MEASURES[metric]
        parts.append(_maps(label, log, outcome["rows"], outcome["columns"], {"": values}))
    if outcome["worst"]:
        heads = [name for name in outcome["worst"][0] if name != "name"]
        lines = [(one["name"], *(number(one[head]) for head in heads)) for one in outcome["worst"]]
        parts.append(table(["tensor", *heads], lines, caption="the most affected tensors"))
    return parts
