"""Inputs of a job whose output is on the Hub, in folders of the job: weights file by file, and
converted adapters of other tools."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.scratch import ScratchFolder, in_scratch
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.overlay import Copied, Overlay
from adapterkit.core.checkpoint.reader import FAR
from adapterkit.core.engine.interruptible import run_stoppable
from adapterkit.core.engine.planned_folder import Conversion, conversion_of, planned_contents
from adapterkit.core.plan import HANDOFF_FOLDER, OutputFile, Plan
from adapterkit.core.weights.codec import stored_parts

Input = tuple[int, str]  # the folder's number and the file
CONVERTED, SOURCES = "converted", "sources"  # folders
MOST_PARTS = 64  # ranges of one file, each a request or more


def plan_in_scratch(plan: Plan, place: Path) -> Plan:
    """The plan with the large Hub files of its inputs in a folder of the job, and converted
    adapters in another, because they stay to the end."""
    folders: list[Folder] = []
    for number, folder in enumerate(plan.folders):
        conversion, kept = conversion_of(folder), place.with_name(CONVERTED) / str(number)
        if conversion is None:
            folders.append(in_scratch(folder, place / str(number)))
            continue
        sources = tuple(
            in_scratch(source, kept / SOURCES / str(n))
            for n, source in enumerate(conversion.plan.folders)
        )
        its = replace(conversion.plan, folders=sources)
        maker = ConversionInScratch(its, kept)
        folders.append(replace(cast(Overlay, folder), known=planned_contents(its), maker=maker))
    return replace(plan, folders=tuple(folders))


def plan_in_parts(plan: Plan) -> Plan:
    """The plan without the unread tensors of its Hub files, if these are most of them: for example,
    one component is read of several."""
    wanted: dict[int, dict[str, list[TensorSpec]]] = {}
    for file in plan.shards:
        for part in _parts_read(file):
            wanted.setdefault(part.folder, {}).setdefault(part.file, []).append(part)
    folders = list(plan.folders)
    for number, files in wanted.items():
        folder = folders[number]
        if isinstance(folder, HubFolder):
            parts = {name: _ranges(specs) for name, specs in files.items() if name in folder.hashes}
            folders[number] = folder.only(
                {
                    name: ranges
                    for name, ranges in parts.items()
                    if len(ranges) <= MOST_PARTS
                    and 2 * sum(b - a for a, b in ranges) <= folder.files()[name]
                }
            )
    return replace(plan, folders=tuple(folders))


def _ranges(specs: list[TensorSpec]) -> list[tuple[int, int]]:
    """The byte ranges of tensors in a file; nearby ones are joined."""
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted((spec.start, spec.stop) for spec in specs):
        if ranges and start <= ranges[-1][1] + FAR:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((start, stop))
    return ranges


def inputs_of(file: OutputFile) -> list[Input]:
    """The input files that an output file reads, each once, in reading order."""
    return list(dict.fromkeys((part.folder, part.file) for part in _parts_read(file)))


def _parts_read(file: OutputFile) -> Iterator[TensorSpec]:
    """The stored tensors that an output file reads."""
    for spec in file.reads:
        for part in stored_parts(spec):
            if part.folder != HANDOFF_FOLDER:
                yield part


@dataclass(frozen=True)
class ConversionInScratch(Conversion):
    """A conversion that stays to the end of the job; its source is removed afterwards."""

    place: Path

    @property
    def download_size(self) -> int:
        """Bytes that it downloads."""
        return sum(folder.disk(name) for folder, name in self._inputs())

    def _inputs(self) -> list[tuple[ScratchFolder, str]]:
        inputs = [each for file in self.plan.shards for each in inputs_of(file)]
        folders = [(self.plan.folders[number], name) for number, name in inputs]
        return [(folder, name) for folder, name in folders if isinstance(folder, ScratchFolder)]

    def make(self, place: Path) -> Mapping[str, Copied]:
        shutil.rmtree(self.place, ignore_errors=True)  # of a run that was stopped
        run_stoppable(self._download)
        files = super().make(self.place)
        shutil.rmtree(self.place / SOURCES)
        return files

    def _download(self, stopped: Callable[[], bool]) -> None:
        """Fetch the sources."""
        for folder, name in self._inputs():
            if folder.disk(name):
                folder.download(name, stopped)


def conversions_in(plan: Plan) -> list[tuple[Overlay, ConversionInScratch]]:
    """The inputs of a plan that are converted in folders of the job, with their conversions."""
    makers = ((folder, conversion_of(folder)) for folder in plan.folders)
    return [
        (cast(Overlay, folder), maker)
        for folder, maker in makers
        if isinstance(maker, ConversionInScratch)
    ]
