"""The receipt, adapterkit.json: a record of the job, with hashes and measured metrics."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from adapterkit.core.checkpoint.folder import Folder, SingleFile
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.checkpoint.hub_ids import repositories
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, shown
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import RECEIPT, receipt_name_of
from adapterkit.core.plan import Plan
from adapterkit.core.records import (
    COUNT,
    FINITE,
    TABLE,
    TEXT,
    Json,
    entries,
    list_of,
    optional,
    problems,
    table_of,
    test,
)
from adapterkit.core.registry import load

RECEIPT_VERSION = 1
SEAL = b',\n  "seal": "'


def digest(recipe: dict) -> str:
    """Return the sha256 of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def fingerprint_of(recipe: dict) -> str:
    """Return the fingerprint of a job: the sha256 of its public recipe, as it is read again."""
    return digest(public_recipe(recipe))


def joined_metrics(shards: Iterable[ShardResult], parts: Collection[str] = ()) -> dict[str, dict]:
    """Return the metrics of all files by name, with the folder in front for files in `parts`.
    The metrics of a stack of experts are those of its factors and of the stored tensor with its
    name."""
    metrics: dict[str, dict] = {}
    for shard in shards:
        folder = shard.file.partition("/")[0]
        prefix = f"{folder}." if folder in parts else ""
        for name, metric in shard.metrics.items():
            metrics[prefix + name] = metrics.get(prefix + name, {}) | metric
    return metrics


def _all_metrics(plan: Plan, shards: Iterable[ShardResult]) -> dict[str, dict]:
    """Return the metrics of all files, and of the job that made their source."""
    metrics = joined_metrics(shards, plan.parts)
    for folder in plan.folders:
        for name, own in getattr(getattr(folder, "maker", None), "metrics", {}).items():
            metrics[name] = own | metrics.get(name, {})
    return metrics


def kept_shares(metrics: Mapping[str, dict]) -> dict[str, float]:
    """Return the share of each tensor's change that is in the written values. Compensated rounding
    is judged by the outputs, not by each element."""
    kept = {key: metric for key, metric in metrics.items() if "output_error" not in metric}
    return {key: metric["survived"] for key, metric in kept.items() if "survived" in metric}


@dataclass(frozen=True)
class Receipt:
    """The receipt of a finished job; `data` is the content of `adapterkit.json`, `out` the folder,
    the file or the Hub address of the output. Notebooks show its metrics."""

    out: Path | str
    data: Json = field(repr=False)
    finished_before: bool = False

    def _repr_html_(self) -> str:
        """Return the HTML that notebooks show."""
        return load("verbs.look.overview.page:receipt_frame")(self.data)


SHA256 = test("a sha256", lambda value: re.fullmatch("[0-9a-f]{64}", value))
# the fields of every receipt and their types; it has as many keys and parameters as tensors
RECEIPT_CHECK = entries(
    {
        "adapterkit": test(str(RECEIPT_VERSION), lambda value: value == RECEIPT_VERSION),
        "fingerprint": TEXT,
        "recipe": entries({"verb": TEXT, "options": TABLE, "inputs": list_of(TABLE)}),
        "inputs": table_of(TEXT, table_of(TEXT, SHA256)),
        "hash": TEXT,
        "files": table_of(TEXT, entries({"size": COUNT, "sha256": optional(SHA256)})),
        "keys": table_of(TEXT, TABLE),
        "totals": entries({"tensors": COUNT, "bytes_written": COUNT}),
        "parameters": TABLE,
        "warnings": list_of(TEXT),
        "notes": list_of(TEXT),
        "timings": entries({"seconds": FINITE}),
    }
)


