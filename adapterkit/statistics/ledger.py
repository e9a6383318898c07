"""Which parts of a model are done: their sums lie in the work folder, and a resumed job leaves them
out."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.storage import storage_errors
from adapterkit.errors import Failed, Refused, shown
from adapterkit.statistics.lockstep import Gradients, Stage
from adapterkit.statistics.sums import Sums
from adapterkit.statistics.units import Unit
from adapterkit.statistics.work import SumsFile, remove
from adapterkit.tasks.rows import byte_view

JOB = "job.json"


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
                    "the work of another job",
                    expected="the same base, data and options",
                    where=str(work),
                    hint="run it without --resume",
                )
        elif work.exists() and any(work.iterdir()):
            if not file.exists():
                raise Refused(
                    "a folder with other files",
                    expected="a folder that is not there yet",
                    where=str(work),
                    hint="give another folder",
                )
            remove(work)
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(job)


class Ledger:
    """The files of the units' sums and gradients.

    A layer that the model uses several times is visited several times: its file has the sums so
    far, and how many visits they are of. The visits of a resumed job are the same.
    """

    def __init__(
        self,
        work: Path,
        sums: Callable[[], Sums],
        passes: int,
        is_transposed: Callable[[str], bool],
    ):
        self.work, self.new_sums, self.passes = work, sums, passes
        self.is_transposed = is_transposed
        self.files: dict[str, SumsFile] = {}
        self._visits = Counter[str]()

    def stage(self, unit: Unit, has_sums: bool, has_gradients: bool) -> Stage:
        """What is to be collected of a unit that the batches go through now."""
        return Stage(
            lambda: self._sums(unit) if has_sums else None,
            lambda: self._gradients(unit) if has_gradients else None,
        )

    def _visit(self, name: str) -> tuple[bool, SumsFile | None]:
        """Whether this visit is done, and the file so far."""
        self._visits[name] += 1
        if name not in self.files and (self.work / name).exists():
            self.files[name] = SumsFile.read(self.work, name)
        file = self.files.get(name)
        return file is not None and file.visits >= self._visits[name], file

    def _sums(self, unit: Unit) -> Sums | None:
        is_done, file = self._visit(_sums_name(unit))
        if is_done:
            return None
        sums = self.new_sums()
        sums.restore(file.sums() if file is not None else ())
        return sums

    def _gradients(self, unit: Unit) -> Gradients | None:
        is_done, file = self._visit(_gradients_name(unit))
        if is_done:
            return None
        if file is None:
            return {}
        return {module: self._oriented(module, file.gradient(module)) for module in file.gradients}

    def finish(self, unit: Unit, stage: Stage) -> None:
        """Write what a stage has collected."""
        collected = vars(stage)
        sums, gradients = collected.get("sums"), collected.get("gradients")
        if sums is not None:
            self._write(_sums_name(unit), sums, {})
        if gradients is not None:
            self._write(_gradients_name(unit), None, gradients)

    def _write(self, name: str, sums: Sums | None, gradients: Gradients) -> None:
        """`Failed` for what is not finite."""
        groups = []
        if sums is not None:
            sums.settle()
            groups = sums.groups
            for one in groups:
                one.check()
        for module, value in gradients.items():
            check_gradient(module, value)
        visits = self._visits[name]
        oriented = {module: self._oriented(module, value) for module, value in gradients.items()}
        self.files[name] = SumsFile.write(self.work, name, groups, oriented, visits, self.passes)

    def write_outside(self, stage: Stage) -> None:
        """Of layers outside the units."""
        if stage.sums is not None or stage.gradients is not None:
            self._write("outside.safetensors", stage.sums, stage.gradients or {})

    def _oriented(self, module: str, gradient: Tensor) -> Tensor:
        """(out, in) of a gradient as the model has it, and the other way round."""
        return gradient.T if self.is_transposed(module) else gradient


def _sums_name(unit: Unit) -> str:
    return f"{unit.order:06}.sums.safetensors"


def _gradients_name(unit: Unit) -> str:
    return f"{unit.order:06}.gradients.safetensors"


def check_gradient(module: str, value: Tensor) -> None:
    """`Failed` for a gradient that is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise Failed(
            f"gradients of {shown(module)} that are not finite",
            expected="numbers",
            where="collect",
            hint="run the model in float32 or bfloat16",
        )
