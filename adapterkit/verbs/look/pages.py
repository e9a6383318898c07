"""Render single-file pages: sections of tables and pictures, light and dark, also on paper, without
script and network. Captions are HTML outside the SVG, so that they keep their size on narrow
screens."""

import base64
import html
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.errors import Failed, Refused, shown
from adapterkit.core.output.writer import unfinished_name
from adapterkit.core.records import Json
from adapterkit.verbs.look.heatmaps import Scale

MARK = '<meta name="generator" content="adapterkit">'  # by which a page is known again
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_CELLS = 4000  # of one heatmap, beyond which it is a bitmap
FAINTEST = 0.05  # the opacity of the smallest value
HUE = (47, 117, 193)  # of a bitmap, which has one colour in both schemes
WIDTH, HEIGHT = 200, 72  # of a band's own coordinates

Row = Sequence[float | None]
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2329;--soft:#56606b;--line:#d5dbe1;
--panel:#f4f6f8;--hue:#1f62ad;--bad:#a5231b;--good:#1a6b33}
@media (prefers-color-scheme:dark){:root{--paper:#11161b;--ink:#e4e8ec;--soft:#a2adb8;
--line:#333c45;--panel:#1a2129;--hue:#79b4f3;--bad:#ff8f86;--good:#7fd396}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1.5rem 1rem 4rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:.2em 0}h2{font-size:1.2rem;margin:2.4em 0 .6em;
border-top:1px solid var(--line);padding-top:1em}h3{font-size:1rem;margin:1.5em 0 .4em}
p,ul{max-width:46rem;margin:.5em 0}.soft,figcaption,.ticks,.key,th{color:var(--soft)}
.soft,.key,.ticks{font-size:.85rem}
code,pre{font:13px/1.45 ui-monospace,monospace}pre{background:var(--panel);padding:.6rem .8rem;
border-radius:6px;white-space:pre-wrap;margin:.4em 0}
.wide{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:normal;white-space:nowrap}
th:first-child,td:first-child,.texts td,.texts th{text-align:left;padding-right:1.6rem}
thead th{font-weight:500}
tbody th{font-weight:400;color:var(--ink)}.texts td{white-space:normal}
caption{text-align:left;padding:.3rem 0}
td[style]{padding:.25rem .6rem;background:color-mix(in srgb,var(--hue) var(--share),transparent)}
.verdict{background:var(--panel);border-left:4px solid var(--good);padding:.7rem 1rem;
border-radius:0 6px 6px 0;margin:1rem 0}.verdict.bad{border-color:var(--bad)}
.verdict p{margin:.2em 0}.verdict.bad strong{color:var(--bad)}
figure{margin:1em 0}figcaption{font-size:.9rem;margin-bottom:.3em}svg{display:block;width:100%}
.map{display:grid;grid-template-columns:minmax(4rem,auto) 1fr;column-gap:.6rem}
.map figcaption,.map .key{grid-column:1/-1}.map .names{max-width:11rem;font-size:12px}
.map .names span{display:block;height:16px;line-height:16px;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap;text-align:right}
.map svg{height:calc(16px*var(--rows));background:var(--panel);fill:var(--hue)}
.map .ticks{grid-column:2}.maps .map{margin:.6em 0}
.ticks{display:flex;justify-content:space-between;gap:1rem}
.key{display:flex;align-items:center;gap:.5rem;margin-top:.3em}
.key i{width:7rem;height:.6rem;border:1px solid var(--line);
background:linear-gradient(90deg,color-mix(in srgb,var(--hue) 5%,transparent),var(--hue))}
.bands{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:.4rem 1.2rem}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:0 2rem}
.side{display:flex;flex-wrap:wrap;gap:0 3rem}
.band{margin:.4em 0}.band svg{height:72px;background:var(--panel)}
.band polygon{fill:var(--hue);fill-opacity:.25}.band polyline{fill:none;stroke:var(--hue);
stroke-width:1.5;vector-effect:non-scaling-stroke}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--panel:#f4f6f8;--hue:#1f62ad;
--line:#ccc}body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid;margin-top:1.4em}
figure,tr,pre{break-inside:avoid}*{print-color-adjust:exact}@page{margin:14mm}}
"""


def escape(text: object) -> str:
    """A text as HTML; unprintable letters and those that change the line's direction are
    escaped."""
    return html.escape(shown(text))


def page(title: str, body: Sequence[str]) -> str:
    """The file of a page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{MARK}"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def frame(whole: str) -> str:
    """A page inside another one; neither changes the other's style, and the page runs no script."""
    return (
        f'<iframe sandbox title="adapterkit" srcdoc="{html.escape(whole)}" '
        'style="width:100%;height:30rem;border:0;resize:vertical"></iframe>'
    )


