"""Principal components from a covariance and a mean."""

import torch
from torch import Tensor

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank.truncated import truncated_svd

FULL = 0.125  # share of the components from which on a full decomposition takes less time


def principal_components(
    covariance: Tensor,  # (in, in) E[x xᵀ], float64
    mean: Tensor,  # (in,) E[x], float64
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(components (k, in), variances (k,), variance (1,)) in float32: of C - m mᵀ the leading
    k = min(count, in) eigenvectors as rows, their eigenvalues by falling size, and the trace.

    Of a few components block Krylov iteration finds them to 1e-7 of the largest variance. The sign
    is such that the largest element of each row is positive. Computed in float64.
    """
    centered = torch.addr(covariance.double(), mean.double(), mean.double(), alpha=-1)
    width = len(centered)
    k = min(count, width)
    if k < FULL * width and bool(centered.any()):
        svd = truncated_svd(centered, k, tolerance=1e-7)
        variances, components = svd.s, svd.vh
    else:
        values, vectors = dense.eigh(centered)
        variances, components = values.flip(0)[:k], vectors.T.flip(0)[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    variance = centered.trace().clamp(min=0)[None]
    return components.float(), variances.clamp(min=0).float(), variance.float()
