"""The Hub: the only file that talks to the network, through huggingface_hub, which is imported when first needed.

A `HubFolder` is pinned to one commit for its whole life: what is planned from it is what is read from it, wherever its
branch moves meanwhile. Ranges of weights are read without a cache, whole files land in huggingface_hub's own. `push` is
one commit. Every failure becomes an `AdapterkitError` in plain words, without tokens, signed addresses or tracebacks.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from adapterkit.checkpoint.folder import LocalFolder, inside
from adapterkit.errors import AdapterkitError, Damaged, Failed, Refused, shown

TRIES = 5  # of one request, the first one included
WAIT = 0.5  # seconds before the second try, doubled before each later one
LONGEST_WAIT = 120.0  # seconds, whatever the server asks for
TIMEOUT = 30.0  # seconds without a byte before a request counts as lost
SMALL = (
    16 << 20
)  # bytes; the Hub keeps files beyond 10 MB apart from git, and binary ones of any size
MANY_FILES = 10_000  # a repository's summary may leave files out beyond some tens of thousands; its tree never does
UPLOAD_GROUP = 256 << 20  # bytes between two reports of progress

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
GRAMMAR = re.compile(
    rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[^\s:\\~^?*\[]+))?(?::(?P<subfolder>[^:\\]+?)/?)?",
    re.ASCII,
)
# Weights that a loader would pick by their name alone, so that old ones beside new ones are silently wrong.
LOADABLE = re.compile(
    r"((diffusion_)?pytorch_model|adapter_model|model)[^/]*\.(safetensors|bin)(\.index\.json)?"
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class HubId:
    """A folder of a model repository: `org/name[@revision][:subfolder]`."""

    repo: str
    revision: str | None = None  # a branch, a tag or a commit; None: the default branch
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.subfolder}" if self.subfolder else "")


def parse(source: str) -> HubId | None:
    """The Hub id that a text is, or None; whether it is a path on disk is the caller's first question."""
    match = GRAMMAR.fullmatch(source) if source.isprintable() else None
    if match is None:
        return None
    repo, revision, subfolder = match.group("repo", "revision", "subfolder")
    named = all(
        ".." not in part and "--" not in part and not part.endswith(".git")
        for part in repo.split("/")
    )
    plain = all(
        part and part == part.rstrip(". ")
        for path in (revision, subfolder)
        if path
        for part in path.split("/")
    )
    return HubId(repo, revision, subfolder or "") if named and plain else None


class Entry(NamedTuple):
    """One file of a listing: its size in bytes, and its sha256 where the Hub stores it as a large file."""

    size: int
    sha256: str | None = None


