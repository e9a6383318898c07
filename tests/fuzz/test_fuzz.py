"""Random jobs on random tiny models of transformers, held against PEFT's forward in float64.

The usual run takes some types and seeds; `pytest -m slow tests/fuzz` takes every type, and
`python -m tests.fuzz.run` as many as wanted.
"""

import pytest

from tests.support.usual import usual

from . import jobs, models

# one type for each way in which models differ: ties, experts, transposed layers, fused projections,
# convolutions, torch's attention, bare parameters, renames
SOME = (
    "llama", "gpt2", "bert", "mixtral", "t5", "vit", "gpt_oss", "whisper", "clip", "gemma3",
    "mamba", "blip", "wav2vec2", "siglip", "qwen2_vl",
)  # fmt: skip
# which the suites of merge, combine and inits have among their models too
ELSEWHERE = ("bert", "clip", "whisper", "blip", "siglip", "gemma3")
ROWS = [(kind, n % 2) for n, kind in enumerate(SOME)]


def check(kind: str, seed: int, folder) -> jobs.Outcome:
    outcome = jobs.run(kind, seed, folder)
    assert not outcome.wrong, "\n".join([str(outcome.settings), *outcome.wrong])
    odd = jobs.unjudged(outcome)
    assert not odd, "\n".join([str(outcome.settings), *(f"{verb}: {text}" for verb, text in odd)])
    return outcome


@pytest.mark.parametrize(("kind", "seed"), usual(ROWS, lambda row: row[0] not in ELSEWHERE))
def test_random_jobs_equal_the_reference(kind, seed, tmp_path):
    outcome = check(kind, seed, tmp_path)
    assert outcome.unusable is None or outcome.untrainable, outcome.unusable


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.KINDS)
def test_random_jobs_on_every_type(kind, tmp_path):
    """Types that transformers cannot make tiny, save or read back are counted by `run`, not judged
    here."""
    for seed in range(10, 13):
        check(kind, seed, tmp_path / str(seed))
