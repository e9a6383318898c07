"""Random jobs on a Hub that fails: a sample of `hub_jobs.py`; more with
`pytest -m slow tests/fuzz/test_hub_jobs.py`, or `python -m tests.fuzz.hub_jobs 0 500`."""

import collections

import pytest

from tests.support.usual import usual

from . import hub_jobs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with hub_jobs.opened(tmp_path_factory.mktemp("hub")) as place:
        yield place


def check(place, seed: int) -> hub_jobs.Outcome:
    outcome = hub_jobs.run(place, seed)
    assert not outcome.wrong, "\n".join([str(outcome.case), *outcome.wrong])
    return outcome


@pytest.mark.parametrize("seed", usual(range(12), range(6)))
def test_random_jobs_on_a_failing_hub(place, seed: int):
    check(place, seed)


@pytest.mark.slow
def test_many_random_jobs_on_a_failing_hub(place):
    """All that is drawn happens: outputs, refusals and failures of jobs that end well, and of those
    that must not."""
    ends = collections.Counter()
    for seed in range(100, 300):
        outcome = check(place, seed)
        ends[outcome.allowed, outcome.first.partition(":")[0]] += 1
    assert {(True, "done"), (True, "Failed"), (True, "Refused"), (False, "Refused")} <= ends.keys()
