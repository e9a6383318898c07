"""Uploading a folder to a model repository, as one commit."""

from collections.abc import Callable
from pathlib import Path

from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.errors import Refused, shown
from adapterkit.hub.destination import Destination
from adapterkit.hub.errors import quiet_library
from adapterkit.hub.ids import HubId, parse
from adapterkit.hub.upload import LocalFile, Uploaded, commit, groups, upload


def push(folder: Path, repo: str, *, progress: Callable[[int, int], None] | None = None) -> dict:
    """Upload a folder as one commit to a model repository, which is created if there is none.

    Returns the receipt's `pushed`: repo, revision, url. `progress(done, total)` counts bytes.
    Raises `Refused` for a folder, a name or an account that will not do, and `Failed` when the
    upload broke or the repository changed meanwhile: nothing is committed then, and a second run
    uploads only what is missing.
    """
    sizes, destination = _finished_files(folder), Destination(_target(repo))
    files = [LocalFile(name, Path(folder, name), size) for name, size in sizes.items()]
    done, total, sent = 0, sum(sizes.values()), list[Uploaded]()
    with quiet_library():
        destination.check_files(sizes)
        destination.create()
        for group in groups(files):
            sent += upload(destination.hub_id, group)
            done += sum(file.size for file in group)
            if progress is not None:
                progress(done, total)
        there = {file.file for file in sent}
        rest = [file for file in files if file.name not in there]
        made = commit(destination, sent, [], rest)
    return {"repo": repo, "revision": made.oid, "url": made.url}


def _finished_files(folder: Path) -> dict[str, int]:
    """The folder's files and sizes; `Refused` unless it is the finished output of a job."""
    if not Path(folder).is_dir():
        raise Refused(
            "not a folder", expected="a folder to upload", where=str(folder), hint="check the path"
        )
    files = LocalFolder(folder).files()
    unfinished = [name for name in files if name.endswith(".part")]
    if unfinished or not files:
        raise Refused(
            f"an unfinished file, {shown(unfinished[0])}" if unfinished else "an empty folder",
            expected="the finished output of a job",
            where=str(folder),
            hint="finish the job first, with --resume if it was interrupted",
        )
    return files


def _target(repo: str) -> HubId:
    target = parse(repo)
    if target is None or target.revision or target.subfolder:
        raise Refused(
            f"{shown(repo)!r}",
            expected="a repository, `org/name`, without revision or folder",
            where="the place to push to",
            hint="give your account's or organization's name and the repository's",
        )
    return target
