"""Combinations on a live model: by way of the files that `adapterkit.combine` takes and writes, so
that there is one algebra."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import Refused, did_you_mean, shown
from adapterkit.runtime.load import reading, writing
from adapterkit.runtime.state import State, weights
from adapterkit.verbs.combine import combine as combine_files

OPTIONS = (
    "space", "rank", "energy", "density", "majority", "svd_clamp", "weight_for", "settings",
    "dtype", "seed", "stats",
)  # fmt: skip


def combine(
    state: State,
    adapters: Mapping[str, float],
    name: str,
    method: str,
    options: Mapping[str, Any],
) -> None:
    """Add a combination of adapters; the temporary files take as much room as the adapters."""
    state.unused(name)
    table = weights(state, adapters)
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise Refused(
            f"combine takes no options {', '.join(map(shown, unknown))}",
            expected=", ".join(OPTIONS),
            where="combine",
            hint=did_you_mean(unknown, OPTIONS) or "remove them",
        )
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as folder:
        sources = {}
        for number, (adapter, weight) in enumerate(table.items()):
            source = Path(folder, str(number))
            writing.save(state, source, adapter, every_process=True)
            sources[source] = weight
        out = Path(folder, "combined")
        combine_files(sources, out=out, method=method, hash="none", **options)
        reading.load(state, out, name, trainable=False, dtype=None)
