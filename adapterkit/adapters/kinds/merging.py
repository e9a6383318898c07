"""Read an adapter whose deltas depend on the base's weights, for a merge by rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from adapterkit.adapters.kinds.common import AdaptedModule, Kind, read_kind
from adapterkit.adapters.kinds.dora_deltas import module_weight
from adapterkit.adapters.kinds.rows import RowDelta
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import CHECK_BASE, PLAIN
from adapterkit.core.errors import Refused, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.merge.changes import check_acting
from adapterkit.core.merge.job import MergeState
from adapterkit.core.plan import Loaded, RowEdit
from adapterkit.core.records import Settings
from adapterkit.core.registry import declarations, member
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter, StoredParameter
from adapterkit.core.weights.reader import Reader


@dataclass(frozen=True)
class ModuleOfRows:
    """A module of such an adapter, until its weight in the base is known."""

    kind: type[Kind]
    target: str  # the base's module
    parts: dict[str, TensorSpec]

    @property
    def name(self) -> str:
        """The type, as PEFT writes it."""
        return self.kind.name.upper()

    def add_to(self, state: MergeState, adapter: Adapter) -> None:
        """Add the changes of this module to a merge's, or the reasons why they cannot be added to
        its errors. Raises `Refused` for shapes that do not fit."""
        weight = state.weight(adapter, self.target)
        if not state.changes_module(adapter, self.target):
            state.skip(adapter, self.target)
            return
        if state.names.model is not None:
            check_acting(state, adapter, self.target, self.name)
        if state.methods is not None:
            method = f"--method {state.options.method}"
            problem = f"{method} and {self.name} of {shown(self.target)}"
            state.errors.add(problem, "plain deltas", PLAIN, where=adapter.label, code="AK401")
            return
        for parameter, function in self._on(state.names, adapter):
            if weight != 1.0 and not function.is_linear:
                state.errors.append(only_whole(adapter, self.name, self.target, weight))
                return
            change = state.change(parameter)
            change.adapters.append(adapter.name)
            # one edit, and the first, because all are functions of the same weight
            before = change.deltas[0][0] if change.deltas else None
            first = before if isinstance(before, PlacedFunctions) else None
            functions = [*(first.functions if first else ()), (function, weight)]
            functions.sort(key=lambda one: not one[0].is_linear)
            own = PlacedFunctions(parameter.shape[0], tuple(functions))
            change.deltas[: first is not None] = [(own, 1.0)]

    def _on(self, names: Names, adapter: Adapter) -> Iterator[tuple[Parameter, RowDelta]]:
        """Yield the changes of the module's weight, and of its bias if it changes too. `Refused` if
        the shapes do not fit, or a weight is stored in pieces."""
        is_embedding = any("embedding" in part for part in self.parts)
        weight = module_weight(names, self.target, is_embedding, adapter.config)
        delta = self.kind.from_module(AdaptedModule(adapter, self.target, self.parts, {}, weight))
        assert isinstance(delta, RowDelta)
        if delta.turned != weight.transposed:
            raise Refused(
                f"{self.name} of {shown(self.target)}, whose weight is stored (in, out)",
                expected="layers whose weight is (out, in): PEFT has no others of this type",
                where=adapter.label,
                hint=CHECK_BASE,
                code="AK401",
            )
        yield self._whole(weight.parameter, adapter), delta
        bias = names.parameter(f"{self.target}.bias") if delta.scales_bias else None
        if bias is not None:
            stored = StoredParameter.of(bias, names.base.tensors)
            yield self._whole(bias, adapter), replace(cast(Any, delta), weight=stored)

    def _whole(self, parameter: Parameter, adapter: Adapter) -> Parameter:
        if not parameter.is_full_tensor:
            raise Refused(
                f"{self.name} of {shown(parameter.name)}, which the base stores in pieces, or "
                "within another tensor",
                expected="a weight that is one stored tensor",
                where=adapter.label,
                hint="save the model once with transformers (from_pretrained, save_pretrained) and "
                "use that as the base",
                code="AK406",
            )
        return parameter


@dataclass(frozen=True)
class PlacedFunctions:
    """The changes of a parameter that are functions of its rows, each with its adapter's weight;
    the linear ones first."""

    rows: int  # of the parameter
    functions: tuple[tuple[RowDelta, float], ...]

    @property
    def folders(self) -> list[int]:
        """The numbers of their adapters."""
        return [function.tensors[0].folder for function, _ in self.functions]

    @property
    def kind(self) -> str:
        """The type of the last one, as PEFT writes it."""
        return self.functions[-1][0].name.upper()

    @property
    def needs_base(self) -> bool:
        """True if one multiplies or rotates the weight, and no other can be added."""
        return not all(function.is_linear for function, _ in self.functions)

    def edit(self, weight: float) -> "ChangeRows":
        """The edit of the stored tensor."""
        return ChangeRows(self.functions, self.rows)


@dataclass(frozen=True, slots=True)
class ChangeRows(RowEdit):
    """w += Σ scale * function(w), of the same w."""

    functions: tuple[tuple[RowDelta, float], ...]
    rows: int

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for function, _ in self.functions for spec in function.tensors)

    @property
    def flops(self) -> int:
        # about one product for each element of an adapter's tensors and each row
        return 2 * self.rows * sum(math.prod(spec.shape) for spec in self.reads)

    @property
    def memory(self) -> int:
        # a block of a rotation has twice its stored elements, in some copies in float64
        return 80 * sum(spec.nbytes for spec in self.reads)

    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        dtype, stored = inputs.dtype, inputs.view(None)
        assert dtype is not None
        changes = [(one.change(stored, dtype), scale) for one, scale in self.functions]

        def apply(w: Tensor, first: int) -> None:
            here = slice(first, first + len(w))
            added = [change(w, here) for change, _ in changes]  # all of the same w
            for one, (_, scale) in zip(added, changes, strict=True):
                w.add_(one, alpha=scale)

        return Loaded(apply)


def read_rows(folder: Folder, number: int, config: Settings) -> Adapter | None:
    """An adapter of a type whose record has `merges_rows`; None for other types. `Refused` with all
    problems of its config and keys."""
    name = str(config.get("peft_type")).lower()
    if name not in merged_by_rows():
        return None
    kind = member("kinds", name)
    adapter, tensors = read_kind(kind, folder, number)
    tensors.pop("")
    bias = adapter.config.get("bias") or "none"
    own = adapter.config | {"bias": "lora_only" if bias.endswith("_only") else bias}
    others = tuple(ModuleOfRows(kind, *module) for module in tensors.items())
    return replace(adapter, config=own, others=others)


def merged_by_rows() -> list[str]:
    """The types of adapters that a merge computes from the rows of the weights."""
    known = declarations("kinds")
    return [name for name, kind in known.items() if kind.constants.get("merges_rows")]


def only_whole(adapter: Adapter, kind: str, module: str, weight: float) -> Refused:
    """The refusal of a weight other than 1 for a change that is no addition."""
    return Refused(
        f"{kind} of {shown(module)} with weight {weight:g}",
        expected="weight 1: it is a change of the base's weight, and no addition",
        where=adapter.label,
        hint="merge it with weight 1",
        code="AK107",
    )
