"""Other tools' own writers and readers, on random settings; `pytest -m slow` takes many."""

from collections import Counter
from pathlib import Path

import pytest

from tests.support.mlx_models import KINDS

from . import clients

USUAL, MANY = (0, 1, 2, 3, 37), 150  # of 37 parts share the norms of their inputs
# refusals that are right, by what they say
EXPECTED = (
    "norms of inputs that are taken over", "input_magnitude of", "LoKr of", "LoHa of",
    "one weight for embeddings and head", "magnitudes, but none for", "magnitude of lora",
    "mixed", "low-rank factors, whose rows can be split", "parts of the module in whole steps",
    "the same of all", "without a name there", "is not the same in",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bases")


def judge(outcome: clients.Outcome) -> None:
    odd = [text for text in outcome.refused if not any(own in text for own in EXPECTED)]
    assert not outcome.wrong and not odd, "\n".join([outcome.settings, *outcome.wrong, *odd])


@pytest.mark.parametrize("seed", USUAL)
def test_a_few_of_lycoris(seed, home, tmp_path):
    judge(clients.lycoris(seed, tmp_path, home))


@pytest.mark.parametrize(("kind", "seed"), [("llama", 0), ("llama", 1), ("qwen3_moe", 0)])
def test_a_few_for_mlx(kind, seed, tmp_path):
    judge(clients.mlx(seed, tmp_path, kind))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_of_lycoris(home, tmp_path):
    counts: Counter[str] = Counter()
    for seed in range(100, 100 + MANY):
        (tmp_path / str(seed)).mkdir()
        outcome = clients.lycoris(seed, tmp_path / str(seed), home)
        judge(outcome)
        counts += Counter(compared=outcome.compared, refused=len(outcome.refused))
    assert counts["compared"] > MANY, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_for_mlx(kind, tmp_path):
    counts: Counter[str] = Counter()
    for seed in range(100, 110):
        (tmp_path / str(seed)).mkdir()
        outcome = clients.mlx(seed, tmp_path / str(seed), kind)
        judge(outcome)
        counts += Counter(compared=outcome.compared, refused=len(outcome.refused))
    assert counts["compared"] > 4, counts