def side_by_side(parts: Sequence[str], style: str) -> str:
    """Figures of one kind (`maps`, `bands`), or tables (`side`), as many per line as fit."""
    return f"<div class={style}>{''.join(parts)}</div>"


def section(title: str, parts: Sequence[str]) -> str:
    """A section with a heading; empty without parts."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if parts else ""


def paragraph(text: str, style: str = "") -> str:
    return f"<p class={style}>{inline(text)}</p>" if style else f"<p>{inline(text)}</p>"


def inline(text: str) -> str:
    """`escape` of a text of any length."""
    words = text.split(" ")
    return " ".join(map(escape, words))


def command(text: str) -> str:
    """One or several lines of a command, to copy."""
    return f"<pre>{chr(10).join(inline(line) for line in text.splitlines())}</pre>"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    shares: Sequence[Sequence[float | None]] | None = None,  # of each cell's colour, but the first
    texts: bool = False,
) -> str:
    """A table whose first column names its rows."""
    lines = []
    for n, (name, *cells) in enumerate(rows):
        styles = [""] * len(cells)
        if shares is not None:
            styles = ["" if s is None else f' style="--share:{45 * s:.0f}%"' for s in shares[n]]
        filled = zip(styles, cells, strict=True)
        lines.append(
            f'<tr><th scope="row">{escape(name)}</th>'
            + "".join(f"<td{style}>{inline(cell)}</td>" for style, cell in filled)
            + "</tr>"
        )
    titles = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    label = f"<caption class=soft>{escape(caption)}</caption>" if caption else ""
    kind = " class=texts" if texts else ""
    return (
        f"<div class=wide><table{kind}>{label}<thead><tr>{titles}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def heatmap(
    label: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Row],
    scale: Scale,
    text: Callable[[float], str],
) -> str:
    """A figure with a strip of cells for each row; None is an empty cell. Each cell has its names
    and value as a tooltip, unless there are too many. `label` is for screen readers."""
    is_small = len(rows) * len(columns) <= MOST_CELLS
    cells = _cells(rows, columns, values, scale, text) if is_small else _bitmap(values, scale)
    picture = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {len(columns)} {len(rows)}" '
        f'preserveAspectRatio="none">{cells}</svg>'
    )
    step = 1 if len(rows) <= 80 else math.ceil(len(rows) / 40)
    names = "".join(
        f"<span>{escape(name) if n % step == 0 else ''}</span>" for n, name in enumerate(rows)
    )
    ends = dict.fromkeys((columns[0], columns[-1])) if columns else ()
    ticks = "".join(f"<span>{escape(name)}</span>" for name in ends)
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return (
        f'<figure class="map" aria-label="{escape(label)}" style="--rows:{len(rows)}">{caption}'
        f'<div class="names" aria-hidden="true">{names}</div><div class="cells">{picture}</div>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></figure>'
    )


def key(scale: Scale, text: Callable[[float], str]) -> str:
    """The legend of the heatmaps' colours."""
    return f'<div class="key">{escape(text(scale.low))}<i></i>{escape(text(scale.high))}</div>'


def _cells(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Row],
    scale: Scale,
    text: Callable[[float], str],
) -> str:
    parts = []
    for y, (row, line) in enumerate(zip(rows, values, strict=True)):
        for x, (column, value) in enumerate(zip(columns, line, strict=True)):
            if value is None:
                continue
            shade = FAINTEST + (1 - FAINTEST) * scale.share(value)
            name = escape(f"{column} {row}: {text(value)}")
            parts.append(
                f'<rect x="{x}" y="{y}" width="1" height="1" fill-opacity="{shade:.3g}">'
                f"<title>{name}</title></rect>"
            )
    return "".join(parts)


