"""What the receipt beside a base says of the adapters in it."""

from collections.abc import Sequence
from typing import NamedTuple

from adapterkit.adapters.keys import WEIGHTS
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.hashes import sha256_of_file
from adapterkit.checkpoint.stage import RECEIPT
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import shown


class Held(NamedTuple):
    """An adapter in a base."""

    name: str
    weight: float
    header: str  # sha256 of its file's header
    sha256: str  # of its file


def held_by(base: Folder) -> list[Held]:
    """The adapters that were merged into a base, as the receipt beside it says: by its merge and by the merges before."""
    receipt = read_json(base, RECEIPT) if RECEIPT in base.files() else {}
    try:
        recipe, sums = receipt["recipe"], receipt["inputs"]
        if recipe["verb"] != "merge":
            return []
        rows = zip(recipe["inputs"][1:], recipe["options"]["weights"], strict=True)
        last = [
            Held(
                str(entry["name"]),
                float(weight),
                entry["files"][WEIGHTS]["header"],
                sums[f"{number} {entry['name']}"][WEIGHTS],
            )
            for number, (entry, weight) in enumerate(rows, start=1)
        ]
        return [*(Held(**one) for one in receipt.get("held", [])), *last]
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # another version's, or without hashes
        return []


def notes_on(
    base: Folder, held: Sequence[Held], adapters: Sequence[Adapter], weights: Sequence[float]
) -> list[str]:
    """Adapters that a base holds already and are added again, and such as it does not hold and are taken out.

    Files are compared by their sha256, and only those whose headers agree are read for it."""
    notes = []
    for adapter, weight in zip(adapters, weights, strict=True):
        alike = [one for one in held if one.header == adapter.header_sha256]
        sha = _sha256(adapter.folder) if alike else ""
        there = sum(one.weight for one in alike if one.sha256 == sha)
        if there * weight > 0:
            notes.append(
                f"{adapter.name} is in {base.name} already, with weight {there:g}, as its receipt says: it is added once more"
            )
        elif held and weight < 0 and there == 0:
            names = ", ".join(dict.fromkeys(shown(one.name) for one in held))
            notes.append(
                f"{adapter.name} is taken out, but the receipt of {base.name} holds {names} instead"
            )
    return notes


def _sha256(folder: Folder) -> str:
    """The hash of an adapter's weights, "" where they are not on this machine and the Hub does not tell."""
    known = folder.hashes.get(WEIGHTS)
    if known or not isinstance(folder, LocalFolder):
        return known or ""
    return sha256_of_file(folder.path(WEIGHTS))
