"""Mixed batches: each row of a batch with its own adapter, one pass of the model for all rows.

If the rows differ at a module, its site gets a router: `LinearRows` for linear layers, `run_groups`
for every other kind of patch. Otherwise it runs as with `activate`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Problems, Refused, by_reason, shown
from adapterkit.kernels import mixed_batch as mixed
from adapterkit.runtime.layers.parameter import is_stack, takes_indices
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.memo import ResultCache
from adapterkit.runtime.site import Args, Kwargs, Patch, Site
from adapterkit.runtime.state import State
from adapterkit.verbs.shared.targets import model_type

# The arguments of a model, or of its generate, whose first axis is the batch, in this order.
INPUTS = (
    "inputs input_ids inputs_embeds decoder_input_ids decoder_inputs_embeds pixel_values "
    "input_features input_values"
).split()
UNBATCHED = ("cache_position", "position_ids")  # whose first axis may be another
REGROUPED = re.compile(r"(^|\.)experts?[._]\d+(\.|$)")  # one expert's modules get the tokens routed
TABLES = re.compile(r"(^|\.)relative_attention_bias$")  # looked up by distance, not by row
SEQUENCE_FIRST = ("xlnet",)  # model types whose hidden states are (tokens, rows, ...)


@contextmanager
def rows(state: State, names: Iterable[str | None]) -> Iterator[None]:
    """Run row i of each batch with the adapter names[i], None: the base alone."""
    batch = Rows(state, _checked(state, names))
    batch.enter()
    try:
        yield
    finally:
        batch.leave()


@contextmanager
def without_rows(state: State) -> Iterator[None]:
    """Disable the routers of a mixed batch, if there is one, while the block runs."""
    batch = state.rows
    if batch is None:
        yield
        return
    batch.route(on=False)
    try:
        yield
    finally:
        batch.route(on=True)


class Rows:
    """A mixed batch: the adapter of each row, and the number of rows in the current call."""

    def __init__(self, state: State, names: tuple[str | None, ...]):
        self.state, self.names = state, names
        self.batch: int | None = None  # rows of the call in progress, once they are checked
        self.group: tuple[int, ...] = tuple(range(len(names)))  # the rows that run now
        self.kept = ResultCache()
        self.generating = self.on = False
        self.routes = {
            site: tuple(name if name in site.patches else None for name in names)
            for site in state.sites.values()
        }
        mixed_sites = [site for site, own in self.routes.items() if len(set(own)) > 1]
        _check_sites(state, mixed_sites)
        self.routers = {site: Router(self, site, self.routes[site]) for site in mixed_sites}

    @property
    def acting(self) -> Collection[str]:
        """The adapters that act in the next call of the model."""
        return {name for name in self.names if name is not None} if self.on else ()

    def enter(self) -> None:
        model = self.state.model
        axis = 0 if _batch_first(model) else 1
        self._generate = model.__dict__.get("generate")
        self._hooks = (
            model.register_forward_pre_hook(
                lambda module, args, kwargs: self._before(args, kwargs, axis), with_kwargs=True
            ),
            model.register_forward_hook(lambda *args: self._after(), always_call=True),
        )
        if callable(getattr(model, "generate", None)):
            # nn.Module types its attributes as Tensor or Module
            model.__dict__["generate"] = self._generator(model.generate)  # type: ignore[operator]
        self.state.rows = self
        self.route(on=True)

    def leave(self) -> None:
        model = self.state.model
        self.route(on=False)
        for site in self.routes:
            site.select(self.state.active)
        self.state.pad_encoders()
        self.state.rows = None
        for hook in self._hooks:
            hook.remove()
        if "generate" in model.__dict__:
            del model.__dict__["generate"]
        if self._generate is not None:
            model.__dict__["generate"] = self._generate

    def route(self, *, on: bool) -> None:
        """Set each site to run its rows' adapters, or the base."""
        self.on = on
        for site, names in self.routes.items():
            router = self.routers.get(site) if on else None
            uniform = names[0] if on and router is None else None
            site.select({} if uniform is None else {uniform: 1.0})
            site.router = router
            if router is not None:
                site.keep_unfused()
        self.state.pad_encoders()

    def _generator(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object, **kwargs: object) -> Any:
            """The model's own generate, for as many rows as there are names."""
            if not self.on:
                return generate(*args, **kwargs)
            size = _batch_size(args, kwargs, 0)
            if size is not None:
                self._fits(size, multiples=False)
            before = self.generating, self.batch
            self.generating, self.batch = True, len(self.names)
            try:
                return generate(*args, **kwargs)
            finally:
                self.generating, self.batch = before

        return run

    def _before(self, args: Args, kwargs: Kwargs, axis: int) -> None:
        if not self.on:
            return
        self._not_training()
        size = _batch_size(args, kwargs, axis)
        if size is None:
            return
        self._fits(size, multiples=self.generating)
        self.batch = size

    def _after(self) -> None:
        self.batch = len(self.names) if self.generating else None

    def _fits(self, size: int, *, multiples: bool) -> None:
        count = len(self.names)
        if size != count and not (multiples and size and size % count == 0):
            raise Refused(
                f"{count} names for a batch of {size} rows",
                expected="one name for each row, None for the base",
                where="rows",
                hint="give as many names as the batch has rows; generate repeats them for beams",
                code="AK804",
            )

    def _not_training(self) -> None:
        if not torch.is_grad_enabled():
            return
        trained = [
            name
            for name in dict.fromkeys(self.names)
            if name in self.state.active and self.state.adapters[name].trainable
        ]
        if self.state.model.training or trained:
            raise Refused(
                "the model is in training mode"
                if self.state.model.training
                else f"{', '.join(map(shown, trained))} active and trainable, with gradients",
                expected="inference: rows have no gradients of their adapters",
                where="rows",
                hint="call model.eval() and use torch.no_grad(), or train with activate",
                code="AK804",
            )

    @contextmanager
    def narrowed(self, rows: Sequence[int], size: int) -> Iterator[None]:
        """Run only some of the rows: the group's, among a module's `size` inputs."""
        before, invocations = (self.group, self.batch), self.state.invocations
        if self.batch is not None:
            self.batch = self.batch // len(self.group) * len(rows)
        count, length = (0, 0) if invocations is None else invocations.shape
        repeat = count // len(self.group)
        self.group = tuple(self.group[row] for row in rows)
        # or tokens of rows one after another
        fits = size in (count, count * length)
        own = tuple(row * repeat + i for row in rows for i in range(repeat))
        try:
            with invocations.narrowed(own) if invocations and fits else nullcontext():
                yield
        finally:
            self.group, self.batch = before

    def check(self, site: Site, x: Tensor, axis: int) -> None:
        """`Refused` if a module's input is not the batch's rows, in their order."""
        size, batch = x.shape[axis], self.batch or len(self.group)
        # (rows * tokens, hidden), as routers of experts get it, or (rows * windows, tokens, hidden)
        flat = self.batch is not None and size and size % batch == 0 and axis == 0
        sequence_first = x.ndim > 2 and x.shape[1] == batch
        table = isinstance(site.host, nn.Embedding)
        if (size != batch and (not flat or sequence_first or table)) or (table and x.ndim < 2):
            raise Refused(
                f"input {tuple(x.shape)} of {shown(site.path)} in a batch of {batch} rows",
                expected=f"{batch} rows on axis {axis}",
                where="rows",
                hint="exclude this module from the adapters, or run them one at a time",
                code="AK804",
            )


