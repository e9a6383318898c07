"""A receipt's metrics in a few lines for the terminal."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from adapterkit.errors import shown


def outcomes(receipt: dict[str, Any]) -> Iterator[str]:
    """Energy kept, survival of the change, relative errors."""
    metrics = receipt["parameters"]
    named = lambda name: {key: metric[name] for key, metric in metrics.items() if name in metric}
    refits = {
        key: metric for key, metric in metrics.items() if "energy" in metric and "norm" in metric
    }
    total = sum(metric["norm"] ** 2 for metric in refits.values())
    if total and min(named("energy").values()) < 0.9995:
        share = sum(metric["energy"] * metric["norm"] ** 2 for metric in refits.values()) / total
        text = f"truncation kept {share:.1%} of the squared norm of {len(refits)} modules"
        yield f"{text}; {_worst(named('energy'))}"
    compensated = {
        key: metric["output_error"]
        for key, metric in metrics.items()
        if "output_error" in metric and "energy" not in metric
    }
    if compensated:  # what is left of each element says nothing then
        worst = max(compensated, key=lambda key: compensated[key])
        text = f"relative error of the outputs: median {median(compensated.values()):.4f} over"
        plain = median(named("unweighted_output_error").values())
        text = f"{text} {len(compensated)} weights, {plain:.4f} if rounded to nearest"
        yield f"{text}; worst: {compensated[worst]:.4f} of {shown(worst)}"
    survived = {k: share for k, share in named("survived").items() if k not in compensated}
    if survived:
        text = f"median {median(survived.values()):.1%} of the adapter's change kept after rounding"
        yield f"{text}, over {len(survived)} tensors; {_worst(survived)}"
    errors = {
        key: metric["error"]
        for key, metric in metrics.items()
        if "error" in metric and "energy" not in metric
    }
    if errors:
        after = named("error_after")
        helped = {key: errors[key] for key in errors if key in after}
        worst = max(errors, key=lambda key: errors[key])
        error = f"median {median(errors.values()):.4f} over {len(errors)} weights"
        if helped:
            rest = f"; {error} in all" if len(helped) < len(errors) else ""
            error = f"median {median(helped.values()):.4f} over {len(helped)} weights with factors"
            error = f"{error}, {median(after.values()):.4f} with the adapter{rest}"
        yield f"relative error: {error}; worst: {errors[worst]:.4f} of {shown(worst)}"


def _worst(shares: dict[str, float]) -> str:
    key = min(shares, key=lambda key: shares[key])
    return f"worst: {shares[key]:.1%} of {shown(key)}"
