"""plan.json: a verb's call for other processes to carry out, without code, pickle or secret.

Paths are absolute and Hub ids pinned to a commit, so that every process plans the same job. The
recipe and the identity of the inputs check that it did.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit import __version__
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.images.pipeline import PART
from adapterkit.core import records
from adapterkit.core.calls import OF_THE_USER, arguments_of, check_call, is_data, own_hints
from adapterkit.core.checkpoint.disk import replace_file
from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.checkpoint.hub_ids import is_on_hub, parse
from adapterkit.core.checkpoint.strict import MAX_JSON, nested_json, strict_json
from adapterkit.core.commands import command
from adapterkit.core.engine.execution import check_out
from adapterkit.core.errors import AdapterkitError, Problems, Refused, as_usage, shown
from adapterkit.core.inputs.sources import similar_path
from adapterkit.core.options import FILE, StrPath, checked, flag_of
from adapterkit.core.plan import Plan
from adapterkit.core.records import TABLE, TEXT, Json
from adapterkit.core.verb import WritingVerb, called
from adapterkit.many.workers.job_identity import WorkerJob, prepare_workers
from adapterkit.many.workflows.verbs import VERB

VERSION = 1
AGAIN = "make the plan again"
# these keys are read again; shards and totals are for people
CONTENT = records.entries({
    "verb": VERB, "arguments": TABLE, "fingerprint": TEXT, "recipe": TABLE, "inputs": TABLE,
    "hash": TEXT,
})  # fmt: skip


@dataclass(frozen=True)
class PlanFile:
    """A plan file's content and its path."""

    path: Path
    verb: WritingVerb
    job: WorkerJob


def write_plan(file: StrPath, verb: str, *sources: object, **options: object) -> Plan:
    """Plan a verb's call for several processes: write `file`, for `run` and `finish`, and make the
    stage next to the output. Returns the plan.

    `verb` is a writing verb's name, `sources` and `options` its arguments. Everything that the verb
    would refuse is refused here. Raises `Refused` also for an output on the Hub, and for arguments
    that no file can store.
    """
    path = Path(checked("file", FILE, file)).absolute()
    record = checked("verb", VERB, verb)
    with as_usage():
        given = called(record, *sources, **options)
    arguments = _portable(given, path)
    call = record(**arguments, overwrite=given.overwrite)
    _check_path(path, call.overwrite, Path(call.out))
    plan = call.plan()
    check_out(plan, call)
    job, needs = WorkerJob.of(plan, call.hash), plan.needs()
    plan = prepare_workers(plan, job, call)
    content = {
        "adapterkit": VERSION,
        "version": __version__,
        "verb": verb,
        "arguments": arguments,
        "fingerprint": job.fingerprint,
        **vars(job),
        "shards": [
            {"file": shard.file, "size": shard.size, "needs": list(needs[shard.file])}
            for shard in plan.shards
        ],
        "totals": plan.totals(),
    }
    data = json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
    replace_file(path, data, path.with_name(f".{path.name}.{os.getpid()}.part"))
    return plan


def read_plan(file: StrPath) -> PlanFile:
    """A plan file; `Refused` if it is none, or has another version."""
    path = Path(file).absolute()
    if not path.exists():
        raise Refused(
            f"no such file: {shown(file)}",
            where=str(path.parent),
            expected="a plan file, a pipeline (.toml) or a recipe (.yml)",
            hint=similar_path(str(file)) or "check the path",
            code="AK201",
        )
    try:
        data = nested_json(read_small(path, MAX_JSON))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), "check the path") from error
    except ValueError as error:
        raise _unreadable(path, f"this is not JSON: {shown(error)}") from error
    if not isinstance(data, dict) or data.get("adapterkit") != VERSION:
        raise _unreadable(path, f"no plan file of version {VERSION}")
    if data.get("version") != __version__:
        raise Refused(
            f"the plan is of adapterkit {shown(data.get('version'))}",
            expected=f"one of {__version__}, as this is",
            where=str(path),
            hint="use the same adapterkit everywhere, or make the plan again",
            code="AK111",
        )
    Problems(records.problems(CONTENT, data, str(path), hint=AGAIN)).raise_all()
    verb, arguments = VERB.read(data["verb"]), data["arguments"]
    out = arguments.get("out")
    if not isinstance(out, str) or not os.path.isabs(out):
        raise _unreadable(path, "its output path is not absolute")
    check_call(verb, arguments, OF_THE_USER, str(path), AGAIN)
    call = records.read(verb, arguments, str(path), hint=AGAIN, name=flag_of)
    job = WorkerJob(data["recipe"], data["inputs"], data["hash"])
    if job.fingerprint != data["fingerprint"]:
        raise _unreadable(path, "its recipe does not match its fingerprint")
    return PlanFile(path, call, job)


