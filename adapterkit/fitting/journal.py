"""Evaluations that are kept until the fit is done, so that one that was interrupted goes on."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapterkit.checkpoint.disk import replace_file, storage_errors
from adapterkit.errors import Refused
from adapterkit.records import Json

JOB = "job.json"


@dataclass
class Journal:
    """A folder beside the output: what each point that was evaluated gave, by the point's bits.

    A fit is a function of what the evaluations give, so that one that is run again comes to the
    same points and finds them here."""

    folder: Path

    @classmethod
    def beside(cls, out: Path, job: Json, resume: bool) -> "Journal":
        """That of a job; `Refused` for another job's, unless the fit begins anew."""
        folder, text = out.with_name(f".{out.name}.fit"), json.dumps(job, sort_keys=True)
        before = folder / JOB
        if resume and before.exists() and before.read_text("utf-8") != text:
            raise Refused(
                "the interrupted fit was of another job",
                expected="the same base, adapters, data and options",
                where=str(out),
                hint="run without --resume to begin anew",
            )
        with storage_errors(folder):
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        replace_file(before, text.encode(), folder / f"{JOB}.part")
        return cls(folder)

    def of(self, what: str, c: Tensor, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `compute` gives at a point, float64: made now, or before."""
        from safetensors.torch import load, save

        digest = hashlib.sha256(what.encode() + c.double().numpy().tobytes()).hexdigest()
        path = self.folder / f"{digest[:32]}.safetensors"
        if path.exists():
            values = load(path.read_bytes())
            return [values[str(number)] for number in range(len(values))]
        results = compute()
        data = save({str(number): value.contiguous() for number, value in enumerate(results)})
        replace_file(path, data, path.with_suffix(".part"))
        return results

    def close(self) -> None:
        """The fit is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
