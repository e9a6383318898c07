"""Permutations of the rows or columns of a weight between the file and the model.

An order is an index `i (out,)` with `model[j] = file[i[j]]`; its inverse is for writing. It applies
to every tensor with the weight's rows: b, bias, magnitude, diff; for columns to a.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.adapters.formats.modules.tensors import Rows, compact
from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch

ORDERS = ("swap_halves", "swap_pair", "interleave", "rotary_q", "rotary_k", "groups", "values",
          "values_last")  # fmt: skip
SETTINGS = ("num_attention_heads", "num_key_value_heads")
LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")


@dataclass(frozen=True, slots=True)
class LinearHeads:
    """The numbers of key heads and of value heads in linear attention, and the size of a key."""

    key: int
    value: int
    size: int


@dataclass(frozen=True, slots=True)
class Heads:
    """The numbers of query heads, and of key and value heads, in attention."""

    query: int
    key: int
    linear: LinearHeads | None = None  # of the layers that have such


def order(
    name: str,  # one of ORDERS
    size: int,  # rows of the weight
    heads: Heads | None,
    where: str,  # the module, for messages
    inputs: int | None = None,  # columns of the weight
) -> Tensor:  # (size,) int64
    """The file's row for each row of the model.

    swap_halves: [second, first]. swap_pair: the same if there are two rows for each input, as in a
    shift and scale alone; none if there are more. interleave: [a0, b0, a1, b1, ...] -> [a...,
    b...]. rotary_q, rotary_k: the same in each head, from the pairs (2i, 2i + 1) that Meta and GGUF
    rotate to transformers' (i, i + d/2). groups: [q of group 0, k 0, v 0, q of group 1, ...] -> [q,
    k, v]. values: [v0 of group 0, v0 of 1, ..., v1 of 0, ...] of heads of linear attention -> [v0
    of group 0, v1 of 0, ...]; values_last: the same of those behind queries and keys. Raises
    `Refused` if heads or inputs are needed and unknown, or rows do not divide evenly.
    """
    if name == "swap_halves":
        return _divided((2, -1), size, where).flip(0).reshape(-1)
    if name == "swap_pair":
        if inputs is None:
            raise Refused(
                f"the order of {size} rows depends on the inputs of the module",
                expected="a weight, or factors of one",
                where=where,
                hint="remove this bias from the adapter",
                code="AK402",
            )
        return (
            order("swap_halves", size, heads, where) if size == 2 * inputs else torch.arange(size)
        )
    if name == "interleave":
        return _divided((-1, 2), size, where).T.reshape(-1)
    if heads is None:
        raise unknown_heads(f"rows in the order {name!r}", where)
    if name in ("values", "values_last"):
        if heads.linear is None:
            raise unknown_heads(f"rows in the order {name!r}", where, LINEAR)
        first = 2 * heads.linear.key * heads.linear.size if name == "values_last" else 0
        groups = (heads.linear.value // heads.linear.key, heads.linear.key, -1)
        values = _divided(groups, size - first, where).transpose(0, 1).reshape(-1)
        return torch.cat([torch.arange(first), first + values])
    if name == "groups":
        per_group = heads.query // heads.key
        groups = _divided((heads.key, per_group + 2, -1), size, where)
        parts = groups.split([per_group, 1, 1], dim=1)
        return torch.cat([part.reshape(-1) for part in parts])
    count = {"rotary_q": heads.query, "rotary_k": heads.key}[name]
    return _divided((count, -1, 2), size, where).transpose(1, 2).reshape(-1)


def unknown_heads(problem: str, where: str, settings: Sequence[str] = SETTINGS) -> Refused:
    """The refusal of rows whose order needs a number of heads."""
    return Refused(
        f"{problem}, and the number of heads is unknown",
        expected=f"a config with {' and '.join(settings)}",
        where=where,
        hint="give --base MODEL",
        code="AK402",
    )


def inverse(
    index: Tensor,  # (size,) int64
) -> Tensor:  # (size,) int64
    """The order that undoes `index`."""
    return torch.argsort(index)


def model_order(
    steps: Sequence[str],
    size: int,  # rows of the file's weight
    heads: Heads | None,
    where: str,
    inputs: int | None = None,
) -> Rows:
    """The file's row for each row of the model after these steps; `Refused` as in `order`."""
    if not steps:
        return range(size)
    rows = torch.arange(size)
    for step in steps:
        rows = rows[order(step, size, heads, where, inputs)]
    return compact(rows.tolist())


def shares_of(size: int, shares: Sequence[int], where: str) -> list[range]:
    """Consecutive rows in these shares; `Refused` if they do not divide `size`."""
    total = sum(shares)
    if size % total:
        raise Refused(
            f"the tensor has {size} rows",
            expected=f"a multiple of {total}, for parts of {':'.join(map(str, shares))}",
            where=where,
            hint="check the architecture (--architecture)",
            code="AK402",
        )
    ends = [size * sum(shares[: i + 1]) // total for i in range(len(shares))]
    return [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _divided(shape: tuple[int, ...], size: int, where: str) -> Tensor:
    """The rows' numbers in this shape, with -1 for the rest; `Refused` if they do not fill it."""
    known = 1
    for n in shape:
        known *= abs(n)
    if size % known:
        raise Refused(
            f"the tensor has {size} rows",
            expected=f"a multiple of {known}",
            where=where,
            hint="give the base that the adapter was trained on",
            code="AK402",
        )
    return torch.arange(size).reshape(shape)
