"""The output of a plan as a folder, before it is there: what later plans are made from."""

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.checkpoint.overlay import Content, Copied, Overlay, Unmade
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from adapterkit.core.plan import OutputFile, Plan


def planned_folder(out: str, plan: "Plan", source: str) -> Overlay | None:
    """What a plan will write at `source`, which is its output or in it; None where sizes or small
    files depend on values, and for one file of a folder. `Refused` where it will write nothing
    there."""
    contents = planned_contents(plan)
    inner = source.removeprefix(out).strip("/:")
    if contents is None or inner in contents:  # a file, read with what lies beside it
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
    """The files that a plan will write; None where sizes or small files depend on values."""
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
            own = (its for file, its in metrics.items() if file.startswith(content.folder))
            contents[name] = content.content({k: v for its in own for k, v in its.items()}, 0)
        elif isinstance(content, CopyFile):
            contents[name] = Copied(plan.folders[content.folder], content.name)
        else:
            contents[name] = content
    return contents


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