class HubFolder:
    """A folder of a model repository, pinned to one commit; see `Folder`.

    Raises `Refused` when the repository, revision or folder is not there for this account, and `Failed` when the Hub is
    in trouble. Without a network the local cache stands in for it.
    """

    def __init__(self, hub_id: HubId):
        self.hub_id = hub_id
        self.commit, self._entries = _listing(hub_id)
        self.name, self.given = hub_id.repo, str(hub_id)
        self.origin = {"repo": hub_id.repo, "revision": self.commit}
        if hub_id.subfolder:
            self.origin["subfolder"] = hub_id.subfolder
        self.hashes = {name: entry.sha256 for name, entry in self._entries.items() if entry.sha256}
        self._lock = threading.Lock()
        self._whole: dict[str, Future[Path]] = {}  # files that are asked for, on their way or there
        self._queue: list[str] = []
        self._thread: threading.Thread | None = None

    def files(self) -> dict[str, int]:
        return {name: entry.size for name, entry in self._entries.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of one file, and no others over the network; small text files come whole into the cache.

        Raises `Damaged` for a file that the commit lacks, `Failed` when no right answer came in `TRIES` tries.
        """
        size = self._size(name)
        stop = min(stop, size)
        if start >= stop:
            return b""
        cached = self._cached(name)
        if cached is None and size <= SMALL and name not in self.hashes:
            cached = self.path(
                name
            )  # the Hub may answer a range of a file that is plain git with all of it
        if cached:
            return _read_local(cached, start, stop)
        if _offline():
            raise self._absent(name)
        return _retrying(lambda: self._range(name, start, stop, size), self._pinned(), name)

    def path(self, name: str) -> Path:
        """The whole file in huggingface_hub's cache, downloaded there first unless `prefetch` already is at it.

        Raises what `read` does, and `Refused` when it is neither cached nor to be had.
        """
        future, mine = self._claim(name)
        if mine:
            self._fill(future, name)
        try:
            return future.result()
        finally:
            if future.done() and future.exception() is not None:
                with self._lock:  # the next call tries anew
                    if self._whole.get(name) is future:
                        del self._whole[name]

    def prefetch(self, names: list[str]) -> None:
        """Start to download files, one after another in this order, in a background thread; `path` says how it went."""
        with self._lock:
            self._queue += names
            if self._queue and self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name=f"prefetch {self.name}", daemon=True
                )
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                name = self._queue.pop(0)
            future, mine = self._claim(name)
            if not mine:
                continue
            self._fill(future, name)
            if future.exception() is not None:
                with self._lock:  # no use in the rest before somebody has looked; `path` still gets each by itself
                    self._queue.clear()

    def _claim(self, name: str) -> tuple["Future[Path]", bool]:
        """The future of a file, and whether it is the caller who has to fill it."""
        with self._lock:
            future = self._whole.setdefault(name, Future())
            return future, not (
                future.running() or future.done()
            ) and future.set_running_or_notify_cancel()

    def _fill(self, future: "Future[Path]", name: str) -> None:
        try:
            future.set_result(self._download(name))
        except BaseException as error:
            future.set_exception(error)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        size = self._size(name)
        cached = self._cached(name)
        if cached:
            return cached
        if _offline():
            raise self._absent(name)
        with _quiet():
            ask = lambda: hf_hub_download(self.hub_id.repo, self._full(name), revision=self.commit)
            path = Path(_retrying(ask, self._pinned(), name))
        _check_size(path, size)
        self._remember()
        return path

    def _range(self, name: str, start: int, stop: int, size: int) -> bytes:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.hub_id.repo, self._full(name), revision=self.commit)
        # identity: a compressed range is a range of other bytes
        headers = build_hf_headers() | {
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as answer:
            if answer.status_code >= 400 and answer.status_code != 416:
                hf_raise_for_status(answer)
            _check_range(answer.status_code, answer.headers, start, stop, size)
            data = bytearray()
            for piece in answer.iter_raw():
                data += piece
                if len(data) > stop - start:
                    break
        if len(data) != stop - start:
            raise _Unusable(f"a body of {len(data):,} bytes for {stop - start:,}")
        return bytes(data)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.hub_id.repo, self._full(name), revision=self.commit)
        if not isinstance(path, str):
            return None
        _check_size(Path(path), self._size(name))
        return Path(path)

    def _remember(self) -> None:
        """Note in the cache what the branch or tag stood for, so that it has an answer offline as well."""
        if self.hub_id.revision == self.commit:
            return
        ref = (
            _store(self.hub_id) / "refs" / inside(self.hub_id.revision or "main", str(self.hub_id))
        )
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit)
        except (
            OSError
        ):  # a cache that cannot be written, such as a shared one, still serves this run
            log.debug("cannot write %s", ref)

    def _size(self, name: str) -> int:
        inside(name, str(self._pinned()))
        if name not in self._entries:
            raise Damaged(
                "no such file in this commit",
                expected="one of " + shown(", ".join(self._entries)),
                where=_where(self._pinned(), name),
                hint="check the file name, and whether the repository is complete",
            )
        return self._entries[name].size

    def _full(self, name: str) -> str:
        return f"{self.hub_id.subfolder}/{name}" if self.hub_id.subfolder else name

    def _pinned(self) -> HubId:
        return HubId(self.hub_id.repo, self.commit, self.hub_id.subfolder)

    def _absent(self, name: str) -> Refused:
        command = (
            f"hf download {self.hub_id.repo} {shown(self._full(name))} --revision {self.commit}"
        )
        return Refused(
            "not in the local Hub cache, and HF_HUB_OFFLINE is set",
            expected="a cached copy, or a network",
            where=_where(self._pinned(), name),
            hint=f"run `{command}` where there is a network, or unset HF_HUB_OFFLINE",
        )


def push(folder: Path, repo: str, *, progress: Callable[[int, int], None] | None = None) -> dict:
    """Upload a folder as one commit to a model repository, made first where there is none; where it is now.

    `progress(done, total)` hears of bytes. Raises `Refused` for a folder, a name or an account that will not do, and
    `Failed` when the upload broke or the repository changed meanwhile: nothing is committed then, and a second run
    uploads only what is missing.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files, target = _to_push(folder), _push_target(repo)
    api = HfApi()
    with _quiet():
        _retrying(lambda: api.create_repo(repo, exist_ok=True), target)
        parent, before = _remote_listing(target, hidden=True)
        _refuse_old_weights(
            set(before) - set(files), {str(Path(name).parent) for name in files}, target
        )
        additions = [CommitOperationAdd(name, str(Path(folder, name))) for name in files]
        with _explaining(target):
            _upload(api, repo, additions, progress or (lambda done, total: None))
        message = f"Upload {len(files)} files with adapterkit"
        commit = lambda: api.create_commit(
            repo, additions, commit_message=message, parent_commit=parent
        )
        done = _retrying(commit, target)
    _check_pushed(HubId(repo, done.oid), {add.path_in_repo: add.upload_info for add in additions})
    return {"repo": repo, "revision": done.oid, "url": _clean(done.commit_url)}


def _to_push(folder: Path) -> dict[str, int]:
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


def _push_target(repo: str) -> HubId:
    target = parse(repo)
    if target is None or target.revision or target.subfolder:
        raise Refused(
            f"{shown(repo)!r}",
            expected="a repository, `org/name`, without revision or folder",
            where="the place to push to",
            hint="give your account's or organisation's name and the repository's",
        )
    if _offline():
        raise Refused(
            "HF_HUB_OFFLINE is set",
            expected="a network to push over",
            where=repo,
            hint="unset HF_HUB_OFFLINE, or push the folder later with `hf upload`",
        )
    return target


def _refuse_old_weights(others: set[str], folders: set[str], target: HubId) -> None:
    old = sorted(
        n for n in others if str(Path(n).parent) in folders and LOADABLE.fullmatch(Path(n).name)
    )
    if old:
        raise Refused(
            f"other weights are there already: {shown(', '.join(old))}",
            expected="a repository whose weights this upload replaces all; a loader might pick the old ones",
            where=str(target),
            hint=f"push to another repository, or run `hf repos delete-files {target.repo} {shown(' '.join(old))}` first",
        )


def _upload(api, repo: str, additions: list, progress: Callable[[int, int], None]) -> None:
    total = sum(add.upload_info.size for add in additions)
    group, reported, done = [], 0, 0
    for add in additions:
        group.append(add)
        done += add.upload_info.size
        if done - reported >= UPLOAD_GROUP or add is additions[-1]:
            # free_memory would drop the paths, which create_commit looks at again
            api.preupload_lfs_files(repo, group, free_memory=False)
            group, reported = [], done
            progress(done, total)


def _check_pushed(commit: HubId, sent: dict) -> None:
    """Refuse to call done what a server's .gitignore or a lost object left out."""
    _, there = _remote_listing(commit, hidden=True)
    wrong = []
    for name, info in sent.items():
        entry = there.get(name)
        if (
            entry is None
            or entry.size != info.size
            or (entry.sha256 and entry.sha256 != info.sha256.hex())
        ):
            wrong.append(name)
    if wrong:
        raise Failed(
            f"the commit lacks or holds otherwise: {shown(', '.join(wrong))}",
            expected="all files of the folder, byte for byte",
            where=str(commit),
            hint="see whether the repository's .gitignore leaves them out, then push again",
        )


# Listings: what a revision is, and what it holds


def _listing(hub_id: HubId) -> tuple[str, dict[str, Entry]]:
    """The commit of a Hub id and its files; from the local cache when there is no network."""
    if _offline():
        return _cached_listing(hub_id, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    try:
        commit, entries = _remote_listing(hub_id)
    except _Unreachable as error:
        commit, entries = _cached_listing(hub_id, error.found, "mend the connection")
        log.warning("%s: %s; using commit %s of the local cache", hub_id, error.found, commit[:12])
        return commit, entries
    if not entries:
        raise Refused(
            "no files there" if not hub_id.subfolder else "no such folder, or nothing in it",
            expected="a folder with a checkpoint",
            where=str(hub_id),
            hint=f"see {_page(hub_id)}/tree/{commit}",
        )
    return commit, entries


def _remote_listing(hub_id: HubId, hidden: bool = False) -> tuple[str, dict[str, Entry]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, repo = HfApi(), hub_id.repo
    ask = lambda: api.model_info(
        repo, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT
    )
    info = _retrying(ask, hub_id)
    commit = info.sha or ""
    asked = hub_id.revision or ""
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(asked) and asked != commit):
        raise Failed(
            f"commit {shown(commit)!r} in the answer",
            expected=asked if COMMIT.fullmatch(asked) else "40 hexadecimal digits",
            where=str(hub_id),
            hint="check that HF_ENDPOINT is a Hub server",
        )
    files = info.siblings or []
    entries = {file.rfilename: _entry(file) for file in files}
    if len(files) > MANY_FILES or any(file.size is None for file in files):
        tree = _retrying(
            lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)), hub_id
        )
        entries = {file.path: _entry(file) for file in tree if isinstance(file, RepoFile)}
    return commit, _below(hub_id.subfolder, entries, hidden)


