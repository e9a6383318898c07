"""The stage of an output that goes to the Hub: files leave it as they are finished, and one commit
publishes them."""

import hashlib
import json
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from adapterkit.bases.hub.destination import Destination
from adapterkit.bases.hub.pins import Pins, current_pins
from adapterkit.bases.hub.upload import CopiedFile, LocalFile, Uploaded, commit, groups, upload
from adapterkit.core.checkpoint.disk import size_below
from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.errors import Failed
from adapterkit.core.output.earlier_output import parse_receipt
from adapterkit.core.output.file_result import ShardResult
from adapterkit.core.output.stage import RECEIPT, Stage, publish_of
from adapterkit.core.records import Json

INPUTS = "inputs"


def work_folder(hub_id: HubId) -> Path:
    """Where the work for a place on the Hub is kept until it is there: in a hidden folder beside
    this name, `HF_HOME/adapterkit/.org--name[@branch][:folder].adapterkit`."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME).expanduser() / "adapterkit" / str(hub_id).replace("/", "--")


def inputs_folder(hub_id: HubId) -> Path:
    """Where the job's inputs are while it needs them."""
    return Stage(work_folder(hub_id)).control / INPUTS


def pins_before(hub_id: HubId) -> Pins:
    """The commits of the inputs of an interrupted run; none where there is none."""
    journal = Stage(work_folder(hub_id)).journal()
    return journal[0].get("pins", {}) if journal else {}


class HubStage(Stage):
    """A `Stage` whose output is a place on the Hub.

    The journal has, besides the finished shards, `{"uploaded": ...}` for files that the Hub's
    storage has, and `{"copied": name}` for those that it has taken from another repository. Such an
    entry counts only for a file of the plan with the sha256 that was noted when it was made, or
    for one of `copies`, those that the plan takes over. `limit`: bytes of disk that the job takes
    at most. `converted`: adapters that are converted before it begins. `names`: the output's files.
    """

    def __init__(
        self,
        work: Path,
        destination: Destination,
        limit: int,
        copies: Iterable[CopiedFile] = (),
        converted: Sequence[Overlay] = (),
        names: Collection[str] = (),
    ):
        super().__init__(work)
        self.destination, self.limit, self.names = destination, limit, names
        self.copies = {file.file: file for file in copies}
        self.inputs, self.converted = self.control / INPUTS, converted
        self.pushed: Json = {}
        self._noting = threading.Lock()
        self._gone: dict[str, Uploaded | CopiedFile] | None = None  # once the journal is read

    @property
    def is_new(self) -> bool:
        return False  # the place on the Hub has been looked at

    def state(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        """As of a folder; what another job left on the Hub is replaced by the commit."""
        entries = self.journal()
        receipt = publish_of(entries)
        if resume and entries and entries[0].get("upon") == self.destination.parent:
            self.destination.is_new = True  # as it was when this job made it
        there = self.destination.receipt()
        is_same = self.published().get("fingerprint") == fingerprint
        was_sent = resume and there and hashlib.sha256(there).hexdigest() == receipt
        if was_sent and self._is_finished(overwrite):
            return "finished"  # the answer to its commit was lost
        return super().state(
            fingerprint, resume=resume and bool(entries or is_same), overwrite=overwrite
        )

    def published(self) -> dict:
        return parse_receipt(self.destination.receipt())

    def size_there(self, name: str) -> int | None:
        entry = self.destination.before.get(name)
        return None if entry is None else entry.size

    def _check_output(self) -> None:
        self.destination.check_files(self.names, overwrite=self.replaces)

    def head(self) -> dict:
        new = {"upon": self.destination.parent} if self.destination.is_new else {}
        return {"pins": current_pins()} | new

    def holds(self, result: ShardResult) -> bool:
        return self._has_gone(result.file, result.sha256) or super().holds(result)

    def is_whole(self, files: Mapping[str, dict]) -> bool:
        left = {n: e for n, e in files.items() if not self._has_gone(n, e["sha256"])}
        return super().is_whole(left)

    def disk(self, size: int) -> int:
        return self.limit  # with the inputs, and never all together

    def begin(self) -> None:
        super().begin()
        self.destination.create()
        for adapter in self.converted:
            adapter.made()

    def note(self, entry: dict) -> None:
        with self._noting:  # of several threads
            super().note(entry)

    def forget(self) -> None:
        super().forget()
        self._gone = {}

    def gone(self) -> dict[str, Uploaded | CopiedFile]:
        """The files that the Hub's storage has, by name: sent, or taken from elsewhere there."""
        if self._gone is None:
            self._gone = {}
            for entry in self.journal():
                if "uploaded" in entry:
                    file = Uploaded(**entry["uploaded"])
                    self._gone[file.file] = file
                elif entry.get("copied") in self.copies:
                    self._gone[entry["copied"]] = self.copies[entry["copied"]]
        return self._gone

    def _has_gone(self, name: str, sha256: str | None) -> bool:
        """Whether the Hub has a file with this sha256; where that is not known, whether it has one
        of that name that is not here any more."""
        file = self.gone().get(name)
        if file is None or sha256 is None:
            return file is not None and not (self.path / name).exists()
        return file.sha256 == sha256

    def copied(self, file: CopiedFile) -> None:
        """Note a file that the Hub has taken from elsewhere."""
        self.note({"copied": file.file})
        self.gone()[file.file] = file

    def upload(self, files: list[LocalFile]) -> list[str]:
        """Send files together, and note those that the Hub keeps apart from git; their names."""
        sent = upload(self.destination.hub_id, files)
        for file in sent:
            self.note({"uploaded": file._asdict()})
            self.gone()[file.file] = file
        return [file.file for file in sent]

    def publish(self) -> None:
        """Send what is still here, and commit everything."""
        receipt = json.loads((self.path / RECEIPT).read_bytes())
        sums: dict[str, str | None] = {n: entry["sha256"] for n, entry in receipt["files"].items()}
        sums[self.destination.receipt_name] = None
        super().begin()  # to note what is sent now
        self.destination.create()
        there = {name for name, sha256 in sums.items() if self._has_gone(name, sha256)}
        here = [self._here(name, sums[name]) for name in sums if name not in there]
        sent = {name for group in groups(here) for name in self.upload(group)}
        large = [self.gone()[name] for name in sums if name in there | sent]
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
        self.discard()

    def _here(self, name: str, sha256: str | None) -> LocalFile:
        """A file of the stage, and no link to another; `Failed` where there is none."""
        here = RECEIPT if name == self.destination.receipt_name else name
        path = self.path / here
        size = size_below(self.path, here)
        if size is None:
            raise Failed(
                "the file is missing, or is a link",
                expected="the file that was made",
                where=str(path),
                hint="give --overwrite to begin again",
                code="AK701",
            )
        return LocalFile(name, path, size, sha256)
