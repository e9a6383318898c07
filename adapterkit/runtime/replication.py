"""layer_replication on a live model: its list of layers in another order, some of them twice, as in
SOLAR (arXiv:2312.15166). The copies share the base's parameters, but have their own adapters."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from adapterkit.core.errors import Refused, shown
from adapterkit.core.merge.job import COUNTS, LAYER, stacked
from adapterkit.core.records import Json
from adapterkit.runtime.state import State

WHERE = "layer_replication"
Ranges = Sequence[Sequence[int]]


class Replication:
    """A model whose layers are stacked in another order, until `undo`.

    The first occurrence of a layer is the layer itself; later ones are copies with the same
    parameters and buffers. PEFT copies all of them, and does not change lists in the config."""

    def __init__(self, state: State, ranges: Ranges):
        path, layers = _layers(state)
        self.state, self.ranges = state, tuple(map(tuple, ranges))
        order = [i for start, end in ranges for i in range(start, end)]
        outside = sorted({i for i in order if i >= len(layers)})
        if outside:
            raise Refused(
                f"layers {outside} of {shown(path)}",
                expected=f"its layers 0 to {len(layers) - 1}",
                where=WHERE,
                hint="the adapter was trained on another model",
                code="AK801",
            )
        parent, _, self._leaf = path.rpartition(".")
        self._owner, self._own = state.modules[parent], layers
        self._undone: list[tuple[Json, str, Any]] = []  # restored by `undo`
        for config in _configs(state, path):
            settings = dict(vars(config))
            for key, value in stacked(settings, len(layers), order).items():
                if value is not settings[key]:
                    self._set(vars(config), key, value)
        new = nn.ModuleList()
        for i in order:
            layer = layers[i]
            new.append(_shared_copy(layer) if any(layer is other for other in new) else layer)
        new.train(layers.training)
        for number, layer in enumerate(new):
            for module in layer.modules():
                # by which a cache knows the layer
                if isinstance(vars(module).get("layer_idx"), int):
                    self._set(vars(module), "layer_idx", number)
        self._owner._modules[self._leaf] = new
        state.find_modules()

    def _set(self, table: Json, key: str, value: object) -> None:
        self._undone.append((table, key, table[key]))
        table[key] = value

    def undo(self) -> None:
        """Restore the model's own layers and config."""
        self._owner._modules[self._leaf] = self._own
        for table, key, value in self._undone:
            table[key] = value
        self.state.find_modules()


def replicate(state: State, ranges: Ranges | None, where: str) -> None:
    """Stack the layers in an adapter's order; `Refused` if other adapters need another order."""
    wanted = tuple(map(tuple, ranges or ()))
    present = () if state.replication is None else state.replication.ranges
    if wanted == present:
        return
    if state.adapters:
        raise Refused(
            f"layer_replication {list(map(list, wanted)) or None}",
            expected=f"{list(map(list, present)) or None}, as the model's other adapters have it",
            where=where,
            hint="load it onto another instance of the model",
            code="AK801",
        )
    state.replication = Replication(state, wanted)


@contextmanager
def replicating(state: State) -> Iterator[None]:
    """Undo a replication in the block if it raises."""
    before = state.replication
    try:
        yield
    except BaseException:
        if state.replication is not before:
            state.unreplicate()
        raise


def _layers(state: State) -> tuple[str, nn.ModuleList]:
    """The path of the model's list of layers, and the list; `Refused` unless there is one."""
    lists = {
        path: module
        for path, module in state.modules.items()
        if type(module) is nn.ModuleList and LAYER.match(f"{path}.0.") and len(module)
    }
    counted = {path: module for path, module in lists.items() if _configs(state, path)}
    outer = [
        path
        for path in counted or lists
        if not any(path.startswith(f"{other}.") for other in counted or lists)
    ]
    if len(outer) != 1:
        raise Refused(
            f"{len(outer)} lists of layers: {', '.join(map(shown, outer))}",
            expected="one list of layers",
            where=WHERE,
            hint="this model's layers cannot be replicated",
            code="AK801",
        )
    return outer[0], lists[outer[0]]


def _configs(state: State, path: str) -> list[Any]:
    """The configs of the modules around a list of layers that contain the list's length."""
    parts, found = path.split("."), {}
    for i in range(len(parts)):
        config = getattr(state.modules[".".join(parts[:i])], "config", None)
        settings = vars(config) if hasattr(config, "__dict__") else {}
        # nn.Module types its attributes as Tensor or Module
        if any(settings.get(key) == len(state.modules[path]) for key in COUNTS):  # type: ignore[arg-type]
            found[id(config)] = config
    return list(found.values())


def _shared_copy(layer: nn.Module) -> nn.Module:
    """A copy of a layer with the same parameters, buffers, hooks and configs."""
    memo: dict[int, Any] = {}
    shared = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            shared += hooks.values()
        shared.append(getattr(module, "config", None))
    memo.update((id(item), item) for item in shared)
    return copy.deepcopy(layer, memo)
