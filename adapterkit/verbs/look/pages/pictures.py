"""Pictures as SVG text: heatmaps, bands of lines. Their texts are HTML beside them, so that they
keep their size on narrow screens."""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapterkit.verbs.look.pages.page import escape

MOST_CELLS = 4000  # of one heatmap, beyond which it is a bitmap
FAINTEST = 0.05  # the opacity of the smallest value
HUE = (47, 117, 193)  # of a bitmap, which has one colour in both schemes
WIDTH, HEIGHT = 200, 72  # of a band's own coordinates

Row = Sequence[float | None]


class Scale(NamedTuple):
    """Values to shares of a colour, from the smallest to the largest of them."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], log: bool = False) -> "Scale":
        """The scale of these values; zeros have no place on a logarithmic one."""
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


def heatmap(
    label: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Row],
    scale: Scale,
    text: Callable[[float], str],
) -> str:
    """A figure with a strip of cells for each row; None is a place without a value. Each cell has
    its names and value as a tooltip, unless there are too many of them for that. `label` is for
    those who do not see it."""
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
    """What the colours of heatmaps mean."""
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
    """The cells as a PNG with a palette of 256 opacities, the first for no value."""
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


def band(
    label: str,
    title: str,
    low: Sequence[float],
    middle: Sequence[float],
    high: Sequence[float],
    scale: Scale,
) -> str:
    """A figure of a line between two others, over 1, 2, ...; `scale` is that of its height, `label`
    is for those who do not see it."""
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
