"""Adapters for one job that makes one of them, and how that is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import StrPath
from adapterkit.plan import Plan
from adapterkit.planning.inputs.converted_adapter import in_adapter_layout

if TYPE_CHECKING:
    from adapterkit.formats.modules.record import Contents


@dataclass(frozen=True)
class Together:
    """Adapters in PEFT's layout for one job that makes one of them, and how that is written."""

    folders: list[Folder]
    first: "Contents | None" = None  # whose layout it has; None: PEFT's
    file: str | None = None  # the name of an output that is one file

    def written(self, plan: Plan) -> Plan:
        """The plan of the job, its output in the layout of the first adapter."""
        if self.first is None:
            return plan
        from adapterkit.planning.convert.as_plain import plan_in_layout

        return plan_in_layout(self.first, plan, self.file, is_alone=len(self.folders) == 1)


def together(sources: Sequence[Folder], out: StrPath) -> Together:
    """Adapters in any format for one job. Its output is a file in the layout of the first one where
    `out` is, and of adapters of several parts; else PEFT's. `Refused` beside these for adapters
    that do not say of which part they are, and for layouts that are not written so."""
    file = Path(out).name if str(out).endswith(".safetensors") and not is_on_hub(out) else None
    if file is not None or not all({CONFIG, "config.json"} & {*one.files()} for one in sources):
        from adapterkit.planning.convert.as_plain import open_parts

        if (parts := open_parts(sources, out, file)) is not None:
            return Together(*parts, file)
    return Together([in_adapter_layout(source) for source in sources])
