"""Which factors are fitted in the norm of their module's outputs, by statistics of its inputs."""

from collections.abc import Collection, Mapping

from adapterkit.adapters.factors import Place
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused, listed
from adapterkit.tasks.statistics import select_covariances


def linear_modules(
    places: Mapping[str, Place], parameters: Collection[str], notes: list[str], otherwise: str
) -> dict[str, int]:
    """The widths (in) of the modules that are linear layers, of factors by name.

    `parameters`: names that are those of single parameters. A note lists what is none, and what
    holds there `otherwise`; `Refused` where none is one.
    """
    widths = {
        name: place.a_tail[0]
        for name, place in places.items()
        if name not in parameters and place.is_linear
    }
    others = [name for name in places if name not in widths]
    if not widths:
        raise Refused(
            "no linear layers with factors",
            expected="some: statistics are of their inputs",
            where="--stats",
            hint="leave --stats out",
        )
    if others:
        notes.append(
            f"{len(others)} of {len(places)} modules are no linear layers (embeddings, "
            f"convolutions, parameters): {otherwise}, without statistics ({listed(others)})"
        )
    return widths


def select_norms(
    stats: Checkpoint | None,
    places: Mapping[str, Place],
    parameters: Collection[str],
    notes: list[str],
) -> dict[str, TensorSpec]:
    """The covariance of the inputs of each linear layer among factors by name, none without a
    file; see `linear_modules`. `Refused` with all that are missing or of another shape."""
    if stats is None:
        return {}
    otherwise = "fitted in the norm of their weights"
    return select_covariances(stats, linear_modules(places, parameters, notes, otherwise))
