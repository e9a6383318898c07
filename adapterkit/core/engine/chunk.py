"""One chunk of a step: computed, copied to the host, measured, checked.

On a GPU all of it is only begun: what it gives is there when the chunk has landed. Until then a
worker reads and begins the next one.
"""

from dataclasses import dataclass

from adapterkit.core.engine.device import Mark
from adapterkit.core.engine.partition import Chunk
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import Loaded, Step
from adapterkit.core.tasks.metrics import change_sums, squares
from adapterkit.core.tasks.rows import rounded, unrounded
from adapterkit.kernels.sums import all_finite


@dataclass
class ComputedChunk:
    """A chunk whose arithmetic and copy have begun, as far as a GPU is concerned."""

    chunk: Chunk
    values: Tensor  # in the dtype of the arithmetic, on the device
    outgoing: Tensor  # rounded, in the host's memory
    sums: list[Tensor]
    mark: Mark

    def landed(self, step: Step) -> list[float]:
        """Wait for it: `outgoing` is there. Σ of the new values squared, and `change_sums` of a
        sampled chunk; `Unrecoverable` if they are not finite."""
        self.mark.wait()
        sums = [float(one) for one in self.sums]
        limit = torch.finfo(self.outgoing.dtype).max
        # then no element is above the limit; false for NaN
        if not sums[0] <= limit * limit and not all_finite(self.outgoing):
            raise _not_finite(step, self.values)
        return sums


def compute_chunk(
    w: Tensor, edits: list[Loaded], step: Step, chunk: Chunk, outgoing: Tensor
) -> ComputedChunk:
    """Begin the edits of w, which change it, and the copy of the rounded rows to `outgoing`."""
    before = w.clone() if chunk.sampled and edits else None
    for edit in edits:
        edit.apply(w, chunk.first)
    if w.device.type == "cpu" and step.draws is None:
        written = outgoing.copy_(w)
    else:  # rounded on the device: a copy that converts would make one thread wait for the GPU
        written = rounded(w, step, chunk.first * step.grid[1])
        outgoing.copy_(written, non_blocking=True)
    sums = [squares(w)]
    if before is not None:
        exact = unrounded(w, before, edits, chunk.first)
        sums += change_sums(before, exact, written)
    if w.device.type != "cpu":
        together = torch.stack([one.double() for one in sums])
        sums = list(together.to("cpu", non_blocking=True))
    return ComputedChunk(chunk, w, outgoing, sums, Mark(w.device))


def _not_finite(step: Step, values: Tensor) -> Unrecoverable:
    what = "overflows" if all_finite(values) else "is not finite (NaN or infinity)"
    return Unrecoverable(
        f"the merged value of {shown(step.key)} {what} in {step.dtype}",
        expected="finite values",
        where=f"{step.source.file}: {shown(step.key)}",
        hint="give --dtype bf16 or fp32, or a smaller weight"
        if what == "overflows"
        else "check the base and the adapters",
        code="AK606",
    )
