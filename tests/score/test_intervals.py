"""Intervals of losses per token cover the loss of a larger set of samples as often as they say."""

import math

import pytest
import torch
from scipy import stats

from adapterkit.verbs.score.results import SampleSums, mean_per_token, score_row, student

pytestmark = pytest.mark.quick
DRAWS, COUNT = 4000, 40


def population(size=20_000):
    """Lengths that are skewed (log-normal), and two models' sums of losses: long samples are
    easier, and samples differ more than models do."""
    generator = torch.Generator().manual_seed(11)
    normal = lambda: torch.randn(size, generator=generator, dtype=torch.float64)
    tokens = (4 + (3.5 + 0.8 * normal()).exp()).round()
    each = 2.5 - 0.2 * (tokens.log() - 3.5) + 0.4 * normal()
    first = tokens * each
    second = tokens * (each + 0.02 + 0.05 * normal())
    return tokens, first, second


def covered(sums, tokens):
    """The share of draws whose interval contains the ratio of the whole set."""
    truth = float(sums.sum() / tokens.sum())
    generator = torch.Generator().manual_seed(7)
    hits = 0
    for _ in range(DRAWS):
        drawn = torch.randint(len(tokens), (COUNT,), generator=generator)
        found = mean_per_token(sums[drawn], tokens[drawn])
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    return hits / DRAWS


def test_the_interval_of_a_loss_covers_it_in_95_of_100_draws():
    tokens, first, _ = population()
    assert 0.925 <= covered(first, tokens) <= 0.975


def test_the_interval_of_a_paired_difference_covers_it_in_95_of_100_draws():
    tokens, first, second = population()
    assert 0.925 <= covered(second - first, tokens) <= 0.975


def test_a_paired_difference_has_a_narrower_interval_than_the_losses():
    tokens, first, second = (one[:COUNT] for one in population())
    width = lambda sums: mean_per_token(sums, tokens).high - mean_per_token(sums, tokens).value
    assert width(second - first) < width(first) / 5


def test_the_interval_is_that_of_the_jackknife():
    """Of the ratios without one sample each, around that of all."""
    tokens, first, _ = (one[:COUNT].numpy() for one in population())
    ratio = first.sum() / tokens.sum()
    without = [(first.sum() - first[n]) / (tokens.sum() - tokens[n]) for n in range(COUNT)]
    error = math.sqrt((COUNT - 1) / COUNT * sum((one - ratio) ** 2 for one in without))
    low, high = stats.t.interval(0.95, COUNT - 1, loc=ratio, scale=error)
    found = mean_per_token(torch.tensor(first), torch.tensor(tokens))
    assert found.value == pytest.approx(ratio, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-5)


def test_samples_of_one_length_have_the_usual_interval_of_a_mean():
    generator = torch.Generator().manual_seed(2)
    sums = torch.randn(9, generator=generator, dtype=torch.float64)
    found = mean_per_token(sums, torch.full((9,), 4.0, dtype=torch.float64))
    error = float(sums.std()) / 4 / 3
    low, high = stats.t.interval(0.95, 8, loc=float(sums.mean()) / 4, scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)


@pytest.mark.parametrize("degrees", [*range(1, 40), 63, 100, 255, 1000, 10**6])
def test_the_quantile_of_students_t_is_scipys(degrees):
    assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-4)


def test_a_single_sample_has_no_interval():
    one = torch.tensor([3.0], dtype=torch.float64)
    found = mean_per_token(one, 2 * one)
    assert (found.value, found.low, found.high) == (0.5, None, None)
    assert found.has_zero  # nothing says that it differs
    sums = SampleSums(1)
    sums.table[0] = torch.tensor([6.0, 3.0, 0.0, 6.0])
    assert score_row(sums, sums, compared=True)["kl"] == {"value": 0.0, "low": None, "high": None}


def test_samples_of_the_same_loss_per_token_have_an_interval_of_width_0():
    tokens = torch.tensor([3.0, 50.0, 7.0], dtype=torch.float64)
    found = mean_per_token(2 * tokens, tokens)
    assert (found.low, found.value, found.high) == (2, 2, 2)


def test_a_difference_is_within_noise_if_its_interval_contains_0():
    tokens, first, _ = (one[:COUNT] for one in population())
    best, other, third = SampleSums(COUNT), SampleSums(COUNT), SampleSums(COUNT)
    for one, losses in ((best, first), (other, first + 0.3 * tokens), (third, first)):
        one.table[:, 0], one.table[:, 1] = tokens, losses
    third.table[:, 1] += 0.1 * tokens * torch.where(torch.arange(COUNT) % 2 == 0, 1, -1)
    rows = [score_row(one, best, compared=False)["more"] for one in (other, third)]
    assert [row["within_noise"] for row in rows] == [False, True]
    assert rows[0]["value"] == pytest.approx(0.3)
    assert "more" not in score_row(best, best, compared=False)


def test_a_loss_beyond_all_floats_has_an_infinite_perplexity():
    sums = SampleSums(1)
    sums.table[0] = torch.tensor([1.0, 800.0, 0.0, 0.0])
    assert score_row(sums, sums, compared=False)["perplexity"] == math.inf
