"""Read tensors' bytes of the inputs: files are opened once, read by position, and checked for
changes.

Positioned reads, not mappings: a mapping of a file that shrinks kills the process, and is slow on
network file systems."""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapterkit.core.checkpoint.folder import Folder, LocalFolder, belonging_to, place_of
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Damaged, Failed, Unrecoverable, shown
from adapterkit.core.system import system

NEAR = 4 << 10  # bytes between two tensors that are read along rather than skipped
# the same in a remote file with more than so many separate tensors: the bytes that arrive while
# several requests, one for each tensor, are in progress
APART, FAR = (64, 128 << 10)
FEW = 4  # requests of a remote file for small tensors, where some of them will do
RANGE = 8 << 20  # bytes of one read of small tensors
REQUESTS = 8  # of a remote file, at a time
COMPARED = 4 << 20  # bytes of two tensors that are compared at a time
Identity = tuple[int, int, int]


def identity(status: os.stat_result) -> Identity:
    """Return a file's size and both times in ns, which change if it is edited or replaced. Device
    and FUSE inode numbers are left out, because they differ between machines and mounts."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Sources:
    """The open files of a job's input folders, at most `limit` of them. Thread-safe."""

    def __init__(
        self,
        folders: tuple[Folder, ...],
        expected: dict[tuple[int, str], Identity],
        limit: int = 16,
    ):
        self.folders, self.expected, self.limit = folders, expected, limit
        self._open: dict[tuple[int, str], tuple[int, Identity]] = {}
        self._lock = threading.Lock()
        self._users: dict[tuple[int, str], int] = {}

    @contextlib.contextmanager
    def file(self, folder: int, name: str) -> Iterator[int]:
        """Yield the descriptor of one input file, which stays open until the end of the block."""
        which = folder, name
        descriptor = self.acquire(which)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[which] -= 1

    def read_into(self, spec: TensorSpec, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on."""
        folder = self.folders[spec.folder]
        parts = getattr(folder, "parts", {}).get(spec.file)  # a hole elsewhere
        if parts is not None and not any(at <= spec.start and spec.stop <= to for at, to in parts):
            raise AssertionError(f"{spec.file}: {spec.key} is read, and was not asked for")
        with belonging_to(folder), self.file(spec.folder, spec.file) as descriptor:
            read_exactly(descriptor, buffer, spec.start + offset, spec)

    def read(self, spec: TensorSpec) -> bytearray:
        """Return all bytes of one tensor; not for large weights."""
        data = bytearray(spec.nbytes)
        if data:
            self.read_into(spec, 0, memoryview(data))
        return data

    def acquire(self, which: tuple[int, str]) -> int:
        """Return the file's descriptor and count one more user."""
        with self._lock:
            if which in self._open:
                self._users[which] += 1
                return self._open[which][0]
        # may wait for a download, so not under the lock
        path = self.folders[which[0]].path(which[1])
        with self._lock:
            if which not in self._open:
                idle = [w for w in self._open if not self._users.get(w)]
                while len(self._open) >= self.limit and idle:
                    self._close(idle.pop(0))
                self._open[which] = self._opened(which, path)
            self._users[which] = self._users.get(which, 0) + 1
            return self._open[which][0]

    def _opened(self, which: tuple[int, str], path: Path) -> tuple[int, Identity]:
        try:
            descriptor = system.open(path, "read")
        except OSError as error:
            raise Failed(
                f"cannot open: {error.strerror}",
                where=str(path),
                hint="check the file, then run again with --resume",
                code="AK209",
            ) from error
        current = identity(os.fstat(descriptor))
        if self.expected.setdefault(which, current) != current:
            os.close(descriptor)
            raise changed(self._label(which))
        return descriptor, current

    def _label(self, which: tuple[int, str]) -> str:
        return place_of(self.folders[which[0]], which[1])

    def _close(self, which: tuple[int, str]) -> None:
        descriptor, before = self._open.pop(which)
        try:
            after = identity(os.fstat(descriptor))
        except OSError as error:
            raise changed(
                self._label(which), f"the file can no longer be examined: {error.strerror}"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # it was only read
                os.close(descriptor)
        if after != before:
            raise changed(self._label(which))

    def close_removed(self, which: tuple[int, str]) -> None:
        """Close a file that will be removed: the next read opens a new one."""
        with self._lock:
            if which in self._open:
                self._close(which)
            self.expected.pop(which, None)

    def close(self) -> None:
        """Close all files; `Failed` if one of them changed while it was open."""
        problems = []
        with self._lock:
            for which in list(self._open):
                try:
                    self._close(which)
                except Failed as error:
                    problems.append(error)
        if problems:
            raise problems[0]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.close()
        except Failed:
            if kind is None:
                raise


def read_exactly(descriptor: int, buffer: memoryview, position: int, spec: TensorSpec) -> None:
    """Fill the buffer from `position`, through short reads.

    Raises `Unrecoverable` at the end of the file, `Failed` on an error.
    """
    done = 0
    while done < len(buffer):
        try:
            n = system.read_at(descriptor, buffer[done:], position + done)
        except OSError as error:
            problem = f"cannot read at byte {position + done}: {error.strerror}"
            where = f"{spec.file}: {shown(spec.key)}"
            raise Failed(
                problem,
                where=where,
                hint="check the disk, then run again with --resume",
                code="AK209",
            ) from error
        if n == 0:
            raise changed(spec.file, f"the file ends at byte {position + done}")
        done += n


def read_small(
    folder: Folder, specs: Iterable[TensorSpec], most: int | None = None
) -> Iterator[tuple[TensorSpec, memoryview]]:
    """Yield the bytes of small tensors, in the order of files and positions, with one read for
    neighbors. `most`: a remote file that needs more requests is not read at all. Raises `Damaged`
    if a file ends before one of them."""
    ordered = sorted(specs, key=lambda spec: (spec.file, spec.start, spec.stop))
    is_remote = not isinstance(folder, LocalFolder)
    for name, group in itertools.groupby(ordered, lambda spec: spec.file):
        in_file = list(group)
        ranges = list(_neighbors(in_file, NEAR))
        if is_remote and len(ranges) > (APART if most is None else most):
            ranges = list(_neighbors(in_file, FAR))
        if is_remote and most is not None and len(ranges) > most:
            continue
        bounds = [(first, stop) for first, stop, _ in ranges]
        labels = [f"{name}: {shown(together[0].key)}" for _, _, together in ranges]
        read = zip(ranges, _read_ranges(folder, name, bounds, labels), strict=True)
        for (first, stop, together), data in read:
            if len(data) < stop - first:
                raise Damaged(
                    f"the file ends at byte {first + len(data)}",
                    expected=f"{stop} bytes or more",
                    where=name,
                    hint="copy the file again",
                    code="AK202",
                )
            view = memoryview(data)
            yield from ((spec, view[spec.start - first : spec.stop - first]) for spec in together)


def _read_ranges(
    folder: Folder, name: str, ranges: list[tuple[int, int]], labels: list[str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of each range, in order; several ranges of a remote file are requested at a
    time. `labels`: their names in errors of the disk."""
    if isinstance(folder, LocalFolder):
        with _opened(folder.path(name)) as descriptor:
            yield from (
                _read_at(descriptor, *at, label) for at, label in zip(ranges, labels, strict=True)
            )
        return
    with ThreadPoolExecutor(REQUESTS, "ranges") as pool:
        for at in range(0, len(ranges), REQUESTS):
            yield from pool.map(lambda part: folder.read(name, *part), ranges[at : at + REQUESTS])


def _neighbors(
    ordered: Iterable[TensorSpec], gap: int
) -> Iterator[tuple[int, int, list[TensorSpec]]]:
    """Yield (start, stop, tensors) of each range to read: at most `gap` bytes between two tensors,
    at most RANGE in all."""
    together: list[TensorSpec] = []
    start = stop = 0
    for spec in ordered:
        if together and (spec.start - stop > gap or spec.stop - start > RANGE):
            yield start, stop, together
            together = []
        if not together:
            start, stop = spec.start, spec.stop
        together.append(spec)
        stop = max(stop, spec.stop)
    if together:
        yield start, stop, together


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = system.open(path, "read")
    except OSError as error:
        raise Failed(f"cannot read: {error.strerror}", where=str(path), code="AK209") from error
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # what was read is right
            os.close(descriptor)


def _read_at(descriptor: int, start: int, stop: int, name: str) -> memoryview:
    data = memoryview(bytearray(stop - start))
    try:
        return data[: system.read_at(descriptor, data, start)]
    except OSError as error:
        raise Failed(
            f"cannot read at byte {start}: {error.strerror}",
            where=name,
            hint="check the disk",
            code="AK209",
        ) from error


def changed(name: str, problem: str = "the file changed between plan and end") -> Unrecoverable:
    """Return the error of an input that changed during the job."""
    return Unrecoverable(
        problem,
        expected="inputs that stay as they are",
        where=name,
        hint="run the job again",
        code="AK210",
    )


def same_bytes(first: tuple[Folder, TensorSpec], *others: tuple[Folder, TensorSpec]) -> bool:
    """Return whether stored tensors have one dtype, one shape and the same bytes."""
    spec = first[1]
    if any((other.dtype, other.shape) != (spec.dtype, spec.shape) for _, other in others):
        return False
    for start in range(0, spec.nbytes, COMPARED):
        stop = min(start + COMPARED, spec.nbytes)
        block = _read(first, start, stop)
        if any(_read(other, start, stop) != block for other in others):
            return False
    return True


def _read(tensor: tuple[Folder, TensorSpec], start: int, stop: int) -> bytes:
    folder, spec = tensor
    return folder.read(spec.file, spec.start + start, spec.start + stop)


def have_same_bytes(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints have the same tensors; reads them if the hashes of their files
    are not known."""
    if one.tensors.keys() != other.tensors.keys():
        return False
    for key, spec in one.tensors.items():
        twin = other.tensors[key]
        hashes = one.folder.hashes.get(spec.file), other.folder.hashes.get(twin.file)
        if None not in hashes and hashes[0] == hashes[1] and spec.start == twin.start:
            continue
        if not same_bytes((one.folder, spec), (other.folder, twin)):
            return False
    return True
