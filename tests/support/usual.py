"""What the usual run takes of a table whose rows run the same code: the rest is marked slow."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest


def usual(rows: Iterable[Any], kept: Container[Any] | Callable[[Any], bool]) -> list:
    """These rows, those not kept marked slow; a tuple holds the values of several names."""
    keeps = kept if callable(kept) else kept.__contains__

    def slow(row: Any):
        values = row if isinstance(row, tuple) else (row,)
        return pytest.param(*values, marks=pytest.mark.slow)

    return [row if keeps(row) else slow(row) for row in rows]
