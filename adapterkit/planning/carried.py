"""What trainers save beside an adapter, and which of it goes along when PEFT's layout stays."""

from collections.abc import Collection

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.stage import RECEIPT
from adapterkit.errors import listed
from adapterkit.formats.schema import Format
from adapterkit.plan import CopyFile

MOST = 100_000_000  # bytes of one file


def carried_files(
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
        notes.append(f"taken along: {listed(list(files))}")
    if left:
        notes.append(f"left behind: {listed(left)}")
    return files
