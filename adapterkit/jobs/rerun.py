"""rerun: an output made again from its receipt, and compared byte for byte."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit import records
from adapterkit.calls import command_of
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.hashes import sha256_of_file
from adapterkit.checkpoint.output.stage import RECEIPT
from adapterkit.errors import Damaged, Problems, Refused, listed, shown
from adapterkit.hub.ids import parse
from adapterkit.jobs.verbs import VERB
from adapterkit.options import Progress, flag_of, option_of
from adapterkit.plan import Plan
from adapterkit.planning.inputs.sources import open_source
from adapterkit.receipt import fingerprint_of, public_recipe, read_receipt
from adapterkit.records import Json
from adapterkit.verb import WritingVerb, fields_of
from adapterkit.verbs.rerun import Rerun

BY_HAND = "run its command again by hand; verify checks its files"


def rerun_output(rerun: Rerun) -> Json:
    """Make an output again and compare it."""
    folder = open_source(rerun.output)
    receipt = read_receipt(folder)
    place = Path(os.path.abspath(rerun.output)).parent if rerun.inputs is None else rerun.inputs
    if rerun.out is not None:
        return _run(rerun, folder, receipt, Path(place), Path(rerun.out))
    with tempfile.TemporaryDirectory(prefix="adapterkit-rerun-") as work:
        name = os.path.basename(os.path.normpath(rerun.output))
        return _run(rerun, folder, receipt, Path(place), Path(work) / name) | {"out": None}


def _run(rerun: Rerun, folder: Folder, receipt: Json, place: Path, out: Path) -> Json:
    verb = _verb_of(receipt, place, out, rerun.progress)
    plan = verb.plan()
    _check_same(receipt, plan)
    done: Any = verb.carry_out(plan)
    made = done.data["files"]
    before = {
        name: entry["sha256"] or sha256_of_file(folder.path(name))  # of --hash none
        for name, entry in receipt["files"].items()
    }
    differing = [name for name, sum in before.items() if made.get(name, {}).get("sha256") != sum]
    errors = Problems(where=str(out), kind=Damaged)
    if differing:
        version = receipt["recipe"].get("version")
        errors.add(
            f"{len(differing)} of {len(before)} files differ: {listed(differing)}",
            "the bytes of the receipt",
            f"the receipt is of adapterkit {shown(version)}, made on "
            f"{shown(receipt.get('device', 'a CPU'))}: run it there, or keep one with --out "
            "and compare: adapterkit diff",
        )
    errors.raise_all()
    return {"out": str(out), "files": len(made), "command": command_text(receipt)}


def command_text(receipt: Json) -> str:
    """The command that a receipt is of, with the names of its inputs."""
    return command_of(VERB.read(receipt["recipe"]["verb"]), receipt["call"], "OUT")


def _verb_of(receipt: Json, place: Path, out: Path, progress: Progress) -> WritingVerb:
    """The call of a receipt with the places of its inputs; `Refused` with all that are missing."""
    kind, call = VERB.read(receipt["recipe"]["verb"]), receipt.get("call")
    if not isinstance(call, dict):
        raise Refused(
            "the receipt does not say how its command was called",
            expected="a receipt of adapterkit 0.1 or later with a call",
            where=RECEIPT,
            hint=BY_HAND,
        )
    errors, arguments = Problems(where=str(place)), dict(call)
    commits = {
        entry["repo"]: entry["revision"]
        for entry in receipt["recipe"]["inputs"]
        if "repo" in entry and "revision" in entry
    }
    for field in fields_of(kind):
        if field.name in arguments and option_of(field).check.kind in ("source", "sources", "file"):
            arguments[field.name] = _found(arguments[field.name], place, commits, errors)
    errors.raise_all()
    more = {"out": str(out), "progress": progress}
    return records.read(kind, arguments | more, RECEIPT, hint=BY_HAND, name=flag_of)


def _found(value: Any, place: Path, commits: dict[str, str], errors: Problems) -> Any:
    """Names as the paths of what is there; ids of the Hub at their commits."""
    if isinstance(value, list):
        return [_found(one, place, commits, errors) for one in value]
    if not isinstance(value, str):
        return value
    path = place / value
    if path.exists():
        return str(path)
    hub_id = parse(value)
    if hub_id is not None:
        return str(replace(hub_id, revision=commits.get(hub_id.repo, hub_id.revision)))
    errors.add(
        f"there is no {shown(value)}",
        "the inputs of the receipt, by their names",
        "give --inputs DIR, where they are",
    )
    return value


def _check_same(receipt: Json, plan: Plan) -> None:
    """`Refused` where the plan is not that of the receipt, with what differs."""
    recipe = plan.recipe()
    if fingerprint_of(recipe) == receipt["fingerprint"]:
        return
    before, now = receipt["recipe"], public_recipe(recipe)
    errors = Problems(where=RECEIPT, hint="give the inputs and the version of the receipt")
    for key in ("version", "options", "layout"):
        if before.get(key) != now[key]:
            errors.add(f"{key} {shown(now[key])}", shown(before.get(key)))
    for one, other in zip(before["inputs"], now["inputs"], strict=False):
        if one != other:
            names = {*one.get("files", {})} | {*other["files"]}
            same = lambda name, a=one, b=other: a.get("files", {}).get(name) == b["files"].get(name)
            files = sorted(name for name in names if not same(name))
            errors.add(
                f"another {shown(other['name'])}: {listed(files)}", "the input of the receipt"
            )
    errors.raise_all()
