"""Intruder dimensions of a trained weight: directions that training added and that the base's
weight does not have. Adapters that forget much have many (arXiv:2410.21228)."""

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product, Svd

TOP = 10  # leading singular vectors of W + delta that are compared
THRESHOLD = 0.5  # cosine


def intruders(
    weight: Tensor,  # (n, m) float64, as the model stores it
    delta: Product,  # of the same shape
) -> Svd:
    """The singular triplets of W + delta, among the TOP leading ones, whose left vector has a
    cosine below THRESHOLD with every left singular vector of W.

    This is PEFT's `reduce_intruder_dimension`, which also takes the left vectors of the weight as
    it is stored: for an embedding, and for GPT-2's Conv1D, these are the inputs'. There PEFT 0.21
    stores the new a and b exchanged; the caller here does not. PEFT computes in float32, so a
    cosine at the threshold may fall on the other side."""
    before = torch.linalg.svd(weight, full_matrices=False).U
    u, s, vh = torch.linalg.svd(weight + delta.dense(), full_matrices=False)
    cosines = (u[:, :TOP].T @ before).abs().amax(1)
    found = (cosines < THRESHOLD).nonzero().flatten()
    return Svd(u[:, found], s[found], vh[found])


def without(
    delta: Product,
    found: Svd,
    share: float,  # of each that is removed, above 0 to 1
) -> Product:
    """delta - share * Σ s u vᵀ over the intruders."""
    left = torch.cat([delta.left, found.u * (-share * found.s)], 1)
    return Product(left, torch.cat([delta.right, found.vh]))
