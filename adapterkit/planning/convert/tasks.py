"""The tasks that make the tensors of a converted adapter."""

from collections import Counter
from collections.abc import Sequence

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.formats.modules.deltas import Fit, fits_of
from adapterkit.formats.modules.tensors import StoredTensor
from adapterkit.formats.write import WrittenTensor
from adapterkit.plan import Task
from adapterkit.tasks.common import CopiedTensor
from adapterkit.tasks.convert import ConvertedTensor, ConvertedTensors

MANY = 8  # outputs of one stored tensor that are made together


def tasks_of(tensors: Sequence[WrittenTensor]) -> tuple[Task, ...]:
    """One task for each tensor, or for all that share fits or are made of the same stored ones."""
    fitted = [tensor for tensor in tensors if fits_of(tensor.expression)]
    others = [_task(tensor) for tensor in tensors if not fits_of(tensor.expression)]
    return _together([*others, *_fitted(fitted)])


def _fitted(tensors: Sequence[WrittenTensor]) -> list[Task]:
    """One task for all tensors that share fits, as parts of a fused module do."""
    groups: dict[int, list[WrittenTensor]] = {}  # by the first of their fits
    owner: dict[int, int] = {}
    fits: dict[int, Fit] = {}
    for tensor in tensors:
        own = fits_of(tensor.expression)
        fits |= {id(fit): fit for fit in own}
        joined = {owner.setdefault(id(fit), id(fit)) for fit in own}
        home = min(joined)
        groups[home] = [one for old in sorted(joined) for one in groups.pop(old, [])] + [tensor]
        owner = {fit: home if old in joined else old for fit, old in owner.items()}
    tasks: list[Task] = []
    for home, members in groups.items():
        own = tuple(fits[fit] for fit, place in owner.items() if place == home)
        outputs = tuple(map(_converted, members))
        tasks.append(ConvertedTensors(members[0].module, outputs, own))
    return tasks


def _task(tensor: WrittenTensor) -> Task:
    """A copy of bytes where nothing is computed."""
    if isinstance(tensor.expression, StoredTensor) and tensor.dtype == tensor.expression.dtype:
        return CopiedTensor(tensor.key, tensor.expression.spec, tensor.key, checked=True)
    return ConvertedTensors(tensor.key, (_converted(tensor),))


def _converted(tensor: WrittenTensor) -> ConvertedTensor:
    return ConvertedTensor(tensor.key, tensor.expression, tensor.dtype)


def _together(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Tensors that are made of the same stored ones, such as experts of their stack, in one task:
    otherwise each of them would read the whole stack."""
    readers = Counter(spec for task in tasks for spec in task.reads)
    groups: dict[TensorSpec, list[ConvertedTensors]] = {}
    result: list[Task] = []
    for task in tasks:
        shared = next((spec for spec in task.reads if readers[spec] > MANY), None)
        if shared is None or not isinstance(task, ConvertedTensors) or task.fits:
            result.append(task)
        else:
            groups.setdefault(shared, []).append(task)
    for own in groups.values():
        outputs = tuple(output for task in own for output in task.outputs)
        result.append(ConvertedTensors(own[0].name, outputs))
    return tuple(result)
