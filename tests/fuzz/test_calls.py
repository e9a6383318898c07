"""Random sequences of calls on a live model; `python -m tests.fuzz.run --what calls` runs more."""

from unittest import mock

import pytest

from adapterkit.runtime.patches.factors import FactorsPatch
from tests.fuzz import calls


@pytest.mark.parametrize("seed", range(8))
def test_sequences_of_calls(seed, tmp_path):
    counts = calls.run(seed, tmp_path)
    assert counts["states"] == 25


def test_a_wrong_state_is_seen():
    with mock.patch.object(FactorsPatch, "rescale", lambda self, factor: None):
        _, wrong = calls.run_all(range(4))
    assert wrong and all("rescale" in text for text in wrong)


@pytest.mark.slow
def test_many_sequences_of_calls():
    counts, wrong = calls.run_all(range(1000, 1100))
    assert not wrong, wrong[:3]
    assert counts["states"] == 2500
