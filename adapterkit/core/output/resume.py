"""Decide what `--resume` and `--overwrite` do: compare the journal and the files of an earlier run
with this job."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from adapterkit.core.errors import Damaged, Refused, listed
from adapterkit.core.output.journal import Entry
from adapterkit.core.output.stage import RECEIPT, Stage, parse_receipt, receipt_bytes
from adapterkit.core.records import Json


def state_of(stage: Stage, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
    """Return 'fresh', 'resume', 'publish' (only the final names are missing) or 'finished'.
    `Refused` if the output or an interrupted run is in the way, or another run is active."""
    output = stage.output
    if not resume:
        stage.lock.check()
    output.check_kind()
    entries = stage.journal()
    head, noted = entries[0] if entries else None, _publish_of(entries)
    if resume and head is not None:
        output.resume_from(head)
    there = output.receipt()
    published = parse_receipt(there).get("fingerprint")
    is_its = _is_receipt(there, noted) or (head is None and published == fingerprint)
    # the caller refuses the output of another job, unless its history keeps that
    is_others = head is None and published not in (None, fingerprint)
    is_others = is_others and not (overwrite or output.has_history)
    if resume and (is_others or (is_its and _is_finished(stage, overwrite))):
        return "finished"
    complete = resume and _is_receipt(receipt_bytes(stage.path / RECEIPT), noted)
    stage.replaces = overwrite or bool(resume and head is not None and head.get("overwrite"))
    if not (complete and output.moves):  # otherwise the output is half moved
        output.check(replaces=stage.replaces)
    if head is not None and not resume and not overwrite:
        stage.lock.check()
        if stage.journal():  # otherwise a run has just finished
            raise Refused(
                "an earlier run to this --out was interrupted",
                expected="an output that no other run has begun",
                where=str(stage.out),
                hint="give --resume to continue it, or --overwrite to begin again",
                code="AK602",
            )
    if head is None or not resume:
        return "fresh"
    return "publish" if complete and head.get("fingerprint") == fingerprint else "resume"


def is_published(stage: Stage, recipe: Json) -> bool:
    """Return whether the output exists and is of this very job, with the same input files: its
    journal is still there."""
    entries = stage.journal()
    is_there = _is_receipt(stage.output.receipt(), _publish_of(entries))
    return is_there and entries[0].get("recipe") == recipe


def _publish_of(entries: list[Entry]) -> str | None:
    """Return the sha256 of the receipt of the complete stage; files may have been sent since."""
    found = [entry["publish"] for entry in entries if "publish" in entry]
    return found[-1] if found else None


def _is_receipt(data: bytes, sha256: str | None) -> bool:
    return bool(data) and hashlib.sha256(data).hexdigest() == sha256


def _is_finished(stage: Stage, overwrite: bool) -> bool:
    """Return whether the existing output has all of its files; `Damaged` if some are missing,
    unless it is to be made again."""
    receipt = parse_receipt(stage.output.receipt())
    lacks = lacking(receipt, stage.output.size_of) if receipt else []
    if lacks and not overwrite:
        raise Damaged(
            f"the finished output lacks files, or has them with other sizes: {listed(lacks)}",
            expected="all files of its receipt",
            where=str(stage.out),
            hint="put them back, or make it again with --overwrite",
            code="AK607",
        )
    return not lacks


def lacking(receipt: Mapping[str, Any], size_of: Callable[[str], int | None]) -> list[str]:
    """Return the files of a receipt that are missing or have another size."""
    return [
        name
        for name, entry in receipt["files"].items()
        if not isinstance(entry, dict) or size_of(name) != entry.get("size", -1)
    ]


def check_same_job(stage: Stage, recipe: Json) -> None:
    """Refuse to resume if the interrupted run had other inputs or options, or another version."""
    before = stage.journal()[0].get("recipe", {})
    if before != recipe:
        raise Refused(
            f"the interrupted run was of another job: {difference(before, recipe)} differs",
            expected="the same inputs, options and version",
            where=str(stage.out),
            hint="give the options of that run, or --overwrite to begin again",
            code="AK603",
        )


def check_same_way(stage: Stage, device: str) -> None:
    """Refuse while several processes write the output's files, or if the interrupted run was on
    another kind of device, which sums in another order."""
    head = stage.journal()[0]
    if head.get("ranks"):
        raise Refused(
            "the output is that of a plan file, whose workers write it",
            expected="a new or finished output folder",
            where=str(stage.out),
            hint="give --overwrite to begin again, or end it\nadapterkit finish PLAN",
            code="AK603",
        )
    before = head.get("device", "cpu")
    if before != device:
        raise Refused(
            f"the interrupted run was on another device: {before}",
            expected=f"that one, not {device}",
            where=str(stage.out),
            hint="resume on that device (--device), or give --overwrite to begin again",
            code="AK603",
        )


def difference(before: dict, now: dict, path: str = "") -> str:
    """Return the first place where two recipes differ, as a dotted path."""
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        here = f"{path}.{key}" if path else str(key)
        if isinstance(old, dict) and isinstance(new, dict):
            return difference(old, new, here)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            return difference(dict(enumerate(old)), dict(enumerate(new)), here)
        return here
    return "something"
