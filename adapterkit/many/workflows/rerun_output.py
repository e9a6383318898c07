"""Make an output again from its receipt: the call in it, with its inputs found by name."""

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from adapterkit.core import records
from adapterkit.core.calls import NOT_IN_RECEIPTS, check_call, command_of
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.checkpoint.hub_ids import COMMIT, parse
from adapterkit.core.errors import Damaged, Problems, Refused, listed, shown
from adapterkit.core.inputs.sources import named_in_file, open_source
from adapterkit.core.options import StrPath, flag_of, option_of
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import fingerprint_of, other_inputs, public_recipe, read_receipt
from adapterkit.core.records import Json
from adapterkit.core.verb import WritingVerb, fields_of
from adapterkit.many.workflows.rerun import Rerun
from adapterkit.many.workflows.verbs import VERB

NAME_IT = "give --inputs PATH: a path that ends in its name, or the folder that contains it"
BY_HAND = "run its command again by hand; verify checks its files"
# of a receipt's inputs, the entries of the Hub
AT_COMMIT = records.entries({
    "repo": records.TEXT, "revision": records.test("a commit", lambda text: COMMIT.fullmatch(text))
})  # fmt: skip


def rerun_output(rerun: Rerun) -> Json:
    """Make an output again and compare it."""
    folder = open_source(rerun.output)
    receipt = read_receipt(folder)
    kind, call = call_in(receipt, folder.label)
    verb = partial(_verb_of, kind, call, _Inputs.of(rerun, receipt), rerun)
    if rerun.out is not None:
        return _run(verb(Path(rerun.out)), folder, receipt)
    with tempfile.TemporaryDirectory(prefix="adapterkit-rerun-") as work:
        name = os.path.basename(os.path.normpath(rerun.output))
        return _run(verb(Path(work) / name), folder, receipt) | {"out": None}


def _run(verb: WritingVerb, folder: Folder, receipt: Json) -> Json:
    plan = verb.plan()
    _check_same(receipt, plan)
    done: Any = verb.carry_out(plan)
    made, out = done.data["files"], str(verb.out)
    before = {
        name: entry["sha256"] or sha256_of_file(folder.path(name))  # of --hash none
        for name, entry in receipt["files"].items()
    }
    differing = [name for name, sum in before.items() if made.get(name, {}).get("sha256") != sum]
    errors = Problems(where=out, kind=Damaged, code="AK607")
    if differing:
        version = receipt["recipe"].get("version")
        errors.add(
            f"{len(differing)} of {len(before)} files differ: {listed(differing)}",
            "the bytes of the receipt",
            f"the receipt is of adapterkit {shown(version)}, made on "
            f"{shown(receipt.get('device', 'a CPU'))}: run it there, or keep one with --out "
            "and compare them with `adapterkit diff`",
        )
    errors.raise_all()
    return {"out": out, "files": len(made), "command": command_text(receipt)}


def command_text(receipt: Json) -> str:
    """The command that a receipt records, with the names of its inputs."""
    return command_of(*call_in(receipt, RECEIPT), "OUT")


def call_in(receipt: Json, where: str) -> tuple[type[WritingVerb], Json]:
    """The verb and arguments in a receipt, limited to the computation. `Refused` for a receipt with
    other arguments, or without a call."""
    call = receipt.get("call")
    if not isinstance(call, dict):
        raise Refused(
            "the receipt does not record its command",
            expected="a receipt of adapterkit 0.1 or later with a call",
            where=RECEIPT,
            hint=BY_HAND,
            code="AK608",
        )
    verb = records.entries({"verb": VERB})
    Problems(records.problems(verb, receipt["recipe"], where, hint=BY_HAND)).raise_all()
    kind = VERB.read(receipt["recipe"]["verb"])
    check_call(kind, call, NOT_IN_RECEIPTS, where, "adapterkit wrote no such call: do not trust it")
    return kind, call


