"""The model card of an adapter: its README.md."""

from collections.abc import Sequence

from adapterkit import __version__
from adapterkit.adapters.formats.engines import engines
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.hub_ids import portable_name
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.outputs.cards import HUB_ID, based_on, card, hub_id_or_name, plain


def adapter_card(
    base: str | None, adapters: Sequence[Adapter], summary: str, receipt: str = RECEIPT
) -> str:
    """The card of an adapter for the base of that id, made from these adapters; `receipt`: its
    path, "" for none."""
    id = portable_name(base or "")
    metadata = [*based_on([id], "adapter"), "library_name: peft"]
    how = " from the files" if receipt else ""
    body = [f"Made by adapterkit {__version__}{how}: {plain(summary)}.", ""]
    body += ["From:", ""] if adapters else []
    body += [f"- {plain(hub_id_or_name(adapter.folder))}" for adapter in adapters]
    line = f"The changes of each module, and the hash of every file, are in `{receipt}`."
    body += ["", line, ""] if receipt else []
    body += ["To load it, in place of `ADAPTER` its folder or id:", ""]
    id = id if HUB_ID.fullmatch(id) else "BASE"
    for client in (one for one in engines().values() if one.models == "language"):
        body += [f"{client.title}:", "```", client.loading("peft", "ADAPTER", id), "```"]
    return card(metadata, ["lora", "adapterkit"], "Adapter", body)
