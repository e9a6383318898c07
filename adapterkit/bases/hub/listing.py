"""List the commit of a revision and its files; without a network, from the local cache. A job notes
the commits of its inputs, so a run that resumes it reads the same ones even if branches moved."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from adapterkit.bases.hub.errors import Unreachable, page
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.folder import WEIGHTS, LocalFolder, inside
from adapterkit.core.checkpoint.hub_ids import COMMIT, HubId
from adapterkit.core.commands import command
from adapterkit.core.errors import Failed, Refused, shown

TIMEOUT = 30.0  # seconds without a byte before a request counts as lost
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_SUMMARY = 10_000  # files; the summary of a larger repository may be incomplete, its tree is not

log = logging.getLogger(__name__)
Pins = dict[str, str]  # `org/name[@revision]` -> commit

_pins: ContextVar[Pins | None] = ContextVar("pins", default=None)


class RemoteEntry(NamedTuple):
    """One file of a listing."""

    size: int  # bytes
    sha256: str | None = None  # where the Hub stores it as a large file
    blob: str | None = None  # git's hash of another, where the Hub gives it


def list_files(hub_id: HubId) -> tuple[str, dict[str, RemoteEntry]]:
    """The commit of a Hub id and its files; from the local cache when there is no network.

    If the id names a file, only that one, under the name "".
    """
    if offline():
        return _list_cache(hub_id, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    try:
        commit, entries = list_remote(hub_id)
    except Unreachable as error:
        commit, entries = _list_cache(hub_id, error.problem, "fix the connection")
        log.warning(
            "%s: %s; using commit %s of the local cache", hub_id, error.problem, commit[:12]
        )
        return commit, entries
    if not entries:
        raise Refused(
            "there are no files" if not hub_id.subfolder else "no such file or folder",
            expected="a folder with a checkpoint, or a file of weights",
            where=str(hub_id),
            hint=f"see {page(hub_id)}/tree/{commit}",
            code="AK701",
        )
    return commit, entries


def list_remote(hub_id: HubId, hidden: bool = False) -> tuple[str, dict[str, RemoteEntry]]:
    """The commit of a Hub id and its files, named as in `list_files`; dot files only if `hidden`.

    Raises `Refused` for a repository or revision that is not there, `Failed` for a failing server.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, repo = HfApi(), hub_id.repo
    request = lambda: api.model_info(
        repo, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT
    )
    info = retry(request, hub_id)
    commit, revision = str(info.sha), hub_id.revision or ""
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and revision != commit):
        expected = revision if COMMIT.fullmatch(revision) else "40 hexadecimal digits"
        raise _not_a_hub(f"commit {shown(commit)!r}", expected, hub_id)
    files = info.siblings or []
    named = [(file.rfilename, file) for file in files]
    if len(files) > MAX_SUMMARY or any(file.size is None for file in files):
        request = lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit))
        tree = retry(request, hub_id)
        named = [(file.path, file) for file in tree if isinstance(file, RepoFile)]
    if odd := [name for name, _ in named if not isinstance(name, str) or "\0" in name]:
        raise _not_a_hub(f"file name {shown(odd[0])!r}", "a path", hub_id)
    entries = {name: _entry(file, hub_id) for name, file in named}
    return commit, _in_subfolder(hub_id.subfolder, entries, hidden)


def _entry(file, hub_id: HubId) -> RemoteEntry:
    size, sha = file.size, file.lfs.sha256 if file.lfs else None
    if type(size) is not int or size < 0:
        raise _not_a_hub(f"a file of {shown(size)} bytes", "a number", hub_id)
    if sha is not None and not (isinstance(sha, str) and SHA256.fullmatch(sha)):
        raise _not_a_hub(f"sha256 {shown(sha)!r}", "64 hexadecimal digits", hub_id)
    return RemoteEntry(size, sha, None if sha else getattr(file, "blob_id", None))


def _not_a_hub(problem: str, expected: str, hub_id: HubId) -> Failed:
    hint = "check that HF_ENDPOINT is a Hub server"
    return Failed(
        f"the answer has {problem}", expected=expected, where=str(hub_id), hint=hint, code="AK702"
    )


def _in_subfolder(
    subfolder: str, entries: dict[str, RemoteEntry], hidden: bool
) -> dict[str, RemoteEntry]:
    if subfolder in entries:
        return {"": entries[subfolder]}
    prefix = f"{subfolder}/" if subfolder else ""
    below = {
        path.removeprefix(prefix): entry
        for path, entry in sorted(entries.items())
        if path.startswith(prefix)
    }
    is_hidden = lambda name: any(part.startswith(".") for part in name.split("/"))
    return {name: entry for name, entry in below.items() if hidden or not is_hidden(name)}


def _list_cache(hub_id: HubId, reason: str, hint: str) -> tuple[str, dict[str, RemoteEntry]]:
    """As `list_files`, from the local cache; `Refused` with both texts where it has no copy."""
    folder = cache_folder(hub_id)
    commit = hub_id.revision or "main"
    ref = folder / "refs" / inside(commit, str(hub_id))
    if not COMMIT.fullmatch(commit) and ref.is_file():
        commit = ref.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit / hub_id.subfolder
    if COMMIT.fullmatch(commit) and snapshot.exists():
        files = (
            LocalFolder(snapshot).files() if snapshot.is_dir() else {"": snapshot.stat().st_size}
        )
        if files:
            return commit, {name: RemoteEntry(size) for name, size in files.items()}
    inside_it = "" if hub_id.subfolder.endswith(WEIGHTS) else "/*"
    only = f"{hub_id.subfolder}{inside_it}" if hub_id.subfolder else None
    download = command("hf download", hub_id.repo, revision=hub_id.revision, include=only)
    raise Refused(
        f"no such file or folder here, nor in the local Hub cache, and {reason}",
        expected="a path that exists, a cached copy, or a network",
        where=str(hub_id),
        hint=f"{hint}, or run with a network\n{download}",
        code="AK703",
    )


def cache_folder(hub_id: HubId) -> Path:
    """The repository's folder in huggingface_hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=hub_id.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser() / name


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def pinned(commits: Pins) -> Iterator[Pins]:
    """Read revisions in `commits` at these commits; record others in it as they are read."""
    token = _pins.set(commits)
    try:
        yield commits
    finally:
        _pins.reset(token)


def are_pinned() -> bool:
    """Return whether a job records the commits that it reads."""
    return _pins.get() is not None


def current_pins() -> Pins:
    """All revisions that the job has read so far, with their commits."""
    return dict(_pins.get() or {})


def pinned_id(hub_id: HubId) -> HubId:
    """The Hub id at its commit, if that is known."""
    commit = (_pins.get() or {}).get(_name(hub_id))
    return HubId(hub_id.repo, commit, hub_id.subfolder) if commit else hub_id


def note_commit(hub_id: HubId, commit: str) -> None:
    """Record the commit that was found for a Hub id."""
    pins = _pins.get()
    if pins is not None:
        pins.setdefault(_name(hub_id), commit)


def _name(hub_id: HubId) -> str:
    return str(HubId(hub_id.repo, hub_id.revision))