class Router:
    """Runs a site for the rows of a mixed batch."""

    def __init__(self, batch: Rows, site: Site, names: tuple[str | None, ...]):
        self.batch, self.names = batch, names
        self.axis = _axis(batch.state, site.path)
        self._linear: LinearRows | None = None
        self._is_linear: bool | None = None

    def __call__(self, site: Site, args: Args, kwargs: Kwargs) -> Any:
        if self._is_linear is None:
            self._linear = linear_rows(site, self.names, self.batch.kept)
            self._is_linear = self._linear is not None
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(site.host, nn.Embedding) and x.ndim == 2 and x.shape[0] == 1:
            # positions that all rows share
            x = x.expand(self.batch.batch or len(self.batch.group), -1)
            args = (x, *args[1:])
        self.batch.check(site, x, self.axis)
        if self._linear is None or len(self.batch.group) < len(self.names):
            names = tuple(self.names[row] for row in self.batch.group)
            return run_groups(site, names, self.axis, args, kwargs, self.batch)
        y = site.base(*args, **kwargs)
        if self.axis == 0:
            return self._linear(y, x)
        return self._linear(y.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1)


def _checked(state: State, names: Iterable[str | None]) -> tuple[str | None, ...]:
    """The names of the rows; `Refused` unless they are a list, and if rows are not possible now."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise Refused(
            f"names {names!r}",
            expected="a list: one name for each row, or None",
            where="rows",
            code="AK804",
        )
    table = tuple(names)
    errors = Problems(where="rows", code="AK804")
    if not table:
        errors.add("no names", "one name for each row")
    if state.rows is not None:
        errors.add("rows inside rows", "one mixed batch at a time", "leave the other one first")
    errors.raise_all()
    state.own_weights("rows")
    adapters = [name for name in dict.fromkeys(table) if name is not None]
    state.provide(adapters, with_active=True)
    sites = {id(site): site for name in adapters for site in state.adapters[name].sites.values()}
    Problems(state.guard.hosts.problems(sites.values(), "rows")).raise_all()
    return table


def _check_sites(state: State, sites: Iterable[Site]) -> None:
    """`Refused` for modules whose inputs are not the batch's rows in their order."""
    errors = Problems(
        where="rows", hint="run these adapters one at a time with activate", code="AK804"
    )
    text = _text_paths(state)
    reasons = by_reason((site.path, _refusal_reason(state, site, text)) for site in sites)
    for reason, paths in reasons.items():
        problem = f"modules that {reason}: {', '.join(map(shown, paths))}"
        errors.add(problem, "modules that each row passes")
    errors.raise_all()