def _verb_of(
    kind: type[WritingVerb], call: Json, inputs: "_Inputs", rerun: Rerun, out: Path
) -> WritingVerb:
    """The call of a receipt with the paths of its inputs; `Refused` with every missing one."""
    arguments = inputs.arguments(kind, call)
    more = {"out": str(out), "progress": rerun.progress}
    if rerun.allow_pickle:
        more["allow_pickle"] = True
    return records.read(kind, arguments | more, RECEIPT, hint=BY_HAND, name=flag_of)


def verb_in(receipt: Json, output: StrPath, given: Json, hint: str) -> WritingVerb:
    """The verb that made an output, with its inputs: those `given`, and others as `rerun` finds
    them. `Refused` with every missing one."""
    kind, call = call_in(receipt, RECEIPT)
    inputs = _Inputs.of(Rerun(output), receipt)
    inputs.errors.hint = hint
    out = os.path.basename(os.path.normpath(output))
    arguments = inputs.arguments(kind, call | given, {*given}) | {"out": out}
    return records.read(kind, arguments, RECEIPT, hint=BY_HAND, name=flag_of)


@dataclass
class _Inputs:
    """The inputs of a receipt, searched in the user's folders or the folder of the output."""

    rerun: Rerun
    commits: Mapping[str, str]
    errors: Problems

    @classmethod
    def of(cls, rerun: Rerun, receipt: Json) -> "_Inputs":
        entries: list[Json] = [one for one in receipt["recipe"]["inputs"] if AT_COMMIT.fits(one)]
        commits = {entry["repo"]: entry["revision"] for entry in entries}
        return cls(rerun, commits, Problems(where=os.fspath(rerun.output), hint=NAME_IT))

    def arguments(self, kind: type[WritingVerb], call: Json, given: Collection[str] = ()) -> Json:
        """A call with the paths of its inputs, except those that are `given`."""
        sources = [f for f in fields_of(kind) if f.name in call and f.name not in given]
        kinds = ("source", "sources", "file")
        named = [f.name for f in sources if option_of(f).check.kind in kinds]
        found = {name: self.found(call[name]) for name in named}
        self.errors.raise_all()
        return call | found

    def found(self, value: Any) -> Any:
        """Names resolved to existing paths, and Hub ids to their commits."""
        if isinstance(value, list):
            return [self.found(one) for one in value]
        if isinstance(value, float | int):  # the weight of the source before it
            return value
        found = next(filter(None, self._named(value)), None)
        hub_id = None if found is None or os.path.exists(found) else parse(found)
        if hub_id is not None:
            commit = self.commits.get(hub_id.repo, hub_id.revision)
            found = named_in_file(str(replace(hub_id, revision=commit)), None)
        if found is None:
            problem = f"there is no {shown(value)}, or it is a link that leads elsewhere"
            self.errors.add(problem, "the receipt's inputs, by name", code="AK608")
        return found

    def _named(self, name: object) -> Iterator[str | None]:
        output, inputs = self.rerun.output, cast(Sequence[StrPath], self.rerun.inputs)
        for path in map(Path, inputs):
            yield str(path) if path.name == name else named_in_file(name, path)
        if not inputs:
            is_here = os.path.exists(output)
            yield named_in_file(name, Path(os.path.abspath(output)).parent if is_here else None)


def _check_same(receipt: Json, plan: Plan) -> None:
    """`Refused` unless the plan is the receipt's, with the differences."""
    recipe = plan.recipe()
    errors = Problems(
        where=RECEIPT, hint="give the inputs and the version of the receipt", code="AK608"
    )
    if fingerprint_of(recipe) == receipt["fingerprint"]:
        if other := other_inputs(plan, receipt):
            errors.add(f"other bytes: {listed(other)}", "the sha256 of the receipt's inputs")
        errors.raise_all()
        return
    before, now = receipt["recipe"], public_recipe(recipe)
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
