"""How much memory a job takes, at the bounds of the rules."""

import pytest

from adapterkit.core import budget

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "claims, limit, most",
    [
        ([5, 5, 5, 5, 5], 100, 15),  # two are ahead of the one that is written
        ([5, 7, 1, 1, 9], 100, 13),  # any three that follow each other
        ([5, 5], 10, 10),  # the limit itself is kept
        ([5, 6], 10, 6),
        ([20], 10, 20),  # one runs, whatever it takes
        ([20, 3, 4], 10, 20),
        ([], 10, 0),
    ],
)
def test_tasks_that_are_in_memory_together(claims, limit, most):
    assert budget.most_together(claims, limit, workers=1) == most


def test_factors_that_are_in_memory_together():
    """Of two steps, and once more the largest, each twice: as it is stored and as it is used."""
    assert budget.factors_memory([1, 4, 2, 3], 0, workers=1) == 2 * (3 + 4) + 2 * 4
    assert budget.factors_memory([5], 0, workers=1) == 20
    assert budget.factors_memory([], 7, workers=1) == 7
    assert budget.factors_memory([], 2 * budget.STACKS, workers=1) == budget.STACKS
