"""An output that is one file: its plan runs in a folder beside it, then the file gets its name."""

import json
import os
from dataclasses import replace
from pathlib import Path

from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.stage import RECEIPT, check_name
from adapterkit.checkpoint.storage import storage_errors, sync_folder
from adapterkit.engines.execution import Execution
from adapterkit.errors import Refused
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt, digest, public_recipe

SUFFIX = ".adapterkit.json"  # of the receipt, after the file's name


def run_to_file(execution: Execution, plan: Plan) -> Receipt | Plan:
    """Run a plan whose only output is a file of the name of `execution.out`; the receipt lies
    beside it as NAME.adapterkit.json. Raises as `Execution.run` does; nothing is left under the
    file's name that is not whole."""
    out = Path(execution.out)
    check_name(out)
    fingerprint = digest(public_recipe(json.loads(json.dumps(plan.recipe()))))
    receipt = out.with_name(out.name + SUFFIX)
    if execution.resume and out.is_file() and receipt.is_file():
        data = json.loads(receipt.read_text())
        if data.get("fingerprint") == fingerprint:
            return Receipt(out, data, finished_before=True)
    _check(out, plan, execution.overwrite)
    work = out.with_name(f".{out.name}.converted")
    done = replace(execution, out=work, overwrite=not execution.resume).run(plan)
    if isinstance(done, Plan):
        return done
    with storage_errors(out):
        os.replace(work / RECEIPT, receipt)
        os.replace(work / out.name, out)
        work.rmdir()
        sync_folder(out.resolve().parent)
    return Receipt(out, done.data)


def _check(out: Path, plan: Plan, overwrite: bool) -> None:
    """`Refused` where something is in the way, or is an input."""
    refused = lambda problem, hint: Refused(
        problem, expected="a new file", where=str(out), hint=hint
    )
    if out.is_symlink() or out.is_dir():
        raise refused("a link or a folder of that name", "choose another --out")
    if out.exists() and not overwrite:
        raise refused("a file of this name exists", "choose another --out, or give --overwrite")
    for folder in plan.folders:
        if isinstance(folder, LocalFolder):
            names = [folder.single] if folder.single else folder.files()
            if out.resolve() in [(folder.root / name).resolve() for name in names]:
                raise refused(f"the output is the input {folder.name}", "choose another --out")
