"""What is compared of two records of a job, and how."""

import hashlib
import json
import math
import re
from typing import Any

TOLERANCE = 2e-3  # relative, of measured numbers: receipts round some to four digits
CLOSE = 3e-4  # relative, of the summaries of weights
DIGITS = 12  # of a sha256
PROSE = ("warnings", "notes", "problems")  # lists of texts
SMALL = 1e-6  # absolute, beside it: sums that cancel


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs between two runs of one job: version, times, texts by their
    number."""
    record = json.loads(json.dumps(record))
    cards = record.get("cards", {})
    plan, receipt, result = (record.get(k) for k in ("plan", "receipt", "result"))
    for part in (plan, receipt):
        if part:
            recipe = part.get("recipe", part)
            recipe["version"] = len(recipe["version"].split("."))
            for key in ("bytes_written", "disk_needed"):
                part["totals"][key] -= sum(len(text.encode()) for text in cards.values())
    if plan and receipt:
        for source in plan["inputs"]:
            for file in source["files"].values():
                if "identity" in file:  # of what is converted its source's files have it
                    file["identity"] = sorted(file["identity"])
        receipt["fingerprint"] = len(receipt["fingerprint"])  # of the recipe, version and all
        receipt["timings"] = sorted(receipt["timings"])
        for name in cards:
            receipt["files"][name] = sorted(receipt["files"][name])
    for part in (plan, receipt, result):
        for key in PROSE:
            if part and key in part:
                part[key] = len(part[key])
    for verified in (result, record.get("returned", {}).get("verified")):
        if verified and set(verified) == {"files", "bytes", "hash", "rows", "tensors"}:
            del verified["bytes"]  # the model card's too
    record["cards"] = sorted(cards)
    return record


def texts(record: dict[str, Any]) -> dict[str, Any]:
    """The prose of a record: warnings, notes, problems and model cards."""
    parts = {name: record[name] for name in ("plan", "receipt", "result") if name in record}
    prose = {
        f"{n}.{k}": p[k]
        for n, p in parts.items()
        for k in ("warnings", "notes", "problems")
        if k in p
    }
    return prose | record.get("cards", {})


def golden(record: dict[str, Any], exact: bool) -> dict[str, Any]:
    """What is kept in golden.json of a record: nothing that depends on the machine, long lists of
    keys as one hash, hashes by their first digits.

    Unless a job is `exact`, the hashes of its weights, and what follows from them, are left to the
    summary.
    """
    record = _shortened(comparable(record))
    plan, receipt = record.get("plan"), record.get("receipt")
    if not plan or not receipt:
        return record
    for part in (plan, receipt):
        part["totals"].pop("memory_peak")  # of the cores that work
    files = [f for s in plan["inputs"] for f in s["files"].values()]
    identities = [file.pop("identity") for file in files if "identity" in file]
    for source in plan["inputs"]:  # what has no more is no file that the receipt names
        source["files"] = {name: file for name, file in source["files"].items() if file}
    if plan["inputs"] == receipt["recipe"]["inputs"]:
        plan["inputs"] = identities[:1]
    plan["computed"] = [len(plan["computed"]), *plan["computed"][:1], _digest(plan["computed"])]
    for file, marks in receipt["keys"].items():
        receipt["keys"][file] = [len(marks), _digest(marks if exact else list(marks))]
    if not exact:
        for file in record["summary"]:
            record["files"][file].pop()
            del receipt["files"][file]["sha256"]
    return record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGITS]


def _shortened(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the first digits of every sha256."""
    long = rf'"([0-9a-f]{{{DIGITS}}})[0-9a-f]{{{64 - DIGITS}}}"'
    return json.loads(re.sub(long, r'"\1"', json.dumps(record)))


def differences(
    old: Any, new: Any, *, tolerance: float = 0.0, small: float = 0.0, path: str = ""
) -> list[str]:
    """Where two JSON values differ, a line each: keys and their order, lengths, values; floats
    beyond the tolerances."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [f"{path}.{key}: is gone" for key in old if key not in new]
        lines += [f"{path}.{key}: is new" for key in new if key not in old]
        if not lines and list(old) != list(new):
            lines.append(f"{path}: keys in another order")
        pairs = [(f".{key}", old[key], new[key]) for key in old if key in new]
    elif isinstance(old, list) and isinstance(new, list):
        lines = [] if len(old) == len(new) else [f"{path}: {len(old)} items -> {len(new)}"]
        pairs = [(f"[{n}]", *pair) for n, pair in enumerate(zip(old, new, strict=False))]
    else:
        near = isinstance(old, float) and isinstance(new, float)
        same = type(old) is type(new) and old == new
        same = same or (near and math.isclose(old, new, rel_tol=tolerance, abs_tol=small))
        return [] if same else [f"{path}: {old!r} -> {new!r}"]
    for name, a, b in pairs:
        lines += differences(a, b, tolerance=tolerance, small=small, path=path + name)
    return lines
