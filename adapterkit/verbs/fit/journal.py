"""Evaluations that are kept until the fit is done, so that one that was interrupted goes on."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.output.journal import read_lines

Shape = tuple[int, ...]


@dataclass
class Evaluations:
    """The work folder of a fit: what each point that was evaluated gave, by the point's bits.

    A fit is a function of what the evaluations give, so that one that is run again comes to the
    same points and finds them here."""

    folder: Path

    def of(
        self, what: str, c: Tensor, compute: Callable[[], list[Tensor]], shapes: list[Shape]
    ) -> list[Tensor]:
        """What `compute` gives at a point, in float64 and of these shapes: made now, or before."""
        from safetensors.torch import save

        digest = hashlib.sha256(what.encode() + c.double().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest[:32]}.safetensors"
        values = _values(path)
        if [tuple(value.shape) for value in values] == shapes:
            return values
        results = compute()
        data = save({str(number): value.contiguous() for number, value in enumerate(results)})
        replace_file(path, data, path.with_suffix(".part"))
        return results


def _values(path: Path) -> list[Tensor]:
    """The finite numbers of a file that was written here; none of any other."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(read_lines(path))
        values = [found[str(number)] for number in range(len(found))]
    except (SafetensorError, KeyError):
        return []
    are_numbers = all(v.dtype == torch.float64 and bool(v.isfinite().all()) for v in values)
    return values if are_numbers else []
