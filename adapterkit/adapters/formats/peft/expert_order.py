"""The order in which the columns of a stack's b count experts and ranks.

PEFT counts the expert fastest. Unsloth counted it slowest until 2026-09-17. Only its later configs
name the order, and both readings have the same shapes and norms.
"""

import json
from collections.abc import Mapping

from adapterkit.core.adapter.config import FASTEST, ORDER, ORDER_DETAIL, ORDERS, SLOWEST
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.records import Json, Settings

CARD, MOST = "README.md", 1 << 20
# of option --expert-layout
GIVEN = {"unsloth": {ORDER: SLOWEST}} | {
    f"peft-{one}": {ORDER: FASTEST, "peft_version": f"{one}.0"} for one in ("0.18", "0.19")
}


def _said(config: Settings) -> dict[str, object]:
    """The words of a config, or of the copy in its auto_mapping, by parameter; "" for all."""
    for table in (config, config.get("auto_mapping")):
        if not isinstance(table, Mapping):
            continue
        said = {"": table[ORDER]} if table.get(ORDER) is not None else {}
        detail = table.get(ORDER_DETAIL)
        words = detail.get("parameters") if isinstance(detail, Mapping) else detail
        if isinstance(words, Mapping):
            for name, one in words.items():
                order = one.get(ORDER) if isinstance(one, Mapping) else one
                said[str(name).rpartition(".")[2]] = order
        elif words is not None:
            said[ORDER_DETAIL] = words
        if said:
            return said
    return {}


def unknown_orders(config: Settings, where: str) -> list[AdapterkitError]:
    """Refuse every word that names no order; Unsloth writes `mixed` if the stacks of a parameter
    differ."""
    errors = Problems(where=where, code="AK301")
    for name, order in _said(config).items():
        if order not in ORDERS:
            owner = f" of {shown(name)}" if name else ""
            errors.add(
                f"{ORDER}{owner} is {shown(repr(order))}",
                f"{FASTEST}, as PEFT has it, or {SLOWEST}",
                f"load and save it with a newer Unsloth, which then writes {FASTEST}",
            )
    return errors


def order_of(config: Settings, leaf: str | None = None) -> str | None:
    """The order in the stack of a parameter `leaf`, else the order of any stack not in PEFT's; None
    if the config has none."""
    said = _said(config)
    known = list(said.values())
    if leaf is not None and said:  # one that is not named is PEFT's, as for Unsloth
        known = [said.get(leaf, said.get(""))]
    return next((order for order in ORDERS if order in known), None)


def with_given(config: Settings, layout: str | None) -> Settings:
    """A config with the order from --expert-layout, if it names none."""
    return config if layout is None or order_of(config) else {**config, **GIVEN[layout]}


def in_order_of_peft(config: Settings, folder: Folder | None = None) -> Json:
    """A config of stacks in PEFT's order. It names the order only if its readers would need it,
    because PEFT warns about unknown settings."""
    without = lambda table: {k: v for k, v in table.items() if k not in (ORDER, ORDER_DETAIL)}
    plain, mapping = without(config), config.get("auto_mapping")
    if isinstance(mapping, Mapping):
        plain["auto_mapping"] = without(mapping)
    is_asked = plain.get("target_parameters") and is_of_unsloth(plain, folder)
    return plain | ({ORDER: FASTEST} if is_asked else {})


def order_problem(adapter: Adapter) -> Refused | None:
    """The reason why a file's stacks cannot be read in PEFT's order, or None."""
    order, folder = order_of(adapter.config), adapter.folder
    if order == FASTEST or not any(map(adapter.is_stack, adapter.loras)):
        return None
    if order is None and not is_of_unsloth(adapter.config, folder):
        return None
    options = {"to": "peft", "expert_layout": "unsloth", "out": "for-peft"}
    return Refused(
        f"stacks of experts by Unsloth, {ORDER} {order or 'unset'}: until 2026-09-17 their b had "
        "another order",
        expected=f"{ORDER} {FASTEST}, as PEFT has it, or {SLOWEST}",
        where=adapter.where,
        hint="give --expert-layout unsloth for one trained until then and --expert-layout "
        "peft-0.19 for a later one, or convert it first, with peft-0.19 for a later one\n"
        + command("adapterkit convert", folder.label, **options),
        code="AK402",
    )


def is_of_unsloth(config: Settings, folder: Folder | None) -> bool:
    """True if an adapter's config or card names Unsloth; a card by adapterkit names files."""
    size = min(folder.files().get(CARD, 0), MOST) if folder is not None else 0
    card = folder.read(CARD, 0, size) if folder is not None and size else b""
    text = json.dumps(config, default=str).encode() + card * (b"adapterkit" not in card)
    return b"unsloth" in text.lower()
