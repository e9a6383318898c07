"""Combinations by the covariances of the layers' inputs: methods that take them, refits in the norm
of the outputs, and weights of several modules by their outputs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, Refused
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.plan_reader import PlanReader
from adapterkit.kernels.lowrank import span
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.linear import Linear
from adapterkit.verbs.combine.methods.mean import Mean
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.combine.tasks.combine import CombinedFactors, Refit
from adapterkit.verbs.combine.tasks.truncate import BY_WEIGHTS, input_widths
from adapterkit.verbs.shared.statistics_file import read_covariance, select_covariances

ALL = "all modules"
MOST_NOTES = 3  # on weights of layers


def with_group_weights(
    tasks: list[CombinedFactors],
    inputs: Sequence[Adapter | Checkpoint],
    shares: Sequence[float],
    notes: list[str],
) -> tuple[list[CombinedFactors], dict[str, list[float]]]:
    """Resolve a method whose weights are those of whole layers or adapters. Return linear tasks
    with weights from all of a group's deltas and covariances, read here, and the weights by group.
    Tasks without covariances get the weights of their group, if it has any."""
    method = next(task.method for task in tasks if task.covariances)
    reader, count = PlanReader([one.folder for one in inputs]), len(shares)
    group_of = lambda task: _layer_of(task.name) if method.over == "layer" else ALL

    def modules() -> Iterator[tuple[str, list[Product | None], Callable[[int], Tensor]]]:
        for task in tasks:
            if task.covariances:
                numbers = [operand.number for operand in task.operands]
                own: list[Product | None] = [None] * count
                for operand in task.operands:
                    (own[operand.number],) = operand.factors.products(reader)
                specs = dict(zip(numbers, task.covariances, strict=True))
                yield group_of(task), own, lambda n, its=specs: read_covariance(reader, its[n])

    found = span.span_weights(modules(), shares, method.ridge)
    notes += [
        f"{method.name}: weights {', '.join(f'{w:.3f}' for w in c.tolist())} of {group}, at a "
        f"distance of {error:.3f} from the adapters' outputs"
        for group, (c, error) in sorted(found.items())[:MOST_NOTES]
    ]
    changed = []
    for task in tasks:
        if group_of(task) in found:
            c, _ = found[group_of(task)]
            operands = [
                replace(operand, weight=float(c[operand.number])) for operand in task.operands
            ]
            read = () if task.refit.exact else task.covariances
            task = replace(task, method=Linear(), operands=tuple(operands), covariances=read)
        changed.append(task)
    return changed, {group: c.tolist() for group, (c, _) in found.items()}


def _layer_of(module: str) -> str:
    """The layer of a module: its name up to the first number, or the whole name without one."""
    parts = module.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: at + 1])


def check_statistics(method: Method, refit: Refit, space: str, adapters: int, files: int) -> None:
    """`Refused` for a combination that lacks statistics, or does not use them."""
    if method.acts_on == "covariances":
        if files != adapters:
            raise Refused(
                f"{files} --stats files for {adapters} adapters",
                expected=f"one for each adapter, because {method.name} weighs them by their inputs",
                where=f"--method {method.name}",
                hint="give --stats FILE once per adapter, in their order; each file is made by\n"
                "adapterkit stats BASE --data FILE --out stats.safetensors",
                code="AK106",
            )
        return
    unused = "an exact result" if refit.exact else "--svd-clamp" if refit.clamp else ""
    unused = "--space factors" if space == "factors" else unused
    if unused:
        raise Refused(
            f"--stats with {unused}",
            expected="a refit in --space delta, whose error the statistics weigh",
            where="options",
            hint="give --rank R or --energy E, or remove --stats",
            code="AK106",
        )
    if files not in (1, adapters):
        raise Refused(
            f"{files} --stats files for {adapters} adapters",
            expected="one for all, or one for each",
            where="--stats",
            hint="give --stats FILE once, or once per adapter, in their order",
            code="AK106",
        )


def without_inputs(method: Method) -> Method:
    """The method for modules without covariances of inputs."""
    return Mean() if method.acts_on == "covariances" else method


def with_statistics(
    tasks: list[CombinedFactors],
    stats: Sequence[Checkpoint],  # one for all adapters, or one for each
    parameters: Collection[str],
    notes: list[str],
    errors: Problems,
) -> list[CombinedFactors]:
    """The tasks, with the inputs' covariances for linear layers; see `input_widths`. Missing ones
    join the errors."""
    replaced = without_inputs(tasks[0].method)
    otherwise = BY_WEIGHTS if replaced is tasks[0].method else f"combined by {replaced.name}"
    if tasks[0].method.over != "module":
        otherwise += f" if their {tasks[0].method.over} has no linear layers"
    try:
        widths = input_widths(tasks, parameters, notes, otherwise)
    except AdapterkitError as error:
        errors.append(error)
        return tasks
    selected: list[Mapping[str, TensorSpec]] = []
    for number, checkpoint in enumerate(stats):
        own = {
            task.name: widths[task.name]
            for task in tasks
            if task.name in widths
            and (len(stats) == 1 or any(operand.number == number for operand in task.operands))
        }
        selected.append({})
        with errors.collected():
            selected[-1] = select_covariances(checkpoint, own)
    weighted = []
    for task in tasks:
        if task.name not in widths:
            weighted.append(replace(task, method=replaced))
            continue
        files = (
            selected if len(stats) == 1 else [selected[operand.number] for operand in task.operands]
        )
        specs = tuple(file[task.name] for file in files if task.name in file)
        weighted.append(replace(task, covariances=specs))
    return weighted
