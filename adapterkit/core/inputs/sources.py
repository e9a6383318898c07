"""Open the folders of the bases and adapters that a caller names."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeGuard, TypeVar, cast

from adapterkit.core.adapter.config import IMPLICIT
from adapterkit.core.adapter.keys import CONFIG, INITIAL, WEIGHTS
from adapterkit.core.checkpoint.folder import (
    Folder,
    LocalFolder,
    SingleFile,
    WithSubfolders,
    is_plain_path,
)
from adapterkit.core.checkpoint.hub_ids import is_on_hub, parse
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.checkpoint.shards import NOT_A_MODEL, SINGLE
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Problems, Refused, did_you_mean, shown
from adapterkit.core.inputs.adapter_door import in_adapter_layout
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.options import Sources, StrPath, finite, unweighted, weighted
from adapterkit.core.registry import load
from adapterkit.doors import ADAPTERS, HUB

T = TypeVar("T")
INDEX = ".safetensors.index.json"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = re.compile(r"\.(safetensors|bin|gguf|index\.json)$")
NUMBERED = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


def open_source(text: StrPath) -> Folder:
    """The folder, or single file, for a path or a Hub id `org/name[@revision][:path]`. A path that
    exists is read as it is; a planned folder is returned unchanged. `Refused` for any other
    text."""
    if isinstance(text, Overlay):
        return text
    if os.path.exists(text):
        return LocalFolder(text)
    name = os.fspath(text)
    hub_id, similar = parse(name), similar_path(name)
    if hub_id is None:
        is_output = "write inputs on the Hub as org/name, without hf://" * is_on_hub(name)
        raise Refused(
            f"no such path: {shown(name)}",
            expected=(
                "a folder, a .safetensors or .gguf file, or a Hub id "
                "org/name[@revision][:folder or file]"
            ),
            hint=is_output or _own_hint(name) or similar or "check the path",
            code="AK201",
        )
    try:
        return load(HUB["folder"])(hub_id)
    except AdapterkitError as error:
        error.hint = f"{similar} else {error.hint}" if similar else error.hint
        raise


def refuse_missing(texts: Iterable[str]) -> None:
    """`Refused` with all texts that are neither paths nor ids of the Hub, if they are several; one
    with a colon may name a component."""
    errors = Problems()
    for text in texts:
        if ":" not in text and not os.path.exists(text) and parse(text) is None:
            with errors.collected():
                open_source(text)
    if len(errors) > 1:
        errors.raise_all()


def named_in_file(name: object, folder: Path | None) -> str | None:
    """The source that an untrusted file names: an item of `folder`, or an id of the Hub. None for
    other names, also for links that lead elsewhere."""
    text = name if isinstance(name, str) else ""
    if folder is not None and is_plain_path(text) and "/" not in text and (folder / text).exists():
        from adapterkit.core.checkpoint.links import leads_inside

        return str(folder / text) if leads_inside(folder / text, folder) else None
    return text if parse(text) is not None and not os.path.lexists(text) else None


def if_given(opener: Callable[[StrPath], T], text: StrPath | None) -> T | None:
    """The opened source of an option; None if it is not given."""
    return None if text is None else opener(text)


def open_statistics(text: StrPath) -> Folder:
    """`open_source` of statistics; `Refused` for a file or folder without safetensors."""
    folder = open_source(text)
    if isinstance(folder, Overlay) or any(name.endswith(".safetensors") for name in folder.files()):
        return folder
    raise Refused(
        "these are no statistics",
        expected="a .safetensors file of statistics",
        where=folder.label,
        hint="make one\n" + command("adapterkit stats", "BASE", data=text, out="stats.safetensors"),
        code="AK106",
    )


def _own_hint(text: str) -> str:
    if os.path.islink(text):
        return f"it is a link to {shown(os.readlink(text))}, which is not there"
    is_pattern = not set(text).isdisjoint("*?[")
    return "give a path: the pattern matches none, or only one path is allowed here" * is_pattern


def similar_path(text: str) -> str:
    """A suggestion (`did_you_mean`) for a missing path, from the content of its folder."""
    folder = os.path.dirname(text)
    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):  # the folder does not exist, or the text is no path
        return ""
    return did_you_mean([text], [os.path.join(folder, name) for name in names])


def open_model(text: StrPath) -> Folder:
    """The folder of a model. A `.safetensors` file opens the checkpoint that it belongs to, or is
    the model itself, with the config and tokenizer next to it. `Refused` for an adapter."""
    folder = open_source(text)
    if _is_weights(folder) and not folder.single.startswith(NOT_A_MODEL):
        folder = _model_of(folder)
    if MODEL_CONFIG in folder.files():
        return folder
    adapter = load(ADAPTERS["another layout"])(folder)
    if adapter is not None:
        raise load(ADAPTERS["no model"])(adapter, folder.name)
    return folder


def _model_of(folder: SingleFile) -> Folder:
    """The model that a file of weights belongs to, or is."""
    whole, here = folder.containing_folder(), folder.next_to()
    indexes = [read_json(whole, name) for name in here if name.endswith(INDEX)]
    named = [
        index["weight_map"].values()
        for index in indexes
        if isinstance(index.get("weight_map"), dict)
    ]
    if NUMBERED.fullmatch(folder.single) or any(folder.single in files for files in named):
        return whole
    name = folder.single if folder.single in SINGLE else SINGLE[0]
    return folder.as_weights(name) if MODEL_CONFIG in here else folder


def open_base(text: StrPath) -> Checkpoint:
    """The model that an adapter is for. A folder without weights is accepted, for callers that need
    only its config."""
    folder = open_model(text)
    if MODEL_CONFIG in folder.files() and not any(map(MODEL_WEIGHTS.search, folder.files())):
        config = read_json(folder, MODEL_CONFIG)
        return Checkpoint(folder, {}, {}, None, None, config, folder.files())
    return read_checkpoint(folder, 1)


def open_adapter(
    text: StrPath,
    base: Folder | None = None,
    *,
    for_merge: bool = False,
    expert_layout: str | None = None,
) -> Folder:
    """The folder of an adapter in PEFT's layout, or an overlay in that layout for another format.
    `base`: gives the modules' names for formats with other names than the model; `for_merge`: also
    LoHa and LoKr; `expert_layout`: of stacks whose config does not say."""
    folder = open_unconverted(text)
    return in_adapter_layout(folder, base, for_merge=for_merge, expert_layout=expert_layout)


def open_unconverted(text: StrPath, allow_pickle: bool = False) -> Folder:
    """The folder of an adapter in any format; with `allow_pickle`, also of a pickle. A
    `.safetensors` file of any name is PEFT's if adapter_config.json is next to it; `Refused` if
    that belongs to another file."""
    folder = open_source(text)
    if not _is_weights(folder) or CONFIG not in folder.next_to():
        return load(ADAPTERS["pickles"])(folder) if allow_pickle else folder
    if folder.single != WEIGHTS and WEIGHTS in folder.next_to():
        problem = f"{shown(folder.single)} next to {WEIGHTS}: {CONFIG} may belong to either"
        hint = "give each a folder of its own with its config"
        raise Refused(
            problem, expected="one adapter in a folder", where=folder.label, hint=hint, code="AK206"
        )
    return folder.as_weights(WEIGHTS)


def _is_weights(folder: Folder) -> TypeGuard[SingleFile]:
    single = getattr(folder, "single", None)
    return single is not None and single.endswith(".safetensors")


def initial_of(adapter: Folder) -> Folder | None:
    """The folder with the initial factors of an adapter whose base is the original without them;
    None for other adapters. `Refused` if it is missing."""
    if CONFIG not in adapter.files():
        return None  # refused when the adapter is read
    try:
        init = read_json(adapter, CONFIG).get("init_lora_weights")
    except AdapterkitError:
        return None  # likewise
    if not isinstance(init, str) or not init.lower().startswith(IMPLICIT):
        return None
    if isinstance(adapter, LocalFolder):
        if (adapter.root / INITIAL).is_dir():
            return adapter.subfolder(INITIAL)
    elif f"{INITIAL}/{CONFIG}" in adapter.files():
        return cast(WithSubfolders, adapter).subfolder(INITIAL)
    raise Refused(
        f"init_lora_weights {shown(init)} without the folder {INITIAL}/",
        expected="the initial factors, to subtract them from the base",
        where=f"{adapter.label}/{CONFIG}",
        hint="keep the folder that `adapterkit init` wrote together",
        code="AK304",
    )


def open_weighted(
    adapters: Sources, opener: Callable[[StrPath], Folder]
) -> list[tuple[Folder, float]]:
    """The folders of adapters with their weights; raises `Refused` with every problem."""
    opened: list[tuple[Folder, float]] = []
    errors = Problems()
    for source, weight in weighted(adapters):
        with errors.collected():
            if weight is None:
                source, weight = weight_of(source)
            opened.append((opener(source), weight))
    errors.raise_all()
    return opened


def open_all(
    *lists: Sources, opener: Callable[[StrPath], Folder] = open_adapter
) -> list[list[Folder]]:
    """The folders of several lists of sources without weights; raises `Refused` with every
    problem."""
    opened: list[list[Folder]] = [[] for _ in lists]
    errors = Problems()
    for folders, sources in zip(opened, lists, strict=True):
        for source in unweighted(sources):
            with errors.collected():
                folders.append(opener(source))
    errors.raise_all()
    return opened


def weight_of(source: StrPath) -> tuple[str, float]:
    """A source and its weight: `PATH=0.7`, unless the whole text exists as a path; 1 if none is
    given."""
    text = os.fspath(source)
    if os.path.exists(text) or "=" not in text:
        return text, 1.0
    path, _, number = text.rpartition("=")
    weight = finite(number)
    if weight is None or not path:
        raise Refused(
            f"{shown(text)}: {shown(number)!r} is not a number",
            expected="ADAPTER or ADAPTER=WEIGHT",
            where="options",
            hint=f"give a number, such as {shown(path) or 'ADAPTER'}=0.5",
            code="AK101",
        )
    return path, weight
