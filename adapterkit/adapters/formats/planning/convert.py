"""convert as it is asked for: its source and base opened, one file or a folder."""

from dataclasses import replace
from pathlib import Path

from adapterkit.adapters.formats.planning.plan import plan_convert
from adapterkit.adapters.formats.records.convert import Convert, ConvertOptions
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.sources import open_base, open_model, open_unconverted
from adapterkit.core.options import StrPath
from adapterkit.core.plan import Plan

FILES = (".safetensors", ".gguf")  # endings of an output that is one file


def plan_conversion(convert: Convert) -> Plan:
    """The plan of a conversion as it is asked for."""
    target = Path(convert.out)
    is_file = target.suffix in FILES and not is_on_hub(convert.out)
    source = open_unconverted(convert.src, convert.allow_pickle)
    base = None if convert.base is None else base_for(convert.base, source, convert.prefix_only)
    options, name = convert.only(ConvertOptions), target.name if is_file else None
    plan = plan_convert(source, options, base, name)
    if any("repo" in folder.origin for folder in plan.folders):  # on the Hub
        from adapterkit.bases.hub.output.inputs import plan_in_parts

        plan = plan_in_parts(plan)
    return replace(plan, is_file=is_file)


def base_for(text: StrPath, source: Folder, component: str | None = None) -> Checkpoint:
    """The base, of a pipeline the part that the adapter is for."""
    base = kind_of(open_model(text))
    own = base.own("base of a conversion")
    return own(base, source, component) if own else open_base(text)
