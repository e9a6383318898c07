"""A folder of a model repository, read by ranges or file by file.

A `HubFolder` is pinned to one commit for its whole life, so a plan and its run read the same files
even if the branch moves. Ranges of weights are read without a cache, whole files go through
huggingface_hub's own.
"""

import copy
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path, PurePosixPath

from adapterkit.bases.hub.errors import UnusableAnswer, location, quiet_library
from adapterkit.bases.hub.listing import cache_folder, list_files, note_commit, offline, pinned_id
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.folder import OTHER_WEIGHTS, inside
from adapterkit.core.checkpoint.header import FIRST_READ
from adapterkit.core.checkpoint.hub_ids import HubId
from adapterkit.core.commands import command
from adapterkit.core.errors import Damaged, Failed, Refused, shown

# bytes; the Hub keeps files beyond 10 MB apart from git, and binary ones of any size
SMALL_FILE = 16 << 20
SMALL_RANGE = 4 << 10  # bytes; what is read of a file is kept up to this size

log = logging.getLogger(__name__)


class HubFolder:
    """A folder of a model repository, or a single file of it, pinned to one commit; see `Folder`.

    Raises `Refused` if this account cannot see the repository, revision or folder, and `Failed` if
    the Hub fails. Without a network the local cache is used.
    """

    def __init__(self, hub_id: HubId):
        self.hub_id = hub_id
        asked = pinned_id(hub_id)
        self.commit, self._entries = list_files(asked)
        note_commit(hub_id, self.commit)
        self._is_head = asked is hub_id and hub_id.revision != self.commit
        self.name, self.label = hub_id.repo, str(hub_id)
        self.origin = {"repo": hub_id.repo, "revision": self.commit}
        self.pinned = HubId(hub_id.repo, self.commit, hub_id.subfolder)
        self.single = None
        if "" in self._entries:
            self.single = hub_id.subfolder.rpartition("/")[2]
            self.origin["file"] = self.single
            self._entries = {self.single: self._entries[""]}
            self.pinned = self.pinned.parent
        if self.pinned.subfolder:
            self.origin["subfolder"] = self.pinned.subfolder
        self.hashes = {name: entry.sha256 for name, entry in self._entries.items() if entry.sha256}
        self.parts: dict[str, list[tuple[int, int]]] = {}
        self.renamed: dict[str, str] = {}  # names here of files that have others in the repository
        self._set_up_downloads()

    def only(self, parts: dict[str, list[tuple[int, int]]]) -> "HubFolder":
        """A view for a job that reads at most these ranges of these files; `path` returns a file
        with holes, for this job alone."""
        folder = copy.copy(self)
        folder.parts = parts
        return folder

    def subfolder(self, name: str) -> "HubFolder":
        """A folder inside this one, of the same commit."""
        return HubFolder(replace(self.pinned, subfolder=self.pinned.path(name)))

    def without(self, names: Collection[str]) -> "HubFolder":
        """A view without these files."""
        folder = HubFolder(self.pinned)
        folder._entries = {name: one for name, one in self._entries.items() if name not in names}
        return folder

    def containing_folder(self) -> "HubFolder":
        """The folder that contains the file."""
        return HubFolder(self.pinned)

    def next_to(self) -> set[str]:
        """The names of all files in the file's folder."""
        return {name for name in self.containing_folder().files() if "/" not in name}

    def as_weights(self, name: str) -> "HubFolder":
        """As in a `LocalFolder`."""
        assert self.single is not None
        folder = self.containing_folder()
        here = {n: entry for n, entry in folder._entries.items() if "/" not in n}
        folder._entries = {n: e for n, e in here.items() if not n.endswith(OTHER_WEIGHTS)}
        folder._entries[name] = here[self.single]
        folder.hashes = {n: e.sha256 for n, e in folder._entries.items() if e.sha256}
        folder.renamed = {name: self.single}
        if self.single != name:
            folder.origin, folder.label = self.origin, self.label
        return folder

    def path_in_repo(self, name: str) -> str:
        """A file's path in the repository."""
        return self.pinned.path(self.renamed.get(name, name))

    def _set_up_downloads(self) -> None:
        self._lock = threading.Lock()
        self._downloads: dict[str, Future[Path]] = {}  # queued, running or done
        self._queue: list[str] = []
        self._thread: threading.Thread | None = None
        # requested by several readers: the starts of files, with their headers, and small tensors
        self._starts: dict[str, bytes] = {}
        self._small: dict[tuple[str, int, int], bytes] = {}
        self._holed: str | None = None  # a folder of files with holes
        self.parsed: dict = {}  # see `checkpoint.folder.parsed`

    def __getstate__(self) -> dict[str, object]:
        """For pickle, without the downloads: a copy does its own."""
        downloads = (
            "_lock", "_downloads", "_queue", "_thread", "_starts", "_small", "_holed", "parsed",
        )  # fmt: skip
        return {name: value for name, value in vars(self).items() if name not in downloads}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._set_up_downloads()

    def files(self) -> dict[str, int]:
        return {name: entry.size for name, entry in self._entries.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of one file; a small text file is downloaded into the cache whole.

        Raises `Damaged` for a file that the commit lacks, `Failed` without a right answer.
        """
        size = self._size(name)
        stop = min(stop, size)
        if start >= stop:
            return b""
        cached = self.cached(name)
        if cached is None and size <= SMALL_FILE and name not in self.hashes:
            # the Hub may answer a range of a file that is plain git with all of it
            cached = self.path(name)
        if cached:
            return _read_local(cached, start, stop)
        if offline():
            raise self._not_cached(name)
        known = self._starts.get(name, b"")
        if stop <= len(known):
            return known[start:stop]
        if (name, start, stop) in self._small:
            return self._small[name, start, stop]
        request = lambda: b"".join(self.pieces(name, start, stop))
        data = retry(request, self.pinned, name)
        if start == 0 and stop <= FIRST_READ:
            self._starts[name] = data
        elif len(data) <= SMALL_RANGE:
            self._small[name, start, stop] = data
        return data

    def path(self, name: str) -> Path:
        """The whole file in huggingface_hub's cache; waits for its download, or does it.

        Raises what `read` does, and `Refused` when it is neither cached nor to be had.
        """
        future, is_ours = self._claim(name)
        if is_ours:
            self._fill(future, name)
        try:
            return future.result()
        finally:
            if future.done() and future.exception() is not None:
                with self._lock:  # the next call tries again
                    if self._downloads.get(name) is future:
                        del self._downloads[name]

    def prefetch(self, names: list[str]) -> None:
        """Start to download files, in this order, in a background thread; `path` raises its
        errors."""
        with self._lock:
            self._queue += names
            if self._queue and self._thread is None:
                self._thread = threading.Thread(
                    target=self._download_queue, name=f"prefetch {self.name}", daemon=True
                )
                self._thread.start()

    def _download_queue(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                name = self._queue.pop(0)
            future, is_ours = self._claim(name)
            if not is_ours:
                continue
            self._fill(future, name)
            if future.exception() is not None:
                with self._lock:  # the others would fail too; `path` still tries each by itself
                    self._queue.clear()

    def _claim(self, name: str) -> tuple["Future[Path]", bool]:
        """The future of a file, and whether the caller has to fill it."""
        with self._lock:
            future = self._downloads.setdefault(name, Future())
            is_taken = future.running() or future.done()
            return future, not is_taken and future.set_running_or_notify_cancel()

    def _fill(self, future: "Future[Path]", name: str) -> None:
        try:
            future.set_result(self._download(name))
        except BaseException as error:
            future.set_exception(error)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        size = self._size(name)
        cached = self.cached(name)
        if cached:
            return cached
        if offline():
            raise self._not_cached(name)
        if name in self.parts:
            return self._download_parts(name)
        repo, path = self.hub_id.repo, self.path_in_repo(name)
        with quiet_library():
            request = lambda: hf_hub_download(repo, path, revision=self.commit)
            download = Path(retry(request, self.pinned, name))
        _check_size(download, size)
        self._cache_revision()
        return download

    def _download_parts(self, name: str) -> Path:
        if self._holed is None:
            self._holed = tempfile.mkdtemp(prefix="adapterkit-")
            weakref.finalize(self, shutil.rmtree, self._holed, ignore_errors=True)
        path = Path(self._holed, *PurePosixPath(name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(self._size(name))
            for start, stop in self.parts[name]:

                def request(start: int = start, stop: int = stop) -> None:
                    file.seek(start)
                    for data in self.pieces(name, start, stop):
                        file.write(data)

                retry(request, self.pinned, name)
        return path

    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of one file as they come, by one request.

        Raises the library's errors, and `UnusableAnswer` for any other bytes or number of them.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.hub_id.repo, self.path_in_repo(name), revision=self.commit)
        # identity: a compressed range is a range of other bytes
        headers = build_hf_headers() | {
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", url, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            if response.status_code >= 400 and response.status_code != 416:
                hf_raise_for_status(response)
            _check_range(response.status_code, response.headers, start, stop, self._size(name))
            left = stop - start
            for piece in response.iter_raw():
                left -= len(piece)
                if left < 0:
                    break
                yield piece
        if left:
            raise UnusableAnswer(f"a body of {stop - start - left:,} bytes for {stop - start:,}")

    def cached(self, name: str) -> Path | None:
        """The file in huggingface_hub's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        repo, path = self.hub_id.repo, self.path_in_repo(name)
        cached = try_to_load_from_cache(repo, path, revision=self.commit)
        if not isinstance(cached, str):
            return None
        _check_size(Path(cached), self._size(name))
        return Path(cached)

    def _cache_revision(self) -> None:
        """Note the commit of the branch or tag in the cache, so that it resolves offline as
        well."""
        if not self._is_head:
            return
        revision = inside(self.hub_id.revision or "main", str(self.hub_id))
        ref = cache_folder(self.hub_id) / "refs" / revision
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit, encoding="utf-8")
        except OSError:  # a read-only cache, such as a shared one, still serves this run
            log.debug("cannot write %s", ref)

    def _size(self, name: str) -> int:
        inside(name, str(self.pinned))
        if name not in self._entries:
            raise Damaged(
                "no such file in this commit",
                expected="one of " + shown(", ".join(self._entries)),
                where=location(self.pinned, name),
                hint="check the file name, and whether the repository is complete",
                code="AK701",
            )
        return self._entries[name].size

    def _not_cached(self, name: str) -> Refused:
        path = self.path_in_repo(name)
        download = command("hf download", self.hub_id.repo, path, revision=self.commit)
        return Refused(
            "the file is not in the local Hub cache, and HF_HUB_OFFLINE is set",
            expected="a cached copy, or a network",
            where=location(self.pinned, name),
            hint=f"unset HF_HUB_OFFLINE, or run with a network\n{download}",
            code="AK703",
        )


