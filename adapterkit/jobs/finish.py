"""finish: the output of a plan file, once its ranks have made the files."""

import shlex
from pathlib import Path

from adapterkit.errors import Refused
from adapterkit.hub.push import repository, send
from adapterkit.jobs.plan_file import again, read_plan
from adapterkit.jobs.verbs import executors_of
from adapterkit.options import StrPath, checked
from adapterkit.plan import Progress
from adapterkit.receipt import Receipt


@checked(push=repository)
def finish(
    file: StrPath,
    *,
    verify: bool = False,
    push: str | None = None,
    progress: Progress = lambda done: None,
) -> Receipt:
    """Publish the output of a plan file: the ranks' files, the small ones, the receipt; the
    receipt.

    `verify` reads the output again and checks every hash, of a merge also rows of each changed
    tensor, before it gets its name. `push` uploads it to this Hub repository, in place of an older
    output where the plan has `overwrite`. Raises `Refused` where files are missing, with the
    command that makes them; finished before, it says so.
    """
    plan_file = read_plan(file)
    command = f"adapterkit run {shlex.quote(str(file))}"
    call = plan_file.call
    if push is not None and call.verb.__name__ == "stats":
        raise Refused(
            "--push does not apply to a file of statistics",
            expected="an output that is a folder",
            where="options",
            hint="remove --push: `adapterkit stats --out hf://...` writes to the Hub",
        )
    recomputes = verify and call.verb.__name__ == "merge"  # it reads the hashes too
    make = executors_of(call.verb.__name__).finish
    if push == call.arguments.get("push"):  # it is there by then
        push = None
    executor = make(plan_file.job, command, verify and not recomputes, push)
    more = {"verify": True} if recomputes else {}
    with again():
        receipt = call.run(engine=executor, resume=True, progress=progress, **more)
    assert isinstance(receipt, Receipt)
    if push is not None:
        overwrite = bool(call.arguments.get("overwrite"))
        receipt.data["pushed"] = send(Path(receipt.out), push, overwrite=overwrite)
    return receipt
