"""Read PEFT's other types than LoRA: as standard factors, token rows or trained values if they are
those in other words, else as factors of a given rank that are fitted to their deltas."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.formats.modules.deltas import Fit
from adapterkit.adapters.formats.modules.kinds import FACTORS, TOKENS, VALUE
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.modules.tensors import Expression, from_spec
from adapterkit.adapters.formats.peft.kinds import headers_of, replaced_values
from adapterkit.adapters.formats.planning.lossy import note_of, plain_config
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.kinds.common import UNUSED_SETTINGS, Delta, Kind, ProductDelta
from adapterkit.adapters.kinds.planning import ModuleOfKind, kind_of, read_deltas
from adapterkit.core.adapter.config import (
    INCOMPLETE,
    SHARED_SETTINGS,
    check_settings,
    check_unknown_settings,
)
from adapterkit.core.adapter.peft import read_other_type
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Problems, Refused
from adapterkit.core.lazy import Tensor
from adapterkit.core.records import NON_NEGATIVE_INT, Check, Json, Settings, list_of
from adapterkit.core.registry import members
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

if TYPE_CHECKING:
    from adapterkit.adapters.formats.planning.source import AdapterConversion

INDICES = {"token_indices": list_of(NON_NEGATIVE_INT, "a list of rows")}
# types without factors: the names of their tensors, and their settings
VALUES: Mapping[str, tuple[tuple[str, ...], dict[str, Check]]] = {
    "LN_TUNING": (("ln_tuning_layers.weight", "ln_tuning_layers.bias"), {}),
    "TRAINABLE_TOKENS": (("trainable_tokens_delta",), INDICES),
}


def is_exact(config: Settings) -> bool:
    """True for an adapter that is a standard LoRA in other words."""
    peft_type = str(config.get("peft_type"))
    return (
        peft_type in VALUES
        or exact_kind(config) is not None
        or (peft_type == "LORA" and any(map(config.get, INCOMPLETE)))
    )


def exact_kind(config: Settings) -> type[Kind] | None:
    """The adapter's type if its deltas are products of factors; None for LoRA and other types."""
    kind = members("kinds").get(str(config.get("peft_type")).lower())
    is_product = isinstance(kind, type) and ProductDelta in kind.__mro__
    return kind if is_product else None


def needed_base(folder: Folder, config: Settings, base: Folder | None) -> Folder | None:
    """The base if the adapter's type depends on it. `Refused` if it is not given."""
    kind = exact_kind(config)
    if kind is None or not kind.needs_base:
        return None
    if base is None:
        text = command("adapterkit convert", folder.label, to="peft", base="BASE", out="plain")
        raise Refused(
            f"a {kind.name.upper()} adapter without its base: {kind.needs_base}",
            expected="standard factors",
            where=folder.label,
            hint=f"convert it with its base\n{text}",
            code="AK402",
        )
    return base


def read_other(conversion: "AdapterConversion") -> Contents:
    """The contents of an adapter of another type than LoRA. `Refused` for types that are not read,
    and without a rank for those that are no standard factors."""
    source, config = conversion.source, conversion.detection.config
    if (peft_type := str(config.get("peft_type"))) in VALUES:
        adapter, modules, plain = _values(source, peft_type)
        return _contents(conversion.detection.format, adapter, modules, plain, ())
    kind, rank = kind_of(source, config), conversion.options.rank
    assert kind is not None  # it is refused
    is_fitted = rank is not None or exact_kind(config) is None
    if is_fitted and rank is None:
        raise Refused(
            f"an adapter of type {kind.name.upper()}",
            expected="--rank N, for LoRA factors of it",
            where=source.label,
            hint="give --rank; the receipt has the error",
            code="AK402",
        )
    notes: list[str] = []
    errors = Problems()
    adapter, deltas = read_deltas(kind, source, conversion.base, notes, errors)
    errors.raise_all()
    modules = [_fitted(one, rank) if rank is not None else _exact(one) for one in deltas]
    if rank is not None:
        notes.append(note_of({kind.name.upper(): len(deltas)}, rank))
    plain = plain_config(adapter.config)
    return _contents(conversion.detection.format, adapter, modules, plain, notes)


def _contents(
    format: Format,
    adapter: Adapter,
    modules: list[AdapterModule],
    config: Json,
    notes: Iterable[str],
) -> Contents:
    """The contents of an adapter with these modules, next to its rows and trained values."""
    folder = adapter.folder
    return Contents(
        format.name,
        (folder,),
        (*modules, *replaced_values(adapter)),
        config=config,
        headers=headers_of(adapter, folder, 0),
        notes=(*notes,),
    )


def _fitted(one: ModuleOfKind, rank: int) -> AdapterModule:
    """Factors of at most that rank that are fitted to a delta, with scale 1."""
    most = min(rank, one.delta.rank, *one.delta.shape)
    fit = Fit(one.module, one.delta, one.trailing_shape, most)
    own = (fit.parts, float(fit.rank), fit.rank, one.embedding)
    return AdapterModule(LANGUAGE, one.module, FACTORS, *own)


def _exact(one: ModuleOfKind) -> AdapterModule:
    """The factors of a delta, in float32, or in float64 if the file is, with scale 1."""
    rank, tail = one.delta.rank, one.trailing_shape
    ones = (1,) * (len(tail) - 1)
    shapes = {"a": (rank, *tail), "b": (one.delta.shape[0], rank, *ones)}
    is_wide = any(spec.dtype == "F64" for spec in one.delta.reads)
    dtype = "F64" if is_wide else "F32"
    parts: dict[str, Expression] = {
        role: ProductFactor(shape=shape, dtype=dtype, delta=one.delta, role=role)
        for role, shape in shapes.items()
    }
    return AdapterModule(LANGUAGE, one.module, FACTORS, parts, float(rank), rank, one.embedding)


@dataclass(frozen=True, kw_only=True)
class ProductFactor(Expression):
    """One factor of a delta that is a product, in float64 until it is written."""

    delta: Delta
    role: str  # a or b

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.delta.reads

    @property
    def known_early(self) -> bool:
        return False

    def value(self, reader: TensorReader) -> Tensor:
        product = self.delta.value(reader)
        assert isinstance(product, Product)
        return (product.right if self.role == "a" else product.left).reshape(self.shape)


def _values(folder: Folder, peft_type: str) -> tuple[Adapter, list[AdapterModule], Json]:
    """An adapter of layer norms or of token rows, its modules, and the config of a LoRA without
    factors that has them."""
    names, settings = VALUES[peft_type]

    def check(config: dict, where: str) -> list[AdapterkitError]:
        errors = check_unknown_settings(config, UNUSED_SETTINGS | settings.keys(), where)
        return errors + check_settings(SHARED_SETTINGS | settings, config, where)

    adapter, roles = read_other_type(folder, 0, check, names)
    plain, modules = plain_config(adapter.config), list[AdapterModule]()
    for (name, _), parts in sorted(roles.items()):
        own = {key.rpartition(".")[2]: from_spec(spec) for key, spec in parts.items()}
        modules.append(AdapterModule(LANGUAGE, name, VALUE, own, 1.0, 1))
    changed = [module.name for module in modules]
    if peft_type == "LN_TUNING":
        plain["modules_to_save"] = sorted({*(plain.get("modules_to_save") or ()), *changed})
        return adapter, modules, plain
    plain["trainable_token_indices"] = {
        name: [*adapter.config["token_indices"]] for name in changed
    }
    rows = [
        replace(one, kind=TOKENS, parts={"rows": part})
        for one in modules
        for part in one.parts.values()
    ]
    return adapter, rows, plain
