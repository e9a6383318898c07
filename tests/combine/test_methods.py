"""Every method of the registry: the laws of its family, a plain dense reference in float64, PEFT and mergekit's golden numbers.

A new method comes under the laws by itself; its reference is one function more in REFERENCES.
"""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkit import registry
from adapterkit.combinations.common import trim
from adapterkit.combinations.protocol import OnFactors
from adapterkit.errors import Refused
from adapterkit.kernels import elementwise
from adapterkit.kernels.elementwise import Trim, ranks, top_k_threshold
from adapterkit.kernels.lowrank import Product

METHODS = registry.members("combinations")
ON_ELEMENTS = [name for name, record in METHODS.items() if record.acts_on == "elements"]
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())

# What a method does not promise. Everything else is held to every law.
ORDERED = {"ema", "slerp"}  # the order of the adapters is part of the question
SHARES = {"mean", "karcher"}  # all weights times two: the same result
NOT_ITSELF = {"iso_c"}  # one adapter alone is not given back
LINEAR = {
    "linear",
    "mean",
    "magnitude_prune",
    "dare_linear",
    "breadcrumbs",
}  # at density 1, Σ shareᵢ Δᵢ
ADDITIVE = LINEAR - {"mean"} | {"ema"}  # at density 1, linear in each delta
PARENTS = {
    "magnitude_prune": "linear",
    "dare_linear": "linear",
    "breadcrumbs": "linear",
    "dare_ties": "ties",
    "della": "ties",
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Dense:
    """Deltas that are kept: float32 matrices, read in blocks of `height` rows."""

    def __init__(self, matrices: list[Tensor], height: int = 3):
        self.matrices, self.height = [m.float() for m in matrices], height
        self.count, self.shape = len(matrices), tuple(matrices[0].shape)

    def blocks(self) -> Iterator[tuple[int, int]]:
        return (
            (first, min(first + self.height, self.shape[0]))
            for first in range(0, self.shape[0], self.height)
        )

    def rows(self, which: int, first: int, last: int) -> Tensor:
        return self.matrices[which][first:last].clone()


def seeds(which: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + which)


def record(name: str, **given):
    """The method with what was given of the options it has, and 0.4 for those it needs."""
    fields = registry.options(METHODS[name])
    needed = {key: 0.4 for key, field in fields.items() if field.default is dataclasses.MISSING}
    return METHODS[name](**needed | {key: value for key, value in given.items() if key in fields})


def combined(method, products: list[Product], weights, seeds=seeds, height=3) -> Tensor:
    """The delta that a method gives, in float64."""
    weights = method.resolve_weights(weights)
    if method.acts_on == "factors":
        return method.combine_factors(products, weights)[0].dense()
    return method.combine_elements(
        Dense([p.dense() for p in products], height), weights, seeds
    ).delta.double()


def product(out: int, inside: int, rank: int, seed: int, kind: str = "normal") -> Product:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((out, rank), (rank, inside))
    )
    if kind == "bf16":
        left, right = left.bfloat16().double(), right.bfloat16().double()
    if kind == "repeated":
        left, right = left.round().clamp(-1, 1), right.round().clamp(-1, 1)
    return Product(left * (kind != "zero"), right)


def case(out: int, inside: int, *parts: tuple[int, str]) -> list[Product]:
    return [product(out, inside, rank, 10 * i + out, kind) for i, (rank, kind) in enumerate(parts)]


HARD = {
    "1x1": case(1, 1, (1, "normal"), (1, "normal")),
    "1x3": case(1, 3, (1, "normal"), (1, "normal"), (1, "bf16")),
    "3x1": case(3, 1, (1, "normal"), (1, "normal")),
    "rank one": case(6, 9, (1, "normal"), (1, "normal")),
    "full rank": case(5, 8, (5, "normal"), (5, "normal"), (5, "normal")),
    "ranks differ": case(12, 7, (1, "normal"), (3, "normal"), (5, "bf16")),
    "a zero": case(7, 9, (2, "normal"), (2, "zero"), (3, "normal")),
    "zero and one": case(7, 9, (2, "zero"), (3, "normal")),
    "zeros": case(4, 5, (2, "zero"), (2, "zero")),
    "repeated": case(9, 11, (2, "repeated"), (3, "repeated"), (2, "repeated")),
    "bf16": case(16, 24, (4, "bf16"), (4, "bf16"), (4, "bf16"), (4, "bf16")),
    "the same twice": [product(6, 8, 2, 1)] * 2,
    "pair": case(10, 14, (3, "normal"), (4, "normal")),
}
WEIGHTS = [0.7, 1.6, 0.4, 1.1]


