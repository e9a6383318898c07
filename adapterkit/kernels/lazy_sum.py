"""A weight plus low-rank products, which replaces their sum while a module multiplies with it.

Indices, transposes, slices and casts of the sum are sums again; products with a tensor are computed
factor by factor. Every other operation runs on the summed tensor, which is computed once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from adapterkit.core.errors import Refused

Value = Any  # a tensor, a `LowRankSum` or NotImplemented
ALIGNMENT = 16  # bytes: the strides that torch's grouped products ask for
FALLBACK = "transformers.grouped_mm_fallback"  # transformers' operator where torch has none


class Term(NamedTuple):
    """scale * left @ right."""

    left: Tensor  # (..., n, r)
    right: Tensor  # (..., r, m)
    scale: float

    @property
    def transposed(self) -> "Term":
        return Term(self.right.mT, self.left.mT, self.scale)


class LowRankSum:
    """weight + sum(scale * left @ right), (..., n, m).

    x @ sum = x @ weight + scale * ((x @ left) @ right), the second summand in the factors' dtype
    and rounded once, to that of the first. It is not a Tensor: a custom autograd function and a
    kernel in another language need `value()`.
    """

    def __init__(self, weight: Tensor, terms: Sequence[Term]):
        self.weight, self.terms = weight, tuple(terms)
        self.is_read = False  # by any operation
        self._value: Tensor | None = None
        self._items: list[LowRankSum] | None = None

    @property
    def requires_grad(self) -> bool:
        factors = (factor for term in self.terms for factor in term[:2])
        return self.weight.requires_grad or any(factor.requires_grad for factor in factors)

    @property
    def transposed(self) -> "LowRankSum":
        """Its last two axes exchanged."""
        return LowRankSum(self.weight.mT, [term.transposed for term in self.terms])

    def value(self) -> Tensor:
        """The sum itself, rounded once, to the weight's dtype; kept for the next call."""
        if self._value is None:
            self._value = summed(self.weight, self.terms)
        return self._value

    def items(self) -> list["LowRankSum"]:
        """The sums along the first axis, unbound together because the gradient of a single index
        would be as large as the whole."""
        if self._items is None:
            terms = [
                [
                    Term(left, right, t.scale)
                    for left, right in zip(t.left.unbind(), t.right.unbind(), strict=True)
                ]
                for t in self.terms
            ]
            self._items = [
                LowRankSum(weight, own)
                for weight, *own in zip(self.weight.unbind(), *terms, strict=True)
            ]
        return self._items

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tuple(args), dict(kwargs or {})
        if func in METADATA and isinstance(args[0], LowRankSum):
            return func(args[0].weight, *args[1:], **kwargs)
        tree_map_only(LowRankSum, _mark, (args, kwargs))
        handler = HANDLERS.get(func)
        if handler is None and str(func) == FALLBACK:
            handler = partial(_grouped, func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.__name__
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            raise Refused(
                f"{name} on a parameter that an adapter changes",
                expected="a forward that only reads the parameter",
                where="parameters",
                hint="target modules instead of this parameter",
                code="AK801",
            )
        values: Any = tree_map_only(LowRankSum, LowRankSum.value, (args, kwargs))
        return func(*values[0], **values[1])

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)  # AttributeError for what tensors lack
        if callable(attribute):
            return partial(_call, attribute, self)
        return _call(attribute.__get__, self)

    def __iter__(self) -> Iterator["LowRankSum | Tensor"]:
        self.is_read = True
        return iter(self.items() if self.ndim > 2 else self.value().unbind())

    def __repr__(self) -> str:
        return f"LowRankSum({tuple(self.weight.shape)}, {len(self.terms)} terms)"


def _call(func: Callable, *args: object, **kwargs: object) -> Any:
    return LowRankSum.__torch_function__(func, (), args, kwargs)


def _mark(total: LowRankSum) -> LowRankSum:
    total.is_read = True
    return total


def _method(name: str) -> Callable:
    return lambda *args: _call(getattr(Tensor, name), *args)


for _name in (
    "getitem setitem len bool float int abs neg pos invert matmul rmatmul add radd sub rsub mul "
    "rmul truediv rtruediv floordiv mod pow rpow eq ne lt le gt ge and or xor contains"
).split():
    if hasattr(Tensor, f"__{_name}__"):
        setattr(LowRankSum, f"__{_name}__", _method(f"__{_name}__"))


