"""Report a model's adapters, module by module."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from adapterkit.core.engine.device import float32_products
from adapterkit.runtime.layers.parameter import ParameterPatch
from adapterkit.runtime.layers.routed import RoutedPatch
from adapterkit.runtime.patches.copies import MirrorPatch
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.site import Patch
from adapterkit.runtime.state import State


@dataclass(frozen=True)
class AdapterOnModule:
    """One adapter, or expert of a router, on one module. `part`: factors, copy, tokens or the
    parameter's name; `norm`: of the delta, ‖scale·b·a‖ (Frobenius). Only factors have a rank, a
    scale and a norm."""

    name: str
    rank: int | None
    scale: float | None
    norm: float | None
    active: bool
    part: str = "factors"

    def cells(self) -> tuple[str, ...]:
        numbers = (
            "" if value is None else text.format(value)
            for value, text in ((self.rank, "{}"), (self.scale, "{:g}"), (self.norm, "{:.4g}"))
        )
        return (self.name, self.part, *numbers, "yes" if self.active else "")


@dataclass(frozen=True)
class Row:
    """One module, or parameter of a module, with adapters; `kind`: the module's class."""

    module: str
    kind: str
    adapters: tuple[AdapterOnModule, ...]


class ModuleTable(list[Row]):
    """Rows in the order of the modules; prints in three lines, `table()` has a line for each row.

    `trainable` and `total`: parameters of the model with its adapters."""

    trainable = total = 0

    @property
    def share(self) -> float:
        """The share of trained parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        kinds = Counter(f"{row.kind} {share.part}" for row in self for share in row.adapters)
        return (
            f"trainable parameters: {self.trainable:,} ({100 * self.share:.4g} %)\n"
            f"total parameters: {self.total:,}\n"
            f"by kind: {', '.join(f'{count} {kind}' for kind, count in kinds.items()) or 'none'}"
        )

    __repr__ = __str__

    def table(self) -> str:
        """All rows as text."""
        cells: list[tuple[str, ...]] = [
            ("module", "kind", "adapter", "part", "rank", "scale", "norm", "active")
        ]
        cells += [(row.module, row.kind, *share.cells()) for row in self for share in row.adapters]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
@float32_products()
def report(state: State) -> ModuleTable:
    """Every module with adapters: its class, and each one's rank, scale and norm."""
    rows = ModuleTable()
    for parameter in state.model.parameters():
        # bitsandbytes packs 4-bit weights
        packed = getattr(parameter, "quant_state", None)
        count = parameter.numel() if packed is None else math.prod(packed.shape)
        rows.total += count
        rows.trainable += count if parameter.requires_grad else 0
    for path in state.modules:
        site = state.sites.get(path)
        if site is None:
            continue
        shares: dict[str, list[AdapterOnModule]] = {}  # by the name of the module or parameter
        for name, patches in site.patches.items():
            for patch in patches.values():
                if isinstance(patch, MirrorPatch):
                    continue  # the copy's row
                target = patch.target(path) if isinstance(patch, ParameterPatch) else path
                for share in _shares(name, patch, name in state.active):
                    shares.setdefault(target, []).append(share)
        rows += [Row(target, type(site.host).__name__, tuple(s)) for target, s in shares.items()]
    return rows


def _shares(name: str, patch: Patch, active: bool) -> Iterator[AdapterOnModule]:
    if isinstance(patch, FactorsPatch):
        yield AdapterOnModule(name, patch.rank, patch.stored_scale, patch.norm(), active)
    elif isinstance(patch, RoutedPatch):
        for expert, scale, norm in zip(patch.names, patch.scales, patch.norms(), strict=True):
            yield AdapterOnModule(f"{name}: {expert}", patch.rank, scale, norm, active)
    else:
        yield AdapterOnModule(name, None, None, None, active, patch.role.removeprefix("weight."))