def input_hashes(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the sha256 of the adapters' files, and of a model's if the Hub lists it: a base is not
    read again to be hashed."""
    hashes: dict[str, dict[str, str]] = {}
    for number, folder in enumerate(plan.folders):
        known = folder.hashes
        names = [name for where, name in plan.headers if where == number]
        sums = {
            name: known.get(name)
            or (sha256_of_file(folder.path(name)) if number not in plan.models else None)
            for name in names
        }
        hashes[f"{number} {folder.name}"] = {name: value for name, value in sums.items() if value}
    return hashes


def other_inputs(plan: Plan, receipt: Json) -> list[str]:
    """Return the input files of a plan whose sha256 differs from that in a receipt of the same job.
    They are read whole."""
    folders = {f"{number} {folder.name}": folder for number, folder in enumerate(plan.folders)}
    sha256 = lambda folder, file: folder.hashes.get(file) or sha256_of_file(folder.path(file))
    return [
        f"{name.partition(' ')[2]}/{file}"
        for name, files in receipt["inputs"].items()
        for file, before in files.items()
        if name not in folders or sha256(folders[name], file) != before
    ]


def public_recipe(recipe: dict) -> dict:
    """Return the recipe without sizes and times of input files, which only a resume uses."""
    inputs = []
    for entry in recipe["inputs"]:
        headers = {name: file.get("header") for name, file in entry["files"].items()}
        files = {name: {"header": sha} for name, sha in headers.items() if sha is not None}
        inputs.append(entry | {"files": files})
    return recipe | {"inputs": inputs}


def earlier_repositories(folders: Iterable[Folder]) -> list[str]:
    """Return the repositories that local inputs were made from, according to their receipts."""
    found: set[str] = set()
    for folder in folders:
        receipt = None if "repo" in folder.origin else find_receipt(folder)
        if receipt is not None:
            with suppress(AdapterkitError):  # an unreadable receipt is ignored
                found |= repositories(read_json(*receipt))
    return sorted(found)


def create_receipt(
    plan: Plan,
    recipe: dict,
    fingerprint: str,
    done: dict[str, ShardResult],
    sums: dict,
    inputs: dict,
    hash: str,
    seconds: float,
) -> Json:
    shards = [done[shard.file] for shard in plan.shards]
    size, placement = sum(shard.size for shard in shards), replace(plan.placement, temporary_disk=0)
    totals, device = replace(plan, placement=placement).totals(), placement.device
    for shard, result in zip(plan.shards, shards, strict=True):
        if result.tensors is not None:  # tensors that were not written had been counted as changed
            fewer, less = (
                len(shard.layout.tensors) - result.tensors,
                shard.layout.size - result.size,
            )
            totals["tensors"] -= fewer
            totals["tensors_changed"] -= fewer
            totals["bytes_changed"] -= less
    totals["bytes_written"] = size + sum(entry["size"] for entry in sums.values())
    return {
        "adapterkit": RECEIPT_VERSION,
        "fingerprint": fingerprint,
        "recipe": public_recipe(recipe),
        "inputs": inputs,
        "hash": hash,
        **({} if device == "cpu" else {"device": device}),
        "files": {s.file: {"size": s.size, "sha256": s.sha256} for s in shards} | sums,
        "keys": {s.file: s.marks for s in shards if s.marks is not None},
        "totals": totals,
        **plan.decided(),
        **({"repositories": earlier} if (earlier := earlier_repositories(plan.folders)) else {}),
        "parameters": (metrics := _all_metrics(plan, shards)),
        "warnings": [*plan.warnings, *plan.warn(metrics)],
        "notes": list(plan.notes),
        "timings": {
            "seconds": round(seconds, 3),
            "bytes_per_second": round(size / seconds) if seconds else None,
        },
    }


def seal_receipt(receipt: dict) -> bytes:
    """Return the receipt's file. Its last value is the sha256 of all bytes before it; it is among
    the timings, because it differs between two runs of one job."""
    text = json.dumps(receipt, indent=1, ensure_ascii=False).encode()
    return _sealed(text.removesuffix(b"\n }\n}"))


def _sealed(text: bytes) -> bytes:
    return text + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n }\n}\n'


def is_sealed(data: bytes) -> bool:
    """Return whether a receipt's bytes are those that were written."""
    return SEAL in data and data == _sealed(data.rpartition(SEAL)[0])


CHANGED = "bytes that are not those that were written"
AGAIN = "run the merge again"


def find_receipt(folder: Folder) -> tuple[Folder, str] | None:
    """Return the receipt of an output, in its folder or next to its one file; None if there is
    none."""
    if RECEIPT in folder.files():
        return folder, RECEIPT
    single = getattr(folder, "single", None)
    if single is None:
        return None
    around, name = cast(SingleFile, folder).containing_folder(), receipt_name_of(single)
    return (around, name) if name in around.files() else None


def read_receipt(folder: Folder) -> Json:
    """Return the receipt of an output."""
    found = find_receipt(folder)
    if found is None:
        raise Refused(
            f"no {RECEIPT}",
            expected="an output of adapterkit, finished",
            where=folder.label,
            hint="give the output of a command that has finished",
            code="AK608",
        )
    place, name = found
    receipt = read_json(place, name)
    if receipt.get("adapterkit") != RECEIPT_VERSION:
        raise Refused(
            f"a receipt of version {shown(receipt.get('adapterkit'))}",
            expected=f"version {RECEIPT_VERSION}",
            where=name,
            hint="verify with the adapterkit that wrote it",
            code="AK608",
        )
    if not is_sealed(place.read(name, 0, place.files()[name])):
        expected = "a receipt that fits the seal at its end"
        raise Damaged(CHANGED, expected=expected, where=name, hint=AGAIN, code="AK608")
    Problems(problems(RECEIPT_CHECK, receipt, name, hint=AGAIN, kind=Damaged)).raise_all()
    return receipt
