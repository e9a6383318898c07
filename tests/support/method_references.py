"""Combination methods written plainly, dense, in float64.

core_space, ctm, iso_c, iso_cts, svc and subspace_boost were compared once with the authors' own
functions, beside the repository, on the matrices of `methods.product`: the same to 1e-14, but that
their ties keeps one element more, to 2e-8 svc, whose factors are float32 there, and ctm within the
tolerance of its iteration (tensorly's Tucker of 1e-12). pico follows the authors' code, too.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from tests.support.methods import METHODS, combined, covariance_of, drawn, record

BY_FACTORS = ("core_space", "pico")  # other factors of the same deltas: another result


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
    masks = [drawn(d.shape, i) < chances[i] for i, d in enumerate(deltas)]
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
    if not sum(squares) or sum(squares) / mask.numel() < options.floor:
        squares = [1.0] * len(squares)
    return elected(selected, weights, options, shares=[s / sum(squares) for s in squares])


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


def basis(x):
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-12 * x.norm()] if x.any() else u[:, :1] * 0
    return u * torch.tensor(
        [1.0 if c[c.abs().argmax()] >= 0 else -1.0 for c in u.T], dtype=torch.float64
    )


def inside(cores, weights, options):
    inner = record(options.inner, density=options.density, majority=options.majority)
    return globals()[options.inner](cores, weights, inner)


def knots(deltas, weights, options):
    u = basis(torch.cat(deltas, 1))
    return u @ inside([u.T @ d for d in deltas], weights, options)


def core_space(products, weights, options):
    u = basis(torch.cat([p.left for p in products], 1))
    v = basis(torch.cat([p.right for p in products], 0).T)
    return u @ inside([u.T @ p.dense() @ v for p in products], weights, options) @ v.T


def ctm(deltas, weights, options):
    """HOOI on the dense stack of rescaled deltas. (The authors have it beside that in the core.)"""
    rank = max(int(torch.linalg.matrix_rank(d)) for d in deltas)
    norms = [d.norm() for d in deltas]
    stack = torch.stack(
        [
            d * (options.beta + (1 - options.beta) * sum(norms) / len(norms) / n) if n else d
            for d, n in zip(deltas, norms, strict=True)
        ]
    )
    u, v = basis(torch.cat([*stack], 1))[:, :rank], basis(torch.cat([*stack.mT], 1))[:, :rank]
    energy = 0.0
    for _ in range(1000):
        u = basis(torch.cat([x @ v for x in stack], 1))[:, :rank]
        v = basis(torch.cat([x.T @ u for x in stack], 1))[:, :rank]
        before, energy = energy, sum(float((u.T @ x @ v).square().sum()) for x in stack)
        if energy - before <= 1e-7 * energy:
            break
    return u @ inside([u.T @ d @ v for d in deltas], weights, options) @ v.T


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


def svc(deltas, weights, options):
    parts = [w * d for w, d in zip(weights, deltas, strict=True)]
    u, s, vh = torch.linalg.svd(sum(parts), full_matrices=False)
    alpha, total = options.alpha or 1 / len(deltas), torch.zeros_like(sum(parts))
    for r in range(int((s > 1e-10).sum())):
        whole, scales = u[:, r] @ sum(parts), []
        for part in parts:
            own = u[:, r] @ part
            along = float(whole @ own / (own @ own)) if own.norm() > 1e-9 * s[r] else 0.0
            scales.append(max(alpha, along))
        total += len(deltas) / sum(scales) * s[r] * torch.outer(u[:, r], vh[r])
    return total


def subspace_boost(deltas, weights, options):
    u, s, vh = torch.linalg.svd(linear(deltas, weights, options), full_matrices=False)
    kept = s > 1e-10
    u, s, vh = u[:, kept], s[kept], vh[kept]
    if not len(s):
        return torch.zeros_like(deltas[0])
    k = int((s.cumsum(0) / s.sum() >= options.beta).nonzero()[0]) if options.beta < 1 else -1
    return u * s.clamp(min=s[k]) @ vh


def iso_cts(deltas, weights, options):
    parts = [w * d for w, d in zip(weights, deltas, strict=True)]
    u, s, vh = torch.linalg.svd(sum(parts), full_matrices=False)
    rank, k = int((s > 1e-10).sum()), len(deltas)
    if not rank:
        return torch.zeros_like(deltas[0])
    each = min(round((rank - int(options.common * rank)) / k), rank // k)
    c = rank - k * each
    us, ss, vs = [u[:, :c]], [s[:c]], [vh[:c]]
    for part in parts:
        x, y, z = torch.linalg.svd(part - u[:, :c] @ u[:, :c].T @ part, full_matrices=False)
        kept = y[:each] > 1e-10
        us, ss = [*us, x[:, :each][:, kept]], [*ss, y[:each][kept]]
        vs = [*vs, z[:each][kept]]
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 0))


def pico(products, weights, options):
    u, s, _ = torch.linalg.svd(torch.cat([p.left for p in products], 1), full_matrices=False)
    alpha = 1 / (1 + (len(products) - 1) * s**2 / (s**2).sum().clamp_min(1e-300))
    deltas = [w * p.dense() for w, p in zip(weights, products, strict=True)]
    fused = sum(d + u @ torch.diag(alpha - 1) @ u.T @ d for d in deltas)
    size = sum(float(d.norm()) for d in deltas) / len(deltas)
    return fused * size / fused.norm() if fused.norm() > 1e-9 * size else 0 * fused


def regmean(deltas, weights, options):
    if min(weights) < 0:
        return None
    covariances = []
    for d in deltas:
        c = covariance_of(d).double()
        covariances.append(options.alpha * c + (1 - options.alpha) * c.diagonal().diag())
    ridge = 1e-6 * linear(covariances, weights, options).diagonal().mean() / sum(weights)
    covariances = [c + ridge * torch.eye(len(c), dtype=c.dtype) for c in covariances]
    outputs = [d @ c for d, c in zip(deltas, covariances, strict=True)]
    return linear(outputs, weights, options) @ linear(covariances, weights, options).inverse()


def regspan(deltas, weights, options):
    """The least squares of the outputs themselves, by a dense solver; the ridge as rows of it."""
    if min(weights) < 0:
        return None
    roots = [torch.linalg.cholesky(covariance_of(d).double()) for d in deltas]
    seen = lambda d: torch.cat(
        [w**0.5 * (d @ r).flatten() for w, r in zip(weights, roots, strict=True)]
    )
    columns = torch.stack([seen(d) for d in deltas], 1)
    wanted = torch.cat(
        [w**0.5 * (d @ r).flatten() for w, d, r in zip(weights, deltas, roots, strict=True)]
    )
    penalty = (options.ridge**0.5 * columns.norm(dim=0)).diag()
    wide = torch.cat([columns, penalty]), torch.cat([wanted, wanted.new_zeros(len(deltas))])
    c = torch.linalg.lstsq(*wide, driver="gelsd").solution
    return linear(deltas, c.tolist(), options)


def gta(deltas, weights, options):
    pruned = []
    for i, d in enumerate(deltas):
        keep = share_of(d, options.density)
        if options.density == 1 or options.prune == "none":
            pruned.append(d)
        elif options.prune == "outliers":
            top = min(share_of(d, options.gamma), d.numel() - keep)
            pruned.append(trimmed(d, keep + top) - trimmed(d, top))
        elif options.prune == "random":
            pruned.append(d * (drawn(d.shape, i) < options.density))
        else:
            assert options.prune == "magnitude"
            pruned.append(trimmed(d, keep))
    if options.rescale == "l1":
        norms = [(d.abs().sum(), p.abs().sum()) for d, p in zip(deltas, pruned, strict=True)]
        pruned = [
            p * a / b if min(a, b) >= 1e-7 else p for p, (a, b) in zip(pruned, norms, strict=True)
        ]
    weighed = torch.stack([w * p for w, p in zip(weights, pruned, strict=True)])
    mask = torch.ones_like(weighed)
    if options.consensus == "sum":
        mask = (weighed.sign() == torch.where(weighed.sum(0) >= 0, 1.0, -1.0)).double()
    total = (weighed * mask).sum(0)
    if options.divide == "weights":
        divisor = (torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1) * mask).sum(0)
        total = total / torch.where(divisor.abs() < 1e-8, 1, divisor)
    return options.factor * total


REFERENCES = {name: globals()[name] for name in METHODS if name in globals()}
VARIANTS = [
    {},
    {"majority": "frequency"},
    {"density": 0.7, "gamma": 0.2, "select": 0.3, "t": 0.2, "share": 0.7, "inner": "dare_ties"}
    | {"beta": 0.8, "alpha": 0.9, "common": 0.5},
    {"prune": "magnitude", "consensus": "sum", "divide": "weights", "density": 0.4},
    {"prune": "outliers", "rescale": "l1", "consensus": "sum", "factor": -0.3, "density": 0.6},
    {"floor": 1e6},
    {"prune": "random", "divide": "weights", "rescale": "l1", "density": 0.6},
]


def refers(name: str, options: dict, products: list[Product], weights: list[float], **how) -> None:
    """The method agrees with its reference, or both refuse."""
    if name == "slerp" and any(w != 1 for w in weights):
        options = {key: value for key, value in options.items() if key != "t"}
    method = record(name, **options)
    on_elements = method.acts_on == "elements"
    deltas = [p.dense().float().double() if on_elements else p.dense() for p in products]
    expected = REFERENCES[name](products if name in BY_FACTORS else deltas, weights, method)
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
