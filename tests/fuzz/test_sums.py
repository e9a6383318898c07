"""Statistics of random models against plain hooks, and PEFT's.

The usual run takes some types; `pytest -m slow tests/fuzz` takes every type, and
`python -m tests.fuzz.run --what statistics` as many as wanted.
"""

import pytest

from tests.support.usual import usual

from . import models, sums

# texts, tokens first, padded within, two halves of a model, images beside texts, states along
# tokens, experts, a Linear of its own
SOME = ("xlnet", "longformer", "mbart", "clip", "mamba", "falcon")


def check(kind: str, seed: int, folder) -> sums.Outcome:
    outcome = sums.run(kind, seed, folder)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    odd = sums.unjudged(outcome)
    assert not odd, "\n".join(f"{door}: {text}" for door, text in odd)
    return outcome


@pytest.mark.parametrize("kind", usual(SOME, {"xlnet", "mbart", "mamba"}))
def test_statistics_of_random_models(kind, tmp_path):
    outcome = check(kind, 0, tmp_path)
    assert outcome.layers and not outcome.unusable, outcome.unusable
    assert outcome.linear[0] > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.KINDS)
def test_statistics_of_every_type(kind, tmp_path):
    for seed in range(2):
        check(kind, seed, tmp_path / str(seed))
