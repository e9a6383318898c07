"""Low-rank products of several adapters in one batch: y[i] += scale·b·a·x[i] of row i's adapter.

Two forms with one result. Dense multiplies every row by all adapters' factors side by side and
masks what is another row's: two products, at a cost that grows with the number of adapters.
Gathered has one copy of the factors for each row: two batched products, at a cost in memory that
grows with the number of rows. Rows of the base have a mask, or factors, of zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_is_better(rows: int, adapters: int, tokens: int) -> bool:
    """Whether the dense form is the faster one, or the other one takes more than 8 times its
    memory; measured on one thread at ranks of 16 and widths of 1024, 1 to 64 rows and adapters, 1
    to 256 tokens a row."""
    if adapters == 1 or rows > 8 * adapters:
        return True
    return rows >= 4 * adapters and adapters * tokens <= 8


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


def gathered_factors(
    factors: Sequence[tuple[Tensor, Tensor, float]],  # a (r, in), b (out, r), scale
    index: Sequence[int],  # for each row its factors, -1 for none
) -> tuple[Tensor, Tensor]:
    """a (rows, in, r) and b (rows, r, out) times its scale; r: the highest rank."""
    first, last, _ = factors[0]
    rank = max(a.shape[0] for a, _, _ in factors)
    a = first.new_zeros(len(index), first.shape[1], rank)
    b = last.new_zeros(len(index), rank, last.shape[0])
    for row, i in enumerate(index):
        if i >= 0:
            row_a, row_b, scale = factors[i]
            a[row, :, : row_a.shape[0]] = row_a.T
            torch.mul(row_b.T, scale, out=b[row, : row_a.shape[0]])
    return a, b


def add_dense_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """y (rows, tokens, out) += ((x·aᵀ) * mask)·b, in place; x (rows, tokens, in)."""
    inner = F.linear(x, a).mul_(mask)
    y.view(-1, y.shape[-1]).addmm_(inner.view(-1, a.shape[0]), b)
    return y


def add_gathered_(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (rows, tokens, out) += (x·a)·b, row by row, in place; x (rows, tokens, in)."""
    return y.baddbmm_(torch.bmm(x, a), b)
