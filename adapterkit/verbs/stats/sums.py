"""Sums over the inputs of layers, and the statistics made from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit.core.engine.device import Mark, begin_copy_to_host, has_room, with_float64
from adapterkit.core.errors import Failed, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.kernels.lowrank import truncated
from adapterkit.verbs.shared.statistics_file import INPUTS, key_of

CPU = torch.device("cpu")
COMPONENTS = 256  # stored principal components of a layer, by default
BLOCK = 1024  # vectors whose products are summed in their own dtype, before they join float64
PANEL = 256  # least rows of a panel
PANELS = 8  # of a covariance: 9/16 of the products of a full one
LEFT = 0.25  # of a GPU's memory, for the model and sums in their own dtype: totals leave it free


@dataclass
class Sum:
    """Σ x xᵀ and Σ x of layers that saw the same inputs so far.

    The products are summed in the inputs' dtype (at least float32) over about BLOCK vectors, then
    in float64, so that rounding does not grow with their number. Only panels of rows on and right
    of the diagonal are computed and kept. Everything is on the device of the inputs, except totals
    that do not fit there, or on devices without float64: these are on the host."""

    width: int
    squares: bool  # Σ x xᵀ is summed
    normalize: bool  # PEFT's CorDA: each call's inputs are divided by |max|, and counted as one
    vectors: int = 0
    calls: int = 0
    modules: dict[str, None] = field(default_factory=dict)  # in the order in which they were called
    vector: Tensor | None = None  # (in,) float64
    block: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)
    in_block: int = 0

    @property
    def owner(self) -> str:
        """The module under whose name the statistics are stored."""
        return next(iter(self.modules))

    @property
    def starts(self) -> range:
        """The first row of each panel."""
        return range(0, self.width, max(PANEL, -(-self.width // PANELS)))

    def add(self, rows: Tensor) -> None:
        """Add vectors, rows of (vectors, in) in float32 or float64."""
        self.vectors += len(rows)
        self.calls += 1
        vector = rows.to(with_float64(rows.device)).sum(0, dtype=torch.float64)
        self.vector = vector if self.vector is None else self.vector.to(vector.device).add_(vector)
        if not self.squares or not len(rows):
            return
        if self.normalize:
            rows = rows / rows.max().abs()
        starts = self.starts
        if not self.block:
            self.block = [
                rows.new_zeros(min(starts.step, self.width - at), self.width - at) for at in starts
            ]
        for part in rows.split(BLOCK):
            for at, panel in zip(starts, self.block, strict=True):
                panel.addmm_(part[:, at : at + starts.step].T, part[:, at:])
            self.in_block += len(part)
            if self.in_block >= BLOCK:
                self._close_block()

    def _close_block(self) -> None:
        if not self.in_block:
            return
        self._add_panels(self.block)
        for panel in self.block:
            panel.zero_()
        self.in_block = 0

    def _add_panels(self, panels: list[Tensor]) -> None:
        """Add to the totals, which move to the device of the panels if they fit there."""
        device, count = panels[0].device, sum(panel.numel() for panel in panels)
        where = self.total[0].device if self.total else torch.device("cpu")
        if where != device and has_room(device, 8 * count, LEFT):
            where = device
            self.total = [total.to(where) for total in self.total]
        if where != device:
            panels = [begin_copy_to_host(panel) for panel in panels]
            Mark(device).wait()
        if not self.total:
            self.total = [panel.to(torch.float64, copy=True) for panel in panels]
            return
        for total, panel in zip(self.total, panels, strict=True):
            total += panel

    def check(self) -> None:
        """`Failed` for inputs that are not finite."""
        if self.vector is not None and not bool(self.vector.isfinite().all()):
            raise Failed(
                f"inputs of {shown(self.owner)} are not finite",
                expected="numbers",
                where="collect",
                hint="run the model in float32 or bfloat16",
                code="AK903",
            )

    def record(self) -> Json:
        """Everything except the tensors, as JSON."""
        return {
            "width": self.width,
            "squares": self.squares,
            "normalize": self.normalize,
            "vectors": self.vectors,
            "calls": self.calls,
            "modules": list(self.modules),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The sums in float64, by name."""
        self._close_block()
        vectors = {} if self.vector is None else {"vector": self.vector}
        return vectors | {f"panel.{i}": panel for i, panel in enumerate(self.total)}

    @classmethod
    def of(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sum:
        """The inverse of `record` and `tensors`."""
        fields = {**record, "modules": dict.fromkeys(record["modules"])}
        count = sum(name.startswith("panel.") for name in tensors)
        total = [tensors[f"panel.{i}"] for i in range(count)]
        return cls(**fields, vector=tensors.get("vector"), total=total)

    def add_to(self, total: Sum) -> None:
        """Add this sum to another one."""
        self._close_block()
        total.vectors += self.vectors
        total.calls += self.calls
        vector = self.vector
        if vector is not None:
            before = total.vector
            total.vector = vector.clone() if before is None else before.to(vector.device) + vector
        if self.total:
            total._add_panels(self.total)

    def copy(self) -> Sum:
        """A copy without modules."""
        return replace(
            self,
            modules={},
            vector=None if self.vector is None else self.vector.clone(),
            block=[panel.clone() for panel in self.block],
            total=[panel.clone() for panel in self.total],
        )

    def to(self, device: torch.device) -> Sum:
        """A copy on another device."""
        vector = None if self.vector is None else self.vector.to(device)
        block, total = ([panel.to(device) for panel in one] for one in (self.block, self.total))
        return replace(self, vector=vector, block=block, total=total)

    def covariance(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
        """E[x xᵀ] (in, in), exactly symmetric."""
        self._close_block()
        result = torch.empty(self.width, self.width, dtype=dtype, device=device)
        count = self.calls if self.normalize else self.vectors
        for at, panel in zip(self.starts, self.total, strict=True):
            stop = at + len(panel)
            result[at:stop, at:] = panel / count
            square = result[at:stop, at:stop]
            square.copy_(square.triu() + square.triu(1).T)
            result[stop:, at:stop] = result[at:stop, stop:].T
        return result

    def mean(self) -> Tensor:
        """E[x] (in,) float64."""
        assert self.vector is not None
        return self.vector / self.vectors


@dataclass
class LastInput:
    """The last input x, and the layers that saw it."""

    x: Tensor
    mask: Tensor | None
    version: int | Tensor  # of its values; a copy of them in inference mode, which counts none
    rows: Tensor  # its vectors that count; memory of their own
    modules: dict[str, None]

    def is_input(self, x: Tensor, mask: Tensor | None) -> bool:
        """True if x has the same memory and view, unchanged."""
        return (
            self.x.data_ptr() == x.data_ptr()
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
            and self.x.dtype == x.dtype
            and self.x.device == x.device
            and self.mask is mask
            and (
                torch.equal(self.version, x)
                if isinstance(self.version, Tensor)
                else self.version == x._version
            )
        )


class Sums:
    """Sums of layers: layers that always see the same inputs, as q, k and v do, share one sum and
    one product.

    `what`: names of INPUTS. `components`: the number of principal components of "pca". `normalize`:
    PEFT's CorDA, whose "covariance" is the mean over calls of x xᵀ / max(x)², of all vectors of a
    call; `Failed` for calls of several rows, which PEFT does not take."""

    def __init__(
        self,
        what: Collection[str] = ("covariance",),
        components: int = COMPONENTS,
        normalize: bool = False,
    ) -> None:
        self.what, self.components, self.normalize = tuple(what), components, normalize
        self.by_module: dict[str, Sum] = {}
        self.latest: LastInput | None = None

    @torch.inference_mode(False)  # tensors of inference mode could not be changed outside of it
    @torch.no_grad()
    def add(self, module: str, x: Tensor, mask: Tensor | None = None) -> None:
        """Add an input (..., in) of a layer.

        `mask` (...): the vectors that count, all if None; one object for all layers that share an
        input."""
        latest = self.latest
        if latest is not None and module not in latest.modules and latest.is_input(x, mask):
            latest.modules[module] = None
            return
        self.settle()
        if self.normalize and x.dim() > 2 and len(x) > 1:
            raise Failed(
                f"{shown(module)} saw an input of {tuple(x.shape)}",
                expected="one row at a time, as PEFT's preprocess_corda takes them",
                where="compat",
                hint="run the model on one text at a time, or remove compat",
                code="AK903",
            )
        version = x.clone() if x.is_inference() else x._version
        rows = x.detach() if mask is None else x.detach()[mask.to(x.device, torch.bool)]
        rows = rows.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        if rows.data_ptr() == x.data_ptr():
            rows = rows.clone()  # the model may change x before its layers are known
        self.latest = LastInput(x, mask, version, rows, {module: None})

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self) -> None:
        """Add the last input to the sums of the layers that saw it; a sum is split if only some of
        its layers saw it. Call this before you read the sums."""
        if self.latest is None:
            return
        rows, modules = self.latest.rows, self.latest.modules
        self.latest = None
        self._spread(modules, rows.shape[-1], lambda total: total.add(rows))

    def _spread(
        self, modules: Mapping[str, None], width: int, change: Callable[[Sum], None]
    ) -> None:
        """Change the sums of modules that saw the same input."""
        while modules:
            old = self.by_module.get(next(iter(modules)))
            if old is None:
                group = {m: None for m in modules if m not in self.by_module}
                squares = "covariance" in self.what or "pca" in self.what
                total = Sum(width, squares, self.normalize)
            else:
                group = {m: None for m in old.modules if m in modules}
                total = old if len(group) == len(old.modules) else old.copy()
                if total is not old:
                    old.modules = {m: None for m in old.modules if m not in group}
            change(total)
            total.modules = group
            self.by_module |= dict.fromkeys(group, total)
            modules = {m: None for m in modules if m not in group}

    def merge(self, others: Iterable[Sum]) -> None:
        """Add sums of more inputs, which may group layers differently."""
        for one in others:
            self._spread(one.modules, one.width, one.add_to)

    @property
    def groups(self) -> list[Sum]:
        """The distinct sums."""
        return list({id(total): total for total in self.by_module.values()}.values())

    @property
    def shared(self) -> dict[str, str]:
        """Module -> the module under whose name its statistics are stored."""
        return {
            module: total.owner for module, total in self.by_module.items() if total.owner != module
        }

    def statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (`<owner>.<kind>`, float32 on the CPU) of each sum, one after the other; `Failed`
        for inputs that are not finite."""
        self.settle()
        for total in self.groups:
            for kind, value in self.of(total).items():
                yield key_of(total.owner, kind), value

    def of(self, total: Sum) -> dict[str, Tensor]:
        """The statistics of one sum by kind; empty if no vector counts."""
        if not total.vectors:
            return {}
        total.check()
        mean, result = total.mean(), {}
        if "covariance" in self.what:
            result["covariance"] = total.covariance()
        if "mean" in self.what:
            result["mean"] = mean.float().cpu()
        if "pca" in self.what:
            square = total.covariance(torch.float64, mean.device)
            values = truncated.principal_components(square, mean, self.components)
            result |= dict(zip(INPUTS["pca"], (value.cpu() for value in values), strict=True))
        return result
