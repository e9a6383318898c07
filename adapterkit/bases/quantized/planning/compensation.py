"""Choose the tensors of a merge that are rounded with compensation, and their covariances."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapterkit.bases.quantized.planning.weights import LINEAR
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.merge.job import Change, MergeState
from adapterkit.core.merge.steps import is_rounded
from adapterkit.core.plan import Compensation, Span, Step
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.parameters import Positions, Slot, identity_slot
from adapterkit.verbs.shared.statistics_file import select_covariances

UNSEEN = "NonDynamicallyQuantizableLinear"  # attention's out_proj, which is never called


@dataclass(frozen=True)
class _Place:
    """The position of a linear layer's outputs in a stored tensor."""

    module: str
    width: int
    outputs: Positions
    by_columns: bool


def with_compensation(
    state: MergeState, steps: Mapping[str, list[Step]], stats: Checkpoint
) -> dict[str, list[Step]]:
    """The steps, where changed weights of linear layers are rounded with covariances of their
    inputs. `Refused` for layers without one, and for layouts whose rows are neither outputs nor
    inputs."""
    changes = _changes_by_key(state)
    places: dict[str, list[_Place]] = {}
    others: list[str] = []
    errors = Problems()
    for step in (step for group in steps.values() for step in group):
        if not is_rounded(state, step):
            continue
        with errors.collected():
            places[step.key] = _places(state, step, changes.get(step.key, []))
            others += [] if places[step.key] else [step.key]
    widths = {place.module: place.width for each in places.values() for place in each}
    selected: dict[str, TensorSpec] = {}
    with errors.collected():
        selected = select_covariances(stats, widths)
    errors.raise_all()
    if others:
        state.notes.append(f"rounded to nearest, not weights of linear layers: {listed(others)}")

    def compensated(step: Step) -> Step:
        each = places.get(step.key)
        if not each:
            return step
        spans = tuple(Span(place.outputs, selected[place.module]) for place in each)
        return replace(step, compensation=Compensation(spans, each[0].by_columns))

    return {name: [compensated(step) for step in group] for name, group in steps.items()}


def _changes_by_key(state: MergeState) -> dict[str, list[tuple[Change, Slot]]]:
    """The changes of each stored tensor, and of each new one."""
    changes: dict[str, list[tuple[Change, Slot]]] = {}
    for change in state.changes.values():
        for slot in change.parameter.slots:
            changes.setdefault(slot.key, []).append((change, slot))
    for name, change in state.new.items():
        changes[name] = [(change, identity_slot(name, change.parameter.shape))]
    return changes


def _places(state: MergeState, step: Step, changes: list[tuple[Change, Slot]]) -> list[_Place]:
    """The changed linear layers in a step's tensor."""
    source = step.source
    packed = isinstance(source, QuantizedWeight) and not state.options.dequantize
    turned = isinstance(source, QuantizedWeight) and source.transposed
    places = [_place(step, change, slot) for change, slot in changes if _is_linear(state, change)]
    sides = {place.by_columns for place in places}
    if len(sides) > 1 or (packed and sides - {turned}):
        raise _layout_error(step, places[0].module)
    return places


def _is_linear(state: MergeState, change: Change) -> bool:
    """Return whether the parameter is the weight of a linear layer and changed by factors."""
    parameter = change.parameter
    if not change.additions or len(parameter.shape) != 2 or not parameter.name.endswith(".weight"):
        return False
    module = parameter.name.removesuffix(".weight")
    classes = [each.__name__ for each in state.names.classes(module)]
    if classes:
        return any(name in LINEAR for name in classes) and UNSEEN not in classes
    return all(one.kind != "embedding" for one in change.additions)


def _place(step: Step, change: Change, slot: Slot) -> _Place:
    """The position of a layer; `Refused` unless inputs are on one axis, in order."""
    parameter = change.parameter
    flip = change.additions[0].flip
    outputs, inputs = slot.axes[::-1] if flip else slot.axes
    width = parameter.shape[0 if flip else 1]
    whole = inputs.at == 0 and isinstance(inputs.of, range) and inputs.of == range(width)
    whole = whole and len(slot.shape) == 2 and {outputs.axis, inputs.axis} == {0, 1}
    if not whole or slot.shape[inputs.axis or 0] != width:
        raise _layout_error(step, parameter.name)
    module = parameter.name.removesuffix(".weight")
    return _Place(module, width, outputs.of, outputs.axis == 1)


def _layout_error(step: Step, name: str) -> Refused:
    return Refused(
        f"{shown(name)} is stored in {shown(step.key)} so that errors cannot be passed on",
        expected="all inputs of the layer, in order, on one axis of the stored tensor",
        where="--rounding compensated",
        hint="exclude it with --exclude, or use another rounding",
        code="AK406",
    )
