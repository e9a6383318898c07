"""Read PEFT's types whose changes are standard factors, token rows or trained values in other
words, as such, without loss."""

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.adapters.formats.modules.deltas import ProductFactor
from adapterkit.adapters.formats.modules.kinds import FACTORS, TOKENS, VALUE
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.modules.tensors import Expression, from_spec
from adapterkit.adapters.formats.peft.kinds import headers_of, replaced_values
from adapterkit.adapters.formats.planning.lossy import plain_config
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.kinds.common import UNUSED_SETTINGS, Kind, ProductDelta
from adapterkit.adapters.kinds.planning import ModuleOfKind, read_deltas
from adapterkit.core.adapter.config import (
    INCOMPLETE,
    SHARED_SETTINGS,
    check_settings,
    check_unknown_settings,
)
from adapterkit.core.adapter.peft import read_other_type
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Problems
from adapterkit.core.records import NON_NEGATIVE_INT, Check, Settings, list_of
from adapterkit.core.registry import members

INDICES = {"token_indices": list_of(NON_NEGATIVE_INT, "a list of rows")}
# types without factors: the names of their tensors, and their settings
VALUES: Mapping[str, tuple[tuple[str, ...], dict[str, Check]]] = {
    "LN_TUNING": (("ln_tuning_layers.weight", "ln_tuning_layers.bias"), {}),
    "TRAINABLE_TOKENS": (("trainable_tokens_delta",), INDICES),
}


def is_exact(config: Settings) -> bool:
    """True for an adapter that is a standard LoRA in other words."""
    peft_type = config.get("peft_type")
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


def read_exact(
    format: Format, folder: Folder, kind: type[Kind], base: Checkpoint | None
) -> Contents:
    """An adapter of that type as LoRA factors of the rank of its deltas, with scale 1."""
    notes: list[str] = []
    errors = Problems()
    adapter, deltas = read_deltas(kind, folder, base, notes, errors)
    errors.raise_all()
    modules = [
        AdapterModule(
            LANGUAGE,
            one.module,
            FACTORS,
            {role: _factor(one, role) for role in "ab"},
            float(one.delta.rank),
            one.delta.rank,
        )
        for one in deltas
    ]
    return Contents(
        format.name,
        (folder,),
        (*modules, *replaced_values(adapter)),
        config=plain_config(adapter.config),
        headers=headers_of(adapter, folder, 0),
        notes=notes,
    )


def _factor(one: ModuleOfKind, role: str) -> Expression:
    """a (rank, *tail) or b (out, rank, *1) in float32, or in float64 if the file is."""
    rank, tail = one.delta.rank, one.trailing_shape
    ones = (1,) * (len(tail) - 1)
    shape = (rank, *tail) if role == "a" else (one.delta.shape[0], rank, *ones)
    is_wide = any(spec.dtype == "F64" for spec in one.delta.reads)
    dtype = "F64" if is_wide else "F32"
    return ProductFactor(shape=shape, dtype=dtype, delta=one.delta, role=role)


def read_values(format: Format, folder: Folder, peft_type: str) -> Contents:
    """An adapter of layer norms or of token rows, as a LoRA without factors."""
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
    else:
        rows = list(adapter.config["token_indices"])
        plain["trainable_token_indices"] = dict.fromkeys(changed, rows)
        modules = [
            replace(one, kind=TOKENS, parts={"rows": part})
            for one in modules
            for part in one.parts.values()
        ]
    return Contents(
        format.name,
        (folder,),
        (*modules, *replaced_values(adapter)),
        config=plain,
        headers=headers_of(adapter, folder, 0),
    )
