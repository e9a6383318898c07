"""A folder that stands for a conversion: what an adapter in another tool's format is to a job."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.keys import ADDED_DELTAS, WEIGHTS
from adapterkit.checkpoint.folder import Folder, LocalFolder, temporary_folder
from adapterkit.checkpoint.header import FIRST_READ
from adapterkit.checkpoint.output.stage import RECEIPT
from adapterkit.checkpoint.strict import read_json
from adapterkit.engines.planned_folder import PlannedFolder, planned_folder
from adapterkit.errors import Refused
from adapterkit.records import Json

if TYPE_CHECKING:
    from adapterkit.plan import Plan


@dataclass(eq=False)
class ConvertedFolder:
    """A conversion into PEFT's layout: its headers and settings are those of its plan. It is
    carried out in a temporary folder when more is asked for."""

    source: Folder
    form: str
    file: str  # the source's
    plan: "Plan"
    component: str = ""  # of the pipeline that the source is for
    name: str = field(init=False)
    label: str = field(init=False)
    origin: Json = field(init=False)  # the source's, with the format that it was in
    hashes: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.label = self.source.name, self.source.label
        self.origin = {**self.source.origin, "format": self.form, "file": self.file}
        if self.component:
            self.origin["component"] = self.component
        self._lock = threading.Lock()
        self._made: LocalFolder | None = None

    def __reduce__(self) -> tuple:
        return ConvertedFolder, (self.source, self.form, self.file, self.plan, self.component)

    @cached_property
    def _planned(self) -> PlannedFolder | None:
        return planned_folder(self.label, self.plan, self.label)

    def made(self) -> LocalFolder:
        """The folder on disk, converted if it is not yet."""
        with self._lock:
            if self._made is None:
                self._made = self._convert(temporary_folder(self) / "adapter")
            return self._made

    def _convert(self, place: Path) -> LocalFolder:
        # here, so that headers of models are read without torch
        from adapterkit.checkpoint.output.stage import Stage
        from adapterkit.engines.local.engine import local
        from adapterkit.execute import run

        run(self.plan, Stage(place), local("cpu"), hash="none")
        return LocalFolder(place)

    def files(self) -> dict[str, int]:
        folder = self._planned or self.made()
        return {name: size for name, size in folder.files().items() if name != RECEIPT}

    def read(self, name: str, start: int, stop: int) -> bytes:
        if self._planned is None or self._made is not None:
            return self.made().read(name, start, stop)
        headers = {shard.file: shard.layout.header for shard in self.plan.shards}
        if name not in headers:
            return self._planned.read(name, start, stop)
        header = headers[name]
        is_header = start == 0 and stop <= max(FIRST_READ, len(header))
        if is_header or stop <= len(header):
            return header[start:stop]
        return self.made().read(name, start, stop)

    def path(self, name: str) -> Path:
        return self.made().path(name)

    def prefetch(self, names: list[str]) -> None:
        pass


class MadeAdapter(ConvertedFolder):
    """An adapter in PEFT's layout that a job makes to be written in another one."""

    def __init__(self, plan: "Plan"):
        super().__init__(plan.folders[0], "peft", WEIGHTS, plan)
        self.name, self.origin = plan.verb, {"name": plan.verb}
        self.metrics: dict[str, Json] = {}  # of the job, for the receipt of what is written

    def __reduce__(self) -> tuple:
        return MadeAdapter, (self.plan,)

    def _convert(self, place: Path) -> LocalFolder:
        folder = super()._convert(place)
        self.metrics = read_json(folder, RECEIPT)["parameters"]
        return folder


def check_added_deltas(folder: Folder) -> None:
    """`Refused` for a folder that has the file and did not make it: it would change modules that no
    other reader of the adapter sees."""
    is_made = isinstance(folder, ConvertedFolder) and ADDED_DELTAS in (
        s.file for s in folder.plan.shards
    )
    if ADDED_DELTAS in folder.files() and not is_made:
        raise Refused(
            f"{ADDED_DELTAS} is a file that adapterkit alone makes, and never keeps",
            expected="an adapter without it",
            where=folder.label,
            hint="do not trust this adapter; without the file it does what other programs show",
        )


def conversion_notes(folders: Iterable[Folder]) -> list[str]:
    """What was noted while adapters of other formats were read."""
    own = (folder for folder in folders if isinstance(folder, ConvertedFolder))
    return [note for folder in own for note in folder.plan.notes_of(folder.name)]
