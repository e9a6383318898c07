"""The files of a converted adapter's folder besides its weights: settings, card, and what trainers
save beside an adapter, where PEFT's layout stays."""

import re
from collections.abc import Collection

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.output.stage import RECEIPT
from adapterkit.errors import listed
from adapterkit.formats.files.configs import config_bytes
from adapterkit.formats.library import formats
from adapterkit.formats.modules.record import Contents
from adapterkit.formats.schema import ADAPTER_LAYOUT, Format
from adapterkit.formats.write import FormatFile
from adapterkit.plan import CopyFile
from adapterkit.planning.outputs.cards import adapter_card
from adapterkit.planning.outputs.folder_files import Files

MOST = 100_000_000  # bytes of one file
# weights, and no state of a trainer
TRAINED = re.compile(
    r"(?!optimizer|scheduler|scaler|rng_state|training_args)[^/]+\.(safetensors|bin|pth?)"
)


def files_of(contents: Contents, written: FormatFile, notes: list[str]) -> Files:
    """The files of a folder besides its weights; notes tell what goes along or stays behind."""
    files: Files = {}
    form = written.form
    if written.settings is not None:
        name = form.file.config[0]
        files[name] = config_bytes(name, written.settings)
    if form.layout != ADAPTER_LAYOUT:
        return files
    if formats()[contents.format].layout == form.layout:
        known = {*files, *(file for _, file in contents.headers), form.file.name}
        files = {**_carried(contents.folders[0], form, known, notes), **files}
    if "README.md" not in files:
        base = (written.settings or {}).get("base_model_name_or_path")
        card = adapter_card(base, [], f"converted from {contents.format}")
        files["README.md"] = card.encode()
    return files


def left_beside(contents: Contents, form: Format) -> list[str]:
    """The note on weights beside the adapter, such as a value head, that stay behind where the
    layout does not stay."""
    if formats()[contents.format].layout == form.layout == ADAPTER_LAYOUT:
        return []  # told already, with all other files
    known = {file for _, file in contents.headers}
    left = [name for name in contents.folders[0].files() if _is_trained(name) and name not in known]
    return [f"not converted: {listed(left)} beside the adapter"] if left else []


def _is_trained(name: str) -> bool:
    return TRAINED.fullmatch(name) is not None


def _carried(
    source: Folder, form: Format, written: Collection[str], notes: list[str]
) -> dict[str, CopyFile]:
    """The source's files that the target's format takes along; all others join the notes.

    `written`: the files that the conversion writes itself, and the source's of those names."""
    files, left = {}, []
    for name, size in sorted(source.files().items()):
        if name in written or name == RECEIPT:
            continue
        if size <= MOST and any(pattern.fullmatch(name) for pattern in form.file.carry):
            files[name] = CopyFile(0, name)
        else:
            left.append(name)
    if files:
        notes.append(f"copied: {listed(list(files))}")
    if left:
        left.sort(key=_is_trained, reverse=True)
        notes.append(f"not copied: {listed(left)}")
    return files
