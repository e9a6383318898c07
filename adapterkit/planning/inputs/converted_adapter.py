"""An adapter of another format as a folder in PEFT's layout, for every verb that takes one."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from adapterkit.adapters.config import SLOWEST
from adapterkit.adapters.eight_bits import notes_on
from adapterkit.adapters.expert_order import is_of_unsloth, order_of, with_given
from adapterkit.adapters.keys import CONFIG, PLAIN, WEIGHTS
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import read_header
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.strict import read_json
from adapterkit.commands import command
from adapterkit.dtypes import FLOATS
from adapterkit.engines.converted_folder import ADDED_DELTAS, ConvertedFolder, check_added_deltas
from adapterkit.errors import AdapterkitError, Refused

if TYPE_CHECKING:
    from adapterkit.formats.detect import Detection
    from adapterkit.formats.modules.record import Contents

T = TypeVar("T")
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
    check_added_deltas(folder)
    if "config.json" in files or not any(name.endswith(FILES) for name in files):
        return folder
    from adapterkit.planning.inputs.model_checkpoint import one_file_of, read_checkpoint

    file = one_file_of(base)
    if file is None and is_plain(folder):
        return folder
    # here, so that headers of models are read without torch, and plain adapters without formats
    from adapterkit.formats.detect import detect
    from adapterkit.formats.schema import ADAPTER_LAYOUT

    try:
        detection = detect(folder)
    except AdapterkitError as error:
        if CONFIG in files or isinstance(error, Refused):
            return folder
        raise
    if file is not None:
        from adapterkit.planning.convert.one_file import plan_in_names_of

        plan = with_own_hints(lambda: plan_in_names_of(file, folder, detection))
        return ConvertedFolder(folder, detection.form.name, detection.container.file, plan)
    is_read = detection.form.layout == ADAPTER_LAYOUT and detection.form.adapter.is_read_by_peft
    if for_merge and detection.config.get("peft_type") in ("LOHA", "LOKR"):
        return _with_others(folder, detection)
    if is_read and not notes_on(detection.container.tensors):
        config = with_given(detection.config, expert_layout)
        is_told = config is not detection.config and is_of_unsloth(config, folder)
        if order_of(config) != SLOWEST and not is_told:
            return folder
    # here, so that adapters in PEFT's layout do not wait for it
    from adapterkit.planning.convert.plan import plan_convert
    from adapterkit.verbs.convert import ConvertOptions

    checkpoint = None if base is None else read_checkpoint(base, 1)
    options = ConvertOptions(to=plain_layout(), expert_layout=expert_layout)
    plan = with_own_hints(lambda: plan_convert(folder, options, checkpoint, detection=detection))
    return ConvertedFolder(folder, detection.form.name, detection.container.file, plan)


def _with_others(folder: Folder, detection: "Detection") -> Folder:
    """An adapter of another type in PEFT's layout, for a merge."""
    from adapterkit.planning.convert.one_file import plan_with_others
    from adapterkit.planning.convert.source import read_contents
    from adapterkit.verbs.convert import ConvertOptions

    options = ConvertOptions(to=plain_layout())
    read = lambda: read_contents(folder, detection, options, None)
    plan = with_own_hints(lambda: plan_with_others(folder, read(), options))
    if plan is None:
        return folder
    plan = replace(plan, notes=())  # on files beside it, which no merge copies
    return ConvertedFolder(folder, detection.form.name, detection.container.file, plan)


def with_own_hints(read: Callable[[], T]) -> T:
    """What it reads or plans; errors' hints are those of any verb."""
    try:
        return read()
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            one.hint = conversion_hint(one.hint, plain_layout())
        raise


def is_plain(folder: Folder) -> bool:
    """Whether a folder needs no detection: PEFT's layout with factors of layers and nothing else.
    To read all formats takes longer than to plan a job."""
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


