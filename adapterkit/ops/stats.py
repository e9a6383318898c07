"""What layers saw: the covariance of each one's inputs, `<module>.covariance` (in, in) in a safetensors file."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, Spoiled, refuse_all, shown
from adapterkit.kernels import weighted
from adapterkit.plan import Inputs

COVARIANCE = ".covariance"


@dataclass(frozen=True)
class Stats:
    """A file of statistics among the inputs of a plan."""

    held: Checkpoint

    @property
    def folder(self) -> Folder:
        return self.held.folder

    def covariances(self, widths: Mapping[str, int]) -> dict[str, TensorSpec]:
        """E[x xᵀ] (in, in) of each module, whose width is `in`; `Refused` with all that are missing or of another shape."""
        errors: list[AdapterkitError] = []
        found = {}
        for module, width in widths.items():
            spec = self.held.tensors.get(module + COVARIANCE)
            where = self.held.name
            if spec is None:
                do = "collect them for this module too, or leave it out with --targets"
                errors.append(Refused(f"no {shown(module + COVARIANCE)}", expected="one for each module", where=where, do=do))
            elif spec.shape != (width, width) or spec.dtype not in (*dtypes.FLOATS, "F64"):
                text, expected = f"{shown(spec.key)}: {spec.dtype} {spec.shape}", f"floats ({width}, {width})"
                errors.append(Damaged(text, expected=expected, where=where, do="collect them on this model"))
            else:
                found[module] = spec
        refuse_all(errors)
        return found


def open_stats(folder: Folder, number: int) -> Stats:
    """Input `number` of a plan as a file of statistics."""
    return Stats(open_checkpoint(folder, number))


def root_of(inputs: Inputs, spec: TensorSpec) -> tuple[Tensor, float]:
    """`weighted.root` of a stored covariance; `Spoiled`, by name, where it is none."""
    try:
        return weighted.root(inputs.tensor(spec))
    except ValueError as error:
        found = f"{shown(spec.key)}: {error}"
        do = "collect it on texts that reach this module"
        raise Spoiled(found, expected="a covariance E[x xᵀ]", where=spec.file, do=do) from error
