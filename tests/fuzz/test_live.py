"""Random adapters on live models of tiny types of transformers, held against PEFT's forward in
float64.

The usual run takes some types; `pytest -m slow tests/fuzz/test_live.py` takes every type, and
`python -m tests.fuzz.run --what live` as many seeds as wanted.
"""

import pytest

from tests.support.usual import usual

from . import live, models

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of odd settings

# each has another way of reading, tying or stacking its weights
SOME = ("llama", "gpt2", "mamba", "mobilebert", "mixtral", "t5", "qwen3_next")


def check(kind: str, seed: int, folder) -> live.Outcome:
    outcome = live.run(kind, seed, folder)
    assert not outcome.wrong, "\n".join([str(outcome.settings), *outcome.wrong])
    odd = live.unjudged(outcome)
    assert not odd, "\n".join([str(outcome.settings), *(f"{verb}: {text}" for verb, text in odd)])
    return outcome


@pytest.mark.parametrize("kind", usual(SOME, {"gpt2", "mamba", "mixtral", "t5"}))
def test_random_adapters_run_as_in_peft(kind, tmp_path):
    outcome = check(kind, 0, tmp_path)
    assert outcome.unusable is None or outcome.untrainable, outcome.unusable
    assert outcome.unusable or outcome.forward


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.KINDS)
def test_random_adapters_on_every_type(kind, tmp_path):
    for seed in range(10, 12):
        check(kind, seed, tmp_path / str(seed))
