"""finish: publish the output of a plan file once its workers have made the files."""

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.core.commands import command
from adapterkit.core.options import (
    FILE,
    FLAG,
    PROGRESS,
    Progress,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.core.shared_options import verify_option
from adapterkit.core.verb import Verb, function_of, push_option

if TYPE_CHECKING:
    from adapterkit.core.receipt import Receipt


@record
class Finish(Verb["Receipt"]):
    """Publish the output of a plan file from the workers' files, and return its receipt.

    `verify` reads the output again and checks every hash, and for a merge rows of each changed
    tensor, before it gets its name. `push` uploads it to this Hub repository; with `overwrite` it
    replaces an older output. Raises `Refused` if files are missing, with the command that makes
    them. An output that is already finished is reported as such.
    """

    command = """Publish the output of a plan file when its workers are done.

    If some files are missing, nothing is published and they are listed. The output and its receipt
    are the same as those of the command itself.

    \b
    Example:
      adapterkit finish merged.plan.json
      adapterkit finish merged.plan.json --verify --push me/merged
    """

    file: StrPath = argument(kw_only=False, check=FILE, metavar="FILE")
    verify: bool = verify_option()
    push: str | None = push_option()
    overwrite: bool = option(
        default=False, check=FLAG, help="Replace an older output in that repository.", needs="push"
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)

    def run(self) -> "Receipt":
        from adapterkit.core.engine.execution import check_out, check_push_of, pushed, with_verified
        from adapterkit.many.workers.finish import finish_workers
        from adapterkit.many.workflows.plan_file import again, read_plan

        plan_file = read_plan(self.file)
        recomputes = self.verify and plan_file.verb.name == "merge"  # it reads the hashes too
        more = {"verify": True} if recomputes else {}
        more |= {"progress": self.progress, "overwrite": self.overwrite}
        verb = replace(plan_file.verb, resume=True, **more)
        missing = command("adapterkit run", self.file)
        with again(verb):
            plan = verb.plan()
            check_push_of(plan, verb, self.push)
            check = verb.check(plan)
            check_out(plan, verb)
            verify = self.verify and not recomputes
            receipt = finish_workers(plan, plan_file.job, verb, missing, check, verify=verify)
        return with_verified(pushed(receipt, verb, self.push), check)


finish = function_of(Finish)
