"""What a receipt says of the tensors that changed."""

from adapterkit.core.records import Json
from adapterkit.verbs.look.heatmaps import grid_of

WORST = 20  # tensors that are listed
METRICS = ("delta", "survived", "rounding", "requantization", "changed", "error", "energy")
WORST_HIGH = ("error", "rounding")  # of which the largest value is the worst
WORST_BY = ("survived", "energy", *WORST_HIGH)  # the first that there is


def outcome_of(receipt: Json) -> Json:
    """Its verb, inputs and totals, metrics by layer and module, and the tensors that lost most."""
    tensors = receipt["parameters"]
    used = [name for name in METRICS if any(name in metrics for metrics in tensors.values())]
    worst_by = next((name for name in WORST_BY if name in used), None)
    ranked = sorted(
        ((name, metrics) for name, metrics in tensors.items() if worst_by in metrics),
        key=lambda pair: pair[1][worst_by],
        reverse=worst_by in WORST_HIGH,
    )
    by_label = {name.removesuffix(".weight"): metrics for name, metrics in tensors.items()}
    places, rows, columns = grid_of(by_label)
    at = {place: by_label[label] for label, place in places.items()}
    return {
        "verb": receipt["recipe"]["verb"],
        "options": receipt["recipe"]["options"],
        "inputs": receipt["recipe"]["inputs"],
        "fingerprint": receipt["fingerprint"],
        "totals": receipt["totals"],
        "seconds": receipt["timings"]["seconds"],
        "warnings": receipt.get("warnings", []),
        "notes": receipt["notes"],
        "rows": rows,
        "columns": columns,
        "metrics": {
            name: [[at.get((r, c), {}).get(name) for c in columns] for r in rows] for name in used
        },
        "worst": [{"name": name} | {m: metrics.get(m) for m in used} for name, metrics in ranked][
            :WORST
        ],
    }
