"""What a stored tensor goes through to have the neutral form's orientation, and back."""

from collections.abc import Callable
from typing import NamedTuple

from adapterkit.formats.tensors import Expression, transposed


class Step(NamedTuple):
    """A step of a format, in both directions."""

    read: Callable[[Expression], Expression]  # from the file
    write: Callable[[Expression], Expression]  # into the file


STEPS = {"transpose": Step(transposed, transposed)}
