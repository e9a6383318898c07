"""A file of weights as the output of a plan: its text is made while the model, or a program, runs,
and what that gives is kept until it is done, so that a fit that was interrupted goes on."""

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
    """The text of a file of weights, made while the model runs; `size`: a guess of its bytes."""

    size: int
    made: TaskResult | None = field(default=None, compare=False, repr=False)

    @classmethod
    def result(cls, weights: WeightsFile, document: Json) -> TaskResult:
        """The file's text, and what is said of the weights."""
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
    """A text: a file without a header."""
    return ShardLayout(file, b"", tuple(tensors), (0,))


class WeightsCollection(ByOneProcess, ABC):
    """What a file of weights is made of; `about`: what a dry run says of it, too."""

    reads = ()  # none as they come from the Hub
    work = device_memory = 0
    effort = Effort()

    def room(self, budget: int) -> int:
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
        """The plan of the file of weights of a base and adapters, of about so many bytes."""
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
    """What was noted while the file was made."""
    return metrics[TASK]["fit"]["notes"]


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