# References: plain, dense, float64.


def trimmed(x: Tensor, keep: int) -> Tensor:
    order = x.flatten().abs().sort(descending=True, stable=True).indices[:keep]
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order] = True
    return x.where(mask.view_as(x), 0)


def share_of(x: Tensor, density: float) -> int:
    return int(density * x.numel())


def linear(deltas, weights, options):
    return sum(w * d for w, d in zip(weights, deltas, strict=True))


def elected(deltas, weights, options, shares=None, majority="total"):
    stack = torch.stack(deltas)
    votes = stack.sum(0) if majority == "total" else stack.sign().sum(0)
    keep = stack.sign() == torch.where(votes >= 0, 1.0, -1.0).double()
    shares = torch.tensor(shares or [1.0] * len(deltas), dtype=torch.float64).view(-1, 1, 1) * keep
    weights = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    total = shares.sum(0)
    return torch.where(total > 0, (shares * weights * stack).sum(0) / total.where(total > 0, 1), 0)


def ties(deltas, weights, options):
    return elected(
        [trimmed(d, share_of(d, options.density)) for d in deltas],
        weights,
        options,
        majority=options.majority,
    )


def magnitude_prune(deltas, weights, options):
    return linear([trimmed(d, share_of(d, options.density)) for d in deltas], weights, options)


def dropped(deltas, chances):
    masks = [torch.rand(d.shape, generator=seeds(i)) < chances[i] for i, d in enumerate(deltas)]
    return [d * mask / chance for d, mask, chance in zip(deltas, masks, chances, strict=True)]


def dare_linear(deltas, weights, options):
    return linear(dropped(deltas, [options.density] * len(deltas)), weights, options)


def dare_ties(deltas, weights, options):
    return elected(
        dropped(deltas, [options.density] * len(deltas)),
        weights,
        options,
        majority=options.majority,
    )


def della(deltas, weights, options):
    chances = []
    for d in deltas:
        p = torch.full_like(d, options.density)
        for row, places in zip(d, p, strict=True):
            order = sorted(range(len(row)), key=lambda j, row=row: (abs(float(row[j])), j))
            for rank, j in enumerate(order):
                r = rank / (len(row) - 1) if len(row) > 1 else 0.5
                places[j] = options.density - options.epsilon + 2 * options.epsilon * r
        chances.append(p.float().double())
    return elected(dropped(deltas, chances), weights, options, majority=options.majority)


def breadcrumbs(deltas, weights, options):
    parts = []
    for d in deltas:
        keep = share_of(d, options.density)
        top = min(int(options.gamma * d.numel()), d.numel() - keep)
        parts.append(trimmed(d, keep + top) - trimmed(d, top))
    return linear(parts, weights, options)


def sce(deltas, weights, options):
    spread = torch.stack(deltas).std(0, correction=0).float().double()
    nonzero = int((spread > 0).sum())
    mask = (
        trimmed(spread, int(options.select * nonzero)) > 0
        if options.select < 1 and nonzero
        else torch.ones_like(spread)
    )
    selected = [d * mask for d in deltas]
    squares = [float(s.square().sum()) for s in selected]
    return elected(selected, weights, options, shares=[s / (sum(squares) or 1) for s in squares])


def mean(deltas, weights, options):
    return linear(deltas, weights, options) / sum(weights)


def ema(deltas, weights, options):
    moving = weights[0] * deltas[0]
    for w, d in zip(weights[1:], deltas[1:], strict=True):
        moving = options.decay * moving + (1 - options.decay) * w * d
    return moving


