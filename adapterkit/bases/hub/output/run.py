"""An output that goes to the Hub, on bounded disk: `--out hf://org/name[@branch][:folder]`."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import PurePath

from adapterkit.bases.hub.destination import Destination, parse_output
from adapterkit.bases.hub.errors import quiet_library
from adapterkit.bases.hub.listing import are_pinned, pinned
from adapterkit.bases.hub.output.engine import HubEngine
from adapterkit.bases.hub.output.hub_output import INPUTS, HubOutput, pins_before, work_output
from adapterkit.bases.hub.output.inputs import conversions_in, plan_in_scratch
from adapterkit.bases.hub.output.transfers import plan_bounded, plan_transfers
from adapterkit.core.checkpoint.disk import free_bytes
from adapterkit.core.checkpoint.hub_ids import HubId, place_on_hub
from adapterkit.core.errors import Refused
from adapterkit.core.execute import FolderCheck, check_place, output_names, run
from adapterkit.core.options import StrPath, parse_size
from adapterkit.core.output.stage import RECEIPT, Stage, check_name, receipt_name_of
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt, earlier_repositories
from adapterkit.core.shared_options import RunOptions


def pinned_inputs(out: StrPath, *, resume: bool) -> AbstractContextManager[object]:
    """Read input revisions at the commits of the run that is resumed; record those of a new run."""
    if are_pinned():
        return nullcontext()
    hub_id = place_on_hub(out)
    return pinned(pins_before(hub_id) if resume and hub_id else {})


def run_to_hub(
    plan: Plan, execution: RunOptions, check: FolderCheck | None = None
) -> Receipt | Plan:
    """Run a plan whose output is on the Hub; with `dry_run`, return it after checking the
    destination and the account.

    Weights are downloaded file by file and sent as they are made; files that the Hub already has
    are copied there. Raises `Refused` before any weights move, `Failed` after: then nothing is
    committed, and `resume` keeps the finished files.
    """
    from adapterkit.core.engine.local import local
    from adapterkit.core.verify.row_checks import RowCheck

    ending = PurePath(plan.shards[0].file).suffix if plan.is_file else ""
    hub_id = parse_output(os.fspath(execution.out), endings=(ending,))
    limit = parse_size(execution.disk_limit) if execution.disk_limit else None
    if execution.engine != "local":
        raise Refused(
            "an output on the Hub from several machines",
            expected="one machine",
            where="--out",
            hint="write a folder, then send it\nadapterkit finish PLAN --push ORG/NAME",
            code="AK111",
        )
    work = work_output(hub_id)
    inputs = work.control / INPUTS
    check_name(work.out, output_names(plan))
    rows = check if isinstance(check, RowCheck) else None
    if collected := next((file for file in plan.shards if file.collection), None):
        plan, disk = plan_bounded(plan, collected, inputs, limit)
        copies, engine = (), local(execution.device)  # its one file is sent at the end
    else:
        plan = plan_in_scratch(plan, inputs)
        transfers = plan_transfers(plan, keep_outputs=check is not None and rows is None)
        if limit is None and transfers.disk(None) > (free := free_bytes(work.out)):
            limit = free // 10 * 9  # it takes what there is
        transfers.check(limit)
        totals = {**plan.placement.totals, **transfers.totals(limit)}
        plan = replace(plan, placement=replace(plan.placement, totals=totals))
        disk, copies = transfers.disk(limit), transfers.copied
        check_file = rows.check_file if rows else None
        engine = HubEngine(local(execution.device), limit, transfers.keep_outputs, check_file)
    with quiet_library():
        destination = open_destination(hub_id, plan)
        destination.look()
        output = HubOutput(
            work,
            destination,
            disk,
            copies,
            [folder for folder, _ in conversions_in(plan)],
            output_names(plan, destination.receipt_name),
        )
        stage = Stage(output)
        if execution.dry_run:
            check_place(stage, plan, resume=execution.resume, overwrite=execution.overwrite)
            return plan
        receipt = run(
            plan,
            stage,
            engine,
            hash=execution.hash,
            resume=execution.resume,
            overwrite=execution.overwrite,
            check=None if rows else check,
            progress=execution.progress,
        )
    if output.pushed:
        receipt.data["pushed"] = output.pushed
    return replace(receipt, out=f"hf://{hub_id}")


def open_destination(hub_id: HubId, plan: Plan) -> Destination:
    """The destination of a plan's output on the Hub; `Refused` if the account may not write there,
    or if it is an input."""
    folder, receipt = hub_id, RECEIPT
    if plan.is_file:
        folder, receipt = hub_id.parent, receipt_name_of(hub_id.subfolder.rpartition("/")[2])
    sources = {folder.origin["repo"] for folder in plan.folders if "repo" in folder.origin}
    sources |= {*earlier_repositories(plan.folders)}
    destination = Destination(folder, sorted(sources), plan.folders, receipt)
    destination.check_account()
    return destination
