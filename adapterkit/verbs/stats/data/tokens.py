"""Find the tokens that a vector depends on, by following them through a model's operations and not
by guessing from sizes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What an element is of, as bits: tokens that count, tokens that are left out. 0: of no token, as a
# parameter, a position or an image; both: of several tokens, such as a mean over a text.
COUNTED, LEFT_OUT = 1, 2
BOTH = COUNTED | LEFT_OUT
ATTRIBUTE = "_adapterkit_tokens"  # of a storage: (who follows, `_Tags`)

# operations that move elements of the first operand, of all of a list of them
MOVES = {"index", "index_select", "gather", "take", "repeat", "roll", "flip",
         "repeat_interleave", "cat", "stack"}  # fmt: skip
# operations that write into the first operand -> the source's position, and how it is written
WRITES = {"index_put": 2, "scatter": 3, "scatter_add": 3, "scatter_reduce": 3, "index_copy": 3,
          "index_add": 3, "masked_scatter": 2, "copy": 1, "slice_scatter": 1,
          "select_scatter": 1}  # fmt: skip
PLAIN_WRITES = {"scatter_add": "scatter", "scatter_reduce": "scatter", "index_add": "index_copy"}
# products -> the position of the first factor
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1,
            "addmv": 1, "_grouped_mm": 0, "_scaled_mm": 0, "_int_mm": 0}  # fmt: skip
REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "var", "std", "prod", "logsumexp",
              "linalg_vector_norm", "norm", "var_mean", "std_mean", "sort", "topk",
              "nansum"}  # fmt: skip
VALUELESS = {
    "zero",
    "fill",
    "bernoulli",
    "uniform",
    "normal",
    "random",
    "exponential",
    "native_dropout_mask",
}


@cache
def _counted(device: torch.device) -> Tensor:
    """The value of storages whose tokens all count."""
    return torch.full((1,), COUNTED, dtype=torch.uint8, device=device)


class _Tags:
    """The tokens behind a storage's elements, as one value for each `run` of them. `is_whole`: all
    are tokens that count, so that most results are known without a look at the values."""

    def __init__(self, values: Tensor, run: int, itemsize: int, is_whole: bool = False):
        self.values, self.run, self.itemsize, self.is_whole = values, run, itemsize, is_whole

    @classmethod
    def of_storage(cls, x: Tensor) -> "_Tags":
        """Tags of a tensor's whole storage, with all tokens counting."""
        size = x.element_size()
        return cls(_counted(x.device), x.untyped_storage().nbytes() // size, size, True)

    def of(self, x: Tensor) -> Tensor:
        """The bits of a tensor's elements, uint8, in its shape."""
        ratio = x.element_size() / self.itemsize
        strides = [
            int(stride * ratio) if size > 1 else 0
            for size, stride in zip(x.shape, x.stride(), strict=True)
        ]
        start = int(x.storage_offset() * ratio)
        inner = [s for s in strides if s % self.run]
        reach = sum(
            (size - 1) * stride
            for size, stride in zip(x.shape, strides, strict=True)
            if stride % self.run
        )
        if inner and start % self.run + reach >= self.run:
            self.spread()
        strides = [0 if stride % self.run else stride // self.run for stride in strides]
        return self.values.as_strided(x.shape, strides, start // self.run)

    def spread(self) -> None:
        """Expand to a value for each element, which can be changed."""
        if self.run > 1 or self.is_whole:
            self.values = self.values.repeat_interleave(self.run)
            self.run, self.is_whole = 1, False


class TokenTracker(TorchDispatchMode):
    """Follow tokens inside the context.

    `mark` sets the tokens that count. From then on, a result belongs to the tokens of its operands:
    a moved element keeps its token, a sum of vectors belongs to all of theirs, a product with a
    weight belongs to the token of its row. For an unknown operation, each element of its result
    belongs to all tokens of its operands."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = False
        self.has_padded = False  # the model, something that is of tokens

    def mark(self, x: Tensor, mask: Tensor) -> None:
        """Assign the tokens of a mask (...) of flags to the vectors of x (..., *)."""
        bits = torch.where(mask.to(x.device), COUNTED, LEFT_OUT).to(torch.uint8)
        self._set(x, bits.view(*mask.shape, *(1,) * (x.dim() - mask.dim())).expand(x.shape))

    def found(self, x: Tensor) -> "_Tags | None":
        """The tags of a tensor's storage, if known."""
        owner, tags = getattr(x.untyped_storage(), ATTRIBUTE, (None, None))
        return tags if owner is self else None

    def of(self, x: Tensor) -> Tensor | None:
        """The bits of a tensor's elements; None if they belong to no token."""
        tags = self.found(x) if x.layout == torch.strided and not x.is_nested else None
        return None if tags is None else tags.of(x)

    def of_vectors(self, x: Tensor) -> Tensor | None:
        """The bits (...) of vectors x (..., in)."""
        bits = self.of(x)
        return None if bits is None else _any(bits, [-1], keep=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_paused:
            operands = _tensors((*args, *kwargs.values()))
            tags = [found for x in operands if _has_storage(x) and (found := self.found(x))]
            if tags and not self._stay_whole(func, args, operands, tags, result):
                with torch.inference_mode(False), torch.no_grad():
                    self._follow(func, args, kwargs, operands, result)
        return result

    def _stay_whole(
        self, func: Any, args: tuple, operands: list[Tensor], tags: list[_Tags], result: Any
    ) -> bool:
        """True if all tokens of the operands, and therefore of the results, count; the results are
        tagged."""
        if not all(one.is_whole for one in tags):
            return False
        sources = _deciding(func, args)
        if sources is None or any(self.found(x) is None for x in sources):
            return False
        for out in _tensors((result,)):
            if not _has_storage(out) or out.dtype == torch.bool or out.numel() < 2:
                continue
            storage = out.untyped_storage()
            if self.found(out) is not None:  # a view, or changed in place
                continue
            old = (x.untyped_storage()._cdata for x in operands if _has_storage(x))
            if storage._cdata in old:
                return False
            setattr(storage, ATTRIBUTE, (self, _Tags.of_storage(out)))
        return True

    def _follow(
        self, func: Any, args: tuple, kwargs: dict[str, Any], operands: list[Tensor], result: Any
    ) -> None:
        bits = {id(x): found for x in operands if (found := self.of(x)) is not None}
        if not bits:
            return
        places = {x.untyped_storage()._cdata for x in operands if _has_storage(x)}
        schema = getattr(func, "_schema", None)
        is_write = schema is not None and schema.is_mutable
        rule = _rule(func)
        if rule is _moved and _appends_ids(func, args, bits):
            rule = _appended
        self.has_padded |= rule in (_padded, _appended)
        for number, out in enumerate(tree_leaves(result)):
            if not isinstance(out, Tensor) or not _has_storage(out) or out.dtype == torch.bool:
                continue
            is_old = out.untyped_storage()._cdata in places
            if out.numel() < 2 or (is_old and not is_write):  # a view, or a number for the model
                continue
            found = rule(_Call(func, args, kwargs, operands, bits, number), out)
            if found is not None:
                self._write(out, found) if is_old else self._set(out, found)

    def _set(self, x: Tensor, bits: Tensor) -> None:
        """Tag a tensor that owns its storage."""
        order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
        dense = x.permute(order)
        storage = x.untyped_storage()
        if not dense.is_contiguous() or x.numel() * x.element_size() != storage.nbytes():
            return self._write(x, bits)
        moved, run = bits.to(x.device).permute(order), 1
        while moved.dim() and _is_constant(moved):
            run *= moved.shape[-1]
            moved = moved[..., 0]
        values = moved.clone(memory_format=torch.contiguous_format).view(-1)  # of its own
        is_whole = len(values) == 1 and bool(values == COUNTED)
        setattr(storage, ATTRIBUTE, (self, _Tags(values, run, x.element_size(), is_whole)))

    def _write(self, x: Tensor, bits: Tensor) -> None:
        """Tag a tensor that shares its storage; elements of no token change nothing."""
        storage, tags = x.untyped_storage(), self.found(x)
        if tags is None or tags.itemsize > x.element_size():  # as other elements than before
            count = storage.nbytes() // x.element_size()
            values = torch.zeros(count, dtype=torch.uint8, device=x.device)
            tags = _Tags(values, 1, x.element_size())
            setattr(storage, ATTRIBUTE, (self, tags))
        tags.spread()
        place = tags.of(x)
        bits = bits.to(place.device)  # bits of a copy from another device are on that device
        place.copy_(torch.where(bits == 0, place, bits))


class _Call:
    """An operation, and the bits of its operands."""

    def __init__(
        self,
        func: Any,
        args: tuple,
        kwargs: dict[str, Any],
        operands: list[Tensor],
        bits: dict[int, Tensor],
        number: int,
    ):
        self.func, self.args, self.kwargs, self.operands = func, args, kwargs, operands
        self._bits, self.number = bits, number  # of the output

    def bits(self, x: Any) -> Tensor | None:
        return self._bits.get(id(x))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name."""
        for place, one in enumerate(self.func._schema.arguments):
            if one.name == name:
                return (
                    self.args[place] if place < len(self.args) else self.kwargs.get(name, default)
                )
        return default

    def first(self) -> tuple[Tensor, Tensor]:
        """The first operand with tokens, and its bits."""
        x = next(x for x in self.operands if id(x) in self._bits)
        return x, self._bits[id(x)]


Rule = Callable[[_Call, Tensor], Tensor | None]
_RULES: dict[Any, Rule] = {}


def _rule(func: Any) -> Rule:
    """The rule for the bits of an operation's outputs."""
    if func not in _RULES:
        _RULES[func] = _find_rule(func)
    return _RULES[func]


def _deciding(func: Any, args: tuple) -> list[Tensor] | None:
    """The operands that must have tokens if the results are to have them, in addition to any
    operand; None if only the rule can decide."""
    rule = _rule(func)
    if rule in (_joined, _placed, _reduced):
        return []
    if rule is _moved:
        return _tensors(args[:1])
    if rule is _embedded:
        return [args[1]]
    place = PRODUCTS.get(func.overloadpacket.__name__) if rule is not _padded else None
    return None if place is None else [args[place]]


def _find_rule(func: Any) -> Rule:
    if not isinstance(func, torch._ops.OpOverload):
        return _placed
    name = func.overloadpacket.__name__
    name = name.removesuffix("_")
    if name in VALUELESS or name.endswith("_like") or name.startswith("new_"):
        return lambda call, out: None
    if name in WRITES:
        return lambda call, out: _written(call, out, name)
    if name == "constant_pad_nd":
        return _padded
    if name in MOVES:
        return _moved
    if name in PRODUCTS:
        return lambda call, out: _product(call, out, PRODUCTS[name])
    if name in REDUCTIONS:
        return _reduced
    if name == "embedding":
        return _embedded
    if name == "convolution":
        return _convolved
    if "attention" in name:
        return _attended
    return _joined if torch.Tag.pointwise in func.tags else _placed


def _joined(call: _Call, out: Tensor) -> Tensor:
    """The union of all operands, element by element."""
    parts = [call.bits(x) for x in call.operands]
    parts = [part.expand(out.shape) for part in parts if part is not None]
    for axis in range(out.dim()):
        if all(part.stride(axis) == 0 for part in parts):
            parts = [part.narrow(axis, 0, 1) for part in parts]
    result = parts[0]
    for part in parts[1:]:
        result = result | part
    return result.expand(out.shape)


def _moved(call: _Call, out: Tensor) -> Tensor | None:
    """The operation, applied to the bits."""
    source = call.args[0]
    sources = source if isinstance(source, (list, tuple)) else [source]
    if all(call.bits(x) is None for x in sources):
        return None
    moved = tree_map(lambda x: _or_none(call, x), source)
    return call.func(moved, *call.args[1:], **call.kwargs)


def _appended(call: _Call, out: Tensor) -> Tensor:
    """The bits after a concatenation of ids: ids that a model appends are left out, like
    padding."""
    left_out = partial(torch.full_like, fill_value=LEFT_OUT, dtype=torch.uint8)
    parts = [left_out(x) if (found := call.bits(x)) is None else found for x in call.args[0]]
    return call.func(parts, *call.args[1:], **call.kwargs)


def _appends_ids(func: Any, args: tuple, bits: Mapping[int, Tensor]) -> bool:
    """True if integers without tokens are appended to those of tokens."""
    if func.overloadpacket.__name__ != "cat":
        return False
    first, *others = args[0]
    is_state = first.is_floating_point() or first.is_complex()
    return not is_state and id(first) in bits and any(id(x) not in bits for x in others)


def _padded(call: _Call, out: Tensor) -> Tensor | None:
    """The bits after padding. Padding of token ids is left out. Vectors that fill a block are
    unknown, unlike features, or the past of a first token if as many are cut off."""
    bits = call.bits(call.args[0])
    if bits is None:
        return None
    is_state = out.is_floating_point() or out.is_complex()
    value = LEFT_OUT if not is_state else BOTH if out.shape[:-1] != bits.shape[:-1] else 0
    return call.func(bits, call.args[1], value)


def _or_none(call: _Call, x: Tensor) -> Tensor:
    bits = call.bits(x)
    return torch.zeros_like(x, dtype=torch.uint8) if bits is None else bits


def _written(call: _Call, out: Tensor, name: str) -> Tensor | None:
    """The bits after a write: those of the source; elements of no token keep the old ones."""
    target, place = call.args[0], WRITES[name]
    source = call.args[place] if len(call.args) > place else None
    if not isinstance(source, Tensor):  # a number, at positions that tokens select
        return _placed(call, out)
    own = call.bits(target)
    bits = call.bits(source)
    if bits is None:
        return own
    blank = torch.zeros(target.shape, dtype=torch.uint8, device=out.device)
    if name == "copy":
        written = bits.expand(target.shape)
    elif name == "index_put":
        indices = call.args[1]
        written = torch.ops.aten.index_put.default(blank, indices, bits)
    elif name == "masked_scatter":
        written = torch.where(call.args[1].expand(target.shape), _any(bits, None), blank)
    else:
        plain = getattr(torch, PLAIN_WRITES.get(name, name))
        arguments = call.args[1:place]
        arguments = (*arguments, bits) if place == 3 else (bits, *call.args[2:])
        written = plain(blank, *arguments)
    if own is None:
        return written
    return own | written if name in PLAIN_WRITES else torch.where(written == 0, own, written)


def _product(call: _Call, out: Tensor, place: int) -> Tensor | None:
    """The bits of a product: those of the first factor's row, or else of the second one's
    column."""
    a, b = call.args[place], call.args[place + 1]
    rows, columns = call.bits(a), call.bits(b)
    if rows is not None:
        # scores of two kinds of tokens: the row has those that are in all elements
        found = _every(rows) if columns is not None else _any(rows, [-1])
        return (found if out.dim() == a.dim() else found[..., 0]).expand(out.shape)
    if columns is None or b.dim() < 2:
        return None
    return _any(columns, [-2]).expand(out.shape)


def _attended(call: _Call, out: Tensor) -> Tensor | None:
    """The bits of an attention's output: those of its query."""
    query = call.args[0]
    bits = call.bits(query)
    fits = call.number == 0 and out.shape[:-1] == query.shape[:-1]
    return _any(bits, [-1]).expand(out.shape) if bits is not None and fits else None


def _reduced(call: _Call, out: Tensor) -> Tensor | None:
    x, bits = call.first()
    axes = call.argument("dim")
    if axes is None:
        return _placed(call, out)
    axes = [axis % x.dim() for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
    found = _any(bits, axes or None)
    if out.dim() < x.dim():
        found = _any(bits, axes, keep=False)
    return found.expand(out.shape)


def _embedded(call: _Call, out: Tensor) -> Tensor | None:
    bits = call.bits(call.args[1])
    return None if bits is None else bits[..., None].expand(out.shape)


def _convolved(call: _Call, out: Tensor) -> Tensor | None:
    """The bits along one axis, step by step: those of the token at which the kernel ends or is
    centered."""
    bits = call.bits(call.args[0])
    strides, is_transposed = call.argument("stride"), call.argument("transposed")
    if bits is None:
        return None
    if is_transposed or list(strides) != [1]:  # along several axes there are several
        return _placed(call, out)
    row = _any(bits, [1])  # (rows, 1, length)
    length, given = out.shape[-1], row.shape[-1]
    if length > given:  # causal, with what is beyond cut off afterwards
        row = torch.nn.functional.pad(row, (0, length - given))
    else:  # earlier padding has no token
        used = row.flatten(0, 1).any(0).nonzero()
        start = min(int(used[0]) if len(used) else 0, given - length)
        row = row[..., start : start + length]
    return row.expand(out.shape)


def _placed(call: _Call, out: Tensor) -> Tensor:
    """The bits of the first operand with tokens, by position, if the output has the same
    positions."""
    x, bits = call.first()
    if out.shape == x.shape:
        return bits
    if out.shape[:-1] == x.shape[:-1]:
        return _any(bits, [-1]).expand(out.shape)
    if out.shape == x.shape[:-1]:
        return _any(bits, [-1], keep=False)
    if out.shape[:-1] == x.shape:
        return bits[..., None].expand(out.shape)
    known = [found for each in call.operands if (found := call.bits(each)) is not None]
    total = _any(torch.stack([_any(found, None).view(()) for found in known]), None)
    return total.view((1,) * out.dim()).expand(out.shape)


def _any(bits: Tensor, axes: Sequence[int] | None, keep: bool = True) -> Tensor:
    """The union of the bits along axes; along all if None."""
    axes = range(bits.dim()) if axes is None else [axis % bits.dim() for axis in axes]
    for axis in sorted(axes, reverse=True):
        if bits.stride(axis) == 0 or bits.shape[axis] == 1:
            found = bits.narrow(axis, 0, 1)
        else:
            found = _either(bits, lambda flags, axis=axis: flags.any(axis, keepdim=True))
        bits = found if keep else found.squeeze(axis)
    return bits


def _every(bits: Tensor) -> Tensor:
    """The intersection of the bits of all elements with tokens along the last axis."""
    bits = torch.where(bits == 0, BOTH, bits)
    found = _either(bits, lambda flags: flags.all(-1, keepdim=True))
    return found * (bits != BOTH).any(-1, keepdim=True)


def _either(bits: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The reduction of each bit separately."""
    parts = [reduce((bits & bit).bool()).to(torch.uint8) * bit for bit in (COUNTED, LEFT_OUT)]
    return parts[0] | parts[1]


def _is_constant(bits: Tensor) -> bool:
    """True if there is only one value along the last axis."""
    if bits.shape[-1] < 2 or bits.stride(-1) == 0:
        return bits.shape[-1] > 0
    return bool((bits == bits[..., :1]).all())


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among values."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _has_storage(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested
