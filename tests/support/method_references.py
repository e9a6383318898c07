"""Combination methods written plainly, dense, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from adapterkit.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from tests.support.methods import METHODS, combined, covariance_of, drawn, record


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
