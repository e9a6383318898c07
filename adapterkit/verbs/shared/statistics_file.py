"""Statistics of layers' inputs and gradients: tensors `<module>.<kind>` of a safetensors file."""

import math
from collections.abc import Mapping
from typing import Protocol

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import Header, TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import Damaged, Problems, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.records import Json
from adapterkit.core.tasks.common import covariance_errors
from adapterkit.core.weights.reader import Reader, TensorReader
from adapterkit.kernels.lowrank import weighted

# of a module's inputs x (in,): equal for all modules that see the same ones
INPUT_KINDS = ("covariance", "mean", "components", "variances", "variance")
KINDS = (*INPUT_KINDS, "gradient")
# name in `stats --what` -> kinds of statistics of a layer's inputs
INPUTS = {
    "covariance": ("covariance",),
    "mean": ("mean",),
    "pca": ("components", "variances", "variance"),
}
METADATA = "adapterkit_statistics"  # key of the header's metadata
Shape = tuple[int | None, ...]  # None: any length


class Statistics(Protocol):
    """A source of statistics: a file's headers, or a mapping in the same form."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    @property
    def shards(self) -> Mapping[str, Header]: ...


def shape_of(kind: str, out: int, width: int) -> Shape:
    """The shape of a kind of statistics of a module with a weight (out, in)."""
    shapes: dict[str, Shape] = {
        "covariance": (width, width),
        "mean": (width,),
        "components": (None, width),
        "variances": (None,),
        "variance": (1,),
        "gradient": (out, width),
    }
    return shapes[kind]


def key_of(module: str, kind: str) -> str:
    return f"{module}.{kind}"


def metadata_of(stats: Statistics) -> Json:
    """The file's metadata on its statistics; empty if adapterkit did not write it."""
    texts = [header.metadata.get(METADATA) for header in stats.shards.values()]
    values = [_parsed(text, stats) for text in texts if text is not None]
    return values[0] if values else {}


def _parsed(text: str, stats: Statistics) -> Json:
    try:
        value = nested_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("shared", {}), dict):
        raise Damaged(
            f"the metadata have {METADATA} {shown(text)}",
            expected="an object, with the modules that share statistics",
            where=stats.name,
            hint="collect them again",
            code="AK106",
        )
    return value


def select_statistics(
    stats: Statistics | None, kind: str, shapes: Mapping[str, Shape]
) -> dict[str, TensorSpec]:
    """The tensor of a kind for each of these modules, with its shape; empty without a file.

    Raises `Refused` with every tensor that is missing or of another shape."""
    selected: dict[str, TensorSpec] = {}
    if stats is None:
        return selected
    errors = Problems(where=stats.name, code="AK106")
    shared = metadata_of(stats).get("shared", {}) if kind in INPUT_KINDS else {}
    for module, shape in shapes.items():
        spec = stats.tensors.get(key_of(module, kind))
        if spec is None:
            spec = stats.tensors.get(key_of(str(shared.get(module)), kind))
        if spec is None:
            errors.add(
                f"the file has no {shown(key_of(module, kind))}",
                "one for each module",
                "collect them for this module too, or choose modules with --targets or --exclude",
            )
        elif not _fits(spec.shape, shape) or spec.dtype not in (*dtypes.FLOATS, "F64"):
            errors.add(
                f"{shown(spec.key)} is {spec.dtype} {spec.shape}",
                f"floats ({', '.join(str(n or 'any') for n in shape)})",
                "collect them on this model",
                kind=Damaged,
            )
        else:
            selected[module] = spec
    errors.raise_all()
    return selected


def _fits(actual: tuple[int, ...], expected: Shape) -> bool:
    return len(actual) == len(expected) and all(
        n is None or n == m for m, n in zip(actual, expected, strict=True)
    )


def select_covariances(
    stats: Checkpoint | None, widths: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """E[x xᵀ] (in, in) of each module, whose width is `in`; see `select_statistics`."""
    return select_statistics(stats, "covariance", {m: (n, n) for m, n in widths.items()})


def read_root(
    inputs: Reader, *several: TensorSpec | None
) -> tuple[Tensor | None, dict[str, float]]:
    """`weighted.root` of the mean of covariances, if there are any, and metrics; `Unrecoverable` if
    one is no covariance."""
    covariances = [covariance for covariance in several if covariance is not None]
    if not covariances:
        return None, {}
    mean = inputs.tensor(covariances[0])
    for number, covariance in enumerate(covariances[1:], 1):
        mean.add_(inputs.tensor(covariance).sub_(mean), alpha=1 / (number + 1))
    with covariance_errors(*covariances):
        root, damping = weighted.root(mean)
    return root, {"damping": damping}


def read_covariance(inputs: TensorReader, covariance: TensorSpec) -> Tensor:
    """E[x xᵀ] in float32; `Unrecoverable` with all problems if it is no covariance."""
    value = inputs.tensor(covariance)
    with covariance_errors(covariance):
        weighted.check(value)
    return value


def root_memory(*covariances: TensorSpec | None) -> int:
    """Bytes for covariances, the copies in float64 of one, and a root."""
    sizes = [math.prod(covariance.shape) for covariance in covariances if covariance is not None]
    return 4 * sum(sizes) + 28 * max(sizes, default=0)
