"""Folders that do not exist yet: the output of a plan, from which later plans are made, and the
conversion of an adapter in another tool's format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.checkpoint.folder import Folder, LocalFolder
from adapterkit.core.checkpoint.overlay import Content, Copied, Overlay, Unmade, identities_of
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import Refused, shown
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from adapterkit.core.plan import OutputFile, Plan


def planned_folder(out: str, plan: "Plan", source: str) -> Overlay | None:
    """Return the files that a plan will write at `source`, its output or a folder in it; None if
    sizes or small files depend on values, or for one file of a folder. `Refused` if it will write
    nothing there."""
    contents = planned_contents(plan)
    inner = source.removeprefix(out).strip("/:")
    if contents is None or inner in contents:  # a file, which is read with its neighbors
        return None
    name = shown(Path(out).name)
    folder = Overlay(name, shown(out), {"name": name}, contents, place=out)
    folder = folder.subfolder(inner) if inner else folder
    if not folder.files():
        inside = sorted({name.rpartition("/")[0] for name in contents} - {""})
        raise Refused(
            f"there is no folder {shown(inner)} in what is written there",
            expected=f"the output itself{' or '.join(['', *map(shown, inside)])}",
            where=shown(source),
            hint="check the path",
            code="AK111",
        )
    return folder


def planned_contents(plan: "Plan") -> dict[str, Content] | None:
    """Return the files that a plan will write; None if sizes or small files depend on values."""
    # here, so that headers of models are read without torch
    from adapterkit.core.plan import CopyFile, FromMetrics

    metrics: dict[str, dict[str, Json]] = {}  # by file
    contents: dict[str, Content] = {}
    for shard in plan.shards:
        planned = _planned_metrics(shard)
        if planned is None:
            return None
        metrics[shard.file] = planned
        contents[shard.file] = Unmade(shard.layout.header, shard.layout.size)
    for name, content in plan.written_files().items():
        if isinstance(content, FromMetrics):
            own = (table for file, table in metrics.items() if file.startswith(content.folder))
            contents[name] = content.content({k: v for table in own for k, v in table.items()}, 0)
        elif isinstance(content, CopyFile):
            contents[name] = Copied(plan.folders[content.folder], content.name)
        else:
            contents[name] = content
    return contents


def _planned_metrics(file: "OutputFile") -> dict[str, Json] | None:
    """Return the metrics of a file's tasks that small files need; None if its header depends on
    values."""
    if file.sizes_are_planned:
        return None if file.variable_size else {}
    if file.finalize is not None:
        return None
    metrics = {task.name: task.planned_metrics for task in file.tasks}
    known = {name: metric for name, metric in metrics.items() if metric is not None}
    return known if len(known) == len(metrics) else None


@dataclass(frozen=True)
class Conversion:
    """Executes the plan of a conversion into PEFT's layout."""

    plan: "Plan"

    def make(self, place: Path) -> Mapping[str, Copied]:
        # here, so that headers of models are read without torch
        from adapterkit.core.engine.local import local
        from adapterkit.core.execute import run
        from adapterkit.core.output.folder_output import FolderOutput
        from adapterkit.core.output.stage import Stage

        run(self.plan, Stage(FolderOutput(place / "adapter")), local("cpu"), hash="none")
        folder = LocalFolder(place / "adapter")
        return {name: Copied(folder, name) for name in folder.files() if name != RECEIPT}

    def identities(self, name: str) -> dict[str, Identity]:
        from adapterkit.core.plan import CopyFile

        found, content = dict(self.plan.identities), self.plan.files.get(name)
        if isinstance(content, CopyFile):
            copied = identities_of(self.plan.folders[content.folder], content.name)
            found |= {(content.folder, file): one for file, one in copied.items()}
        return {f"source/{number}/{file}": one for (number, file), one in found.items()}


@dataclass(frozen=True)
class JobOutput(Conversion):
    """Executes a job whose adapter is to be written in another layout."""

    metrics: dict[str, Json] = field(default_factory=dict)  # for the receipt of the written adapter

    def make(self, place: Path) -> Mapping[str, Copied]:
        files = super().make(place)
        self.metrics.update(read_json(LocalFolder(place / "adapter"), RECEIPT)["parameters"])
        return files


def converted_folder(
    source: Folder,
    format: str,
    file: str,  # the source's
    plan: "Plan",
    component: str = "",  # the pipeline's component that the source changes
) -> Overlay:
    """Return an adapter in PEFT's layout, whose headers and settings come from the plan of its
    conversion. The conversion runs when anything else is read."""
    origin = {**source.origin, "format": format, "file": file}
    origin |= {"component": component} if component else {}
    known = planned_contents(plan)
    return Overlay(source.name, source.label, origin, known, Conversion(plan), source)


def made_adapter(plan: "Plan") -> Overlay:
    """Return an adapter in PEFT's layout that a job makes, to be written in another one."""
    source, origin = plan.folders[0], {"name": plan.verb}
    known = planned_contents(plan)
    return Overlay(plan.verb, source.label, origin, known, JobOutput(plan), source)


def conversion_of(folder: Folder) -> Conversion | None:
    """Return the conversion behind a folder; None for other folders."""
    maker = getattr(folder, "maker", None)
    return maker if isinstance(maker, Conversion) else None


def check_added_deltas(folder: Folder) -> None:
    """Refuse a folder that contains the file of added deltas but was not made here, because it
    would change modules that no other reader of the adapter sees."""
    conversion = conversion_of(folder)
    is_made = conversion and ADDED_DELTAS in (shard.file for shard in conversion.plan.shards)
    if ADDED_DELTAS in folder.files() and not is_made:
        raise Refused(
            f"{ADDED_DELTAS} is a file that adapterkit alone makes, and never keeps",
            expected="an adapter without it",
            where=folder.label,
            hint="do not trust this adapter; without the file it does what other programs show",
            code="AK114",
        )
