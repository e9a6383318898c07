"""Upload large files in groups, then commit everything at once and check the commit."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adapterkit.bases.hub.destination import Destination
from adapterkit.bases.hub.errors import redact
from adapterkit.bases.hub.listing import RemoteEntry, list_remote
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.errors import AdapterkitError, Failed, shown

# A group is sent at once: the client sends several of its files in parallel.
GROUP_FILES = 8
GROUP_BYTES = 16 << 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalFile:
    """A file on disk for a commit; `sha256` if it is known already."""

    name: str  # in the output
    path: Path
    size: int
    sha256: str | None = None


class Uploaded(NamedTuple):
    """A large file in the repository's storage, for a later commit."""

    file: str
    size: int
    sha256: str


class CopiedFile(NamedTuple):
    """A large file of another repository, or another revision, that a commit takes over."""

    file: str
    size: int
    sha256: str
    repo: str
    revision: str
    path: str


class Commit(NamedTuple):
    oid: str
    url: str


def groups(files: Iterable[LocalFile]) -> Iterable[list[LocalFile]]:
    """The files in order, grouped as they are sent together."""
    group: list[LocalFile] = []
    for file in files:
        group.append(file)
        if len(group) >= GROUP_FILES or sum(one.size for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def upload(target: HubId, files: Sequence[LocalFile]) -> list[Uploaded]:
    """Upload the files that the Hub stores outside git, without a commit; return them.

    The others go into the commit itself. Raises `Failed` if the repository would leave one out, and
    the Hub's refusals.
    """
    from huggingface_hub import HfApi

    additions = [_addition(target, file) for file in files]
    request = lambda: HfApi().preupload_lfs_files(
        target.repo, additions, revision=target.revision, free_memory=False
    )
    retry(request, target)
    # the modes that the Hub has answered have no public name
    ignored = [f.name for f, a in zip(files, additions, strict=True) if a._should_ignore]
    _refuse_left_out(ignored, target)
    return [
        Uploaded(file.name, file.size, addition.upload_info.sha256.hex())
        for file, addition in zip(files, additions, strict=True)
        if addition._upload_mode == "lfs"
    ]


def commit(
    destination: Destination,
    uploaded: Iterable[Uploaded],
    copied: Iterable[CopiedFile],
    files: Sequence[LocalFile],
) -> Commit:
    """Commit uploaded files, files of other repositories and files on disk, and remove those of an
    older output; return the existing commit if it has everything. Checked afterwards.

    Raises `Failed` when the repository has changed meanwhile; then nothing is committed.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    target, large = destination.hub_id, [*uploaded, *copied]
    there = {
        f.file
        for f in large
        if (entry := destination.before.get(f.file)) and entry[:2] == (f.size, f.sha256)
    }
    additions = [_addition(target, file) for file in files]
    operations = [
        *additions,
        *(_sent(target, file) for file in uploaded if file.file not in there),
        *(_taken_over(target, file) for file in copied if file.file not in there),
        *(CommitOperationDelete(target.path(name)) for name in destination.outdated),
    ]
    request = lambda: HfApi().create_commit(
        target.repo,
        operations,
        commit_message=f"Upload {len(operations)} files with adapterkit",
        revision=target.revision,
        parent_commit=destination.parent,
    )
    done = retry(request, target)
    written = {file.file: RemoteEntry(file.size, file.sha256) for file in large}
    for file, addition in zip(files, additions, strict=True):
        info = addition.upload_info
        written[file.name] = RemoteEntry(info.size, info.sha256.hex())
    _check_commit(HubId(target.repo, done.oid, target.subfolder), written)
    return Commit(done.oid, redact(done.commit_url))


def copy_storage(target: HubId, files: Sequence[CopiedFile]) -> list[CopiedFile]:
    """Copy large files of other repositories on the Hub; return those that the repository now has.

    The Hub does not copy files of another region, of read-only repositories, or in the older
    storage. Files that it does not copy, also because it fails, are uploaded.
    """
    by_source: dict[HubId, list[CopiedFile]] = {}
    for file in files:
        by_source.setdefault(HubId(file.repo, file.revision), []).append(file)
    return [
        file
        for source, some in by_source.items()
        for file in (some if source.repo == target.repo else _duplicated(target, source, some))
    ]


def _duplicated(target: HubId, source: HubId, files: list[CopiedFile]) -> list[CopiedFile]:
    try:
        return _duplicate(target, source, files)
    except AdapterkitError as error:
        log.warning("%s: not copied on the Hub: %s", source, error.problem)
        return []


def _duplicate(target: HubId, source: HubId, files: list[CopiedFile]) -> list[CopiedFile]:
    """Copy as the library does while it commits, but early enough to upload instead."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    paths = [file.path for file in files]
    request = lambda: HfApi().get_paths_info(source.repo, paths, revision=source.revision)
    found = {info.path: getattr(info, "xet_hash", None) for info in retry(request, source)}
    wanted = [file for file in files if found.get(file.path)]
    body = {
        "target": {"type": "model", "name": target.repo},
        "files": [
            {"xetHash": found[file.path], "sha256": file.sha256, "filename": file.path}
            for file in wanted
        ],
    }

    def duplicate() -> set[str]:
        """Copy files; return the sha256 of those that could not be copied."""
        url = f"{constants.ENDPOINT}/api/models/{source.repo}/lfs-files/duplicate"
        response = get_session().post(url, headers=build_hf_headers(), json=body)
        hf_raise_for_status(response)
        return {file.get("sha256") for file in response.json().get("failed", [])}

    if not wanted:
        return []
    failed = retry(duplicate, source)
    return [file for file in wanted if file.sha256 not in failed]


def _addition(target: HubId, file: LocalFile):
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(target.path(file.name), str(file.path))
    if file.sha256 is not None:
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # else the library hashes it again
    return addition


def _sent(target: HubId, file: Uploaded):
    """The operation for a file no longer on disk, as the library leaves it after an upload with
    `free_memory`, because it has no public constructor for one."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(target.path(file.file), b"")
    addition.upload_info = UploadInfo(size=file.size, sample=b"", sha256=bytes.fromhex(file.sha256))
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition


def _taken_over(target: HubId, file: CopiedFile):
    from huggingface_hub import CommitOperationCopy

    path = target.path(file.file)
    if file.repo == target.repo:
        return CommitOperationCopy(file.path, path, src_revision=file.revision)
    return CommitOperationCopy(
        file.path, path, src_revision=file.revision, src_repo_id=file.repo, src_repo_type="model"
    )


def _check_commit(commit: HubId, written: Mapping[str, RemoteEntry]) -> None:
    """`Failed` where the commit lacks a file: a server's .gitignore drops files silently."""
    _, entries = list_remote(commit, hidden=True)
    _refuse_left_out(
        [
            name
            for name, file in written.items()
            if (entry := entries.get(name)) is None
            or entry.size != file.size
            or (entry.sha256 and entry.sha256 != file.sha256)
        ],
        commit,
    )


def _refuse_left_out(names: list[str], where: HubId) -> None:
    if names:
        raise Failed(
            f"files are missing from the commit, or differ in it: {shown(', '.join(names))}",
            expected="all files of the output, byte for byte",
            where=str(where),
            hint="check whether the repository's .gitignore excludes them, then push again",
            code="AK704",
        )
