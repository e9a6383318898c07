"""The stage of an output that goes to the Hub: files leave it as they are finished, and one commit
publishes them."""

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path

from adapterkit.checkpoint.stage import RECEIPT, Stage
from adapterkit.hub.destination import Destination
from adapterkit.hub.folder import HubFolder
from adapterkit.hub.ids import HubId
from adapterkit.hub.pins import Pins, current_pins
from adapterkit.hub.upload import CopiedFile, LocalFile, Uploaded, commit, groups, upload

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
    return dict(journal[0].get("pins", {})) if journal else {}


class HubStage(Stage):
    """A `Stage` whose output is a place on the Hub.

    The journal has, besides the finished shards, `{"uploaded": ...}` for files that the Hub's
    storage has, and `{"copied": ...}` for those that it has taken from another repository. `limit`:
    bytes of disk that the job takes at most.
    """

    def __init__(self, work: Path, destination: Destination, limit: int):
        super().__init__(work)
        self.destination, self.limit = destination, limit
        self.inputs = self.control / INPUTS
        self.pushed: dict[str, str] = {}
        self._noting = threading.Lock()
        self._gone: dict[str, Uploaded | CopiedFile] | None = None  # once the journal is read

    def state(self, fingerprint: str, *, resume: bool, overwrite: bool) -> str:
        """As of a folder; what another job left on the Hub is replaced by the commit."""
        entries = self.journal()
        receipt = entries[-1].get("publish") if entries else None
        there = self._published()
        if resume and receipt is not None and hashlib.sha256(there).hexdigest() == receipt:
            return "finished"  # the answer to its commit was lost
        is_same = self.published().get("fingerprint") == fingerprint
        return super().state(
            fingerprint, resume=resume and bool(entries or is_same), overwrite=overwrite
        )

    def published(self) -> dict:
        try:
            data = json.loads(self._published())
        except ValueError:
            return {}
        return data if isinstance(data, dict) else {}

    def _published(self) -> bytes:
        entry, hub_id = self.destination.before.get(RECEIPT), self.destination.hub_id
        if entry is None:
            return b""
        there = HubFolder(HubId(hub_id.repo, self.destination.parent, hub_id.subfolder))
        return there.read(RECEIPT, 0, entry.size)

    def head(self) -> dict:
        return {"pins": current_pins()}

    def holds(self, name: str, size: int) -> bool:
        return name in self.gone() or super().holds(name, size)

    def disk(self, size: int) -> int:
        return self.limit  # with the inputs, and never all together

    def begin(self) -> None:
        super().begin()
        self.destination.create()

    def note(self, entry: dict) -> None:
        with self._noting:  # of several threads
            super().note(entry)

    def forget(self) -> None:
        super().forget()
        self._gone = {}

    def gone(self) -> dict[str, Uploaded | CopiedFile]:
        """The files that the Hub's storage has, by name: sent, or taken from elsewhere there."""
        if self._gone is None:
            entries = self.journal()
            sent = [Uploaded(**entry["uploaded"]) for entry in entries if "uploaded" in entry]
            copied = [CopiedFile(**entry["copied"]) for entry in entries if "copied" in entry]
            self._gone = {file.file: file for file in (*sent, *copied)}
        return self._gone

    def copied(self, file: CopiedFile) -> None:
        """Note a file that the Hub has taken from elsewhere."""
        self.note({"copied": file._asdict()})
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
        sums = {name: entry["sha256"] for name, entry in receipt["files"].items()}
        self.send({**sums, RECEIPT: None})

    def send(self, sums: Mapping[str, str | None]) -> None:
        """Send those of the files that are still here, and commit all; `sums`: the sha256 of each
        where it is known."""
        self.destination.create()
        here = [
            LocalFile(name, self.path / name, (self.path / name).stat().st_size, sha256)
            for name, sha256 in sums.items()
            if name not in self.gone()
        ]
        sent = {name for group in groups(here) for name in self.upload(group)}
        made = commit(
            self.destination,
            [file for file in self.gone().values() if isinstance(file, Uploaded)],
            [file for file in self.gone().values() if isinstance(file, CopiedFile)],
            [file for file in here if file.name not in sent],
        )
        repo = self.destination.hub_id.repo
        self.pushed = {"repo": repo, "revision": made.oid, "url": made.url}
        self.discard()
