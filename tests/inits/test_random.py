"""No use of the process's random generator: the caller's numbers stay, on a GPU too, and threads do
not share one."""

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit
from adapterkit import LoraConfig
from adapterkit.core.registry import members
from adapterkit.runtime import attach
from adapterkit.verbs.init.methods.pissa import Pissa
from tests.support.sources import parsed, walked

OF_THE_PROCESS = {"seed", "manual_seed", "manual_seed_all", "fork_rng", "set_rng_state"}
PLACES = {"torch.", "torch.random.", "torch.cuda."}
DRAWS = {
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "svd_lowrank",
    "pca_lowrank", "rand_like", "randn_like", "normal_", "uniform_", "bernoulli_", "exponential_",
}  # fmt: skip


def uses(source: str) -> list[int]:
    """Lines that draw, or seed, without a generator of their own."""
    lines = []
    for call in (node for node in walked(parsed(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        leaf = name.rpartition(".")[2]
        own = any(word.arg == "generator" for word in call.keywords)
        seeds = leaf in OF_THE_PROCESS and name.removesuffix(leaf) in PLACES
        if seeds or (leaf in DRAWS and not own):
            lines.append(call.lineno)
    return lines


def test_the_package_draws_from_generators_of_its_own():
    found = {
        str(path): lines
        for path in Path(adapterkit.__file__).parent.rglob("*.py")
        if (lines := uses(path.read_text("utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    ["torch.manual_seed(0)", "torch.random.fork_rng()", "torch.randn(3)", "torch.seed()",
     "torch.cuda.manual_seed_all(1)", "torch.svd_lowrank(x, 3)", "x.normal_()"],
)  # fmt: skip
def test_a_use_of_the_processs_generator_is_seen(source: str):
    assert uses(source) == [1]


def weights(count: int) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(3)
    return [torch.randn(30, 20 + i % 20, generator=numbers) for i in range(count)]


def test_threads_give_the_factors_of_one(one_thread: None):
    given, method = weights(80), Pissa(niter=2)
    expected = [method.factors(weight, 4, 1.0) for weight in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda weight: method.factors(weight, 4, 1.0), given))
    for pair, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, pair, other))


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_niter_is_torchs_method(rounds: int, one_thread: None):
    for weight in weights(3):
        for matrix in (weight, weight.T.contiguous()):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, 5, rounds)
            a, b = Pissa(niter=rounds).factors(matrix, 5, 2.0)
            torch.testing.assert_close(2 * b @ a, (u * s) @ v.T)


@pytest.mark.parametrize("seed", [None, 3])
def test_attach_leaves_the_callers_numbers_alone(seed: int | None):
    for name, method in members("inits").items():
        if not set(method.needs) <= {"weight"}:
            continue
        model = nn.Sequential(nn.Linear(6, 6))
        before = torch.get_rng_state()
        attach(model, LoraConfig(targets=["0"], rank=2, init=name), seed=seed)
        assert torch.equal(torch.get_rng_state(), before), name
