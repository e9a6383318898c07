"""Uploading a folder to a model repository, as one commit."""

import re
from collections.abc import Callable
from pathlib import Path

from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.errors import Failed, Refused, shown
from adapterkit.hub.errors import explained_errors, quiet_library, redact
from adapterkit.hub.ids import HubId, parse
from adapterkit.hub.listing import list_remote, offline
from adapterkit.hub.retry import retry

UPLOAD_GROUP = 256 << 20  # bytes between two reports of progress
# Weights that a loader picks by their name alone: old ones beside new ones are silently wrong.
LOADABLE = re.compile(
    r"((diffusion_)?pytorch_model|adapter_model|model)[^/]*\.(safetensors|bin)(\.index\.json)?"
)


def push(folder: Path, repo: str, *, progress: Callable[[int, int], None] | None = None) -> dict:
    """Upload a folder as one commit to a model repository, which is created if there is none.

    Returns the receipt's `pushed`: repo, revision, url. `progress(done, total)` counts bytes.
    Raises `Refused` for a folder, a name or an account that will not do, and `Failed` when the
    upload broke or the repository changed meanwhile: nothing is committed then, and a second run
    uploads only what is missing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files, target = _finished_files(folder), _target(repo)
    api = HfApi()
    with quiet_library():
        retry(lambda: api.create_repo(repo, exist_ok=True), target)
        parent, before = list_remote(target, hidden=True)
        _refuse_old_weights(
            set(before) - set(files), {str(Path(name).parent) for name in files}, target
        )
        additions = [CommitOperationAdd(name, str(Path(folder, name))) for name in files]
        with explained_errors(target):
            _upload(api, repo, additions, progress or (lambda done, total: None))
        message = f"Upload {len(files)} files with adapterkit"
        request = lambda: api.create_commit(
            repo, additions, commit_message=message, parent_commit=parent
        )
        commit = retry(request, target)
    uploads = {addition.path_in_repo: addition.upload_info for addition in additions}
    _check_commit(HubId(repo, commit.oid), uploads)
    return {"repo": repo, "revision": commit.oid, "url": redact(commit.commit_url)}


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
    if offline():
        raise Refused(
            "HF_HUB_OFFLINE is set",
            expected="a network to push over",
            where=repo,
            hint="unset HF_HUB_OFFLINE, or push the folder later with `hf upload`",
        )
    return target


def _refuse_old_weights(others: set[str], folders: set[str], target: HubId) -> None:
    """`Refused` where weights that this upload does not replace lie beside those that it writes."""
    old = sorted(
        name
        for name in others
        if str(Path(name).parent) in folders and LOADABLE.fullmatch(Path(name).name)
    )
    if old:
        command = f"hf repos delete-files {target.repo} {shown(' '.join(old))}"
        raise Refused(
            f"other weights are there already: {shown(', '.join(old))}",
            expected="a repository all of whose weights this upload replaces; "
            "a loader might pick the old ones",
            where=str(target),
            hint=f"push to another repository, or run `{command}` first",
        )


def _upload(api, repo: str, additions: list, progress: Callable[[int, int], None]) -> None:
    """Upload the large files, in groups, without a commit."""
    total = sum(addition.upload_info.size for addition in additions)
    group, reported, done = [], 0, 0
    for addition in additions:
        group.append(addition)
        done += addition.upload_info.size
        if done - reported >= UPLOAD_GROUP or addition is additions[-1]:
            # free_memory would drop the paths, which create_commit looks at again
            api.preupload_lfs_files(repo, group, free_memory=False)
            group, reported = [], done
            progress(done, total)


def _check_commit(commit: HubId, uploads: dict) -> None:
    """`Failed` where the commit lacks a file: a server's .gitignore drops files silently."""
    _, entries = list_remote(commit, hidden=True)
    wrong = []
    for name, upload in uploads.items():
        entry = entries.get(name)
        if (
            entry is None
            or entry.size != upload.size
            or (entry.sha256 and entry.sha256 != upload.sha256.hex())
        ):
            wrong.append(name)
    if wrong:
        raise Failed(
            f"files missing from the commit, or different in it: {shown(', '.join(wrong))}",
            expected="all files of the folder, byte for byte",
            where=str(commit),
            hint="check whether the repository's .gitignore excludes them, then push again",
        )
