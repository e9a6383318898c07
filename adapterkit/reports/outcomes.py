"""A receipt's metrics in a few lines for the terminal."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from adapterkit.errors import shown


def outcomes(receipt: dict[str, Any]) -> Iterator[str]:
    """Bytes read and written, energy kept, survival of the change, relative errors."""
    totals, metrics = receipt["totals"], receipt["parameters"]
    before, after = totals.get("bytes_read", 0), totals["bytes_written"]
    if before:
        yield f"sizes: {before:,} bytes read, {after:,} written ({after / before:.2f} of them)"
    named = lambda name: {key: metric[name] for key, metric in metrics.items() if name in metric}
    refits = {
        key: metric for key, metric in metrics.items() if "energy" in metric and "norm" in metric
    }
    total = sum(metric["norm"] ** 2 for metric in refits.values())
    if total:
        share = sum(metric["energy"] * metric["norm"] ** 2 for metric in refits.values()) / total
        text = f"energy kept: {share:.2%} of all {len(refits)} modules' together"
        yield f"{text}; {_least(named('energy'))}"
    if survived := named("survived"):
        text = f"of the change {median(survived.values()):.1%} survives in the median of"
        yield f"{text} {len(survived)} tensors; {_least(survived)}"
    errors = {
        key: metric["error"]
        for key, metric in metrics.items()
        if "error" in metric and "energy" not in metric
    }
    if errors:
        after = named("error_after")
        beside = f", with the factors {median(after.values()):.4f}" if after else ""
        worst = max(errors, key=lambda key: errors[key])
        error = f"{median(errors.values()):.4f} in the median of {len(errors)} weights{beside}"
        yield f"relative error: {error}; largest: {errors[worst]:.4f} of {shown(worst)}"


def _least(shares: dict[str, float]) -> str:
    key = min(shares, key=lambda key: shares[key])
    return f"least: {shares[key]:.1%} of {shown(key)}"
