"""The output of a plan as a folder, before it is there: what later plans are made from."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import Refused, shown
from adapterkit.records import Json

if TYPE_CHECKING:
    from adapterkit.plan import OutputFile, Plan


@dataclass(frozen=True)
class _Weights:
    """A file of weights, of which the header is known."""

    header: bytes
    size: int


@dataclass(frozen=True)
class _Copied:
    """A file as another folder has it."""

    folder: Folder
    name: str


_File = bytes | _Weights | _Copied


class PlannedFolder:
    """A folder that a plan will write; a `Folder`, and a path for the options of verbs.

    Headers of weights and small files can be read. For what is behind a header there is `Refused`,
    and `asked_for_values` is true from then on, also where the caller goes on without.
    """

    def __init__(self, path: str | os.PathLike, files: Mapping[str, _File], asked: list[str]):
        self._path, self._contents, self._asked = os.fspath(path), files, asked
        self.label = shown(self._path)
        self.name = shown(Path(path).name)
        self.origin: Json = {"name": self.name}
        self.hashes: dict[str, str] = {}

    def __fspath__(self) -> str:
        return self._path

    @property
    def asked_for_values(self) -> bool:
        return bool(self._asked)

    def subfolder(self, name: str) -> "PlannedFolder":
        """A folder inside this one."""
        inside = {
            file.removeprefix(f"{name}/"): content
            for file, content in self._contents.items()
            if file.startswith(f"{name}/")
        }
        return PlannedFolder(os.path.join(self._path, name), inside, self._asked)

    def without(self, names: Collection[str]) -> "PlannedFolder":
        """It as if these files were not there."""
        kept = {name: one for name, one in self._contents.items() if name not in names}
        return PlannedFolder(self._path, kept, self._asked)

    def files(self) -> dict[str, int]:
        return {name: _size(content) for name, content in self._contents.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; of weights those of the header, when read from the
        start."""
        content = self._contents[name]
        if isinstance(content, _Copied):
            return content.folder.read(content.name, start, stop)
        if isinstance(content, bytes):
            return content[start:stop]
        if start == 0:
            return content.header[:stop]
        raise self._not_written(name)

    def path(self, name: str) -> Path:
        content = self._contents[name]
        if isinstance(content, _Copied):
            return content.folder.path(content.name)
        raise self._not_written(name)

    def prefetch(self, names: list[str]) -> None:
        pass

    def _not_written(self, name: str) -> Refused:
        self._asked.append(name)
        return Refused(
            "the values are not written yet",
            expected="a plan from headers",
            where=f"{self.label}/{name}",
            hint="plan it when the step before is done",
        )


def planned_folder(out: str, plan: "Plan", source: str) -> PlannedFolder | None:
    """What a plan will write at `source`, which is its output or in it; None where sizes or small
    files depend on values, and for one file of a folder. `Refused` where it will write nothing
    there."""
    # here, so that headers of models are read without torch
    from adapterkit.plan import CopyFile, FromMetrics

    metrics: dict[str, dict[str, Json]] = {}  # by file
    contents: dict[str, _File] = {}
    for shard in plan.shards:
        planned = _planned_metrics(shard)
        if planned is None:
            return None
        metrics[shard.file] = planned
        contents[shard.file] = _Weights(shard.layout.header, shard.layout.size)
    for name, content in plan.written_files().items():
        if isinstance(content, FromMetrics):
            own = (its for file, its in metrics.items() if file.startswith(content.folder))
            contents[name] = content.content({k: v for its in own for k, v in its.items()}, 0)
        elif isinstance(content, CopyFile):
            contents[name] = _Copied(plan.folders[content.folder], content.name)
        else:
            contents[name] = content
    inner = source.removeprefix(out).strip("/:")
    if inner in contents:  # read with what lies beside it
        return None
    folder = PlannedFolder(out, contents, [])
    folder = folder.subfolder(inner) if inner else folder
    if not folder.files():
        inside = sorted({name.rpartition("/")[0] for name in contents} - {""})
        raise Refused(
            f"there is no folder {shown(inner)} in what is written there",
            expected=f"the output itself{' or '.join(['', *map(shown, inside)])}",
            where=shown(source),
            hint="check the path",
        )
    return folder


def _planned_metrics(file: "OutputFile") -> dict[str, Json] | None:
    """The metrics of a file's tasks, as far as small files need them; None where values decide
    about its header."""
    if file.sizes_are_planned:
        return None if file.variable_size else {}
    if file.finalize is not None:
        return None
    metrics = {task.name: task.planned_metrics for task in file.tasks}
    known = {name: metric for name, metric in metrics.items() if metric is not None}
    return known if len(known) == len(metrics) else None


def _size(content: _File) -> int:
    if isinstance(content, _Copied):
        return content.folder.files()[content.name]
    return len(content) if isinstance(content, bytes) else content.size