def _check_path(path: Path, overwrite: bool, out: Path) -> None:
    """`Refused` if the plan file cannot be made, or has the output's path."""
    where = str(path)
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        problem, expected = "the plan file is the output, or in it", "one outside the output"
        where, hint = f"--plan {shown(path)}", "choose another --plan"
    elif path.is_file() and overwrite and not _is_plan(path):
        problem, hint = "the file is no plan file", "move it away, or choose another --plan"
        expected = "a new file, or an older plan, which --overwrite replaces"
    elif path.is_dir() or (path.exists() and not overwrite):
        problem, expected = "a file of this name exists", "a new plan file"
        hint = "choose another --plan, or give --overwrite"
    elif not path.parent.is_dir():
        problem, where = "the folder does not exist", str(path.parent)
        expected = "an existing folder for the plan file"
        hint = "create it, or choose another --plan"
    else:
        return
    raise Refused(problem, expected=expected, where=where, hint=hint, code="AK111")


def _is_plan(path: Path) -> bool:
    """True if a file is a plan of any version."""
    try:
        data = strict_json(read_small(path, MAX_JSON))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"adapterkit", "verb", "fingerprint"} <= data.keys()


def _unreadable(path: Path, problem: str, hint: str = AGAIN) -> Refused:
    expected = "a file that a command with --plan wrote, or a .toml or .yml file"
    return Refused(problem, expected=expected, where=str(path), hint=hint, code="AK111")


def _portable(verb: WritingVerb, path: Path) -> Json:
    """The given arguments, in a form with the same meaning in every process."""
    send = command("adapterkit finish", path, push=getattr(verb, "push", None) or "ORG/NAME")
    if is_on_hub(verb.out):
        raise Refused(
            "--plan cannot write to the Hub directly",
            expected="a folder that all processes see",
            where="--out",
            hint=f"write into a folder, then send it\n{send}",
            code="AK111",
        )
    if getattr(verb, "push", None) is not None:
        raise Refused(
            "--push is given with --plan",
            expected="a plan file without an upload",
            where="options",
            hint=f"give it later\n{send}",
            code="AK111",
        )
    if getattr(verb, "choose", ()):
        raise Refused(
            "--choose is given with --plan",
            expected="one plan, which is the same in every process",
            where="options",
            hint="remove --choose and --data, or run without --plan",
            code="AK111",
        )
    own = {"accept", "allow_pickle"}
    arguments = arguments_of(verb, _portable_path, {*OF_THE_USER} - own)
    lost = [name for name, value in arguments.items() if name in own or not is_data(value)]
    if lost := ", ".join(lost):
        raise Refused(
            f"a plan file cannot store {lost}",
            expected="text, numbers, lists and mappings",
            where="--plan",
            hint=f"remove {lost}, or run without --plan",
            code="AK111",
        )
    return json.loads(json.dumps(arguments))


def _portable_path(kind: str, path: StrPath) -> str:
    """A path with the same meaning in every process."""
    return _pinned(path) if kind == "source" else os.path.abspath(path)


def _pinned(source: StrPath) -> str:
    """An absolute path, or a Hub id with its commit; other texts stay, and are refused later."""
    text = os.fspath(source)
    if os.path.exists(text):
        return os.path.abspath(text)
    if named := PART.fullmatch(text):  # of a pipeline
        return f"{named[1]}:{_pinned(named[2])}"
    hub_id = parse(text)
    return text if hub_id is None else str(replace(hub_id, revision=HubFolder(hub_id).commit))


@contextmanager
def again(verb: WritingVerb) -> Iterator[None]:
    """Errors in this block have hints with options of the plan's verb, and with the same command,
    which needs no --resume."""
    try:
        with own_hints(verb):
            yield
    except AdapterkitError as error:
        error.hint = error.hint.replace(" with --resume", "")
        raise