def slerp(deltas, weights, options):
    if len(deltas) != 2:
        return None
    if options.t is not None:
        weights = [1 - options.t, options.t]
    total = sum(abs(w) for w in weights)
    t, (x, y) = (
        abs(weights[1]) / total,
        (math.copysign(1, w) * d for w, d in zip(weights, deltas, strict=True)),
    )
    if not x.any() or not y.any():
        return total * ((1 - t) * x + t * y)
    cosine = float((x * y).sum() / (x.norm() * y.norm()))
    if cosine < -1 + 1e-12:
        return None
    angle = math.acos(min(cosine, 1))
    if angle < 1e-7:
        return total * ((1 - t) * x + t * y)
    return total * (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def karcher(deltas, weights, options):
    shares = [w / sum(weights) for w in weights]
    used = [(p, d / d.norm()) for p, d in zip(shares, deltas, strict=True) if p and d.any()]
    if any((x * y).sum() < -1 + 1e-12 for (_, x), (_, y) in itertools.combinations(used, 2)):
        return None
    u = sum((p * x for p, x in used), torch.zeros_like(deltas[0]))
    u = u / (u.norm() or 1)
    for _ in range(100):
        step = torch.zeros_like(u)
        for p, x in used:
            side = x - (x * u).sum() * u
            angle = torch.atan2(side.norm(), (x * u).sum())
            step += p / sum(q for q, _ in used) * angle * side / side.norm().clamp_min(1e-300)
        u = torch.cos(step.norm()) * u + torch.sin(step.norm()) * step / step.norm().clamp_min(
            1e-300
        )
    return sum(p * d.norm() for p, d in zip(shares, deltas, strict=True)) * u


def knots(deltas, weights, options):
    u, s, _ = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    u = u[:, s > 1e-10]
    u = u * torch.tensor(
        [1.0 if c[c.abs().argmax()] > 0 else -1.0 for c in u.T], dtype=torch.float64
    )
    return u @ ties([u.T @ d for d in deltas], weights, options)


def polar(x):
    p, s, qh = torch.linalg.svd(x, full_matrices=False)
    return p[:, s > 1e-8] @ qh[s > 1e-8]


def tsv(deltas, weights, options):
    smaller = min(deltas[0].shape)
    keep = max(1, smaller // len(deltas) if options.share is None else int(options.share * smaller))
    us, ss, vs = [], [], []
    for w, d in zip(weights, deltas, strict=True):
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        kept = s[:keep] > 1e-10
        us, ss, vs = [*us, u[:, :keep][:, kept]], [*ss, w * s[:keep][kept]], [*vs, vh[:keep][kept]]
    return polar(torch.cat(us, 1)) * torch.cat(ss) @ polar(torch.cat(vs, 0))


def iso_c(deltas, weights, options):
    u, s, vh = torch.linalg.svd(linear(deltas, weights, options), full_matrices=False)
    kept = s > 1e-10
    return s[kept].sum() / max(int(kept.sum()), 1) * u[:, kept] @ vh[kept]


REFERENCES = {name: globals()[name] for name in METHODS if name in globals()}
VARIANTS = [
    {},
    {"majority": "frequency"},
    {"density": 0.7, "gamma": 0.2, "select": 0.3, "t": 0.2, "share": 0.7},
]


def refers(name: str, options: dict, products: list[Product], weights: list[float], **how) -> None:
    """The method agrees with its reference, or both refuse."""
    if name == "slerp" and any(w != 1 for w in weights):
        options = {key: value for key, value in options.items() if key != "t"}
    method = record(name, **options)
    on_elements = method.acts_on == "elements"
    deltas = [p.dense().float().double() if on_elements else p.dense() for p in products]
    expected = REFERENCES[name](deltas, weights, method)
    if expected is None:
        with pytest.raises(Refused):
            combined(method, products, weights)
        return
    size = max(float(d.norm()) for d in deltas) * max(abs(w) for w in weights)
    torch.testing.assert_close(
        combined(method, products, weights, **how),
        expected,
        rtol=0,
        atol=(3e-7 if on_elements else 1e-9) * size,
    )


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("name", REFERENCES)
def test_reference(name: str, hard: str) -> None:
    products = HARD[hard]
    for options in VARIANTS:
        refers(name, options, products, WEIGHTS[: len(products)])
        refers(name, options, products, [1.0] * len(products))
        if name != "karcher":
            refers(name, options, products, [-0.5, 2.0, 1.0, -1.0][: len(products)])


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_on_something_larger(name: str) -> None:
    products = [product(96, 130, rank, rank) for rank in (3, 16)]
    refers(name, {"density": 0.2}, products, [0.8, 0.5], height=32)
    refers(name, {"share": 0.05}, products, [1.0, 1.0], height=32)


# Laws, for every member.


@pytest.mark.parametrize("name", METHODS)
def test_record(name: str) -> None:
    kind = METHODS[name]
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert (
        kind.name == name
        and kind.__module__.rsplit(".", 1)[1] == name
        and ("arXiv:" in kind.source or "doi:" in kind.source)
    )
    assert "=" in kind.__doc__.splitlines()[0]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_acts_on(name: str) -> None:
    """It is declared beside the name, and the method has the function for it, and that one alone."""
    kind = METHODS[name]
    functions = {"factors": "combine_factors", "elements": "combine_elements"}
    assert {"name", "source", "acts_on"} <= vars(kind).keys()
    assert [key for key, value in functions.items() if hasattr(kind, value)] == [kind.acts_on]
    assert not getattr(kind, "__abstractmethods__", None)
    assert not {"name", "source", "acts_on"} & registry.options(kind).keys(), "not an option"


def test_an_unfinished_method_cannot_be_made() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unfinished(OnFactors):
        name = "unfinished"
        source = "none"
        acts_on = "factors"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


@pytest.mark.parametrize("name", METHODS)
def test_one_weight_for_each_delta(name: str) -> None:
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError):
            combined(record(name), HARD["pair"], weights)


@pytest.mark.parametrize("name", METHODS)
def test_same_inputs_same_bytes_and_inputs_untouched(name: str) -> None:
    products = HARD["pair"]
    before = [p.left.clone() for p in products] + [p.right.clone() for p in products]
    one, two = (combined(record(name), products, [0.7, 1.6]) for _ in range(2))
    assert torch.equal(one, two) and one.any()
    assert all(map(torch.equal, before, [p.left for p in products] + [p.right for p in products]))


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_finite_numbers(name: str) -> None:
    for products in (HARD["pair"], case(4, 5, (2, "zero"), (2, "zero"))):
        method = record(name)
        if name in ON_ELEMENTS:
            result, metrics = method.combine_elements(
                Dense([p.dense() for p in products]), [1.0, 1.0], seeds
            )
        else:
            result, metrics = method.combine_factors(products, [1.0, 1.0])
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        if name in ON_ELEMENTS:
            assert result.dtype == torch.float32 and result.shape == products[0].dense().shape
        else:
            assert result.left.dtype == torch.float64 and result.rank <= sum(
                p.rank for p in products
            )


@pytest.mark.parametrize("name", METHODS)
def test_order_of_adapters(name: str) -> None:
    products = HARD["pair"] if name == "slerp" else HARD["full rank"]
    weights = WEIGHTS[: len(products)]
    order = list(range(len(products)))[::-1]
    moved = combined(
        record(name),
        [products[i] for i in order],
        [weights[i] for i in order],
        lambda i: seeds(order[i]),
    )
    if name in ORDERED:
        assert not torch.allclose(combined(record(name), products, weights[::-1]), moved)
    else:
        torch.testing.assert_close(
            moved, combined(record(name), products, weights), rtol=1e-6, atol=1e-6
        )


def test_slerp_the_other_way_round() -> None:
    one, two = HARD["pair"]
    torch.testing.assert_close(
        combined(record("slerp"), [one, two], [1, 2]), combined(record("slerp"), [two, one], [2, 1])
    )


def test_slerp_s_weights_say_where_on_the_arc() -> None:
    one, two = HARD["pair"]
    for t in (0.0, 0.25, 0.5, 1.0):
        said = combined(record("slerp", t=t), [one, two], [1, 1])
        torch.testing.assert_close(said, combined(record("slerp"), [one, two], [1 - t, t]))
        torch.testing.assert_close(
            3 * said, combined(record("slerp"), [one, two], [3 * (1 - t), 3 * t])
        )
    assert not torch.allclose(
        combined(record("slerp", t=0.25), [one, two], [1, 1]),
        0.75 * one.dense() + 0.25 * two.dense(),
    )
    for weights in ([0.5, 1], [1, -1], [0, 1]):
        with pytest.raises(Refused, match="both are the position on the arc"):
            combined(record("slerp", t=0.25), [one, two], weights)


@pytest.mark.parametrize("name", METHODS)
def test_all_weights_doubled(name: str) -> None:
    products = HARD["pair"]
    one, two = (combined(record(name), products, [0.7 * by, 1.6 * by]) for by in (1, 2))
    torch.testing.assert_close(two, one if name in SHARES else 2 * one)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slerp"}))
def test_one_adapter_is_itself(name: str) -> None:
    products = [HARD["pair"][0]]
    result = combined(record(name, density=1), products, [1.0])
    assert torch.allclose(result, products[0].dense(), atol=1e-6) == (name not in NOT_ITSELF)


@pytest.mark.parametrize(
    "name", sorted(LINEAR & set(METHODS) | {"slerp", "karcher"})
)  # of all: see test_combine
def test_weights_one_and_zero(name: str) -> None:
    products = HARD["pair"]
    torch.testing.assert_close(
        combined(record(name, density=1), products, [1.0, 0.0]),
        products[0].dense(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", sorted(ADDITIVE & set(METHODS)))
def test_linear_in_the_first_delta(name: str) -> None:
    one, two, three = (product(6, 8, 2, seed) for seed in (1, 2, 3))
    both = Product(torch.cat([one.left, two.left], 1), torch.cat([one.right, two.right], 0))
    none = Product(three.left * 0, three.right)
    method = record(name, density=1)
    parts = combined(method, [one, three], [0.5, 2.0]) + combined(method, [two, none], [0.5, 2.0])
    torch.testing.assert_close(
        combined(method, [both, three], [0.5, 2.0]), parts, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", PARENTS)
def test_density_one_is_the_dense_parent(name: str) -> None:
    for products in (HARD["full rank"], HARD["repeated"], HARD["1x3"]):
        for majority in ("total", "frequency"):
            got = combined(record(name, density=1, majority=majority), products, [0.7, -1.6, 0.4])
            parent = combined(
                record(PARENTS[name], density=1, majority=majority), products, [0.7, -1.6, 0.4]
            )
            torch.testing.assert_close(got, parent, rtol=1e-6, atol=1e-6)


def test_ties_at_density_one_is_untrimmed() -> None:
    deltas = [p.dense().float().double() for p in HARD["repeated"]]
    expected = elected(deltas, WEIGHTS[:3], None)
    torch.testing.assert_close(
        combined(record("ties", density=1.0), HARD["repeated"], WEIGHTS[:3]),
        expected,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ON_ELEMENTS)
def test_blocks_and_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CACHED", 700)
    products = [
        product(100, 401, 8, seed, kind)
        for seed, kind in ((1, "normal"), (2, "bf16"), (3, "normal"))
    ]
    seen = []
    for number, height in ((1, 100), (2, 100), (5, 100), (2, 17), (1, 9)):
        torch.set_num_threads(number)
        seen.append(combined(record(name, density=0.3), products, WEIGHTS[:3], height=height))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


class Live(TorchDispatchMode):
    """Where in memory matrices of at least half the size of the result were made."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.places = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= 2 * self.size:
                self.places.add(value.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("name", ON_ELEMENTS)
def test_memory(name: str) -> None:
    deltas = Dense([product(1024, 1024, 4, seed).dense() for seed in (1, 2)], height=16)
    with Live(1024 * 1024) as live:
        record(name, density=0.2, select=0.2).combine_elements(deltas, [1.0, 1.0], seeds)
    assert len(live.places - {m.untyped_storage().data_ptr() for m in deltas.matrices}) == 1, (
        "only the result may be of the size of the matrix"
    )


@pytest.mark.parametrize("products", [HARD["pair"], HARD["repeated"]])
@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "sce", "knots"])
def test_conflict(name: str, products: list[Product]) -> None:
    """The metric agrees with a count by hand for ties at density 1, and is a share for the others."""
    weights = [1.0] * len(products)
    if name == "knots":
        metrics = record(name).combine_factors(products, weights)[1]
    else:
        metrics = (
            record(name)
            .combine_elements(Dense([p.dense() for p in products]), weights, seeds)
            .metrics
        )
    assert 0 <= metrics["conflict"] <= 1
    if name == "ties":
        for density, majority in itertools.product((1.0, 0.5), ("total", "frequency")):
            deltas = [p.dense().float() for p in products]
            kept = torch.stack([trimmed(d, share_of(d, density)) for d in deltas])
            plus, minus = (kept > 0).sum(0), (kept < 0).sum(0)
            several = int((plus + minus >= 2).sum())
            metrics = (
                record("ties", density=density, majority=majority)
                .combine_elements(Dense(deltas), weights, seeds)
                .metrics
            )
            assert metrics["conflict"] == int(((plus > 0) & (minus > 0)).sum()) / several > 0


# Trimming is exact.


def exact(x: Tensor, keep: int, height: int = 3) -> int:
    """The trimmed matrix is the stable sort's; returns the number of passes."""
    deltas, passes = Dense([x], height), 0

    def read() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return (x[first:last].clone() for first, last in deltas.blocks())

    cut = Trim(top_k_threshold(read, x.numel(), keep))
    blocks = [x[first:last].clone() for first, last in deltas.blocks()]
    for block in blocks:
        cut(block)
    assert torch.equal(torch.cat(blocks), trimmed(x, keep)), f"{keep} of {x.numel()}"
    return passes


def awkward() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(40, 50, generator=generator)
    return {
        "normal": normal,
        "equal": torch.full((40, 50), -0.3),
        "zero": torch.zeros(40, 50),
        "nearly zero": torch.where(normal > 1.5, normal, -0.0),
        "signs": normal.sign() * 0.1,
        "two values": torch.where(normal > 0.3, 2.0, -1.0),
        "few values": normal.mul(2).round(),
        "bf16": normal.bfloat16().float(),
        "wide": normal.mul(40).exp2() * normal.sign(),
        "subnormal": normal * 1e-41,
        "rows grow": normal * torch.arange(40.0)[:, None].exp2(),
        "sorted": torch.arange(2000.0).view(40, 50),
        "one large": torch.cat([torch.full((39, 50), 1e-3), torch.full((1, 50), 1e3)]),
        "float64": normal.double() + 1e-12,
        "infinite": torch.where(normal > 2, math.inf, normal),
    }


@pytest.mark.parametrize("size", [(elementwise.SAMPLE, elementwise.ROOM), (50, 100), (7, 1)])
@pytest.mark.parametrize("kind", awkward())
def test_exactly_so_many_stay(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "SAMPLE", size[0])
    monkeypatch.setattr(elementwise, "ROOM", size[1])
    x = awkward()[kind]
    for keep in (0, 1, 2, 37, 400, 1000, 1001, 1999, 2000, 3000):
        assert exact(x, keep, height=7) < 70
    assert exact(x[:1, :1], 1) == 0 and exact(x[:1, :1], 0) == 0
    for keep in range(7):
        exact(x[:2, :3], keep, height=1)


def test_two_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = product(300, 700, 8, 1).dense().float()
    assert exact(x, 42_000, height=32) == 2
    monkeypatch.setattr(elementwise, "SAMPLE", 2000)
    assert exact(x, 42_000, height=32) == 2
    assert exact(torch.full((300, 700), 0.5), 42_000) == 2
    columns = torch.where(
        torch.arange(700) % 35 == 0, 100.0, 1.0
    )  # 210,000 / 2000 = 105, and of 700 columns it meets each 35th
    assert exact(x * columns, 42_000, height=32) == 2


def test_few_passes_where_the_bracket_holds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two values and a threshold at the jump between them: the bracket has room for neither."""
    monkeypatch.setattr(elementwise, "ROOM", 100)
    monkeypatch.setattr(elementwise, "SAMPLE", 2000)
    large = torch.rand(300, 700, generator=torch.Generator().manual_seed(0)) < 0.3
    x = torch.where(large, 2.0, -1.0)
    for off in (-1, 0, 1):
        assert exact(x, int(large.sum()) + off, height=32) <= 5


def test_few_passes_where_the_bracket_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 20 elements: each miss tells where to look next."""
    monkeypatch.setattr(elementwise, "SAMPLE", 20)
    monkeypatch.setattr(elementwise, "ROOM", 100)
    passes = [
        exact(product(64, 90, 3, seed).dense().float(), keep, height=16)
        for seed in range(5)
        for keep in (60, 1000, 5000)
    ]
    assert max(passes) <= 20 and sum(passes) / len(passes) < 8


def test_the_order_of_adapters_changes_no_sign() -> None:
    """1e8 - 1 - 1e8 is 0 in float32, were it summed there."""
    values = [1e8, -1.0, -1e8]
    for order in itertools.permutations(range(3)):
        result = record("ties", density=1.0).combine_elements(
            Dense([torch.tensor([[values[i]]]) for i in order]), [1.0] * 3, seeds
        )
        assert result.delta.item() < 0 and result.metrics["conflict"] == 1


def test_deviation() -> None:
    x, y, z = (torch.randn(5, 700, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = torch.empty(5, 700)
    elementwise.deviation([x, x, x], out)
    assert not out.any(), "equal deltas vary nowhere"
    elementwise.deviation([x, y, z], out)
    torch.testing.assert_close(out, torch.stack([x, y, z]).std(0, correction=0))


def test_trimming_counts_as_peft_does() -> None:
    deltas = Dense([torch.randn(10, 10, generator=torch.Generator().manual_seed(0))])
    for density in (0.29, 0.57, 0.58, 1.0, 0.0):  # 0.29 * 100 is 28.999...
        block = deltas.rows(0, 0, 10)
        trim(deltas, 0, density)(block)
        assert int((block != 0).sum()) == int(density * 100)


def test_ranks() -> None:
    assert ranks(torch.tensor([[3.0, -1, 2, 1, 0]])).tolist() == [[1, 0.25, 0.75, 0.5, 0]]
    assert ranks(torch.tensor([[3.0], [0]])).tolist() == [[0.5], [0.5]]


def test_drops_keep_the_expectation_and_the_density() -> None:
    deltas = Dense([torch.ones(200, 500)], height=64)
    for name in ("dare_linear", "dare_ties", "della"):
        result = record(name, density=0.3).combine_elements(deltas, [1.0], seeds).delta
        assert (
            abs(float((result != 0).float().mean()) - 0.3) < 0.005
            and abs(float(result.mean()) - 1) < 0.02
        )
    both = (
        record("dare_linear", density=0.3)
        .combine_elements(Dense([torch.ones(200, 500)] * 2), [1.0, -1.0], seeds)
        .delta
    )
    assert both.any(), "each delta has its own random numbers"


# PEFT.


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_against_peft(name: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not density and "dare" in name:
        with pytest.raises(Refused):
            record(name, density=density)
        return
    products = [product(21, 34, 5, seed) for seed in (1, 2, 3, 4)]
    deltas = [p.dense().float().double() for p in products]
    turn = iter(range(8))

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return tensor * (torch.rand(tensor.shape, generator=seeds(next(turn))) < density) / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    weights = [0.7, -1.6, 0.4, 2.0]
    for majority in ("total", "frequency") if "ties" in name else (None,):
        turn = iter(range(4))
        given = {"majority_sign_method": majority} if majority else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = getattr(merge_utils, name)(
                deltas, torch.tensor(weights, dtype=torch.float64), density, **given
            )
        got = combined(record(name, density=density, majority=majority), products, weights)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# mergekit's golden numbers.


def ours(method: str, parameters: dict) -> tuple[str, dict, list[float]]:
    """Our method, options and weights for mergekit's."""
    weight = parameters.get("weight", 1.0)
    names = {"task_arithmetic": "linear", "linear": "mean"}
    options = {
        "select": parameters.get("select_topk"),
        **{key: parameters.get(key) for key in ("density", "gamma", "t")},
    }
    given = {key: value for key, value in options.items() if value is not None}
    return names.get(method, method), given, weight if isinstance(weight, list) else [weight] * 3


@pytest.mark.parametrize("golden", GOLDEN["cases"], ids=lambda case: case["method"])
def test_against_mergekit(golden: dict) -> None:
    name, options, weights = ours(golden["method"], golden["parameters"])
    deltas = [torch.tensor(d).double() for d in GOLDEN["deltas"]][: 2 if name == "slerp" else 3]
    products = [Product(d, torch.eye(d.shape[1], dtype=torch.float64)) for d in deltas]
    got = combined(record(name, **options), products, weights[: len(products)])
    torch.testing.assert_close(got, torch.tensor(golden["merged"]).double(), rtol=0, atol=3e-6)


def test_della_chances_against_mergekit() -> None:
    golden = GOLDEN["della"]
    chances = record("della", density=golden["density"], epsilon=golden["epsilon"]).probabilities(
        torch.tensor(GOLDEN["deltas"][0])
    )
    torch.testing.assert_close(chances, torch.tensor(golden["chances"]), rtol=0, atol=1e-6)


# Refusals, and what is special to one method.


BAD = {
    "density": [-0.1, 1.1, math.nan],
    "majority": ["most"],
    "gamma": [-0.1, 1.5],
    "epsilon": [-0.1, 0.4, 0.9],
    "select": [-0.1, 2.0],
    "decay": [-0.1, 1.1],
    "t": [-0.1, 1.1],
    "share": [0.0, 1.1],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in METHODS for option in registry.options(METHODS[name])],
)
def test_bad_options(name: str, option: str) -> None:
    for value in BAD.get(option, []):
        with pytest.raises(Refused, match=f"--{option}"):
            record(name, **{option: value})


def test_della_says_which_epsilon_fits() -> None:
    with pytest.raises(Refused, match="below 0.1"):
        record("della", density=0.9, epsilon=0.15)
    record("della", density=1.0, epsilon=0.15), record("della", density=0.75, epsilon=0.25)


def test_refusals_of_factors() -> None:
    one, two, three = HARD["full rank"]
    minus = Product(-one.left * 3, one.right)
    for name in ("slerp", "karcher"):
        with pytest.raises(Refused, match="opposite directions"):
            combined(record(name), [one, minus], [1.0, 1.0])
    with pytest.raises(Refused, match="adapters 1 and 3 in opposite"):
        combined(record("karcher"), [one, two, minus], [1.0, 1.0, 1.0])
    (
        combined(record("slerp"), [one, minus], [1.0, -1.0]),
        combined(record("karcher"), [one, two, minus], [1.0, 1.0, 0.0]),
    )
    with pytest.raises(Refused, match="two"):
        combined(record("slerp"), [one, two, three], [1.0, 1.0, 1.0])
    with pytest.raises(Refused, match="add up to 0"):
        combined(record("mean"), [one, two], [1.0, -1.0])
    for weights in ([1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(Refused, match="shares"):
            combined(record("karcher"), [one, two], weights)


def test_karcher_of_balanced_directions_is_refused() -> None:
    """Three vectors at 120°: no two are opposite, and yet there is no mean."""
    turns = [2 * math.pi * i / 3 for i in range(3)]
    products = [
        Product(
            torch.tensor([[math.cos(a)], [math.sin(a)]], dtype=torch.float64),
            torch.ones(1, 1).double(),
        )
        for a in turns
    ]
    with pytest.raises(Refused, match="cancel"):
        combined(record("karcher"), products, [1.0, 1.0, 1.0])


def test_karcher_is_where_the_pulls_balance() -> None:
    products = [product(30, 20, 4, seed) for seed in range(6)]
    weights = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0]
    result = combined(record("karcher"), products, weights)
    u, pull = result / result.norm(), torch.zeros(30, 20, dtype=torch.float64)
    for w, p in zip(weights, products, strict=True):
        x = p.dense() / p.dense().norm()
        angle = torch.acos((x * u).sum())
        pull += w * angle / angle.sin() * (x - angle.cos() * u)
    assert float(pull.norm()) < 1e-8
    assert float(result.norm()) == pytest.approx(
        sum(w * float(p.dense().norm()) for w, p in zip(weights, products, strict=True)) / 8.5
    )


@pytest.mark.parametrize("name", ["mean", "karcher", "slerp", "tsv", "ties", "sce", "knots"])
def test_a_delta_with_itself(name: str) -> None:
    one = product(12, 9, 3, 4)
    weights = [0.5, 0.5] if name == "slerp" else [1.0, 1.0]
    result = combined(record(name, density=1, select=0.5), [one, one], weights)
    torch.testing.assert_close(result, one.dense(), rtol=1e-5, atol=1e-6)


def test_nearly_parallel() -> None:
    """Angles far below the square root of float64's noise do no harm."""
    one, other = product(12, 9, 3, 4), product(12, 9, 3, 5)
    for tiny in (1e-5, 1e-8, 1e-11):
        near = Product(
            torch.cat([one.left, tiny * other.left], 1), torch.cat([one.right, other.right], 0)
        )
        for name in ("karcher", "slerp"):
            got = combined(record(name), [one, near], [0.5, 0.5])
            torch.testing.assert_close(
                got, (one.dense() + near.dense()) / 2, rtol=0, atol=1e-9 + tiny**2
            )


def test_slerp_of_a_small_angle() -> None:
    one, other = product(12, 9, 3, 4), product(12, 9, 3, 5)
    near = Product(
        torch.cat([one.left, 0.03 * other.left], 1), torch.cat([one.right, other.right], 0)
    )
    refers("slerp", {}, [one, near], [1.0, 3.0])


def test_iso_c_is_isotropic_and_tsv_is_orthogonal() -> None:
    products = [product(30, 20, 3, seed) for seed in (1, 2)]
    found = torch.linalg.svdvals(combined(record("iso_c"), products, [1.0, 1.0]))
    assert float(found[5]) == pytest.approx(float(found[0])) and float(found[6]) < 1e-12
    strengths = (
        torch.cat([torch.linalg.svdvals(p.dense())[:3] for p in products])
        .sort(descending=True)
        .values
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(combined(record("tsv"), products, [1.0, 1.0]))[:6], strengths
    )
    energy = record("tsv", share=0.05).combine_factors(products, [1.0, 1.0])[1]["kept_energy"]
    kept = [torch.linalg.svdvals(p.dense()).square() for p in products]
    assert energy == pytest.approx(
        sum(float(s[0]) for s in kept) / sum(float(s.sum()) for s in kept)
    )


@pytest.mark.parametrize("name", ["iso_c", "tsv", "knots"])
def test_noise_is_not_a_direction(name: str) -> None:
    """The same delta twice in other factors: the second half of the rank is rounding, and must stay out."""
    one = product(12, 9, 3, 4)
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = Product(one.left @ mixed, torch.linalg.solve(mixed, one.right))
    expected = combined(record(name, density=1), [one], [1.0])
    got = combined(
        record(name, density=1), [one, same], [0.5, 0.5] if name == "iso_c" else [1.0, 1.0]
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_sce_weighs_small_deltas_too() -> None:
    """Mean squares far below 1e-6, as those of most adapters: the shares are still those of the squares."""
    one, two = HARD["pair"]
    small = [Product(p.left * 1e-6, p.right) for p in (one, two)]
    for select in (0.5, 1.0):
        method = record("sce", select=select)
        torch.testing.assert_close(
            combined(method, small, [1, 1]) * 1e6,
            combined(method, [one, two], [1, 1]),
            rtol=1e-5,
            atol=1e-6,
        )
