"""Upload an output to a model repository, as one commit."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

from adapterkit.bases.hub.destination import Destination
from adapterkit.bases.hub.errors import quiet_library
from adapterkit.bases.hub.listing import RemoteEntry
from adapterkit.bases.hub.upload import LocalFile, Uploaded, commit, groups, upload
from adapterkit.core.checkpoint.folder import FinishedFolder, Folder
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.checkpoint.hub_ids import HubId, parse, repositories
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.options import checked
from adapterkit.core.output.stage import RECEIPT, receipt_name_of
from adapterkit.core.records import Check, Json, invalid_value


def check_push(
    repo: str,
    names: Collection[str],
    inputs: Collection[Folder],
    receipt: str,
    *,
    overwrite: bool,
    job: str,
) -> None:
    """`Refused` if the output files of a job could not be pushed under these names; called before
    they are made. `job`: its fingerprint; `inputs`: its sources; `receipt`: the name of its
    receipt."""
    destination = Destination(HubId(repository(repo)), inputs=inputs, receipt_name=receipt)
    with quiet_library():
        destination.check_account()
        destination.look()
        destination.check_files(names, overwrite=overwrite, job=job)


def send(output: Path, repo: str, *, overwrite: bool = False) -> Json:
    """`push` for a finished output: its errors say how to repeat the upload."""
    try:
        return push(output, repo, overwrite=overwrite, of_receipt=True)
    except AdapterkitError as error:
        error.hint += "; the output is finished: the same command sends what is missing"
        raise


def push(
    output: Path,
    repo: str,
    *,
    overwrite: bool = False,
    of_receipt: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Json:
    """Upload a folder, or a file with its receipt, as one commit to a model repository. A new
    repository is private if one of the sources in the receipt is.

    `overwrite` replaces an older output of adapterkit. `of_receipt`: only files that the receipt
    lists, because the folder may have others. A link that leaves the folder is refused. Returns the
    receipt's `pushed`: repo, revision, url, notes. `progress(done, total)` counts bytes. Raises
    `Refused` for an unsuitable folder, name or account, or for a repository with other files of
    these names, and `Failed` if the upload broke or the repository changed meanwhile. Then nothing
    is committed, and a second run uploads only missing files.
    """
    target = HubId(checked("push", Check("a repository", repository), repo))
    folder, receipt_name = Path(output), RECEIPT
    if folder.is_file():
        folder, receipt_name = folder.parent, receipt_name_of(folder.name)
    sizes, local = _finished_files(Path(output), receipt_name), FinishedFolder(folder)
    receipt = read_json(local, receipt_name) if receipt_name in sizes else {}
    if of_receipt and isinstance(listed := receipt.get("files"), dict):
        sizes = {name: sizes[name] for name in sizes if name in listed or name == receipt_name}
    files = [LocalFile(name, local.path(name), size) for name, size in sizes.items()]
    destination = Destination(target, sorted(repositories(receipt)), receipt_name=receipt_name)
    done, total, sent = 0, sum(sizes.values()), list[Uploaded]()
    is_there = lambda name, entry: _is_there(Path(folder, name), entry)
    with quiet_library():
        destination.look()
        destination.create()
        job = str(receipt.get("fingerprint", ""))
        destination.check_files(sizes, overwrite=overwrite, job=job, is_there=is_there)
        before = destination.parent
        for group in groups(files):
            sent += upload(destination.hub_id, group)
            done += sum(file.size for file in group)
            if progress is not None:
                progress(done, total)
        there = {file.file for file in sent}
        rest = [file for file in files if file.name not in there]
        made = commit(destination, sent, [], rest)
    notes = list(destination.notes)
    if made.oid == before:
        notes.append("all files were there before: nothing was sent")
    return {"repo": repo, "revision": made.oid, "url": made.url, "notes": notes}


def _is_there(file: Path, entry: RemoteEntry) -> bool:
    """Return whether a file on the Hub has the content of a local one."""
    if file.stat().st_size != entry.size:
        return False
    if entry.sha256 is not None:
        return sha256_of_file(file) == entry.sha256
    data = file.read_bytes()
    return entry.blob == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _finished_files(output: Path, receipt: str) -> dict[str, int]:
    """An output's files and sizes; `Refused` unless a job finished it."""
    next_to = output.with_name(receipt)
    if output.is_file() and next_to.is_file():
        return {path.name: path.stat().st_size for path in (output, next_to)}
    if not output.is_dir():
        raise Refused(
            "this is neither a folder nor a file with its receipt next to it",
            expected="an output to upload",
            where=str(output),
            hint="check the path",
            code="AK608",
        )
    files = FinishedFolder(output).files()
    unfinished = [name for name in files if name.endswith(".part")]
    if unfinished or not files:
        raise Refused(
            f"{shown(unfinished[0])} is unfinished" if unfinished else "the folder is empty",
            expected="the finished output of a job",
            where=str(output),
            hint="finish the job first, with --resume if it was interrupted",
            code="AK608",
        )
    return files


def repository(value: object) -> str:
    """A repository on the Hub."""
    hub_id = parse(value) if isinstance(value, str) else None
    if hub_id is None or hub_id.revision or hub_id.subfolder:
        raise invalid_value(
            value,
            "a repository on the Hub, org/name, without revision or folder",
            "give your account's or organization's name and the repository's",
        )
    return str(value)
