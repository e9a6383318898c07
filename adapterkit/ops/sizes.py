"""Measured numbers as receipts hold them."""


def short(value: float) -> float:
    """Rounded to six significant digits."""
    return float(f"{value:.6g}")
