"""What is missing of a checkpoint, against what transformers' loader reports."""

import pytest

from . import damaged, models

# one type for each way in which names and parameters differ
SOME = ("llama", "gpt2", "bert", "t5", "mixtral", "vit")


def check(kind: str, seed: int, folder) -> list[damaged.Outcome]:
    outcomes = damaged.run(kind, seed, folder)
    assert not [line for outcome in outcomes for line in outcome.wrong]
    return outcomes


@pytest.mark.parametrize("kind", SOME)
def test_damaged_checkpoints_are_refused_or_unchanged(kind, tmp_path):
    outcomes = check(kind, 0, tmp_path)
    assert len(outcomes) == len(damaged.DAMAGES) and sum(o.found for o in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.KINDS)
def test_damaged_checkpoints_of_every_type(kind, tmp_path):
    check(kind, 1, tmp_path)
