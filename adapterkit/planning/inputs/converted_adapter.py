"""The door of adapters: PEFT's layout is read as it is, others as a folder in that layout."""

from contextlib import suppress

from adapterkit.adapters.keys import ADDED_DELTAS, CONFIG, PLAIN, WEIGHTS
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import read_header
from adapterkit.checkpoint.strict import read_json
from adapterkit.dtypes import FLOATS
from adapterkit.errors import AdapterkitError
from adapterkit.planning.inputs.model_checkpoint import one_file_of

FILES = (".safetensors", ".gguf")


def in_adapter_layout(
    folder: Folder,
    base: Folder | None = None,
    *,
    for_merge: bool = False,
    expert_layout: str | None = None,
) -> Folder:
    """The folder itself where it is in PEFT's layout, a model's, or in no format that is known (its
    reader refuses it); else one that stands for it. `Refused` for contents that PEFT's layout
    cannot hold. `for_merge`: what is added to weights and is no plain factors is in a file beside
    these; `expert_layout`: of stacks whose config does not say."""
    files = folder.files()
    if ADDED_DELTAS in files:
        from adapterkit.engines.converted_folder import check_added_deltas

        check_added_deltas(folder)
    if "config.json" in files or not any(name.endswith(FILES) for name in files):
        return folder
    file = one_file_of(base)
    if file is None and is_plain(folder):
        return folder
    from adapterkit.planning.convert.as_plain import converted

    return converted(folder, base, file, for_merge=for_merge, expert_layout=expert_layout)


def is_plain(folder: Folder) -> bool:
    """Whether a folder needs no detection: PEFT's layout, without stacks. To read all formats takes
    longer than to plan a job."""
    if [name for name in folder.files() if name.endswith(FILES) and "/" not in name] != [WEIGHTS]:
        return False
    try:
        config, header = read_json(folder, CONFIG), read_header(folder, WEIGHTS)
    except (AdapterkitError, OSError):
        return False
    return (
        "peft_type" in config
        and not config.get("target_parameters")
        and all(PLAIN.fullmatch(x.key) and x.dtype in FLOATS for x in header.tensors)
    )


def adapter_or_file(
    folder: Folder, base: Folder | None = None, *, with_parts: bool = False
) -> Folder:
    """What `in_adapter_layout` gives, of an adapter of several parts of a pipeline (`with_parts`:
    of one, too) `with_part_names`; the folder itself where that is refused (alphas that nothing
    says), for verbs that tell of bare tensors too."""
    try:
        if not with_parts:
            return in_adapter_layout(folder, base)
    except AdapterkitError:
        files = folder.files()
        if ADDED_DELTAS in files or not any(name.endswith(".safetensors") for name in files):
            raise
    from adapterkit.planning.convert.as_plain import contents_of, with_part_names

    with suppress(AdapterkitError):
        contents = contents_of(folder)
        if contents is not None and (with_parts or len(contents.components) > 1):
            return with_part_names(folder, contents)
    return folder
