"""An output that is one file: its plan runs in a folder beside it, then the file gets its name."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from adapterkit.checkpoint.disk import storage_errors, sync_folder
from adapterkit.checkpoint.folder import LocalFolder, original
from adapterkit.checkpoint.output.earlier import incomplete, lacking, receipt_at, size_at
from adapterkit.checkpoint.output.stage import RECEIPT, check_name
from adapterkit.errors import Refused, shown
from adapterkit.plan import Plan
from adapterkit.receipt import RECEIPT_CHECK, Receipt, fingerprint_of
from adapterkit.run_options import RunOptions

SUFFIX = ".adapterkit.json"  # of the receipt, after the file's name


Done = TypeVar("Done")


def run_to_file(
    plan: Plan, how: RunOptions, run: Callable[[Plan, RunOptions], Done]
) -> Done | Receipt:
    """Let `run` make a plan's only output, a file of the name of `how.out`; the receipt lies beside
    it as NAME.adapterkit.json. Raises as `run` does; nothing is left under the file's name that is
    not whole."""
    out = Path(how.out)
    check_name(out)
    receipt = out.with_name(out.name + SUFFIX)
    older = receipt_at(receipt)
    is_its = how.resume and out.is_file() and RECEIPT_CHECK.fits(older)
    if is_its and older["fingerprint"] == fingerprint_of(plan.recipe()):
        lacks = lacking(older, lambda name: size_at(out.with_name(name)))
        if not lacks:
            return Receipt(out, older, finished_before=True)
        if not how.overwrite:
            raise incomplete(lacks, str(out))
    _check(out, plan, how.overwrite, out.name in older.get("files", ()))
    work = out.with_name(f".{out.name}.converted")
    done = run(plan, replace(how, out=work, overwrite=not how.resume))
    if not isinstance(done, Receipt):
        return done
    with storage_errors(out):
        os.replace(work / RECEIPT, receipt)
        os.replace(work / out.name, out)
        work.rmdir()
        sync_folder(out.resolve().parent)
    return Receipt(out, done.data)


def _check(out: Path, plan: Plan, overwrite: bool, is_older: bool) -> None:
    """`Refused` where something is in the way, or is an input. `is_older`: a receipt says that
    adapterkit wrote a file of that name."""
    refused = lambda problem, hint: Refused(
        problem, expected="a new file", where=str(out), hint=hint
    )
    if out.is_symlink() or out.is_dir():
        raise refused("a link or a folder of that name", "choose another --out")
    for folder in map(original, plan.folders):
        if isinstance(folder, LocalFolder):
            names = [folder.single] if folder.single else folder.files()
            if out.resolve() in [(folder.root / name).resolve() for name in names]:
                raise refused(f"the output is the input {folder.name}", "choose another --out")
    receipt = out.with_name(out.name + SUFFIX)
    there = out if out.exists() else receipt
    if there.exists() and not is_older:
        raise Refused(
            f"output exists, and adapterkit did not write it: {shown(there.name)}",
            expected="a new file, or an older output, which --overwrite replaces",
            where=str(out),
            hint="move it away, or choose another --out",
        )
    if out.exists() and not overwrite:
        raise refused("a file of this name exists", "choose another --out, or give --overwrite")
