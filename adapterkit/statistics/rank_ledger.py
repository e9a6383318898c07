"""The files of the units' sums that several processes make of one job.

Each process lets all batches through the model. At a unit that is done, or that another one is at,
they go through without being summed, so processes leapfrog. A file is the same bytes whoever makes
it; a later visit of a unit has a file of its own, so no file is ever changed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from adapterkit.checkpoint.disk import storage_errors, sync_folder
from adapterkit.checkpoint.output.file_result import ShardResult
from adapterkit.checkpoint.output.rank_stage import RankStage
from adapterkit.engines.ranks.rank import Liveness, Marks
from adapterkit.statistics.job import CollectionJob
from adapterkit.statistics.ledger import OUTSIDE, WHOLE, Ledger
from adapterkit.statistics.model.layers import Unit
from adapterkit.statistics.model.lockstep import Gradients, UnitSums
from adapterkit.statistics.sums import Sum
from adapterkit.statistics.sums_files import SumsFile

FOLDER = "work"  # in the stage, as of a single process
VISIT = re.compile(r"\d{6,}(-\d+)?\.(sums|gradients)\.safetensors")


def path_of(name: str) -> str:
    """A file of sums as a file of the stage."""
    return f"{FOLDER}/{name}"


def visit_name(name: str, number: int) -> str:
    """The file of a unit's sums after so many visits."""
    return name if number == 1 else name.replace(".", f"-{number}.", 1)


def names_of(stage: RankStage, foreseen: Sequence[str]) -> list[str] | None:
    """The files that make up the statistics, in their order; None until a process has come to the
    end of the model, which notes how often it came to each unit."""
    if WHOLE in foreseen:
        return [WHOLE]
    entry = stage.marker(path_of(OUTSIDE))
    if entry is None:
        return None
    visits = entry["shard"]["metrics"]
    return [*(visit_name(name, visits[name]["visits"]) for name in sorted(visits)), OUTSIDE]


def accepts(result: ShardResult) -> bool:
    """Whether a result that was noted is of a file of sums."""
    name = result.file.removeprefix(f"{FOLDER}/")
    return name in (OUTSIDE, WHOLE) or VISIT.fullmatch(name) is not None


class SumsShare:
    """What one process knows of the files, and which of them it takes."""

    def __init__(
        self,
        stage: RankStage,
        marks: Marks,
        foreseen: Sequence[str],
        check_inputs: Callable[[], None],
    ):
        self.stage, self.marks, self.foreseen = stage, marks, foreseen
        self.folder: Path = stage.path / FOLDER
        self.watch = Liveness(stage)
        self.passed_by = False  # a file, since others are at it
        self._check_inputs = check_inputs
        self._done: set[str] = set()

    def todo(self) -> Iterator[str]:
        """The files without a marker, as far as they are known, the last of a pass first."""
        names = names_of(self.stage, self.foreseen) or self.foreseen
        return (name for name in reversed(names) if not self.is_done(name))

    def has_free(self) -> bool:
        """Whether there is a file to make that no other living process is at."""
        return any(not self.watch.alive(path_of(name)) for name in self.todo())

    def others_are_at(self, names: Iterable[str]) -> bool:
        """Whether others have been seen to live at all of these files."""
        return all(self.watch.advancing(path_of(name)) for name in names)

    def is_done(self, name: str) -> bool:
        """Whether a file has a marker."""
        if name not in self._done and self.stage.marker(path_of(name)) is not None:
            self._done.add(name)
        return name in self._done

    def take(self, name: str, before: str | None = None) -> bool:
        """Whether this process makes a file, which others see from now on; `before`: what it goes
        on from."""
        self.marks.check_spoiled()
        if self.is_done(name):
            return False
        if self.watch.alive(path_of(name)) or (before is not None and not self.is_done(before)):
            self.passed_by = True
            return False
        self.stage.claim(path_of(name))
        return True

    def write(
        self,
        name: str,
        sums: list[Sum],
        gradients: Gradients,
        visits: int,
        passes: int,
        metrics: dict[str, dict],
    ) -> None:
        """Make a file, and note it; `Unrecoverable` where an input has changed."""
        self._check_inputs()
        attempt = self.stage.attempt
        SumsFile.write(self.folder, name, sums, gradients, visits, passes, attempt)
        with storage_errors(self.folder / name):
            sync_folder(self.folder)
            size = (self.folder / name).stat().st_size
        self.marks.note(ShardResult(path_of(name), size, None, None, metrics))
        self._done.add(name)


class RankLedger(Ledger):
    """The ledger of one pass of one process."""

    def __init__(self, job: CollectionJob, share: SumsShare):
        super().__init__(share.folder, job)
        self.share = share
        share.passed_by = False
        if not job.is_whole:
            self.share.take(OUTSIDE)  # as it is summed all the way

    def wants_whole(self) -> bool:
        return self.share.take(WHOLE)

    def stage(self, unit: Unit) -> UnitSums | None:
        self.share.marks.check_spoiled()
        return super().stage(unit) if self.share.has_free() else None

    def _visit(self, name: str) -> tuple[bool, SumsFile | None]:
        self._visits[name] += 1
        number = self._visits[name]
        before = visit_name(name, number - 1) if number > 1 else None
        if not self.share.take(visit_name(name, number), before):
            return True, None
        return False, SumsFile.read(self.work, before) if before else None

    def _write(self, name: str, sums: list[Sum], gradients: Gradients, passes: int) -> None:
        visits, metrics = self._visits[name], {}
        if name == OUTSIDE:
            metrics = {name: {"visits": count} for name, count in self._visits.items() if count}
        file = visit_name(name, visits or 1)
        self.share.write(file, sums, gradients, visits, passes, metrics)

    def write_outside(self, stage: UnitSums) -> None:
        """Also where nothing is outside: the file says that this pass came to the end."""
        if not self.share.is_done(OUTSIDE):
            self._collect(OUTSIDE, stage.sums, stage.gradients or {})
