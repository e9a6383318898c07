"""Block-diagonal rotations by the Cayley transform, and the order of a butterfly's stages."""

from __future__ import annotations

import math

from adapterkit.core.lazy import Tensor, torch


def skew(
    upper: Tensor,  # (blocks, size * (size - 1) / 2)
    size: int,
    eps: float | None,
) -> Tensor:  # (blocks, size, size)
    """Q = -Qᵀ with these elements above its diagonal, and with eps of norm ≤ eps / sqrt(blocks)."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    q = upper.new_zeros(len(upper), size * size).index_copy_(1, rows * size + columns, upper)
    q = q.view(-1, size, size)
    q = q - q.mT
    if eps is None:
        return q
    limit = eps / math.sqrt(len(upper))
    length = torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)
    return torch.where(length <= limit, q, q * (limit / length))


def less_identity(
    q: Tensor,  # (blocks, size, size), skew
    terms: int | None,
) -> Tensor:
    """R - I = (I - Q) (I + Q)⁻¹ - I = -2 Q (I + Q)⁻¹.

    With `terms` PEFT's series 2 Q + 2 Q² + ... + Qⁿ⁻¹, whose last term counts once, with the
    opposite sign of Q. One term gives 0, two give 2 Q, and three the same as four.
    """
    if terms is None:
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        return torch.linalg.solve(eye + q, -2 * q, left=False)
    if terms == 1:
        return torch.zeros_like(q)
    total, power = 2 * q, q
    if terms > 2:
        for _ in range(2, max(terms, 4) - 1):
            power = power @ q
            total = total + 2 * power
        total = total + power @ q
    return total


def rotated(
    rows: Tensor,  # (n, blocks * size)
    rotation: Tensor,  # (blocks, size, size): R - I; or one, which all share
) -> Tensor:
    """Each block of the rows times its R - I."""
    blocks = rows.reshape(len(rows), -1, rotation.shape[-1])
    return torch.einsum("nbk,bkc->nbc", blocks, rotation.expand(blocks.shape[1], -1, -1)).reshape(
        rows.shape
    )


def butterfly_order(width: int, blocks: int, half: int, device: torch.device) -> Tensor:
    """Positions of a stage's inputs: in each of the blocks, pieces of `half` with even numbers
    first, then those with odd ones."""
    pieces = torch.arange(width, device=device).view(blocks, -1, half)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], 1).flatten()
