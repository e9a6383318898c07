"""The same bytes whatever the number of workers and the sizes of reads, fresh or resumed, hashed or
not."""

import itertools

import pytest

from tests.support.usual import usual

RECEIPT = "adapterkit.json"


@pytest.mark.parametrize(
    ("workers", "resumed", "hashed"),
    [
        *usual(itertools.product([1, 2, 8], [False, True], ["sha256"]), lambda row: row[0] != 2),
        (8, False, "none"),
        (8, True, "none"),
    ],
)
@pytest.mark.parametrize(
    "fault",
    [None, {"calls": ["preadv", "pwrite"], "delay": 0.0005}, {"calls": ["preadv"], "short": True}],
)
def test_one_sha256_of_every_file(
    shared, whole, workers: int, resumed: bool, hashed: str, fault: dict | None
):
    shared.clear()
    options = ("--hash", hashed)
    if resumed:
        for when in (1, 2):  # a shard more each time
            shared.merge(
                "--resume",
                *options,
                workers=workers,
                fault={"kill": True, "calls": ["rename"], "when": 2 * when},
            )
    shared.merge(
        "--resume" if resumed else "--quiet", *options, workers=workers, fault=fault
    ).succeeded()
    found = shared.digests()
    if hashed == "none":  # its receipt holds no hashes
        del found[RECEIPT]
    assert found == {name: sha for name, sha in whole.items() if name in found}
    assert found.keys() | {RECEIPT} == whole.keys()


def test_receipts_without_hashes_agree_too(shared):
    receipts = set()
    for workers in (1, 2, 8):
        shared.clear()
        shared.merge("--hash", "none", workers=workers).succeeded()
        receipts.add(shared.digests()[RECEIPT])
    assert len(receipts) == 1


def test_options_that_change_the_layout(shared):
    """Resharded, cast and rounded at random, with one worker and with eight."""
    drawn = ("--rounding", "stochastic", "--seed", "7")
    layouts = [
        ("--dtype", "fp32"),
        ("--max-shard-size", "7KB"),
        ("--dtype", "bf16", "--max-shard-size", "4KB"),
    ]
    for options in (*layouts, drawn, (*drawn, "--dtype", "fp16", "--max-shard-size", "4KB")):
        found = []
        for workers in (1, 8):
            shared.clear()
            shared.merge(*options, workers=workers).succeeded()
            found.append(shared.digests())
        assert found[0] == found[1]


def test_a_resume_draws_the_same(shared):
    drawn = ("--rounding", "stochastic", "--seed", "7")
    found = []
    for kills in (0, 2):
        shared.clear()
        for when in range(1, kills + 1):
            shared.merge(
                "--resume", *drawn, fault={"kill": True, "calls": ["rename"], "when": 2 * when}
            )
        shared.merge("--resume" if kills else "--quiet", *drawn).succeeded()
        found.append(shared.digests())
    assert found[0] == found[1]
    shared.clear()
    shared.merge("--rounding", "stochastic").succeeded()
    assert shared.digests() != found[0]
