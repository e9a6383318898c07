"""Low-rank products of several adapters in one batch: y[i] += scale·b·a·x[i] of row i's adapter.

Two forms with one result. Dense multiplies every row by all adapters' factors side by side and
masks what is another row's: two products, at a cost that grows with the number of adapters.
Grouped has the rows of one adapter together, in groups of one size with one copy of the factors
each: two batched products. The larger the groups are, the fewer factors are read; rows that do not
lie together are copied for them, and groups are filled up. Rows of the base have a mask, or
factors, of zeros, or are in no group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_is_better(rows: int, adapters: int, tokens: int) -> bool:
    """Whether the dense form is the faster one; measured on one thread at ranks of 16 and widths of
    1024, 2 to 64 rows, 1 to 64 adapters and 1 to 128 tokens a row."""
    return adapters == 1 or adapters * tokens <= 2


def group_size(index: Sequence[int], tokens: int) -> int:
    """The number of rows in a group for which least is read and multiplied; `index`: for each row
    its factors, -1 for none. Never more than 8 copies of an adapter's factors on average."""
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


def _is_in_order(index: Sequence[int], size: int) -> bool:
    """Whether the rows lie in full groups as they are."""
    groups = [index[i : i + size] for i in range(0, len(index), size)]
    return all(len(g) == size and set(g) == {g[0]} and g[0] >= 0 for g in groups)


def dense_factors(
    factors: Sequence[tuple[Tensor, Tensor, float]],  # a (r, in), b (out, r), scale
    index: Sequence[int],  # for each row its factors, -1 for none
) -> tuple[Tensor, Tensor, Tensor]:
    """a (R, in), b (R, out) and the mask (rows, 1, R) with the scales; R: the sum of the ranks."""
    a = torch.cat([a for a, _, _ in factors])
    b = torch.cat([b.T for _, b, _ in factors])
    mask = a.new_zeros(len(index), 1, a.shape[0])
    ends = torch.tensor([a.shape[0] for a, _, _ in factors]).cumsum(0).tolist()
    for row, i in enumerate(index):
        if i >= 0:
            rank, scale = factors[i][0].shape[0], factors[i][2]
            mask[row, :, ends[i] - rank : ends[i]] = scale
    return a, b, mask


@dataclass(frozen=True)
class Groups:
    """Factors of groups of `size` rows, and the rows in them."""

    size: int
    a: Tensor  # (groups, in, r)
    b: Tensor  # (groups, r, out), times its scale
    rows: Tensor | None = None  # (groups · size,) of the batch; None: as they are
    used: Tensor | None = None  # which of these are no filling; None: all


def grouped_factors(
    factors: Sequence[tuple[Tensor, Tensor, float]],  # a (r, in), b (out, r), scale
    index: Sequence[int],  # for each row its factors, -1 for none
    size: int,
) -> Groups:
    """The factors of groups of rows; r: the highest rank."""
    if size == 1 or _is_in_order(index, size):
        return Groups(size, *_stacked(factors, index[::size]))
    members = {i: [row for row, own in enumerate(index) if own == i] for i in dict.fromkeys(index)}
    rows, used, own = [], [], []
    for i, all_rows in members.items():
        for start in range(0, len(all_rows) if i >= 0 else 0, size):
            group = all_rows[start : start + size]
            used += range(len(rows), len(rows) + len(group))
            rows += group + group[:1] * (size - len(group))
            own.append(i)
    device = factors[0][0].device
    return Groups(
        size,
        *_stacked(factors, own),
        torch.tensor(rows, device=device),
        None if len(used) == len(rows) else torch.tensor(used, device=device),
    )


def _stacked(
    factors: Sequence[tuple[Tensor, Tensor, float]], index: Sequence[int]
) -> tuple[Tensor, Tensor]:
    first, last, _ = factors[0]
    rank = max(a.shape[0] for a, _, _ in factors)
    a = first.new_zeros(len(index), first.shape[1], rank)
    b = last.new_zeros(len(index), rank, last.shape[0])
    for group, i in enumerate(index):
        if i >= 0:
            own_a, own_b, scale = factors[i]
            a[group, :, : own_a.shape[0]] = own_a.T
            torch.mul(own_b.T, scale, out=b[group, : own_a.shape[0]])
    return a, b


def add_dense_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """y (rows, tokens, out) += ((x·aᵀ) * mask)·b, in place; x (rows, tokens, in)."""
    inner = F.linear(x, a).mul_(mask)
    y.view(-1, y.shape[-1]).addmm_(inner.view(-1, a.shape[0]), b)
    return y


def add_grouped_(y: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """y (rows, tokens, out) += (x·a)·b, group by group, in place; x (rows, tokens, in)."""
    count, tokens = len(groups.a), x.shape[1]
    if groups.rows is None:
        inner = torch.bmm(x.reshape(count, -1, x.shape[-1]), groups.a)
        y.view(count, -1, y.shape[-1]).baddbmm_(inner, groups.b)
        return y
    inner = torch.bmm(x.index_select(0, groups.rows).view(count, -1, x.shape[-1]), groups.a)
    update, rows = torch.bmm(inner, groups.b).view(-1, tokens, y.shape[-1]), groups.rows
    if groups.used is not None:
        update, rows = update.index_select(0, groups.used), rows.index_select(0, groups.used)
    return y.index_add_(0, rows, update)
