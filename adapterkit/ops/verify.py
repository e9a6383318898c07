"""verify: an output against its receipt. Every byte is hashed; with the inputs at hand, sampled rows are recomputed in float64."""

import os
from pathlib import Path
from typing import Any

from adapterkit.checkpoint.folder import Folder, LocalFolder, inside
from adapterkit.checkpoint.hashes import RunningHash
from adapterkit.checkpoint.spec import read_header, read_json
from adapterkit.checkpoint.stage import RECEIPT
from adapterkit.errors import AdapterkitError, Damaged, Failed, Refused, refuse_all, shown
from adapterkit.ops.sources import open_model, open_weighted
from adapterkit.options import Sources, StrPath, checked
from adapterkit.plan import RECEIPT_VERSION, Plan, Progress, is_sealed

BLOCK = 4 << 20
CHANGED = "bytes that are not those that were written"
AGAIN = "run the merge again"
THREADS = 4  # that recompute; each holds a whole weight where its format needs that


@checked()
def verify(
    folder: StrPath,
    *,
    base: StrPath | None = None,
    adapters: Sources = (),
    progress: Progress = lambda done: None,
) -> dict[str, Any]:
    """Check the folder's files against its receipt; with `base` and `adapters`, rows of a merge against its inputs too.

    Returns counts of what was checked; `rows` is 0 without the inputs. Raises `Damaged` naming each file, and in it the first
    tensor, whose bytes are not what was written, and `Refused` where there is no receipt or the inputs are not those of the
    receipt.
    """
    path = Path(folder)
    receipt = read_receipt(path)
    sources = open_weighted(adapters)
    if bool(base) != bool(sources):
        raise Refused(
            "base or adapters alone",
            expected="both, or neither",
            where="--base, --adapter",
            hint="give both",
        )
    result = check_files(path, receipt, progress)
    plan = _plan_again(receipt, base, sources) if base else None
    return result | (check_rows(path, plan) if plan else {"rows": 0, "tensors": 0})


def verify_against(folder: Path, plan: Plan) -> dict[str, Any]:
    """What `merge --verify` does at its end: hashes, keys, and rows."""
    return check_files(folder, read_receipt(folder)) | check_rows(folder, plan)


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of an output folder."""
    if not os.path.isfile(folder / RECEIPT):
        raise Refused(
            f"no {RECEIPT}",
            expected="an output of adapterkit, finished",
            where=str(folder),
            hint="run the job again (with --resume if it was interrupted)",
        )
    local = LocalFolder(folder)
    receipt = read_json(local, RECEIPT)
    if receipt.get("adapterkit") != RECEIPT_VERSION:
        raise Refused(
            f"a receipt of version {shown(receipt.get('adapterkit'))}",
            expected=f"version {RECEIPT_VERSION}",
            where=RECEIPT,
            hint="verify with the adapterkit that wrote it",
        )
    if not is_sealed(local.read(RECEIPT, 0, local.files()[RECEIPT])):
        raise Damaged(
            CHANGED, expected="a receipt that fits the seal at its end", where=RECEIPT, hint=AGAIN
        )
    return receipt


def check_files(
    folder: Path, receipt: dict, progress: Progress = lambda done: None
) -> dict[str, Any]:
    """Every file that the receipt lists: there, of its size, with its hash, holding its keys; and no other weights."""
    out = LocalFolder(folder)
    errors: list[AdapterkitError] = []
    for name, metrics in receipt["files"].items():
        try:
            size = out.files().get(str(inside(name, RECEIPT)))
            if size != metrics["size"]:
                found = "no such file" if size is None else f"{size} bytes"
                raise Damaged(found, expected=f"{metrics['size']} bytes", where=name, hint=AGAIN)
            _check_file(out, name, metrics["sha256"], receipt["keys"].get(name), progress)
        except AdapterkitError as error:
            errors.append(error)
    here = {
        name for name in out.files() if name.endswith(".safetensors") and "/" not in name
    } - set(receipt["files"])
    for name in sorted(here):
        errors.append(
            Damaged(
                "weights that the receipt does not list",
                expected="the files of the receipt",
                where=shown(name),
                hint="remove the file",
            )
        )
    refuse_all(errors)
    total = sum(metrics["size"] for metrics in receipt["files"].values())
    return {"files": len(receipt["files"]), "bytes": total, "hash": receipt["hash"]}


def _check_file(
    out: LocalFolder, name: str, sha: str | None, marks: dict | None, progress: Progress
) -> None:
    """Hash a file once; the marks at the tensors' ends tell the first damaged one. `marks`: of weights only."""
    problem: AdapterkitError | None = None
    ends: list[tuple[str, int]] = []
    if marks is not None:
        try:
            ends = _ends(out, name, marks, hashed=sha is not None)
        except AdapterkitError as error:
            problem = error
    if sha is not None:
        actual = _hash(out, name, ends, progress)
        if actual.hexdigest() != sha and problem is None:
            keys = list(actual.marks)
            wrong = next((key for key in keys if actual.marks[key] != (marks or {})[key]), None)
            where = name
            if wrong is not None:
                where += f": {'its header or ' * (wrong == keys[0])}{shown(wrong)}"
            problem = Damaged(CHANGED, expected="the receipt's sha256", where=where, hint=AGAIN)
    if problem is not None:
        raise problem


