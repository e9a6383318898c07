"""Sizes as people type them: 5GB; KB, MB and GB are powers of 1000. And measured numbers as receipts hold them."""

from adapterkit.errors import Refused

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str, where: str) -> int:
    """Bytes of a size such as 5GB; `where` is the option that it came with."""
    upper = text.strip().upper()
    unit = next((u for u in UNITS if upper.endswith(u)), None)
    number = upper.removesuffix(unit) if unit else upper
    try:
        size = int(float(number) * UNITS.get(unit or "", 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise Refused(f"size {text!r}", expected="a number with KB, MB, GB or TB", where=where, do="e.g. 5GB")
    return size


def short(value: float) -> float:
    """Rounded to six significant digits."""
    return float(f"{value:.6g}")
