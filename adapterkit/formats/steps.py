"""What a stored tensor goes through to have the neutral form's orientation, and back."""

from collections.abc import Callable
from typing import NamedTuple

from adapterkit.formats.tensors import Expression, transposed

COLUMN = "column"  # of magnitudes: (out, 1, ...), where PEFT has vectors


class Step(NamedTuple):
    """A step of a format, in both directions."""

    read: Callable[[Expression], Expression]  # from the file
    write: Callable[[Expression], Expression]  # into the file


def _same(value: Expression) -> Expression:
    return value


STEPS = {"transpose": Step(transposed, transposed), COLUMN: Step(_same, _same)}
