"""Links in the folders of inputs: which are followed.

A link is followed if it stays in its folder, or leads from the configured Hub cache to a blob of
its repository. A link that leads out of the folder is followed if it and the folder belong to the
user or to root, as git's `safe.directory` has it, and if others may read its file too: whoever
unpacks a stranger's archive owns its links, and a merge copies what they lead to."""

import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from adapterkit.core.errors import Refused, printable, shown
from adapterkit.core.system import system

SAFE_FOLDERS = "ADAPTERKIT_SAFE_FOLDERS"  # of the environment: all links in them are followed
MOST_LINKS = 40  # on one path, as for Linux
OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


def check_links(path: Path, root: Path, outward: bool = True) -> None:
    """`Refused` for a path in a folder with a link that is not followed; if not `outward`, for each
    that leads out."""
    if leads_inside(path, root) or (outward and _is_safe(root.resolve())):
        return
    target, links = path.resolve(), list(islice(_links(path, root), MOST_LINKS))
    foreign = [one for one in (root.resolve(), *links) if not system.is_own(one.lstat())]
    mode = target.stat().st_mode
    hint = "copy the file into the folder"
    if not outward:
        reason = "an output has no other files than its own"
    elif foreign:
        reason = f"{shown(foreign[0])} belongs to another user"
    elif stat.S_ISREG(mode) and not mode & OTHERS_READ:
        reason = "only its owner may read that file"
    elif len(links) < MOST_LINKS:
        return
    else:
        reason = "too many links"
    if outward:
        folder = system.quote(printable(str(root.resolve())))
        hint += ", or trust all links in the folder\n"  # next to those that are trusted already
        hint += f'export {SAFE_FOLDERS}="${SAFE_FOLDERS}:"{folder}'
    raise Refused(
        f"this is a link to {shown(target)}: {reason}",
        expected="a file inside, or a link and a folder of yours to a file that others may read",
        where=str(path),
        hint=hint,
        code="AK201",
    )


def leads_inside(path: Path, root: Path) -> bool:
    """Return whether a path below a folder stays in it, through all links. The Hub cache's files
    are links to blobs of their repository, which may be links too. Only the configured cache
    counts: a stranger's folder may have the same layout."""
    target, home = path.resolve(), root.resolve()
    if target.is_relative_to(home):
        return True
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    if not (home.is_relative_to(cache) and home != cache and path.is_symlink()):
        return False
    link = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    return link.parent == cache / home.relative_to(cache).parts[0] / "blobs" and target.is_file()


def _is_safe(root: Path) -> bool:
    named = os.environ.get(SAFE_FOLDERS, "").split(os.pathsep)
    return any(root.is_relative_to(Path(one).resolve()) for one in named if one)


def _links(path: Path, root: Path) -> Iterator[Path]:
    """The links on a path below a folder, and the links on the way of each."""
    at, rest = root.resolve(), [*reversed(path.relative_to(root).parts)]
    while rest:
        at = at / name if (name := rest.pop()) != ".." else at.parent
        if at.is_symlink():
            yield at
            target = Path(os.readlink(at))
            at = Path(target.anchor) if target.is_absolute() else at.parent
            rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
