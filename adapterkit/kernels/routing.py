"""Routing tokens to low-rank experts: softmax over the largest |x·p| (Arrow, arXiv:2405.11157).

The experts of one module are two matrices: `down` (E·r + E, in), the rows of every a and then the
prototypes, and `up` (E·r, out), the rows of every bᵀ. An expert computes outputs only for tokens
routed to it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Routing(NamedTuple):
    """The experts of a module and the settings of their routing; all of one dtype."""

    down: Tensor
    up: Tensor
    scales: Tensor  # (E,)
    top_k: int
    temperature: float
    weight: float


def route(
    similarity: Tensor,  # (T, E) x·p
    top_k: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Each token's coefficients (T, k), softmax(|x·p| / temperature) over the `top_k` largest, and
    the numbers (T, k) of their experts."""
    values, experts = similarity.abs().topk(top_k, dim=-1)
    return torch.softmax(values / temperature, dim=-1), experts


def route_one(similarity: list[float], top_k: int, temperature: float) -> list[tuple[int, float]]:
    """`route` for one token without tensors, whose calls take longer than the arithmetic."""
    sizes = [abs(value) for value in similarity]
    top = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:top_k]
    powers = [math.exp((sizes[expert] - sizes[top[0]]) / temperature) for expert in top]
    total = sum(powers)
    return [(expert, power / total) for expert, power in zip(top, powers, strict=True)]


def add_routed(
    y: Tensor,  # (T, out)
    x: Tensor,  # (T, in)
    down: Tensor,
    up: Tensor,
    scales: Tensor,  # (E,)
    *,
    top_k: int,
    temperature: float,
    weight: float = 1.0,
    in_place: bool = False,
) -> Tensor:
    """y + weight·Σ_e coefficient_e·scale_e·b_e·a_e·x for each token; all of one dtype.

    The form is chosen by times at width 1024 and rank 16 on a CPU, relative to all experts at once.
    By expert: for one token 0.5 (3 of 10 experts) or 0.07 (3 of 64), for 256 tokens 0.35 (3 of 64);
    with fewer experts many small products wait for each other's threads. Gathered: for one token
    0.15 (3 of 64).
    """
    if not in_place and not torch.is_grad_enabled():
        y, in_place = y.clone(), True
    tokens, count = x.shape[0], scales.shape[0]
    waits = x.device.type == "cpu" and not torch.compiler.is_compiling()
    routing = Routing(down, up, scales, top_k, temperature, weight)
    if in_place and waits and by_expert_is_faster(tokens, count, top_k):
        by_expert_(y, x, routing)
        return y
    if 8 * tokens * top_k <= count:
        return gathered(y, x, routing)
    return dense(y, x, routing, in_place=in_place)


def by_expert_is_faster(tokens: int, count: int, top_k: int) -> bool:
    return (2 if tokens == 1 else 10) * top_k <= count


def by_expert_(y: Tensor, x: Tensor, routing: Routing) -> None:
    """Each expert on its own tokens, added to y: k/E of the arithmetic. Synchronizes with the
    routing."""
    down, up, scales, top_k, temperature, weight = routing
    count, width = scales.shape[0], up.shape[0]
    rank = width // count
    similarity = F.linear(x, down.narrow(0, width, count))
    factor = [scale * weight for scale in scales.tolist()]
    if x.shape[0] == 1:
        for expert, coefficient in route_one(similarity[0].tolist(), top_k, temperature):
            inner = F.linear(x, down.narrow(0, expert * rank, rank))
            own = up.narrow(0, expert * rank, rank)
            y.addmm_(inner, own, alpha=coefficient * factor[expert])
        return
    coefficients, experts = route(similarity, top_k, temperature)
    order = experts.flatten().argsort()
    rows = order.div(top_k, rounding_mode="floor")
    coefficients = coefficients.flatten().index_select(0, order)[:, None]
    start = 0
    for expert, size in enumerate(experts.flatten().bincount(minlength=count).tolist()):
        if not size:
            continue
        own = rows.narrow(0, start, size)
        inner = F.linear(x.index_select(0, own), down.narrow(0, expert * rank, rank))
        inner = inner.mul_(coefficients.narrow(0, start, size))
        update = inner @ up.narrow(0, expert * rank, rank)
        y.index_add_(0, own, update, alpha=factor[expert])
        start += size


def gathered(y: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """Each token's experts concatenated as one of rank k·r: for few tokens."""
    down, up, scales, top_k, temperature, weight = routing
    count, width = scales.shape[0], up.shape[0]
    coefficients, experts = route(F.linear(x, down[width:]), top_k, temperature)
    coefficients = coefficients * scales[experts]
    a, b = (t[:width].view(count, -1, t.shape[1]) for t in (down, up))  # (E, r, in), (E, r, out)
    own_a, own_b = a[experts].flatten(1, 2), b[experts].flatten(1, 2)  # (T, k·r, in), (T, k·r, out)
    inner = torch.bmm(own_a, x[:, :, None]).view(*experts.shape, -1) * coefficients[:, :, None]
    return torch.baddbmm(y[:, None], inner.flatten(1)[:, None], own_b, alpha=weight)[:, 0]


def dense(y: Tensor, x: Tensor, routing: Routing, *, in_place: bool) -> Tensor:
    """All experts' factors at once; unselected experts have the coefficient 0."""
    down, up, scales, top_k, temperature, weight = routing
    count, width = scales.shape[0], up.shape[0]
    products = F.linear(x, down)
    inner, similarity = products[:, :width], products[:, width:]
    top, experts = route(similarity, top_k, temperature)
    coefficients = torch.zeros_like(similarity).scatter(1, experts, top) * scales
    inner = (inner.reshape(-1, count, width // count) * coefficients[:, :, None]).flatten(1)
    add = y.addmm_ if in_place else y.addmm
    return add(inner, up, alpha=weight)