def _entry(file) -> Entry:
    return Entry(file.size, file.lfs.sha256 if file.lfs else None)


def _below(subfolder: str, entries: dict[str, Entry], hidden: bool) -> dict[str, Entry]:
    prefix = f"{subfolder}/" if subfolder else ""
    found = {
        name.removeprefix(prefix): entry
        for name, entry in sorted(entries.items())
        if name.startswith(prefix)
    }
    return {
        n: e
        for n, e in found.items()
        if hidden or not any(part.startswith(".") for part in n.split("/"))
    }


def _cached_listing(hub_id: HubId, why: str, mend: str) -> tuple[str, dict[str, Entry]]:
    store = _store(hub_id)
    commit = hub_id.revision or "main"
    ref = store / "refs" / inside(commit, str(hub_id))
    if not COMMIT.fullmatch(commit) and ref.is_file():
        commit = ref.read_text().strip()
    snapshot = store / "snapshots" / commit / hub_id.subfolder
    files = LocalFolder(snapshot).files() if COMMIT.fullmatch(commit) and snapshot.is_dir() else {}
    if files:
        return commit, {name: Entry(size) for name, size in files.items()}
    revision = f" --revision {hub_id.revision}" if hub_id.revision else ""
    only = f" --include '{hub_id.subfolder}/*'" if hub_id.subfolder else ""
    raise Refused(
        f"not in the local Hub cache, and {why}",
        expected="a cached copy, or a network",
        where=str(hub_id),
        hint=f"run `hf download {hub_id.repo}{revision}{only}` where there is a network, or {mend}",
    )