def _refusal_reason(state: State, site: Site, text: list[str]) -> str | None:
    """The reason why a module's inputs are not the batch's rows; `text`: of `_text_paths`."""
    stacks = [p for patches in site.patches.values() for p in patches.values() if is_stack(p)]
    if REGROUPED.search(site.path) or (stacks and not takes_indices(site.host)):
        return "get the tokens that are routed to them, not the batch's rows"
    if TABLES.search(site.path):
        return "are looked up by distance, not by row"
    if model_type(state.model) in SEQUENCE_FIRST:
        return "have their rows on another axis"
    if not any(not root or f"{site.path}.".startswith(f"{root}.") for root in text):
        return "get images or sounds, of which a row may have none or several"
    return None


def _text_paths(state: State) -> list[str]:
    """The language model and its head in a model that puts images or sounds among the tokens; for
    another model the whole."""
    model, config = state.model, getattr(state.model, "config", None)
    kinds = (
        f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")
    )
    if config is None or not any(getattr(config, name, None) is not None for name in kinds):
        return [""]
    # nn.Module types its attributes as Tensor or Module
    inner = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]  # type: ignore[operator]
    names = {id(module): path for path, module in state.modules.items()}
    return [names[id(module)] for module in inner if module is not None and id(module) in names]


def _batch_size(args: Args, kwargs: Kwargs, axis: int) -> int | None:
    """Rows of the first tensor among a call's arguments."""
    named = [kwargs.get(name) for name in INPUTS]
    others = [value for key, value in kwargs.items() if key not in (*INPUTS, *UNBATCHED)]
    for value in (*args, *named, *others):
        if isinstance(value, Tensor) and value.ndim > axis:
            return value.shape[axis]
    return None


def _batch_first(module: nn.Module) -> bool:
    """False for torch's own transformers whose inputs are (tokens, rows, ...)."""
    inner = getattr(module, "self_attn", module)
    layers = getattr(module, "layers", None)
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder) and layers:
        inner = layers[0].self_attn
    if not isinstance(module, nn.Transformer) and not isinstance(inner, nn.MultiheadAttention):
        return True
    return bool(inner.batch_first)


def _axis(state: State, path: str) -> int:
    """The axis of the rows in a module's inputs."""
    while path:
        if not _batch_first(state.modules[path]):
            return 1
        path = path.rpartition(".")[0]
    return 0 if _batch_first(state.model) else 1


# nn.MultiheadAttention's arguments, in order
ATTENTION = (
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal".split()
)


def run_groups(
    site: Site, names: tuple[str | None, ...], axis: int, args: Args, kwargs: Kwargs, batch: Rows
) -> Any:
    """Run the site on the rows of one adapter at a time, and join the outputs."""
    if isinstance(site.host, nn.MultiheadAttention):
        args, kwargs = (), {**dict(zip(ATTENTION, args, strict=False)), **kwargs}
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        raise Refused(
            f"a cache of all rows for {shown(site.path)}, which runs for some of them at a time",
            expected="modules that read no cache",
            where="rows",
            hint="give use_cache=False, or run these adapters one at a time with activate",
            code="AK804",
        )
    x = args[0] if args else next(iter(kwargs.values()))
    size = x.shape[axis]
    repeat = size // len(names)
    groups, outputs = batch.kept(row_groups, names, repeat, x.device), []
    for name, (rows, index) in groups.items():
        own_args = [select(value, index, size, axis) for value in args]
        own_kwargs = {
            key: _argument(site.host, key, value, index, size, axis)
            for key, value in kwargs.items()
        }
        with batch.narrowed(rows, size):
            outputs.append(run_alone(site, name, own_args, own_kwargs))
    counts = [len(index) for _, index in groups.values()]
    order = partial(batch.kept, row_order, names, repeat, x.device)
    if isinstance(site.host, nn.MultiheadAttention):
        first, weights = zip(*outputs, strict=True)  # weights have the rows first
        return (
            join(first, counts, order, axis, site.path),
            join(weights, counts, order, 0, site.path),
        )
    return join(outputs, counts, order, axis, site.path)