# options of `convert` that no other verb has, or has for something else; and what they are given
_OF_CONVERT = re.compile(r"--(alpha|architecture|allow-pickle|lossy|prefix-only|rank)\b")
_VALUES = {"alpha": "A", "architecture": "NAME", "prefix-only": "PART", "rank": 16}


def conversion_hint(hint: str, to: str, base: str | None = None) -> str:
    """A hint of a conversion, for any verb: the first alternative of options of `convert` becomes
    its command. `base`: what stands for one that is given."""
    if "\n" in hint:
        return hint
    first = next((one for one in hint.split(", or ") if "--" in one), "")
    names = _OF_CONVERT.findall(first)
    if not names and not (base and "--base" in first):
        return hint
    options = {"base": base or ("BASE" if "--base" in first else None)}
    options |= {name: _VALUES.get(name, True) for name in names}
    text = command("adapterkit convert", "ADAPTER", to=to, **options, out=f"for-{to}")
    return f"convert it first\n{text}"


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
    with suppress(AdapterkitError):
        contents = contents_of(folder)
        if contents is not None and (with_parts or len(contents.components) > 1):
            return with_part_names(folder, contents)
    return folder


def with_part_names(folder: Folder, contents: "Contents") -> ConvertedFolder:
    """An adapter as a folder in PEFT's layout, the names of its modules with that of their part of
    the pipeline in front."""
    from adapterkit.formats.library import format_named
    from adapterkit.formats.peft.layout import write_layout
    from adapterkit.planning.convert.plan import plan_written
    from adapterkit.verbs.convert import ConvertOptions

    modules = tuple(replace(m, name=m.path, component="") for m in contents.modules)
    plain = replace(contents, modules=modules, architectures=(), config={}, metadata={})
    form = format_named(plain_layout())
    layout = write_layout(plain, form, rebuilt=True, values=True)
    plan = plan_written(folder, plain, layout, ConvertOptions(to=form.name))
    file, parts = next(file for _, file in plan.headers), ", ".join(contents.components)
    return ConvertedFolder(folder, contents.format, file, plan, parts)


def contents_of(folder: Folder, base: Checkpoint | None = None) -> "Contents | None":
    """What an adapter that is not in PEFT's layout holds; None for all else. `base`: its model, or
    the denoiser of its pipeline."""
    from adapterkit.formats.detect import in_another_layout
    from adapterkit.planning.convert.source import read_contents
    from adapterkit.verbs.convert import ConvertOptions

    detection = in_another_layout(folder)
    if detection is None:
        return None
    return read_contents(folder, detection, ConvertOptions(to=plain_layout()), base)


def as_component(
    folder: Folder, contents: "Contents", name: str, base: Checkpoint | None = None
) -> ConvertedFolder:
    """One component of a pipeline's adapter as a folder in PEFT's layout, what that does not hold
    in a file beside it; `base`: that model of the pipeline."""
    from adapterkit.formats.detect import detect
    from adapterkit.formats.library import format_named
    from adapterkit.planning.convert.one_file import plan_with_others
    from adapterkit.planning.convert.plan import plan_contents
    from adapterkit.planning.convert.source import named_base, selected
    from adapterkit.verbs.convert import ConvertOptions

    detection, form = detect(folder), format_named(plain_layout())
    options = ConvertOptions(to=form.name, prefix_only=name)
    own, model = selected(contents, name), named_base(base, detection, form)
    plan = plan_with_others(folder, own, options)
    plan = plan or plan_contents(folder, own, options, base, model)
    return ConvertedFolder(folder, detection.form.name, detection.container.file, plan, name)


def plain_layout() -> str:
    """The name of PEFT's layout among the formats, of its dialects that of PEFT itself."""
    from adapterkit.formats.library import formats
    from adapterkit.formats.schema import ADAPTER_LAYOUT, AdapterWords

    plain = AdapterWords()
    return next(
        form.name
        for form in formats().values()
        if form.layout == ADAPTER_LAYOUT and form.writes and form.adapter == plain
    )