def _store(hub_id: HubId) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
        repo_id=hub_id.repo, repo_type="model"
    )


def _read_local(path: Path, start: int, stop: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
    except OSError as error:
        raise Failed(
            f"cannot read: {error.strerror}",
            expected="a readable cache",
            where=str(path),
            hint="delete the file",
        ) from error
    if len(data) != stop - start:
        raise Failed(
            f"{len(data):,} bytes from byte {start:,} on",
            expected=f"{stop - start:,} bytes, as there were when the size was checked",
            where=str(path),
            hint="keep other programs from the cache and run again",
        )
    return data


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size
    if found != size:
        raise Damaged(
            f"{found:,} bytes in the local Hub cache",
            expected=f"{size:,} bytes",
            where=str(path),
            hint="delete this file and the one it links to",
        )


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from logging signed addresses, and from drawing bars unless its variable asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_scrub)  # the same function again is no second filter
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# Answers: which of them may be used, which are worth another try, and what the others mean in plain words


class _Unusable(Exception):
    """An answer that is not the one asked for; never used, asked for again."""


class _Unreachable(Failed):
    """No answer at all."""


def _check_range(status: int, headers, start: int, stop: int, size: int) -> None:
    wanted = {
        "content-range": f"bytes {start}-{stop - 1}/{size}",
        "content-length": str(stop - start),
    }
    if status != 206:
        raise _Unusable(f"status {status}")
    for name, value in wanted.items():
        if headers.get(name, "").strip() != value:
            raise _Unusable(f"{name} {shown(headers.get(name))!r}")
    if headers.get("content-encoding", "identity") != "identity":
        raise _Unusable(f"content-encoding {shown(headers['content-encoding'])!r}")


