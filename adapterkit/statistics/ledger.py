"""Which parts of a model are done: their sums lie in the work folder, and a resumed job leaves them
out."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.disk import storage_errors
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Failed, Refused, shown
from adapterkit.statistics.job import CollectionJob
from adapterkit.statistics.model.layers import Unit, is_within
from adapterkit.statistics.model.lockstep import Gradients, UnitSums
from adapterkit.statistics.sums import Sum, Sums
from adapterkit.statistics.sums_files import SumsFile, remove
from adapterkit.tasks.rows import byte_view

JOB = "job.json"
OUTSIDE, WHOLE = "outside.safetensors", "whole.safetensors"


def fingerprint(
    base: Checkpoint, batches: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]
) -> str:
    """What tells two jobs apart: the base's headers and config, the data, the options."""
    digest = hashlib.sha256()
    heads = {name: header.sha256 for name, header in base.shards.items()}
    digest.update(json.dumps([heads, base.config, options], sort_keys=True, default=str).encode())
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(byte_view(value))
    return digest.hexdigest()


def open_work(work: Path, job: str, resume: bool) -> None:
    """Make the work folder of a job; `Refused` where --resume finds one of another job."""
    file = work / JOB
    with storage_errors(work):
        if resume and file.exists():
            if file.read_text() != job:
                raise Refused(
                    "this is the work of another job",
                    expected="the same base, data and options",
                    where=str(work),
                    hint="run it without --resume",
                )
        elif work.exists() and any(work.iterdir()):
            if not file.exists():
                raise Refused(
                    "the folder has other files",
                    expected="a folder that is not there yet",
                    where=str(work),
                    hint="give another folder",
                )
            remove(work)
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(job)


class Ledger:
    """The files of the units' sums and gradients, in the work folder of one process.

    A layer that the model uses several times is visited several times: its file has the sums so
    far, and how many visits they are of. The visits of a resumed job are the same.
    """

    def __init__(self, work: Path, job: CollectionJob):
        self.work, self.job = work, job
        self._files: dict[str, SumsFile] = {}
        self._visits = Counter[str]()

    @property
    def files(self) -> list[SumsFile]:
        """What was written, or found, in the order of the statistics."""
        return [self._files[name] for name in sorted(self._files)]

    def wants_whole(self) -> bool:
        """Whether the sums of a model that is run whole are still to be made."""
        return True

    def stage(self, unit: Unit) -> UnitSums | None:
        """What is to be collected of a unit that the batches go through now; None where nothing is
        left to collect, of it and of all that follow."""
        return UnitSums(
            lambda: self._sums(unit) if has_sums(self.job, unit) else None,
            lambda: self._gradients(unit) if has_gradients(self.job, unit) else None,
        )

    def _visit(self, name: str) -> tuple[bool, SumsFile | None]:
        """Whether this visit is done, and the file so far."""
        self._visits[name] += 1
        if name not in self._files and (self.work / name).exists():
            self._files[name] = SumsFile.read(self.work, name)
        file = self._files.get(name)
        return file is not None and file.visits >= self._visits[name], file

    def _sums(self, unit: Unit) -> Sums | None:
        is_done, file = self._visit(sums_name(unit))
        if is_done:
            return None
        sums = self.job.sums()
        sums.restore(file.sums() if file is not None else ())
        return sums

    def _gradients(self, unit: Unit) -> Gradients | None:
        is_done, file = self._visit(gradients_name(unit))
        if is_done:
            return None
        if file is None:
            return {}
        return {module: self._oriented(module, file.gradient(module)) for module in file.gradients}

    def finish(self, unit: Unit, stage: UnitSums) -> None:
        """Write what a stage has collected."""
        collected = vars(stage)
        sums, gradients = collected.get("sums"), collected.get("gradients")
        if sums is not None:
            self._collect(sums_name(unit), sums, {})
        if gradients is not None:
            self._collect(gradients_name(unit), None, gradients)

    def _collect(self, name: str, sums: Sums | None, gradients: Gradients) -> None:
        """`Failed` for what is not finite."""
        groups = []
        if sums is not None:
            sums.settle()
            groups = sums.groups
            for one in groups:
                one.check()
        for module, value in gradients.items():
            check_gradient(module, value)
        oriented = {module: self._oriented(module, value) for module, value in gradients.items()}
        self._write(name, groups, oriented, len(self.job.batches))

    def _write(self, name: str, sums: list[Sum], gradients: Gradients, passes: int) -> None:
        """Keep the sums of a visit, of gradients over so many backward passes."""
        visits = self._visits[name]
        self._files[name] = SumsFile.write(self.work, name, sums, gradients, visits, passes)

    def write_outside(self, stage: UnitSums) -> None:
        """Of layers outside the units, when all batches have gone through the model."""
        if stage.sums is not None or stage.gradients is not None:
            self._collect(OUTSIDE, stage.sums, stage.gradients or {})

    def write_whole(self, sums: Sums, gradients: Gradients) -> None:
        """Of a model that was run whole: the sums, and means of gradients (out, in)."""
        self._visits[WHOLE] = 1
        self._write(WHOLE, sums.groups, gradients, 1)

    def _oriented(self, module: str, gradient: Tensor) -> Tensor:
        """(out, in) of a gradient as the model has it, and the other way round."""
        return gradient.T if self.job.is_transposed(module) else gradient


def has_sums(job: CollectionJob, unit: Unit) -> bool:
    """Whether a unit has layers whose inputs are summed."""
    return bool(job.inputs) and any(is_within(name, [unit.name]) for name in job.watched)


def has_gradients(job: CollectionJob, unit: Unit) -> bool:
    """Whether a unit has layers whose gradients are summed."""
    return job.gradients and any(is_within(name, [unit.name]) for name in job.targets)


def foreseen(job: CollectionJob) -> tuple[str, ...]:
    """Names of a job's files, in the order of a pass, if the model calls each layer once."""
    if job.is_whole:
        return (WHOLE,)
    units = job.units.outer
    sums = [sums_name(unit) for unit in units if has_sums(job, unit)]
    gradients = [gradients_name(unit) for unit in reversed(units) if has_gradients(job, unit)]
    return (*sums, *gradients, OUTSIDE)


def sums_name(unit: Unit) -> str:
    return f"{unit.order:06}.sums.safetensors"


def gradients_name(unit: Unit) -> str:
    return f"{unit.order:06}.gradients.safetensors"


def check_gradient(module: str, value: Tensor) -> None:
    """`Failed` for a gradient that is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise Failed(
            f"gradients of {shown(module)} are not finite",
            expected="numbers",
            where="collect",
            hint="run the model in float32 or bfloat16",
        )