def _ends(out: LocalFolder, name: str, marks: dict, *, hashed: bool) -> list[tuple[str, int]]:
    """The keys of a weights file, which must be the receipt's, and where their tensors end."""
    tensors = read_header(out, name).tensors
    odd = sorted({spec.key for spec in tensors} ^ set(marks)) if hashed else []
    if odd:
        raise Damaged(
            f"keys {', '.join(map(shown, odd[:4]))}",
            expected="the receipt's keys",
            where=name,
            hint=AGAIN,
        )
    return [(spec.key, spec.stop) for spec in tensors]


def _hash(
    out: LocalFolder, name: str, ends: list[tuple[str, int]], progress: Progress
) -> RunningHash:
    """A file's hash and marks, read from the disk and not from the system's cache of it."""
    running, size, at = RunningHash(ends), out.files()[name], 0
    try:
        with out.path(name).open("rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while at < size:
                block = file.read(min(BLOCK, size - at))
                if not block:
                    raise Damaged(
                        f"the file ends at byte {at}",
                        expected=f"{size} bytes",
                        where=name,
                        hint=AGAIN,
                    )
                running.update(block)
                at += len(block)
                progress(len(block))
    except OSError as error:
        raise Failed(
            f"cannot read at byte {at}: {error.strerror}",
            where=name,
            hint="check the disk, then verify again",
        ) from error
    return running


def _plan_again(receipt: dict, base: StrPath | None, sources: list[tuple[Folder, float]]) -> Plan:
    """The plan that made the output, from the receipt's options and inputs that are the same."""
    from adapterkit.ops.merge import Options, plan_merge

    assert base is not None
    verb = receipt["recipe"]["verb"]
    if verb != "merge":
        hint = "leave --base and --adapter out: every hash and key is checked without them"
        raise Refused(
            f"an output of {shown(verb)}",
            expected="an output of merge",
            where="--base, --adapter",
            hint=hint,
        )
    options = dict(receipt["recipe"]["options"])
    weights = options.pop("weights")
    if len(sources) != len(weights):
        raise Refused(
            f"{len(sources)} adapters",
            expected=str(len(weights)),
            where="--adapter",
            hint="give all, in order",
        )
    pairs = [(folder, weight) for (folder, _), weight in zip(sources, weights, strict=True)]
    plan = plan_merge(open_model(base), pairs, Options(**options))
    errors: list[AdapterkitError] = []
    for number, entry in enumerate(receipt["recipe"]["inputs"]):
        for name, said in entry["files"].items():
            if plan.headers.get((number, name)) != said["header"]:
                found = f"{shown(name)} of {plan.folders[number].name} is not the file of the merge"
                errors.append(
                    Refused(
                        found,
                        expected="the same inputs",
                        where=RECEIPT,
                        hint="give the inputs of the merge",
                    )
                )
    refuse_all(errors)
    return plan


def check_rows(folder: Path, plan: Plan) -> dict[str, Any]:
    """Rows of every changed tensor, recomputed from the inputs in float64 (`recomputed`); `Damaged` listing what is wrong."""
    import torch

    from adapterkit.checkpoint.reader import Sources
    from adapterkit.engines.computed import in_order
    from adapterkit.engines.local import Inputs
    from adapterkit.ops.recomputed import Check, Codes, Floats, changed

    out, errors = LocalFolder(folder), []
    specs = {s.key: s for shard in plan.shards for s in read_header(out, shard.file).tensors}
    checks = list(changed(plan))
    with Sources(plan.folders, dict(plan.identities)) as sources, Sources((out,), {}) as written:
        inputs, stored = (
            Inputs(files, torch.device("cpu"), torch.float64) for files in (sources, written)
        )

        def run(check: Floats | Codes) -> Check:
            torch.set_num_threads(1)  # this thread's
            with torch.inference_mode():
                return check.run(inputs, stored, specs)

        threads = torch.get_num_threads()
        try:
            results = list(in_order(run, checks, min(THREADS, len(os.sched_getaffinity(0)))))
        finally:
            torch.set_num_threads(threads)
    for check, result in zip(checks, results, strict=True):
        if result.wrong is not None:
            errors.append(
                Damaged(
                    result.wrong, expected=check.expected, where=shown(check.step.key), hint=AGAIN
                )
            )
    refuse_all(errors)
    rows = sum(result.rows for result in results)
    if checks and not rows:
        raise Failed(
            "no row was recomputed: every changed tensor is empty",
            where=str(folder),
            hint="check the base and the adapters",
        )
    return {"rows": rows, "tensors": len(checks)}
