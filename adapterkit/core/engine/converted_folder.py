"""A folder that stands for a conversion: what an adapter in another tool's format is to a job."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.checkpoint.folder import Folder, LocalFolder
from adapterkit.core.checkpoint.overlay import Copied, Overlay, identities_of
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.engine.planned_folder import planned_contents
from adapterkit.core.errors import Refused
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from adapterkit.core.plan import Plan


@dataclass(frozen=True)
class Conversion:
    """Carries out the plan of a conversion into PEFT's layout."""

    plan: "Plan"

    def make(self, place: Path) -> Mapping[str, Copied]:
        # here, so that headers of models are read without torch
        from adapterkit.core.engine.local import local
        from adapterkit.core.execute import run
        from adapterkit.core.output.stage import Stage

        run(self.plan, Stage(place / "adapter"), local("cpu"), hash="none")
        folder = LocalFolder(place / "adapter")
        return {name: Copied(folder, name) for name in folder.files() if name != RECEIPT}

    def identities(self, name: str) -> dict[str, Identity]:
        from adapterkit.core.plan import CopyFile

        found, its = dict(self.plan.identities), self.plan.files.get(name)
        if isinstance(its, CopyFile):
            copied = identities_of(self.plan.folders[its.folder], its.name)
            found |= {(its.folder, file): one for file, one in copied.items()}
        return {f"source/{number}/{file}": one for (number, file), one in found.items()}


@dataclass(frozen=True)
class JobOutput(Conversion):
    """Carries out a job whose adapter is to be written in another layout."""

    metrics: dict[str, Json] = field(default_factory=dict)  # for the receipt of what is written

    def make(self, place: Path) -> Mapping[str, Copied]:
        files = super().make(place)
        self.metrics.update(read_json(LocalFolder(place / "adapter"), RECEIPT)["parameters"])
        return files


def converted_folder(
    source: Folder,
    form: str,
    file: str,  # the source's
    plan: "Plan",
    component: str = "",  # of the pipeline that the source is for
) -> Overlay:
    """An adapter in PEFT's layout whose headers and settings are those of the plan of its
    conversion, which is carried out when more is asked for."""
    origin = {**source.origin, "format": form, "file": file}
    origin |= {"component": component} if component else {}
    known = planned_contents(plan)
    return Overlay(source.name, source.label, origin, known, Conversion(plan), source)


def made_adapter(plan: "Plan") -> Overlay:
    """An adapter in PEFT's layout that a job makes to be written in another one."""
    source, origin = plan.folders[0], {"name": plan.verb}
    known = planned_contents(plan)
    return Overlay(plan.verb, source.label, origin, known, JobOutput(plan), source)


def conversion_of(folder: Folder) -> Conversion | None:
    """What makes a folder that stands for a conversion; None for others."""
    maker = getattr(folder, "maker", None)
    return maker if isinstance(maker, Conversion) else None


def check_added_deltas(folder: Folder) -> None:
    """`Refused` for a folder that has the file and did not make it: it would change modules that no
    other reader of the adapter sees."""
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


def conversion_notes(folders: Iterable[Folder]) -> list[str]:
    """What was noted while adapters of other formats were read."""
    own = ((folder, made) for folder in folders if (made := conversion_of(folder)))
    return [note for folder, made in own for note in made.plan.notes_of(folder.name)]
