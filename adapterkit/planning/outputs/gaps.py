"""Parameters that a base lacks: a loader of what is made of it would make them up."""

from collections.abc import Collection

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import WARNING, AdapterkitError
from adapterkit.weights.loading import find_gaps, gaps_of, looks_whole
from adapterkit.weights.skeleton import Skeleton


def check_gaps(
    base: Checkpoint,
    model: Skeleton | None,
    notes: list[str],
    brought: Collection[str] = (),
) -> list[AdapterkitError]:
    """Problems of a base that lacks a parameter which its other layers have, or whose experts do
    not fit together; other gaps are notes, as a model may lack a head or a pooler on purpose.

    `model`: if it was built anyhow. If not, only what does not look whole is worth the seconds.
    `brought`: parameters that come from elsewhere."""
    if model is None and looks_whole(base):
        return []
    try:
        gaps = (gaps_of(base) if model is None else find_gaps(model)).without(brought)
    except AdapterkitError:
        return []  # transformers does not know the model
    if gaps.holes or gaps.failed:
        return gaps.errors()
    notes += [f"{WARNING}{error.where}: {error.problem}; {error.hint}" for error in gaps.errors()]
    return []