def _retrying(ask: Callable[[], T], hub_id: HubId, file: str = "") -> T:
    """What `ask` returns, asked again while the server is busy, unreachable or answers something else."""
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except AdapterkitError:
            raise
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES:
                raise _explained(error, hub_id, file) from None
            log.warning(
                "%s: %s; try %d of %d in %.1f s",
                _where(hub_id, file),
                _brief(error),
                attempt + 1,
                TRIES,
                wait,
            )
            time.sleep(wait)
    raise AssertionError("TRIES is at least 1")


@contextmanager
def _explaining(hub_id: HubId) -> Iterator[None]:
    """For calls that huggingface_hub tries again by itself."""
    try:
        yield
    except AdapterkitError:
        raise
    except Exception as error:
        raise _explained(error, hub_id) from None


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds until another try, None where it would end in the same way."""
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", 0)
    # the last: another thread met an error and closed the session that all share
    told = ("Consistency check failed", "the client has been closed")
    lost = (
        isinstance(error, _Unusable)
        or _is_transport(error)
        or any(text in str(error) for text in told)
    )
    if not lost and status not in (408, 429, 500, 502, 503, 504):
        return None
    headers = getattr(answer, "headers", {})
    limit = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) if status == 429 else None
    later = limit.group(1) if limit else headers.get("retry-after", "")
    asked = float(later) if later.isdecimal() else 0.0
    return min(LONGEST_WAIT, max(asked, WAIT * 2 ** (attempt - 1)))


def _is_transport(error: BaseException) -> bool:
    """A request that got no answer: refused, reset, cut off, timed out or never resolved."""
    return any(
        c.__name__ == "RequestError" for c in type(error).__mro__
    )  # of httpx, or httpx2 from hub 2 on


# What an error of the library means: kind, found, expected, what to do
Meaning = tuple[type[AdapterkitError], str, str, str]
NOT_A_HUB: Meaning = (
    Failed,
    "an answer that is not a Hub's",
    "the JSON and the headers of a Hub server",
    "check HF_ENDPOINT, and proxies or login pages on the way",
)
MEANINGS: dict[str | int, Meaning] = {  # by the name of its class, or by the status of the answer
    "GatedRepoError": (
        Refused,
        "access to this repository is restricted",
        "an account that its owners let in",
        "ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        Refused,
        "no such repository, or a private one; nor a file or folder of that name here",
        "a model repository that this account may read, or a path that exists",
        "check the name; for a private repository log in with `hf auth login` or set HF_TOKEN",
    ),
    "DisabledRepoError": (
        Refused,
        "the Hub has disabled this repository",
        "one in use",
        "see {page}",
    ),
    "RevisionNotFoundError": (
        Refused,
        "no such revision",
        "a branch, a tag or a commit of {repo}",
        "see {page}/tree/main for those there are",
    ),
    "RemoteEntryNotFoundError": (
        Damaged,
        "no such file in this revision",
        "a file that the repository holds",
        "see {page}/tree/{revision}",
    ),
    "HFValidationError": (Refused, "not a name that the Hub takes", "`org/name`", "check the name"),
    "FileMetadataError": NOT_A_HUB,
    "JSONDecodeError": NOT_A_HUB,
    "KeyError": NOT_A_HUB,
    401: (
        Refused,
        "the Hub does not accept these credentials",
        "a valid token, or none for a public repository",
        "log in again with `hf auth login`, or mend or unset HF_TOKEN",
    ),
    403: (
        Refused,
        "the Hub does not allow this to the account",
        "a token that may read the repository, or write to it when pushing",
        "make a token with those rights at https://huggingface.co/settings/tokens",
    ),
    404: (
        Refused,
        "nothing at this address of the Hub",
        "a file or repository",
        "check the name and HF_ENDPOINT",
    ),
    412: (
        Failed,
        "the repository has changed since this upload began",
        "one writer at a time (or the answer to an earlier try of this commit was lost)",
        "look at {page}/commits/main, then push again: files that are there already are not uploaded twice",
    ),
    429: (
        Failed,
        "too many requests",
        "fewer for one account or address",
        "wait some minutes, log in, and run again",
    ),
}


def _explained(error: BaseException, hub_id: HubId, file: str = "") -> AdapterkitError:
    """The error of a library call in four parts."""
    while type(error).__name__ in ("LocalEntryNotFoundError", "RuntimeError") and error.__cause__:
        error = error.__cause__
    kind, found, expected, hint = _meaning(error)
    names = {"repo": hub_id.repo, "revision": hub_id.revision or "main", "page": _page(hub_id)}
    expected, hint = _clean(expected.format_map(names)), _clean(hint.format_map(names))
    return kind(_clean(found), expected=expected, where=_where(hub_id, file), hint=hint)


def _meaning(error: BaseException) -> Meaning:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    for key in [c.__name__ for c in type(error).__mro__] + [status]:
        if key in MEANINGS:
            return MEANINGS[key]
    again = "run again: what is there already is not transferred twice"
    if isinstance(error, _Unusable):
        found, hint = (
            f"{error} in answer to a range, {TRIES} times",
            "check HF_ENDPOINT, and proxies on the way",
        )
        return Failed, found, "exactly that range", hint
    if _is_transport(error):
        found, hint = (
            _brief(error),
            "check the connection and the proxies; with a cached copy set HF_HUB_OFFLINE=1",
        )
        return _Unreachable, found, "a network, or a cached copy", hint
    if status >= 500:
        hint = f"see https://status.huggingface.co, then {again}; with a cached copy set HF_HUB_OFFLINE=1"
        return Failed, _brief(error), "a Hub in order", hint
    if "Invalid metadata in README.md" in str(error):
        return (
            Refused,
            _brief(error),
            "YAML that the Hub accepts at the head of the model card",
            "mend README.md",
        )
    if status:
        return Failed, _brief(error), "an answer of use", again
    if isinstance(error, OSError) and error.errno:
        hint = "free space, or give HF_HOME a folder that can be written"
        return Failed, f"the local Hub cache: {error.strerror}", "a cache that can be written", hint
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return Failed, "a download of the wrong length", "the length that the Hub promised", again
    return (
        Failed,
        _brief(error),
        "a transfer without errors",
        again + "; HF_HUB_DISABLE_XET=1 transfers over plain HTTP",
    )


def _brief(error: BaseException) -> str:
    """One line on an error: what the server said, or what happened instead of an answer."""
    if isinstance(error, _Unusable):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    said = getattr(error, "server_message", None) or "" if status else str(error)
    said = " ".join(_clean(said).split())
    if status:
        return f"the Hub answered {status}" + (f": {shown(said)}" if said else "")
    if _is_transport(error):
        return f"the Hub cannot be reached ({type(error).__name__}{': ' * bool(said)}{shown(said)})"
    return f"{type(error).__name__}: {shown(said)}"


def _clean(text: str) -> str:
    """A text without tokens, passwords and the signatures of addresses."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_\w{8,}", "***", text)
    text = re.sub(r"(https?://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


def _scrub(record: logging.LogRecord) -> bool:
    record.msg, record.args = _clean(record.getMessage()), ()
    return True


def _page(hub_id: HubId) -> str:
    from huggingface_hub import constants

    return _clean(f"{constants.ENDPOINT}/{hub_id.repo}")


def _where(hub_id: HubId, file: str = "") -> str:
    return f"{hub_id}: {shown(file)}" if file else str(hub_id)
