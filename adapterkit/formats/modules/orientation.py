"""What a stored tensor goes through to have the neutral form's orientation, and back."""

from collections.abc import Callable
from typing import NamedTuple

from adapterkit.formats.modules.tensors import Expression, is_made_by, transposed

COLUMN = "column"  # of magnitudes: (out, 1, ...), where PEFT has vectors


class LayoutStep(NamedTuple):
    """A step of a format, in both directions."""

    read: Callable[[Expression], Expression]  # from the file
    write: Callable[[Expression], Expression]  # into the file


def _same(value: Expression) -> Expression:
    return value


def shared(source: Expression) -> Expression:
    """One of a stack's matrices where it holds the same one for all, as (1, ...)."""
    if is_made_by(source, "cat") and len(set(source.inputs)) == 1:
        return source.inputs[0]
    return source


STEPS = {
    "transpose": LayoutStep(transposed, transposed),
    "shared": LayoutStep(_same, shared),  # a file may have one matrix for all
    COLUMN: LayoutStep(_same, _same),
}