def _bitmap(values: Sequence[Row], scale: Scale) -> str:
    """The cells as a PNG with a palette of 256 opacities, the first for missing values."""
    lines = [
        b"\0" + bytes(0 if v is None else 13 + round(242 * scale.share(v)) for v in row)
        for row in values
    ]
    width, height = len(values[0]), len(values)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(HUE) * 256,
        b"tRNS": bytes(range(256)),
        b"IDAT": zlib.compress(b"".join(lines), 9),
        b"IEND": b"",
    }
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f'<image href="{source}" width="{width}" height="{height}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated"/>'
    )


def bars(label: str, rows: Sequence[tuple[str, Json]]) -> str:
    """A figure with a bar from 0 to each row's `value`, and a line from its `low` to its `high`
    unless they are null. `label` is for screen readers."""
    values = [one[end] for _, one in rows for end in ("value", "high") if one[end] is not None]
    wide = 100 / max(*values, 1e-9)
    parts = []
    for y, (name, one) in enumerate(rows):
        value, title = one["value"], escape(f"{name}: {one['value']:.4f}")
        bar = f'<rect y="{y + 0.15}" width="{wide * value:.3f}" height=".7" fill-opacity=".55">'
        parts.append(f"{bar}<title>{title}</title></rect>")
        if one["low"] is not None and one["high"] is not None:
            at, width = wide * one["low"], wide * (one["high"] - one["low"])
            line = f'<rect x="{at:.3f}" y="{y + 0.42}" width="{width:.3f}" height=".16"'
            parts.append(f'{line} style="fill:var(--ink)"/>')
    names = "".join(f"<span>{escape(name)}</span>" for name, _ in rows)
    return (
        f'<figure class="map" aria-label="{escape(label)}" style="--rows:{len(rows)}">'
        f'<div class="names" aria-hidden="true">{names}</div><svg role="img" '
        f'aria-label="{escape(label)}" viewBox="0 0 100 {len(rows)}" preserveAspectRatio="none">'
        f"{''.join(parts)}</svg></figure>"
    )


def band(
    label: str,
    title: str,
    low: Sequence[float],
    middle: Sequence[float],
    high: Sequence[float],
    scale: Scale,
) -> str:
    """A figure of a line between two others, over 1, 2, ...; `scale` is the scale of its height,
    `label` is for screen readers."""
    at = lambda n, value: (
        f"{WIDTH * n / max(len(middle) - 1, 1):.1f},{HEIGHT * (1 - scale.share(value)):.1f}"
    )
    points = lambda values: [at(n, value) for n, value in enumerate(values)]
    name = f'aria-label="{escape(label)}"'
    area = " ".join([*points(low), *points(high)[::-1]])
    return (
        f'<figure class="band" {name}><figcaption>{escape(title)}</figcaption>'
        f'<svg role="img" {name} viewBox="0 -2 {WIDTH} {HEIGHT + 4}" '
        f'preserveAspectRatio="none"><polygon points="{area}"/>'
        f'<polyline points="{" ".join(points(middle))}"/></svg>'
        f'<div class="ticks" aria-hidden="true"><span>1</span><span>{len(middle)}</span></div>'
        "</figure>"
    )


def check_page(path: Path, flag: str, overwrite: bool) -> None:
    """`Refused` for a path that is not a file, or holds something else; without `overwrite` also
    for an older page."""
    if path.suffix != ".html" or not os.path.isdir(path.parent) or os.path.isdir(path):
        expected, hint = (
            "a file name ending in .html, in a folder that exists",
            "give another name, for example report.html",
        )
        problem = f"{shown(path)} cannot be an HTML page"
        raise Refused(problem, expected=expected, where=flag, hint=hint, code="AK601")
    if os.path.exists(path):  # not if the system refuses the name
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
    """Write the page completely or not at all; `Failed` if that is impossible."""
    try:
        replace_file(path, text.encode(), path.with_name(unfinished_name(path.name)), durable=False)
    except Failed as error:
        error.hint = "check the disk and the folder"
        raise
