"""Low-rank products of several adapters in one batch: y[i] += scale·b·a·x[i] of row i's adapter.

Two forms give the same result. The dense form multiplies every row with the concatenated factors of
all adapters and masks other rows' columns: two products, whose cost grows with the number of
adapters. The grouped form gathers the rows of one adapter in groups of one size, each with a copy
of the factors: two batched products. Larger groups read fewer factors, but scattered rows are
copied, and groups are padded. Rows of the base have zero masks or factors, or no group.

All factors are concatenated once, whatever the rows; masks and indices of rows are made on the host
and moved once for all layers with the same ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LIMIT = 1 << 18  # tokens times columns up to which a GPU takes the dense form; estimated
Index = tuple[int, ...]  # for each row the number of its factors, -1 for none


def dense_is_better(
    rows: int,
    adapters: int,
    tokens: int,  # of each row
    columns: int,  # the sum of the ranks
    device: torch.device,
) -> bool:
    """Return whether the dense form is faster. CPU: measured on one thread at rank 16 and width
    1024, 2 to 64 rows, 1 to 64 adapters, 1 to 128 tokens per row; GPU: for few tokens reading the
    factors dominates."""
    if device.type != "cpu" and rows * tokens * columns <= LIMIT:
        return True
    return adapters == 1 or adapters * tokens <= 2


def group_size(index: Index, tokens: int) -> int:
    """The number of rows per group with the least reads and multiplications; `index`: the factors
    of each row, -1 for none. On average at most 8 copies of an adapter's factors."""
    counts = [index.count(i) for i in sorted(set(index) - {-1})]

    def cost(size: int) -> float:
        # in products of a token: to read a group's factors costs 8, to copy a token in and out ½
        groups = len(index) if size == 1 else sum(-(-count // size) for count in counts)
        copied = 0 if size == 1 or _is_in_order(index, size) else groups * size * tokens / 2
        return groups * (8 + size * tokens) + copied

    few = len(index) <= 8 * len(counts)
    sizes = {1} if few else set()
    sizes |= {count for count in counts if sum(-(-n // count) for n in counts) <= 8 * len(counts)}
    return min(sorted(sizes), key=cost)


def _is_in_order(index: Index, size: int) -> bool:
    """Return whether the rows form full groups in their order."""
    groups = [index[i : i + size] for i in range(0, len(index), size)]
    return all(len(g) == size and set(g) == {g[0]} and g[0] >= 0 for g in groups)


class JoinedFactors(NamedTuple):
    """Concatenated factors of several adapters; R: the sum of their ranks."""

    a: Tensor  # (R, in)
    b: Tensor  # (R, out)
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


def join_factors(factors: Sequence[tuple[Tensor, Tensor, float]]) -> JoinedFactors:
    """Concatenate a (r, in), b (out, r) and the scale of each adapter."""
    a, b, scales = zip(*factors, strict=True)
    if b[0].device.type == "cpu":
        stacked_b = torch.cat([one.T for one in b])
    else:  # in one launch, which takes what is contiguous only
        stacked_b = torch.cat(b, 1).T.contiguous()
    return JoinedFactors(torch.cat(a), stacked_b, tuple(len(one) for one in a), scales)


def dense_mask(
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    index: Index,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """(rows, 1, R): the scale at a row's own columns, else 0."""
    mask = torch.zeros(len(index), 1, sum(ranks), dtype=dtype)
    for row, i in enumerate(index):
        if i >= 0:
            mask[row, :, sum(ranks[:i]) : sum(ranks[: i + 1])] = scales[i]
    return mask.to(device)


class Grouping(NamedTuple):
    """The rows of groups of `size`, and the factors of each group."""

    size: int
    # (groups · r,) of the factors side by side, R where there are zeros; None: all in their order
    picks: Tensor | None
    scales: Tensor  # (groups, 1, 1)
    rows: Tensor | None  # (groups · size,) of the batch; None: as they are
    used: Tensor | None  # which of these are no filling; None: all
    targets: Tensor | None  # the rows of these
    is_padded: bool  # whether some picks are zeros


def grouping(
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    index: Index,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Grouping:
    """The groups of rows; r: the highest rank."""
    rows, used, own = [], [], list(index[::size])
    is_ordered = size == 1 or _is_in_order(index, size)
    if not is_ordered:
        rows, used, own = _filled(index, size)
    starts, rank = [sum(ranks[:i]) for i in range(len(ranks) + 1)], max(ranks)
    picks = [
        starts[i] + k if i >= 0 and k < ranks[i] else starts[-1] for i in own for k in range(rank)
    ]
    factor = [[[scales[i] if i >= 0 else 0.0]] for i in own]
    there = lambda values: torch.tensor(values).to(device)
    return Grouping(
        size,
        None if picks == list(range(starts[-1])) else there(picks),
        torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32)).to(device),
        None if is_ordered else there(rows),
        None if is_ordered or len(used) == len(rows) else there(used),
        None if is_ordered else there([rows[i] for i in used]),
        starts[-1] in picks,
    )


def _filled(index: Index, size: int) -> tuple[list[int], list[int], list[int]]:
    """The rows of groups, padded with their first ones; flags of rows that are no padding; each
    group's factors."""
    rows, used, own = list[int](), list[int](), list[int]()
    for i in dict.fromkeys(index):
        members = [row for row, other in enumerate(index) if other == i]
        for start in range(0, len(members) if i >= 0 else 0, size):
            group = members[start : start + size]
            used += range(len(rows), len(rows) + len(group))
            rows += group + group[:1] * (size - len(group))
            own.append(i)
    return rows, used, own


class Groups(NamedTuple):
    """Factors of groups of rows."""

    grouping: Grouping
    a: Tensor  # (groups, in, r)
    b: Tensor  # (groups, r, out), times its scale


def grouped_factors(side: JoinedFactors, groups: Grouping) -> Groups:
    """Each group's factors, gathered from the concatenated ones."""
    a, b, picks = side.a, side.b, groups.picks
    if picks is not None:
        if groups.is_padded:  # with a row of zeros
            a, b = (F.pad(x, (0, 0, 0, 1)) for x in (a, b))
        a, b = a.index_select(0, picks), b.index_select(0, picks)
    a, b = (x.view(len(groups.scales), max(side.ranks), x.shape[1]) for x in (a, b))
    return Groups(groups, a.mT, (b * groups.scales).to(b.dtype))


def add_dense_(y: Tensor, x: Tensor, side: JoinedFactors, mask: Tensor) -> Tensor:
    """y (rows, tokens, out) += ((x·aᵀ) * mask)·b, in place; x (rows, tokens, in)."""
    inner = F.linear(x, side.a).mul_(mask)
    y.view(-1, y.shape[-1]).addmm_(inner.view(-1, side.a.shape[0]), side.b)
    return y


def add_grouped_(y: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """y (rows, tokens, out) += (x·a)·b, group by group, in place; x (rows, tokens, in)."""
    (_, _, _, rows, used, targets, _), a, b = groups
    count, tokens = len(a), x.shape[1]
    if rows is None or targets is None:
        inner = torch.bmm(x.reshape(count, -1, x.shape[-1]), a)
        y.view(count, -1, y.shape[-1]).baddbmm_(inner, b)
        return y
    inner = torch.bmm(x.index_select(0, rows).view(count, -1, x.shape[-1]), a)
    update = torch.bmm(inner, b).view(-1, tokens, y.shape[-1])
    return y.index_add_(0, targets, update if used is None else update.index_select(0, used))
