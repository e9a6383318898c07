"""Read the receipt next to a base for adapters that were merged into it before."""

from collections.abc import Sequence
from os.path import realpath
from typing import NamedTuple

from adapterkit.core.adapter.keys import WEIGHTS
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, original
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import WARNING, shown
from adapterkit.core.receipt import RECEIPT_CHECK, find_receipt
from adapterkit.core.records import FINITE, TEXT, Json, entries


class MergedAdapter(NamedTuple):
    """An adapter merged into a base; receipts have these fields."""

    name: str
    weight: float
    header: str  # sha256 of its file's header
    sha256: str  # of its file


MERGED = entries({"name": TEXT, "weight": FINITE, "header": TEXT, "sha256": TEXT})


def merged_adapters(base: Folder) -> list[MergedAdapter]:
    """The adapters that were merged into a base, by the last merge and by those before it.

    Empty if there is no receipt, or it is of another verb or version, or has no hashes."""
    receipt = _receipt_of(base)
    try:
        recipe, sums = receipt["recipe"], receipt["inputs"]
        if recipe["verb"] != "merge":
            return []
        rows = zip(recipe["inputs"][1:], receipt["adapters"], strict=True)
        last = [
            MergedAdapter(
                str(entry["name"]),
                float(adapter["weight"]),
                entry["files"][WEIGHTS]["header"],
                sums[f"{number} {entry['name']}"][WEIGHTS],
            )
            for number, (entry, adapter) in enumerate(rows, start=1)
        ]
        merged = [*(MergedAdapter(**entry) for entry in receipt.get("held", [])), *last]
        return merged if all(MERGED.fits(one._asdict()) for one in merged) else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _receipt_of(base: Folder) -> Json:
    found = find_receipt(base)
    if found is None:
        return {}
    receipt = read_json(*found)
    return receipt if RECEIPT_CHECK.fits(receipt) else {}


def same_merges(merged: Sequence[MergedAdapter], adapter: Adapter) -> list[MergedAdapter]:
    """The entries that are this adapter. Files are compared by sha256, which is computed only if
    the headers agree."""
    candidates = [one for one in merged if one.header == adapter.header_sha256]
    sha256 = _sha256(adapter.folder) if candidates else ""
    return [one for one in candidates if one.sha256 == sha256]


def merged_change(base: Folder, key: str) -> float:
    """The change of a stored tensor by the last merge, relative to its norm; 0 if the receipt has
    none."""
    receipt = _receipt_of(base)
    try:
        return float(receipt["parameters"][key]["delta"])
    except (KeyError, TypeError, ValueError):
        return 0.0


def history_notes(
    base: Folder,
    merged: Sequence[MergedAdapter],
    adapters: Sequence[Adapter],
    weights: Sequence[float],
) -> list[str]:
    """Notes on adapters that the base already contains and that are added again, on adapters
    subtracted from a base that does not contain them, and on copies."""
    notes = []
    options = _receipt_of(base).get("recipe", {}).get("options", {}) if merged else {}
    how = options.get("method", "linear")
    for adapter, weight in zip(adapters, weights, strict=True):
        present = sum(one.weight for one in same_merges(merged, adapter))
        if present * weight > 0:
            notes.append(
                f"{adapter.name} is in {base.name} already, with weight {present:g}, as its "
                "receipt says; it is added again"
            )
        elif present * weight < 0 and how != "linear":
            notes.append(
                f"{WARNING}{adapter.name} is subtracted from {base.name}, which was merged with "
                f"--method {how}: some of its change remains"
            )
        elif merged and weight < 0 and present == 0:
            names = ", ".join(dict.fromkeys(shown(one.name) for one in merged))
            notes.append(
                f"{adapter.name} is subtracted, but the receipt of {base.name} names {names} "
                "instead"
            )
    return notes + notes_on_copies(adapters)


def notes_on_copies(adapters: Sequence[Adapter]) -> list[str]:
    """Notes on adapters that are given several times: their weights add up."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for adapter in adapters:
        folder = original(adapter.folder)
        location = realpath(getattr(folder, "root", folder.label)), getattr(folder, "single", None)
        names.setdefault(location, []).append(adapter.name)
    return [
        f"{shown(own[0])} is given {len(own)} times: its weights add up"
        for own in names.values()
        if len(own) > 1
    ]


def _sha256(folder: Folder) -> str:
    """The sha256 of an adapter's weights; "" if they are remote and the Hub has no hash of them."""
    known = folder.hashes.get(WEIGHTS)
    if known or not isinstance(original(folder), LocalFolder):
        return known or ""
    return sha256_of_file(folder.path(WEIGHTS))
