"""Statistics of layers' inputs: the covariance of each one's, `<module>.covariance` (in, in) in a
safetensors file."""

import math
from collections.abc import Mapping

from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, Unrecoverable, refuse_all, shown
from adapterkit.kernels import weighted
from adapterkit.weights.reader import Reader

COVARIANCE = ".covariance"


def select_covariances(
    stats: Checkpoint | None, widths: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """E[x xᵀ] (in, in) of each module, whose width is `in`; none without a file.

    Raises `Refused` with all that are missing or of another shape.
    """
    errors: list[AdapterkitError] = []
    selected: dict[str, TensorSpec] = {}
    if stats is None:
        return selected
    for module, width in widths.items():
        spec = stats.tensors.get(module + COVARIANCE)
        if spec is None:
            errors.append(
                Refused(
                    f"no {shown(module + COVARIANCE)}",
                    expected="one for each module",
                    where=stats.name,
                    hint="collect them for this module too, or exclude it with --targets",
                )
            )
        elif spec.shape != (width, width) or spec.dtype not in (*dtypes.FLOATS, "F64"):
            errors.append(
                Damaged(
                    f"{shown(spec.key)}: {spec.dtype} {spec.shape}",
                    expected=f"floats ({width}, {width})",
                    where=stats.name,
                    hint="collect them on this model",
                )
            )
        else:
            selected[module] = spec
    refuse_all(errors)
    return selected


def read_root(
    inputs: Reader, covariance: TensorSpec | None
) -> tuple[Tensor | None, dict[str, float]]:
    """`weighted.root` of a covariance, if there is one, and metrics; `Unrecoverable` where it is no
    covariance."""
    if covariance is None:
        return None, {}
    try:
        root, damping = weighted.root(inputs.tensor(covariance))
    except ValueError as error:
        raise Unrecoverable(
            f"{shown(covariance.key)}: {error}",
            expected="a covariance E[x xᵀ]",
            where=covariance.file,
            hint="collect it on texts that reach this module, and store it in float32",
        ) from error
    return root, {"damping": damping}


def root_memory(covariance: TensorSpec | None) -> int:
    """Bytes for a covariance, its copies in float64 and its root."""
    return 0 if covariance is None else 32 * math.prod(covariance.shape)
