"""Examine an earlier output at the same location: its job, and whether its inputs have changed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.output.hub_output import work_output
from adapterkit.core.checkpoint import hub_ids as ids
from adapterkit.core.checkpoint.folder import FinishedFolder, Folder, read_small
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.checkpoint.strict import MAX_JSON, read_json
from adapterkit.core.engine.execution import stage_of
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.inputs.input_identity import identities
from adapterkit.core.output.resume import check_same_job, lacking
from adapterkit.core.output.stage import RECEIPT, Stage, receipt_name_of
from adapterkit.core.plan import CopyFile, Plan
from adapterkit.core.receipt import RECEIPT_CHECK, fingerprint_of, read_receipt
from adapterkit.core.records import Json
from adapterkit.core.verify.file_checks import check_files
from adapterkit.many.workflows.workflow_file import Location


@dataclass(frozen=True)
class Older:
    """An older output of adapterkit."""

    receipt: Json
    folder: Folder
    written: int | None  # time in nanoseconds, if known

    @property
    def pipeline(self) -> Json:
        """The receipt's entry on the pipeline that wrote it."""
        entry = self.receipt.get("pipeline")
        return entry if isinstance(entry, dict) else {}

    def is_of(self, plan: Plan) -> bool:
        """True if it is complete, and the plan would write the same from the current inputs."""
        is_same = self.receipt.get("fingerprint") == fingerprint_of(plan.recipe())
        if not is_same or not self._is_complete():
            return False
        if "inputs" in self.pipeline:
            return self.pipeline["inputs"] == inputs_digest(plan)
        times = [time for _, time, _ in _local_inputs(plan).values()]
        return all(self.written is not None and time <= self.written for time in times)

    def _is_complete(self) -> bool:
        return not lacking({"files": {}} | self.receipt, self.folder.files().get)

    def damage(self) -> str:
        """The error of `verify` on it, or ""."""
        try:
            if RECEIPT in self.folder.files():
                read_receipt(self.folder)
            if "files" in self.receipt:
                check_files(self.folder, self.receipt)
        except AdapterkitError as error:
            return str(error).splitlines()[0]
        return ""


def older_output(place: Location) -> Older | None:
    """The older output at a location; None if there is none by adapterkit."""
    if place.repository:
        return _on_hub(place)
    path = Path(place.path)
    if (path / RECEIPT).is_file():
        return _with_receipt(path, path / RECEIPT)
    if not path.is_file():
        return None
    next_to = path.with_name(receipt_name_of(path.name))
    return _with_receipt(path, next_to) if next_to.is_file() else None


def is_pushed(older: Older, there: Older | None) -> bool:
    """True if a repository has all files of an output, and the same receipt."""
    return there is not None and there.receipt == older.receipt and there._is_complete()


def _with_receipt(out: Path, receipt: Path) -> Older | None:
    try:
        data = json.loads(read_small(receipt, MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    is_receipt = RECEIPT_CHECK.fits(data)
    return Older(data, FinishedFolder(out), receipt.stat().st_mtime_ns) if is_receipt else None


def _on_hub(place: Location) -> Older | None:
    try:
        folder = HubFolder(_hub_id(place))
    except Refused:  # not there yet
        return None
    next_to, name = folder, RECEIPT
    if folder.single:
        next_to, name = HubFolder(_hub_id(place).parent), receipt_name_of(folder.single)
    if name not in next_to.files():
        return None
    receipt = read_json(next_to, name)
    return Older(receipt, folder, None) if RECEIPT_CHECK.fits(receipt) else None


def _hub_id(place: Location) -> ids.HubId:
    hub_id = ids.parse(place.text)
    assert hub_id is not None
    return hub_id


def can_go_on(place: Location, plan: Plan, overwrite: bool) -> bool:
    """True if an interrupted run of this plan can be continued. `Refused` for one of another plan,
    or one that is still running, unless it is to be overwritten."""
    is_on_hub = bool(place.repository)  # made on this machine
    stage = Stage(work_output(_hub_id(place))) if is_on_hub else stage_of(plan, Path(place.path))
    entries, recipe = stage.journal(), plan.recipe()
    if entries and entries[0].get("recipe") != recipe and not overwrite:
        stage.lock.check()
        check_same_job(stage, recipe)
    return bool(entries) and entries[0].get("recipe") == recipe


def inputs_digest(plan: Plan) -> str:
    """A short hash of the identities of all local files that a plan reads. It changes when a file
    is written again, even with the same bytes."""
    rows = [*_local_inputs(plan).values()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _local_inputs(plan: Plan) -> dict[tuple[int, str], Identity]:
    """The identities of local headers that were read, and of local files that are copied."""
    copied = ((c.folder, c.name) for c in plan.files.values() if isinstance(c, CopyFile))
    more = [file for file in copied if file not in plan.identities]
    return plan.identities | identities(plan.folders, more)
