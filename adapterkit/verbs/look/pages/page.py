"""A page of one file: sections of tables and pictures, light and dark, also on paper."""

import html
from collections.abc import Sequence

from adapterkit.core.errors import shown

MARK = '<meta name="generator" content="adapterkit">'  # by which a page is known again
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
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
    """A text as HTML, with letters that are not printed or turn the line's direction escaped."""
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
    """A page inside another one, which neither changes the other's style nor runs anything."""
    return (
        f'<iframe sandbox title="adapterkit" srcdoc="{html.escape(whole)}" '
        'style="width:100%;height:30rem;border:0;resize:vertical"></iframe>'
    )


def side_by_side(parts: Sequence[str], style: str) -> str:
    """Figures of one kind (`maps`, `bands`), or tables (`side`), as many in a line as fit."""
    return f"<div class={style}>{''.join(parts)}</div>"


def section(title: str, parts: Sequence[str]) -> str:
    """A section with a heading; nothing without parts."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if parts else ""


def paragraph(text: str, style: str = "") -> str:
    return f"<p class={style}>{inline(text)}</p>" if style else f"<p>{inline(text)}</p>"


def inline(text: str) -> str:
    """`escape` of a text of any length."""
    words = text.split(" ")
    return " ".join(map(escape, words))


def command(text: str) -> str:
    """A command, or several lines, to copy."""
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