def _check_range(status: int, headers, start: int, stop: int, size: int) -> None:
    """Raises `UnusableAnswer` unless the answer is these bytes [start, stop) of `size`."""
    if status != 206:
        raise UnusableAnswer(f"status {status}")
    required = {
        "content-range": f"bytes {start}-{stop - 1}/{size}",
        "content-length": str(stop - start),
    }
    for name, value in required.items():
        if headers.get(name, "").strip() != value:
            raise UnusableAnswer(f"{name} {shown(headers.get(name))!r}")
    if headers.get("content-encoding", "identity") != "identity":
        raise UnusableAnswer(f"content-encoding {shown(headers['content-encoding'])!r}")


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
            code="AK704",
        ) from error
    if len(data) != stop - start:
        raise Failed(
            f"the cache has {len(data):,} bytes from byte {start:,} on",
            expected=f"{stop - start:,} bytes, as there were when the size was checked",
            where=str(path),
            hint="keep other programs from the cache and run again",
            code="AK704",
        )
    return data


def _check_size(path: Path, size: int) -> None:
    actual = path.stat().st_size
    if actual != size:
        raise Damaged(
            f"the file has {actual:,} bytes in the local Hub cache",
            expected=f"{size:,} bytes",
            where=str(path),
            hint="delete this file" + " and the one it links to" * path.is_symlink(),
            code="AK704",
        )
