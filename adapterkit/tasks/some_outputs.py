"""A task of which one file gets some of the tensors, and another file the rest."""

from dataclasses import dataclass

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import TensorPlan
from adapterkit.plan import Effort, Metrics, Task, TaskResult
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class SomeOutputs(Task):
    """The tensors of a task with these keys; it is computed once for each file."""

    whole: Task
    keys: tuple[str, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.whole.reads

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        return self.whole.shared_reads

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return tuple(one for one in self.whole.max_outputs if one.key in self.keys)

    @property
    def planned_metrics(self) -> Metrics | None:
        return self.whole.planned_metrics

    @property
    def effort(self) -> Effort:
        return self.whole.effort

    @property
    def memory(self) -> int:
        return self.whole.memory

    def compute(self, inputs: Reader) -> TaskResult:
        result = self.whole.compute(inputs)
        tensors = {key: value for key, value in result.tensors.items() if key in self.keys}
        return result._replace(tensors=tensors)
