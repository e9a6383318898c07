"""Plan a file of weights as an output. Its text is made while the model, or a program, runs;
results are kept until it is finished, so that an interrupted fit resumes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.weights_file import WeightsFile, text
from adapterkit.core.options import Progress
from adapterkit.core.output.journal import read_lines
from adapterkit.core.output.stage import Workspace, work_folder
from adapterkit.core.plan import Effort, OutputFile, Plan, Task, TaskResult
from adapterkit.core.records import Json
from adapterkit.core.weights.reader import Reader
from adapterkit.verbs.fit.verb import WeightFit
from adapterkit.verbs.stats.plan import ByOneProcess, check_unchanged

TASK = "weights"  # its name, and of its tensor the key
Shape = tuple[int, ...]


@dataclass(frozen=True)
class FittedWeights(Task):
    """The text of a file of weights, made while the model runs; `size`: an estimate of its
    bytes."""

    size: int
    made: TaskResult | None = field(default=None, compare=False, repr=False)

    @classmethod
    def result(cls, weights: WeightsFile, document: Json) -> TaskResult:
        """The file's text, and the document on the weights as its metric."""
        data = bytearray(text(weights).encode())
        return TaskResult({TASK: torch.frombuffer(data, dtype=torch.uint8)}, {"fit": document})

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(self.name, "U8", (self.size,), varies=True),)

    @property
    def memory(self) -> int:
        return 2 * self.size

    def compute(self, inputs: Reader) -> TaskResult:
        assert self.made is not None
        return self.made


def _laid_out(file: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, Any]) -> ShardLayout:
    """The layout of a text file, which has no header."""
    return ShardLayout(file, b"", tuple(tensors), (0,))


class WeightsCollection(ByOneProcess, ABC):
    """The collection behind a file of weights; `about`: its entries in a dry run's document."""

    reads = ()  # none as they come from the Hub
    work = device_memory = 0
    effort = Effort()

    def temporary_disk(self, budget: int) -> int:
        return 0

    @property
    def about(self) -> Json:
        return {}

    @abstractmethod
    def made(
        self, plan: Plan, work: Path, device: torch.device, progress: Progress
    ) -> TaskResult: ...

    def collected(
        self,
        plan: Plan,
        file: OutputFile,
        stage: Workspace,
        device: torch.device,
        progress: Progress,
    ) -> OutputFile:
        made = self.made(plan, work_folder(stage), device, progress)
        check_unchanged(plan)
        task = FittedWeights(TASK, file.layout.size, made)
        return replace(file, tasks=(task,), collection=None)

    def plan(
        self,
        options: WeightFit,
        recipe: Json,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        size: int,
        notes: Iterable[str] = (),
    ) -> Plan:
        """The plan of a file of weights for a base and adapters; `size`: an estimate of its
        bytes."""
        tasks, name = [FittedWeights(TASK, size)], Path(options.out).name
        file = OutputFile.computed(name, tasks, {}, lay_out=_laid_out)
        plan = plan_of(
            "fit",
            recipe,
            [base, *adapters],
            configs=(0,),
            shards=[replace(file, collection=self)],
            files={},
            decisions={},
            notes=dict.fromkeys(notes),
            warn=_notes_in,
        )
        return replace(plan, is_file=True)


def _notes_in(metrics: dict[str, dict]) -> list[str]:
    """Notes taken while the file was made."""
    return metrics[TASK]["fit"]["notes"]


@dataclass
class Evaluations:
    """The work folder of a fit: the result of each evaluated point, by the point's bits.

    A fit is a deterministic function of its evaluations, so a repeated run reaches the same points
    and finds them here."""

    folder: Path

    def of(
        self, what: str, c: Tensor, compute: Callable[[], list[Tensor]], shapes: list[Shape]
    ) -> list[Tensor]:
        """The results of `compute` at a point, in float64 and of these shapes, computed now or
        read."""
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
    """The finite numbers of a file of this class; empty for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(read_lines(path))
        values = [found[str(number)] for number in range(len(found))]
    except (SafetensorError, KeyError):
        return []
    are_numbers = all(v.dtype == torch.float64 and bool(v.isfinite().all()) for v in values)
    return values if are_numbers else []