def row_groups(
    names: Sequence[str | None], repeat: int, device: torch.device
) -> dict[str | None, tuple[tuple[int, ...], Tensor]]:
    """The rows of each adapter, and their indices among inputs with `repeat` per row."""
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    each = torch.arange(repeat, device="cpu")
    return {
        name: (
            tuple(own),
            (torch.tensor(own, device="cpu")[:, None] * repeat + each).flatten().to(device),
        )
        for name, own in rows.items()
    }


def row_order(
    names: Sequence[str | None], repeat: int, device: torch.device, tokens: int
) -> Tensor:
    """The position of each row in the concatenated groups, with `tokens` vectors per input."""
    groups = row_groups(names, repeat, torch.device("cpu")).values()
    order = torch.cat([index for _, index in groups]).argsort()
    return (order[:, None] * tokens + torch.arange(tokens, device="cpu")).flatten().to(device)


def _argument(host: nn.Module, key: str, value: object, index: Tensor, size: int, axis: int) -> Any:
    """The rows of an argument; an attention's masks have them first, 3-D ones for each head."""
    if isinstance(host, nn.MultiheadAttention) and key.endswith("_mask"):
        if key == "attn_mask" and isinstance(value, Tensor) and value.ndim == 3:
            return select(value.unflatten(0, (size, -1)), index, size, 0).flatten(0, 1)
        return value if key == "attn_mask" else select(value, index, size, 0)
    return select(value, index, size, axis)


def run_alone(site: Site, name: str | None, args: Args, kwargs: Kwargs) -> Any:
    """The site's output with one adapter, or with none."""
    router, site.router = site.router, None
    site.select({} if name is None else {name: 1.0})
    try:
        return site.forward(*args, **kwargs)
    finally:
        site.select({})
        site.router = router
        site.keep_unfused()


def select(value: object, index: Tensor, size: int, axis: int) -> Any:
    """The rows of every tensor with that many rows, also in lists and maps."""
    if isinstance(value, Tensor):
        if value.ndim <= axis or value.shape[axis] != size:
            return value
        return value.index_select(axis, index.to(value.device))
    if isinstance(value, tuple | list):
        return type(value)(select(item, index, size, axis) for item in value)
    if isinstance(value, dict):
        return {key: select(item, index, size, axis) for key, item in value.items()}
    return value


