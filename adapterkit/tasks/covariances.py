"""What layers saw: the covariance of each one's inputs, `<module>.covariance` (in, in) in a safetensors file."""

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


def covariances(stats: Checkpoint | None, widths: Mapping[str, int]) -> dict[str, TensorSpec]:
    """E[x xᵀ] (in, in) of each module, whose width is `in`; none without a file. `Refused` with all that are missing or of another
    shape."""
    errors: list[AdapterkitError] = []
    found: dict[str, TensorSpec] = {}
    if stats is None:
        return found
    for module, width in widths.items():
        spec = stats.tensors.get(module + COVARIANCE)
        if spec is None:
            hint = "collect them for this module too, or leave it out with --targets"
            errors.append(
                Refused(
                    f"no {shown(module + COVARIANCE)}",
                    expected="one for each module",
                    where=stats.name,
                    hint=hint,
                )
            )
        elif spec.shape != (width, width) or spec.dtype not in (*dtypes.FLOATS, "F64"):
            text, expected = (
                f"{shown(spec.key)}: {spec.dtype} {spec.shape}",
                f"floats ({width}, {width})",
            )
            errors.append(
                Damaged(
                    text, expected=expected, where=stats.name, hint="collect them on this model"
                )
            )
        else:
            found[module] = spec
    refuse_all(errors)
    return found


def root_of(
    inputs: Reader, covariance: TensorSpec | None
) -> tuple[Tensor | None, dict[str, float]]:
    """`weighted.root` of a stored covariance, if there is one, and what the receipt says of it; `Unrecoverable` where it is none."""
    if covariance is None:
        return None, {}
    try:
        root, damping = weighted.root(inputs.tensor(covariance))
    except ValueError as error:
        found = f"{shown(covariance.key)}: {error}"
        hint = "collect it on texts that reach this module, and store it in float32"
        raise Unrecoverable(
            found, expected="a covariance E[x xᵀ]", where=covariance.file, hint=hint
        ) from error
    return root, {"damping": damping}


def given(covariance: TensorSpec | None) -> tuple[TensorSpec, ...]:
    """What a task reads for it."""
    return () if covariance is None else (covariance,)


def room(covariance: TensorSpec | None) -> int:
    """Bytes for a covariance, its copies in float64 and its root."""
    return 0 if covariance is None else 32 * math.prod(covariance.shape)