def summed(
    weight: Tensor,  # (..., n, m)
    terms: Sequence[Term],
) -> Tensor:
    """weight + sum(scale * left @ right) in the weight's dtype, for 8-bit floats clamped to their
    range (as PEFT)."""
    with torch.autocast(weight.device.type, enabled=False):
        if weight.ndim == 3 and {t.dtype for term in terms for t in term[:2]} == {weight.dtype}:
            for left, right, scale in terms:
                weight = torch.baddbmm(weight, left, right, alpha=scale)
            return weight
        zero = torch.zeros((), device=weight.device)
        delta = sum((scale * (left @ right) for left, right, scale in terms), zero)
        if weight.itemsize > 1:
            return (weight + delta).to(weight.dtype)
        limits = torch.finfo(weight.dtype)
        return (weight.to(delta.dtype) + delta).clamp(limits.min, limits.max).to(weight.dtype)


# --- products -----------------------------------------------------------------------------------


def _plus(
    y: Tensor,  # (..., n, m), of a product just taken: changed
    total: LowRankSum,
    operands: Callable[[Term], tuple[Tensor, Tensor]],  # (..., n, r), (..., r, m)
) -> Tensor:
    """y + sum(scale * u @ v) over the terms, in fused operations if dtypes and axes allow."""
    for term in total.terms:
        u, v = operands(term)
        alike = y.dtype == u.dtype == v.dtype and y.ndim == u.ndim == v.ndim
        if alike and y.ndim == 2:
            y.addmm_(u, v, alpha=term.scale)
        elif alike and y.ndim == 3:
            y.baddbmm_(u, v, alpha=term.scale)
        else:
            y.add_(u @ v, alpha=term.scale)
    return y


def _linear(x: Value, weight: Value, bias: Tensor | None = None) -> Value:
    if not isinstance(weight, LowRankSum) or isinstance(x, LowRankSum) or weight.ndim != 2:
        return NotImplemented
    if isinstance(bias, LowRankSum):
        bias = bias.value()
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight.weight, bias)
    _plus(y, weight, lambda t: (rows.to(t.right.dtype) @ t.right.mT, t.left.mT))
    return y.view(*x.shape[:-1], y.shape[-1])


def _matmul(x: Value, y: Value) -> Value:
    if isinstance(y, LowRankSum) and not isinstance(x, LowRankSum):
        if y.ndim == 2:
            return _linear(x, y.transposed) if x.ndim else NotImplemented
        if x.ndim < 2:
            return NotImplemented
        return _plus(x @ y.weight, y, lambda t: (x.to(t.left.dtype) @ t.left, t.right))
    if isinstance(x, LowRankSum) and not isinstance(y, LowRankSum) and y.ndim > 1:
        return _plus(x.weight @ y, x, lambda t: (t.left, t.right @ y.to(t.right.dtype)))
    return NotImplemented


def _added_matmul(func: Callable, summand: Value, x: Value, y: Value, **options: float) -> Value:
    """addmm and baddbmm: summand + x @ y."""
    sums = [isinstance(value, LowRankSum) for value in (summand, x, y)]
    if options or sums != [False, False, True]:
        return NotImplemented
    product = func(summand, x, y.weight)
    return _plus(product, y, lambda t: (x.to(t.left.dtype) @ t.left, t.right))


