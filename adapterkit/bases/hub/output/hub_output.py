"""An output on the Hub: finished files leave the stage, and one commit publishes them."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from adapterkit.bases.hub.destination import Destination
from adapterkit.bases.hub.listing import Pins, current_pins
from adapterkit.bases.hub.upload import CopiedFile, LocalFile, Uploaded, commit, groups, upload
from adapterkit.core.checkpoint.disk import size_below
from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.errors import Failed
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import RECEIPT, Stage, StagedOutput
from adapterkit.core.records import Json

INPUTS = "inputs"


def work_output(hub_id: HubId) -> FolderOutput:
    """The name of the local work: the stage is a hidden folder next to
    `HF_HOME/adapterkit/.org--name[@branch][:folder].adapterkit`."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME).expanduser() / "adapterkit"
    return FolderOutput(home / str(hub_id).replace("/", "--"))


def pins_before(hub_id: HubId) -> Pins:
    """The input commits of an interrupted run; none without one."""
    journal = Stage(work_output(hub_id)).journal()
    return journal[0].get("pins", {}) if journal else {}


class HubOutput(StagedOutput):
    """A folder of a repository on the Hub.

    In addition to finished shards the journal has `{"uploaded": ...}` for files in the Hub's
    storage, and `{"copied": name}` for those taken from another repository. An entry counts only
    for a file of the plan with the sha256 recorded when it was made, or for one of `copies`, which
    the plan takes over. `limit`: the job's bytes of disk. `converted`: adapters to convert first.
    `names`: the output's files.
    """

    has_history = True

    def __init__(
        self,
        work: FolderOutput,
        destination: Destination,
        limit: int,
        copies: Iterable[CopiedFile] = (),
        converted: Sequence[Overlay] = (),
        names: Collection[str] = (),
    ):
        self.out, self.final, self.control = work.out, work.final, work.control
        self.destination, self.limit, self.names = destination, limit, names
        self.copies = {file.file: file for file in copies}
        self.inputs, self.converted = self.control / INPUTS, converted
        self.pushed: Json = {}
        self._sent: dict[str, Uploaded | CopiedFile] | None = None  # once the journal is read

    def exists(self) -> bool:
        return True  # it has been looked at

    def receipt(self) -> bytes:
        return self.destination.receipt()

    def size_of(self, name: str) -> int | None:
        entry = self.destination.before.get(name)
        return None if entry is None else entry.size

    def check(self, *, replaces: bool) -> None:
        self.destination.check_files(self.names, overwrite=replaces)

    def head(self) -> Json:
        new = {"upon": self.destination.parent} if self.destination.is_new else {}
        return {"pins": current_pins()} | new

    def resume_from(self, head: Json) -> None:
        if head.get("upon") == self.destination.parent:
            self.destination.is_new = True  # as it was when this job made it

    def begin(self) -> None:
        self.destination.create()
        for adapter in self.converted:
            adapter.made()

    def disk(self, size: int) -> int:
        return self.limit  # with the inputs, and never all together

    def has(self, stage: Stage, name: str, sha256: str | None) -> bool:
        """Return whether the Hub has the file; if its sha256 is unknown, whether it was sent and
        the stage no longer has it."""
        file = self.sent_files(stage).get(name)
        if file is None or sha256 is None:
            return file is not None and not (stage.path / name).exists()
        return file.sha256 == sha256

    def sent_files(self, stage: Stage) -> dict[str, Uploaded | CopiedFile]:
        """The files that the Hub's storage has, by name: uploaded, or copied on the Hub."""
        if self._sent is None:
            self._sent = {}
            for entry in stage.journal():
                if "uploaded" in entry:
                    file = Uploaded(**entry["uploaded"])
                    self._sent[file.file] = file
                elif entry.get("copied") in self.copies:
                    self._sent[entry["copied"]] = self.copies[entry["copied"]]
        return self._sent

    def note_copied(self, stage: Stage, file: CopiedFile) -> None:
        """Record a file that the Hub copied."""
        stage.note({"copied": file.file})
        self.sent_files(stage)[file.file] = file

    def upload(self, stage: Stage, files: list[LocalFile]) -> list[str]:
        """Upload files together; record those that the Hub stores outside git, and return their
        names."""
        sent = upload(self.destination.hub_id, files)
        for file in sent:
            stage.note({"uploaded": file._asdict()})
            self.sent_files(stage)[file.file] = file
        return [file.file for file in sent]

    def publish(self, stage: Stage) -> None:
        """Upload the remaining files and commit everything."""
        receipt = json.loads((stage.path / RECEIPT).read_bytes())
        sums: dict[str, str | None] = {n: entry["sha256"] for n, entry in receipt["files"].items()}
        sums[self.destination.receipt_name] = None
        stage.open_journal()  # to note what is sent now
        self.destination.create()
        there = {name for name, sha256 in sums.items() if self.has(stage, name, sha256)}
        here = [self._here(stage, name, sums[name]) for name in sums if name not in there]
        sent = {name for group in groups(here) for name in self.upload(stage, group)}
        large = [self.sent_files(stage)[name] for name in sums if name in there | sent]
        made = commit(
            self.destination,
            [file for file in large if isinstance(file, Uploaded)],
            [file for file in large if isinstance(file, CopiedFile)],
            [file for file in here if file.name not in sent],
        )
        self.pushed = {
            "repo": self.destination.hub_id.repo,
            "revision": made.oid,
            "url": made.url,
            "notes": self.destination.notes,
        }

    def _here(self, stage: Stage, name: str, sha256: str | None) -> LocalFile:
        """A file of the stage, not a link; `Failed` without one."""
        here = RECEIPT if name == self.destination.receipt_name else name
        path = stage.path / here
        size = size_below(stage.path, here)
        if size is None:
            raise Failed(
                "the file is missing, or is a link",
                expected="the file that was made",
                where=str(path),
                hint="give --overwrite to begin again",
                code="AK701",
            )
        return LocalFile(name, path, size, sha256)
