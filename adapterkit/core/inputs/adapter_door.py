"""Open adapters: PEFT's layout is read as it is, other formats as a folder in that layout."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.adapter.config import INCOMPLETE
from adapterkit.core.adapter.keys import ADDED_DELTAS, CONFIG, PLAIN, WEIGHTS
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.dtypes import FLOATS
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.options import StrPath
from adapterkit.core.registry import load
from adapterkit.doors import ADAPTERS

if TYPE_CHECKING:
    from adapterkit.adapters.formats.modules.record import Contents
    from adapterkit.core.plan import Plan

FILES = (".safetensors", ".gguf")


def in_adapter_layout(
    folder: Folder,
    base: Folder | None = None,
    *,
    for_merge: bool = False,
    expert_layout: str | None = None,
) -> Folder:
    """The folder itself if it is in PEFT's layout, a model's, or in an unknown format, which its
    reader refuses; else an overlay in PEFT's layout. `Refused` for contents that PEFT's layout
    cannot represent. `for_merge`: deltas that are not plain factors are stored in an additional
    file; `expert_layout`: of stacks whose config does not say."""
    files = folder.files()
    if ADDED_DELTAS in files:
        from adapterkit.core.engine.planned_folder import check_added_deltas

        check_added_deltas(folder)
    if "config.json" in files or not any(name.endswith(FILES) for name in files):
        return folder
    file = None if base is None else kind_of(base).images
    if file is None and is_plain(folder):
        return folder
    converted = load(ADAPTERS["converted"])
    return converted(folder, base, file, for_merge=for_merge, expert_layout=expert_layout)


def is_plain(folder: Folder) -> bool:
    """Return whether a folder needs no detection, because it is PEFT's layout without stacks.
    Reading all formats takes longer than planning a job."""
    if [name for name in folder.files() if name.endswith(FILES) and "/" not in name] != [WEIGHTS]:
        return False
    try:
        config, header = read_json(folder, CONFIG), read_header(folder, WEIGHTS)
    except (AdapterkitError, OSError):
        return False
    return (
        config.get("peft_type") == "LORA"
        and not any(map(config.get, ("target_parameters", *INCOMPLETE)))
        and all(PLAIN.fullmatch(x.key) and x.dtype in FLOATS for x in header.tensors)
    )


def adapter_or_file(
    folder: Folder, base: Folder | None = None, *, with_parts: bool = False
) -> Folder:
    """The result of `in_adapter_layout`, for verbs that also describe bare tensors. An adapter for
    several components of a pipeline (with `with_parts`, also for one) gets the components' names.
    If the result would be refused, for example because alphas are unknown, the folder itself is
    returned."""
    try:
        if not with_parts:
            return in_adapter_layout(folder, base)
    except AdapterkitError:
        files = folder.files()
        if ADDED_DELTAS in files or not any(name.endswith(".safetensors") for name in files):
            raise
    with suppress(AdapterkitError):
        contents = load(ADAPTERS["contents"])(folder)
        if contents is not None and (with_parts or len(contents.components) > 1):
            return load(ADAPTERS["part names"])(folder, contents)
    return folder


@dataclass(frozen=True)
class ComponentAdapters:
    """Adapters in PEFT's layout for one job that makes one adapter of them, and the output's
    layout."""

    folders: list[Folder]
    first: "Contents | None" = None  # the adapter whose layout the output has; None: PEFT's
    file: str | None = None  # the name of a single-file output

    def written(self, plan: "Plan") -> "Plan":
        """The plan of the job, with its output in the layout of the first adapter."""
        if self.first is None:
            return plan
        plan_in_layout = load(ADAPTERS["layout"])
        return plan_in_layout(self.first, plan, self.file, is_alone=len(self.folders) == 1)


def together(sources: Sequence[Folder], out: StrPath, as_is: bool = False) -> ComponentAdapters:
    """Adapters in any format for one job; `as_is`: of any type. The output is a single file in the
    first adapter's layout if `out` is one, or if adapters are for several components; else in
    PEFT's. `Refused` also for adapters without their component, and for layouts not written."""
    file = Path(out).name if str(out).endswith(".safetensors") and not is_on_hub(out) else None
    if file is not None or not all({CONFIG, "config.json"} & {*one.files()} for one in sources):
        parts = load(ADAPTERS["parts"])(sources, out, file)
        if parts is not None:
            return ComponentAdapters(parts[0], parts[1], file)
    return ComponentAdapters([one if as_is else in_adapter_layout(one) for one in sources])