def _grouped(
    func: Callable, x: Value, weight: Value, offs: Tensor | None = None, **options: object
) -> Value:
    """Products of the rows of x (S, n), sorted by group and ending at `offs`, with the groups'
    matrices (E, n, m)."""
    if not isinstance(weight, LowRankSum) or isinstance(x, LowRankSum):
        return NotImplemented
    if offs is None or x.ndim != 2 or weight.ndim != 3 or set(options.values()) - {None}:
        return NotImplemented
    y = func(x, weight.weight, offs=offs)
    # as products that autocast knows; CUDA's fast ones are of 16 bits, others loop over the experts
    is_narrow = torch.is_autocast_enabled(x.device.type) or (x.is_cuda and str(func) != FALLBACK)
    for left, right, scale in weight.terms:
        # not narrower than the weight: narrower rows may not be aligned
        dtype = weight.dtype if is_narrow else torch.promote_types(left.dtype, weight.dtype)
        padding = -left.shape[-1] % (ALIGNMENT // dtype.itemsize)
        left = F.pad(left.to(dtype), (0, padding))
        right = F.pad(right.to(dtype), (0, 0, 0, padding))
        h = func(x.to(dtype), left, offs=offs)
        y.add_(func(h, right, offs=offs), alpha=scale)
    return y


# --- sums again ---------------------------------------------------------------------------------


def _transpose(total: Value, *axes: int) -> Value:
    ndim = total.ndim
    last = {ndim - 2, ndim - 1}
    return total.transposed if {axis % ndim for axis in axes} == last else NotImplemented


def _permute(total: Value, *axes: Any) -> Value:
    axes = axes[0] if len(axes) == 1 else axes
    kept = tuple(range(total.ndim - 2))
    last = (total.ndim - 1, total.ndim - 2)
    return (
        total.transposed if tuple(a % total.ndim for a in axes) == kept + last else NotImplemented
    )


def _matrix(total: Value) -> Value:
    """.T and .t(), of matrices."""
    return total.transposed if total.ndim == 2 else NotImplemented


def _view(func: Callable, total: Value, *shape: object) -> Value:
    """(E * n, m) as (E, n, m): experts stacked in the rows of a matrix."""
    weight = func(total.weight, *shape)
    if total.ndim != 2 or weight.ndim != 3 or weight.shape[-1] != total.shape[-1]:
        return NotImplemented
    experts, rows, _ = weight.shape
    return LowRankSum(
        weight,
        [
            Term(t.left.reshape(experts, rows, -1), t.right.expand(experts, -1, -1), t.scale)
            for t in total.terms
        ],
    )


def _cast(func: Callable, total: Value, *args: object, **kwargs: object) -> Value:
    """Another dtype, device or memory order of the weight: the factors keep their dtype."""
    weight = func(total.weight, *args, **kwargs)
    if not isinstance(weight, Tensor):
        return weight  # .type()
    if not weight.is_floating_point():
        return NotImplemented
    device = weight.device
    terms = [Term(t.left.to(device), t.right.to(device), t.scale) for t in total.terms]
    return LowRankSum(weight, terms)


def _item(total: Value, index: object) -> Value:
    """One expert by its number, or several; for a matrix, several rows."""
    if not isinstance(total, LowRankSum) or not isinstance(index, int | slice | Tensor):
        return NotImplemented
    if isinstance(index, bool) or (isinstance(index, Tensor) and index.dtype == torch.bool):
        return NotImplemented
    if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
        return total.items()[int(index)] if total.ndim == 3 else NotImplemented
    return LowRankSum(
        total.weight[index],
        [
            Term(t.left[index], t.right[index] if total.ndim == 3 else t.right, t.scale)
            for t in total.terms
        ],
    )


HANDLERS: dict[Callable, Callable] = {}


def _functions(names: str) -> Iterator[Callable]:
    """Functions of torch, and methods and getters of tensors."""
    for name in names.split():
        method = getattr(Tensor, name)
        for func in (getattr(torch, name, None), method if callable(method) else method.__get__):
            if callable(func):  # torch.half is a dtype
                yield func


def _register(handler: Callable, names: str, *, passes: bool = False) -> None:
    """Register the handler of functions; `passes`: it receives the function itself first."""
    for func in _functions(names):
        HANDLERS[func] = partial(handler, func) if passes else handler


HANDLERS[F.linear] = _linear
_register(_matmul, "mm bmm matmul __matmul__")
_register(lambda y, x: _matmul(x, y), "__rmatmul__")
_register(_added_matmul, "addmm baddbmm", passes=True)
if grouped_mm := getattr(torch, "_grouped_mm", None):
    HANDLERS[grouped_mm] = partial(_grouped, grouped_mm)
_register(_transpose, "transpose swapaxes swapdims")
_register(_permute, "permute")
_register(lambda total: total.transposed, "mT")
_register(_matrix, "T t")
_register(_view, "view reshape", passes=True)
_register(
    _cast, "to type type_as float half bfloat16 double cpu cuda contiguous clone", passes=True
)
_register(_item, "__getitem__")
# attributes that the sum shares with its weight
METADATA = frozenset(
    _functions(
        "shape dtype device ndim layout itemsize nbytes is_cuda is_cpu is_meta is_quantized "
        "is_sparse is_nested size dim numel nelement element_size stride is_contiguous "
        "is_floating_point is_complex get_device __len__"
    )
)