def join(
    outputs: Sequence[Any],
    counts: Sequence[int],  # inputs of each group
    order: Callable[[int], Tensor],  # as `row_order`, by the vectors for each input
    axis: int,
    path: str,
) -> Any:
    """Join the outputs of all groups: tensors row by row, also in tuples and maps."""
    first = outputs[0]
    if isinstance(first, Tensor):
        sizes = [output.shape[axis] if output.ndim > axis else 0 for output in outputs]
        # (rows * tokens, ...), as some routers of experts give (rows, tokens, ...) back
        tokens = max(sizes[0] // counts[0], 1) if axis == 0 else 1
        if sizes != [tokens * count for count in counts]:
            raise Refused(
                f"an output {tuple(first.shape)} of {shown(path)} that is not one for each row",
                expected="outputs whose rows are those of the batch",
                where="rows",
                hint="exclude this module from the adapters, or run them one at a time",
                code="AK804",
            )
        return torch.cat(list(outputs), axis).index_select(axis, order(tokens))
    if isinstance(first, tuple | list):
        joined = [join(items, counts, order, axis, path) for items in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if isinstance(first, dict):
        return type(first)(
            **{key: join([o[key] for o in outputs], counts, order, axis, path) for key in first}
        )
    return first


@dataclass(frozen=True)
class AdapterTerm:
    """One adapter at a linear layer: stretch·y + offset + scale·(x·aᵀ)·bᵀ."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    stretch: Tensor | None  # (out,)
    offset: Tensor | None  # (out,)


def share_of(site: Site, patches: Mapping[str, Patch]) -> AdapterTerm | None:
    """The term of an adapter whose only patch here is a linear layer's factors, else None."""
    patch = patches.get("delta")
    if len(patches) != 1 or not isinstance(patch, FactorsPatch) or not patch.mixes_rows:
        return None
    if patch.magnitude is None:
        a, b = patch.joined()
        scale = patch.stored_scale
        return AdapterTerm(a, b, scale, None, None if patch.bias is None else patch.bias * scale)
    stretch, a, b = patch.folded()
    bias = site.host._parameters.get("bias")
    assert stretch is not None
    return AdapterTerm(a, b, 1.0, stretch, None if bias is None else (1 - stretch) * bias)


class LinearRows:
    """The products of all rows at one linear layer; factors are stacked at the first call."""

    def __init__(
        self,
        shares: Sequence[AdapterTerm],
        index: mixed.Index,
        kept: ResultCache,
        *,
        in_place: bool,
    ):
        dtypes = [tensor.dtype for share in shares for tensor in (share.a, share.b)]
        self.dtype = dtypes[0]
        for dtype in dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.factors = [(s.a.to(self.dtype), s.b.to(self.dtype), s.scale) for s in shares]
        self.index, self.kept, self.in_place = index, kept, in_place
        ranks, scales = tuple(len(s.a) for s in shares), tuple(s.scale for s in shares)
        self._numbers, self._columns = (ranks, scales, index), sum(ranks)
        self.stretch = self._rows([s.stretch for s in shares], 1.0)
        self.offset = self._rows([s.offset for s in shares], 0.0)
        self._dense: tuple[mixed.JoinedFactors, Tensor] | None = None
        self._groups: mixed.Groups | None = None

    def _rows(self, values: Sequence[Tensor | None], default: float) -> Tensor | None:
        """(rows, 1, out), with the default for rows without a value; None if no row has one."""
        given = next((value for value in values if value is not None), None)
        if given is None:
            return None
        plain = torch.full_like(given, default)
        own = [plain if value is None else value for value in values]
        return torch.stack([own[i] if i >= 0 else plain for i in self.index])[:, None].to(
            self.dtype
        )

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        """y, the base's output, changed for each row; x: its input."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._add(y, x)
        return self._add(y, x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        rows = len(self.index)
        x = x.reshape(rows, -1, x.shape[-1])
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        owned = self.in_place and y.dtype == self.dtype and not y.requires_grad
        out = y if owned and y.is_contiguous() else y.to(self.dtype, copy=True).contiguous()
        total = out.view(rows, -1, y.shape[-1])
        if self.stretch is not None:
            total.mul_(self.stretch)
        if self.offset is not None:
            total.add_(self.offset)
        tokens = x.shape[1]
        if mixed.dense_is_better(rows, len(self.factors), tokens, self._columns, x.device):
            mixed.add_dense_(total, x, *self._with_mask())
        else:
            size = self.kept(mixed.group_size, self.index, tokens)
            mixed.add_grouped_(total, x, self._grouped(size))
        return out if out.dtype == y.dtype else out.to(y.dtype)

    def _with_mask(self) -> tuple[mixed.JoinedFactors, Tensor]:
        if self._dense is None:
            side = self._side()
            mask = self.kept(mixed.dense_mask, *self._numbers, self.dtype, side.a.device)
            self._dense = side, mask
        return self._dense

    def _grouped(self, size: int) -> mixed.Groups:
        if self._groups is None or self._groups.grouping.size != size:
            side = self._side()
            groups = self.kept(mixed.grouping, *self._numbers, size, self.dtype, side.a.device)
            with torch.inference_mode(False), torch.no_grad():
                self._groups = mixed.grouped_factors(side, groups)
        return self._groups

    def _side(self) -> mixed.JoinedFactors:
        if self._dense is not None:
            return self._dense[0]
        with torch.inference_mode(False), torch.no_grad():
            return mixed.join_factors(self.factors)


def linear_rows(site: Site, names: Sequence[str | None], kept: ResultCache) -> LinearRows | None:
    """All rows at once if each adapter has the factors of a linear layer here; else None."""
    adapters = [name for name in dict.fromkeys(names) if name is not None]
    index = tuple(-1 if name is None else adapters.index(name) for name in names)
    shares = []
    # not in inference mode, or no later call could record gradients of its input
    with torch.inference_mode(False), torch.no_grad():
        for name in adapters:
            share = share_of(site, site.patches[name])
            if share is None:
                return None
            shares.append(share)
        # the output of another class may be a view, or not writable (8-bit layers)
        return LinearRows(shares, index, kept, in_place=type(site.host) is nn.Linear)
