"""Low-rank factors of one adapter on one module: the base class of all kinds of layers."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.core.adapter.keys import part_keys
from adapterkit.kernels.lowrank import directions
from adapterkit.runtime.patches import dora
from adapterkit.runtime.patches.memo import Memo
from adapterkit.runtime.quantized import plainly_stored, unmergeable
from adapterkit.runtime.site import Host, Inside, Patch, Site, Values


class FactorsPatch(Patch):
    """y + weight·scale·b(a(dropout(x))) of one adapter on one module.

    a (r, in) and b (out, r) as in the file, float32 unless the caller says otherwise. Subclasses
    define b·a for their layer, and those with a `kind` the runtime's interface to it. `initial`:
    factors that the base lacks (for example PiSSA's); their product is subtracted, so the base
    itself never changes. `magnitude`: DoRA, see `dora`; with a weight w it gives y + w·(DoRA's
    output - y).
    """

    kind: ClassVar[str]  # how targets call it
    takes: ClassVar[tuple[str, ...]] = ()  # settings of a LoraConfig that some layers do not take
    is_matrix: ClassVar[bool] = False  # of vectors: inits decompose it, and statistics are of x
    mixes_rows: ClassVar[bool] = False  # whether all rows of a mixed batch have one product
    stored_as: ClassVar[str] = "module"  # the layout of its keys
    axis: ClassVar[int | None] = None  # of the outputs in the host's weight, where it takes dora
    parameter: ClassVar[str] = "weight"  # of the host, to which it adds
    host_bias: ClassVar[str] = "bias"
    rank_axes: ClassVar[tuple[int, int]] = (0, 1)  # of a and b
    initial_a: Tensor | None
    initial_b: Tensor | None
    scale: Any  # a float, or a tensor (): see `pad`
    padded: tuple[int, float] | None = None  # rank and scale, where a and b have more rows

    def __init__(
        self,
        adapter: str,
        a: Tensor,
        b: Tensor,
        scale: float,
        *,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        magnitude: Tensor | None = None,
        initial: tuple[Tensor, Tensor] | None = None,
        ephemeral_gpu_offload: bool = False,
    ):
        super().__init__()
        self.adapter, self.scale, self.dropout = adapter, scale, dropout
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude, requires_grad=False)
        for name, value in zip(("initial_a", "initial_b"), initial or (None, None), strict=True):
            self.register_buffer(name, value)
        self.norms = dora.RowNorms(offload=ephemeral_gpu_offload)
        self._folded: Memo[tuple[Tensor, Tensor, Tensor]] = Memo()
        self._directed: Memo[FactorsPatch] = Memo(waits=True)

    @property
    def stored_rank(self) -> int:
        """The rank in a file: with the initial factors, without padding."""
        initial = 0 if self.initial_a is None else self.initial_a.shape[self.rank_axes[0]]
        return self._used_rank() + initial

    def _used_rank(self) -> int:
        """The rank, or all rows if training has changed the padding."""
        rank = self.rank
        if self.padded is None:
            return rank
        rows = self.a.shape[self.rank_axes[0]]
        rest = [
            factor.narrow(axis, rank, rows - rank)
            for factor, axis in zip((self.a, self.b), self.rank_axes, strict=True)
        ]
        return rows if any(bool(values.any()) for values in rest) else rank

    @property
    def stored_scale(self) -> float:
        return self.scale if self.padded is None else self.padded[1]

    @property
    def rank(self) -> int:
        return self.a.shape[self.rank_axes[0]] if self.padded is None else self.padded[0]

    @classmethod
    def matches(cls, host: nn.Module) -> bool:
        """Return whether a module is of this kind, if `weights.layers` has none for it."""
        return False

    @classmethod
    def members(cls, path: str) -> "list[tuple[str, type[FactorsPatch]]]":
        """The modules, with their kinds, that get factors if `path` is a target."""
        return [(path, cls)]

    @classmethod
    def refusal_reason(cls, host: Host, rank: int) -> tuple[str, str] | None:
        """The reason why a host takes no factors, and an expected one; None if it takes them."""
        return None

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b for a host."""
        raise NotImplementedError

    @classmethod
    def matrix(cls, host: Host) -> Tensor:
        """The host's weight (out, in) in float32, for inits that decompose it."""
        raise NotImplementedError

    def product(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """b·a applied to the host's input, plus a bias."""
        raise NotImplementedError

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        """b·a in the layout of the host's parameter."""
        raise NotImplementedError

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        whole = self.input(x)
        dropped = self.drop(whole)
        if self.magnitude is not None:
            return self._rescaled(y, weight, x, whole, dropped)
        update = self.product(dropped, self.a, self.b, self.bias)
        if self.initial_a is not None and self.initial_b is not None:
            # the base that lacks them drops nothing
            update = update - self.product(whole, self.initial_a, self.initial_b)
        if isinstance(self.scale, Tensor):  # `alpha` would wait for its value
            return y + update * (self.scale * weight)
        return torch.add(y, update, alpha=self.scale * weight)

    def _rescaled(
        self, y: Tensor, weight: float, x: Tensor, whole: Tensor, dropped: Tensor
    ) -> Tensor:
        """As in PEFT: g·(y - bias) + bias + g·s·b·a·x; with dropout g - 1 scales W·dropout(x),
        without the outputs of other adapters."""
        f, a, b = self.folded(weight)
        assert f is not None
        is_whole, acting = dropped is whole, Inside(self.site, (), self.site.changing)
        bias = self._own_bias() if is_whole else acting.value("bias")
        # (1 - f)·bias by way of the product: no further pass over the output
        update = self.product(dropped, a, b, None if bias is None else ((1 - f) * bias).to(b.dtype))
        f = dora.on_outputs(f, self.a.ndim - 2)
        if is_whole:
            return torch.addcmul(update, y, f)
        y = y + torch.addcmul(update, acting.base(dropped.to(x.dtype)), f - 1)
        if self.initial_a is None or self.initial_b is None:
            return y
        change = self.product(whole - dropped, self.initial_a, self.initial_b)
        return y - change * (self.scale * weight)

    def _own_bias(self) -> Tensor | None:
        """The host's bias as in its forward, before anything is added to it."""
        own = self.host._parameters.get("bias")
        return None if own is None else self.site.replacements.get("bias", own).to(own)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def joined(self) -> tuple[Tensor, Tensor]:
        """a and b with the initial ones: b·a - b0·a0 = [b, -b0]·[a; a0]."""
        return self._with_initial(self.a, self.b)

    def _with_initial(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.initial_a is None or self.initial_b is None:
            return a, b
        a_axis, b_axis = self.rank_axes
        return torch.cat([a, self.initial_a], a_axis), torch.cat([b, -self.initial_b], b_axis)

    @property
    def can_be_padded(self) -> bool:
        """Return whether a and b can have more rows than the adapter, which those of grouped
        convolutions cannot."""
        a_axis, b_axis = self.rank_axes
        return self.a.shape[a_axis] == self.b.shape[b_axis]

    def pad(self, rank: int) -> None:
        """Pad a and b with zeros to a rank, and make the scale a tensor, so that compiled code
        reads other factors and scales without a new compilation."""
        own = self.rank, self.stored_scale
        for name, axis in zip("ab", self.rank_axes, strict=True):
            rows = padded(getattr(self, name).detach(), axis, rank)
            setattr(self, name, nn.Parameter(rows, requires_grad=False))
        del self.scale
        self.register_buffer("scale", _scalar(own[1], self.a.device))
        self.set_own(*own)

    def set_own(self, rank: int, scale: float) -> None:
        """Set the rank and the scale; rows of a and b after the rank are zeros."""
        self.padded = (rank, scale) if rank < self.a.shape[self.rank_axes[0]] else None
        if isinstance(self.scale, Tensor):
            self.padded = rank, scale
            self.scale.fill_(scale)
        else:
            self.scale = scale

    def _apply(self, fn: object, recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        if self.padded is not None and isinstance(self.scale, Tensor):  # never in half precision
            self.scale = _scalar(self.padded[1], self.scale.device)
        return module

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """a and b as a file stores them: with the initial ones, without padding."""
        if self.padded is None:
            return self.joined()
        rank = self._used_rank()
        a_axis, b_axis = self.rank_axes
        return self._with_initial(self.a.narrow(a_axis, 0, rank), self.b.narrow(b_axis, 0, rank))

    def folded(self, weight: float = 1.0) -> tuple[Tensor | None, Tensor, Tensor]:
        """f (out,), a and b, with the scales and DoRA's factor in f and b:
        y' = f·(y - bias) + bias + b·a·x. f is None for 1, without a magnitude."""
        a, b = self.joined()
        if self.magnitude is None:
            return None, a, b * (self.scale * weight)
        if torch.compiler.is_compiling():
            return self._fold(weight)
        tensors = [*plainly_stored(self.host), *self.parameters(), *self.buffers()]
        return self._folded(lambda: self._fold(weight), tensors, weight, self.stored_scale)

    def _fold(self, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        assert self.magnitude is not None
        a, b = self.joined()
        g = dora.ratio(self.magnitude, self.row_norms(self.host))
        factor = g if weight == 1 else 1 + weight * (g - 1)
        scales = dora.on_outputs(g * (self.scale * weight), b.ndim - 1)
        return factor, a, (b * scales).to(b.dtype)

    def row_norms(self, host: nn.Module) -> Tensor:
        """‖W + delta‖ of each output (out,), float32; constant for autograd."""
        assert self.axis is not None
        a, b = self.joined()
        return self.norms(host, self.axis, a, b, self.scale)

    def decompose(self, host: nn.Module, dtype: torch.dtype | None) -> None:
        """Make it a DoRA whose initial output is that of the factors alone."""
        norms = self.row_norms(host).view(dora.magnitude_shape(self.b.shape))
        self.magnitude = nn.Parameter(norms.to(dtype), requires_grad=False)

    def input(self, x: Tensor) -> Tensor:
        """The host's input in the factors' dtype."""
        return x if x.dtype == self.a.dtype else x.to(self.a.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """scale·b·a in the layout of the host's parameter, float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        delta = self.dense(self.a.to(wide), self.b.to(wide))
        if self.initial_a is not None and self.initial_b is not None:
            delta -= self.dense(self.initial_a.to(wide), self.initial_b.to(wide))
        return delta.mul_(self.scale)

    def norm(self) -> float:
        """‖scale·b·a‖, Frobenius."""
        return float(torch.linalg.vector_norm(self.delta()))

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        values[self.parameter].add_(self.delta(), alpha=weight)
        if self.bias is not None:
            values[self.host_bias].add_(self.bias, alpha=weight * self.scale)
        if self.magnitude is not None and self.axis is not None:
            g = dora.ratio(self.magnitude, self.row_norms(self.host))
            values["weight"].mul_(dora.on_outputs(g, values["weight"].ndim - 1 - self.axis))
            bias = self._own_bias()
            if "bias" in values and bias is not None:  # outputs of other adapters are rescaled
                values["bias"].sub_(bias).mul_(g).add_(bias)

    def unmergeable(self, site: Site, weight: float) -> str | None:
        if self.magnitude is not None and weight != 1:
            return f"DoRA with weight {weight:g}: its magnitudes are values, not additions"
        if self.bias is not None and Values(site.host)[self.host_bias] is None:
            return "it adds a bias (lora_bias) and the layer has none"
        return None if self.parameter != "weight" else unmergeable(self.host)

    def named(self, path: str) -> str:
        return self.module(path)

    def undirected(self, weights: Sequence[float]) -> str | None:
        if self.bias is not None or self.magnitude is not None:
            return "it has more than low-rank factors (DoRA, or a bias)"
        if self.initial_a is not None or not self.can_be_padded:
            return "its delta is no product (initial factors, or a convolution with groups)"
        lefts, rights = self._matrices()
        shape = lefts[0].shape[0], rights[0].shape[1]
        count = len(lefts) * directions.count(shape, self.stored_rank)
        return None if len(weights) == count else f"it has {count} directions, not {len(weights)}"

    def directed(self, weights: tuple[float, ...]) -> "FactorsPatch":
        return self._directed(
            lambda: self._direct(weights), [self.a, self.b], weights, self.padded, self.stored_scale
        )

    def _matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """b (out, r) and a (r, in), for experts each one's."""
        a, b = self.stored_factors()
        if self.rank_axes == (-2, -1) and a.ndim == 3:
            return list(b), list(a)
        return [b.flatten(1)], [a.flatten(1)]

    def _direct(self, weights: tuple[float, ...]) -> "FactorsPatch":
        """A copy with other values of b, in which only b is trained."""
        a, b = self.stored_factors()
        pairs = list(zip(*self._matrices(), strict=True))
        each = len(weights) // len(pairs)
        lefts = [
            directions.weighted_left(left, right, weights[n * each :][:each])
            for n, (left, right) in enumerate(pairs)
        ]
        return self._with_factors(a.detach(), torch.stack(lefts).reshape(b.shape))

    def _with_factors(self, a: Tensor, b: Tensor) -> "FactorsPatch":
        twin = copy.copy(self)
        twin._parameters = {**self._parameters}
        twin._buffers = {**self._buffers}
        twin.a, twin.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        if self.padded is not None:
            del twin.scale
            twin.scale, twin.padded = self.stored_scale, None
        twin._folded, twin._directed = Memo(), Memo(waits=True)
        return twin

    def rescale(self, factor: float) -> None:
        self.set_own(self.rank, self.stored_scale * factor)

    def module(self, path: str) -> str:
        """The module that it is on; `path`: the site's."""
        return path

    def target(self, path: str) -> str:
        """The module or parameter as targets and patterns name it; `path`: the site's."""
        return path

    def stored(self, path: str) -> dict[str, Tensor]:
        """Its tensors for a file; initial factors join the trained ones, for the original base."""
        a, b = self.stored_factors()
        values = {"a": a, "b": b, "bias": self.bias, "magnitude": self.magnitude}
        if not a.shape[0]:
            return {}
        keys = part_keys(self.module(path), self.stored_as)
        return {keys[role]: value for role, value in values.items() if value is not None}

    def values_in(self, other: Patch) -> dict[str, Tensor]:
        """Values of another patch as stored: initial factors follow the trained ones, see `joined`,
        without padding."""
        values = super().values_in(other)
        if not {"a", "b"} <= values.keys():
            return values
        for name, axis, sign in zip("ab", self.rank_axes, (1, -1), strict=True):
            initial = getattr(self, f"initial_{name}")
            if initial is not None:
                own = values[name].shape[axis] - initial.shape[axis]
                values[name], rest = values[name].detach().tensor_split([own], axis)
                values[f"initial_{name}"] = sign * rest
            rows = getattr(self, name).shape[axis]
            if self.padded is not None and rows > values[name].shape[axis]:
                values[name] = padded(values[name], axis, rows)
        return values

    def take(self, other: Patch) -> None:
        """Copy another patch's values, rank and scale, as it was read."""
        assert isinstance(other, FactorsPatch)
        super().take(other)
        initial = 0 if self.initial_a is None else self.initial_a.shape[self.rank_axes[0]]
        self.set_own(other.rank - initial, other.stored_scale)

    def extra_repr(self) -> str:
        shapes = f"a {tuple(self.a.shape)}, b {tuple(self.b.shape)}"
        return f"{shapes}, scale={self.stored_scale:g}, dropout={self.dropout:g}"


def padded(value: Tensor, axis: int, size: int) -> Tensor:
    """A value padded with zeros at the end of an axis."""
    shape = list(value.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis)


def _scalar(value: float, where: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=where)
