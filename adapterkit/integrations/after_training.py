"""Follow-up jobs for a trained adapter: a page, other formats, a merged model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.adapters.formats.convert import convert
from adapterkit.core.errors import Refused
from adapterkit.core.merge.verb import merge
from adapterkit.core.options import StrPath
from adapterkit.verbs.look.records.report import report


@dataclass(frozen=True, kw_only=True)
class AfterTraining:
    """Follow-up jobs for a trained adapter; outputs of earlier runs are replaced.

    `report`: the HTML page of `adapterkit report`; `convert`: format -> output; `merge`: the output
    of a merge into `base`, by default the trainer's; `push`: the repository for the merged model
    (needs `merge`).
    """

    base: str | None = None
    report: StrPath | None = None
    convert: Mapping[str, StrPath] = field(default_factory=dict)
    merge: StrPath | None = None
    push: str | None = None

    def __post_init__(self) -> None:
        if self.push is not None and self.merge is None:
            hint = "give merge=FOLDER, or upload the adapter with the trainer's push_to_hub"
            raise Refused("push without merge", expected="a merged model", hint=hint, code="AK102")

    def run(self, adapter: StrPath, base: str | None = None) -> list[str]:
        """Run all jobs on the folder of an adapter; lines that name their outputs. `base`: the
        trainer's base, used if none was given."""
        model = self.base or base
        lines = []
        if self.report is not None:
            document = report([adapter], base=_if_local(model), out=self.report, overwrite=True)
            lines.append(f"{os.fspath(self.report)}: {document['advice']['reason']}")
        for format, out in self.convert.items():
            convert(
                adapter, to=format, base=_if_local(model), out=out, overwrite=Path(out).exists()
            )
            lines.append(f"{os.fspath(out)}: in the format {format}")
        if self.merge is not None:
            if model is None:
                raise Refused(
                    "the base of the merge is not known",
                    expected="its folder or id",
                    where=os.fspath(adapter),
                    hint="give base=",
                    code="AK102",
                )
            exists = Path(self.merge).exists()
            done = merge(model, [adapter], out=self.merge, push=self.push, overwrite=exists)
            changed = done.data["totals"]["tensors_changed"]
            lines.append(f"{os.fspath(self.merge)}: merged, {changed} tensors changed")
        return lines


def _if_local(base: str | None) -> str | None:
    """The base if it can be opened without a download."""
    return base if base is not None and os.path.isdir(base) else None
