"""The mark of a base that a job changes for an adapter, and of this adapter: a name of the change,
because the values of the changed base are unknown before the job runs.

The base has it in its files' metadata, the adapter in the setting `revision`: PEFT keeps this one,
but drops a header's metadata and the settings that it does not know."""

import hashlib
import json
from collections.abc import Sequence

from adapterkit.core.adapter.config import CHANGED
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.fingerprint import fingerprint, of_headers
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, shown
from adapterkit.core.plan import OutputFile
from adapterkit.core.records import Json

CHANGED_BY = "adapterkit_changed_by"  # key of the metadata


def change_by(verb: str, inputs: Sequence[Checkpoint | None], options: Json) -> str:
    """Return the name of a job's change, VERB and a hash of the inputs and options."""
    sources = [(fingerprint(one), one.folder.origin.get("revision")) for one in inputs if one]
    return f"{verb}-{hashlib.sha256(json.dumps([sources, options]).encode()).hexdigest()[:16]}"


def planned_fingerprint(shards: Sequence[OutputFile]) -> str | None:
    """The fingerprint, without values, of a base of these files; None if a tensor's shape depends
    on the values."""
    if any(shard.variable_size for shard in shards):
        return None
    return of_headers(stored for shard in shards for stored in shard.layout.tensors)


def marked(settings: Json, base_settings: Json | None, change: str) -> dict[str, Json]:
    """Return an adapter's settings with the mark. They name no base, so that PEFT writes the path
    of the one on which it trains."""
    unnamed = {**(base_settings or {}), "base_model_name_or_path": None}
    return {"settings": settings | {"revision": CHANGED + change}, "base_settings": unnamed}


def changes_of(base: Checkpoint, key: str = CHANGED_BY) -> set[str]:
    """Return the names of the changes that made this base, or of those with another mark."""
    return {header.metadata.get(key, "") for header in base.shards.values()} - {""}


def unmarked(adapter: Adapter, changes: set[str] | None, base: str) -> Problems:
    """Return the problem of a base without the mark of the change that the adapter names."""
    errors, change = Problems(where=adapter.where, code="AK304"), adapter.base_change
    if change and change not in (changes or ()):
        errors.add(
            f"{adapter.name} was trained on a base changed by {change}, and {shown(base)} has no "
            "mark of that change",
            "the base that was written with the adapter",
            "give that base; if BASE is a copy of it that lost the mark, give --base-is-residual\n"
            "adapterkit merge BASE ADAPTER --base-is-residual --out merged",
        )
    return errors
