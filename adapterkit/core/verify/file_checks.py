"""Check the files of an output against its receipt."""

import contextlib
import threading

from adapterkit.core.checkpoint.folder import Folder, LocalFolder, inside
from adapterkit.core.checkpoint.hashes import RunningHash
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.engine.file_threads import in_order
from adapterkit.core.errors import AdapterkitError, Damaged, Failed, Problems, shown
from adapterkit.core.options import Progress
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.receipt import AGAIN, CHANGED
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.core.system import cores, system
from adapterkit.doors import CONTAINERS

ENDING = ".safetensors"
BLOCK = 4 << 20  # bytes per thread


class _Stopped(Exception):
    """The check was cancelled while a thread was reading a file."""


def check_files(
    out: Folder, receipt: dict, progress: Progress = lambda done: None, *, shared: bool = False
) -> Json:
    """Check every file of the receipt: present, of its size, with its hash and its keys. Other
    weights are refused, unless the folder is `shared` with other outputs. Several files are hashed
    at a time. For the Hub's large files, the hash is the one that the Hub lists."""
    files, sizes, stop = receipt["files"], out.files(), threading.Event()

    def going_on(done: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(done)

    def checked(name: str) -> AdapterkitError | None:
        try:
            _check_listed(out, name, receipt, going_on)
        except AdapterkitError as error:
            return error
        return None

    largest_first = sorted(files, key=lambda name: -sizes.get(name, 0))
    workers = cores() if isinstance(out, LocalFolder) else 1  # downloads come one by one
    try:
        found = dict(zip(largest_first, in_order(checked, largest_first, workers), strict=True))
    finally:
        stop.set()
    errors = [error for name in files if (error := found[name]) is not None]
    listed = {name.rpartition("/")[0] for name in files if name.endswith(ENDING)}
    weights = {n for n in sizes if n.endswith(ENDING) and n.rpartition("/")[0] in {"", *listed}}
    unlisted = set() if shared else weights
    errors += [
        Damaged(
            "the receipt does not list these weights",
            expected="the files of the receipt",
            where=shown(name),
            hint="remove the file",
            code="AK607",
        )
        for name in sorted(unlisted - set(files))
    ]
    Problems(errors).raise_all()
    for ending, container in CONTAINERS.items():
        if models := [name for name in files if name.endswith(ending)]:
            load(container["check"])(out, models)
    total = sum(entry["size"] for entry in files.values())
    return {"files": len(files), "bytes": total, "hash": receipt["hash"]}


def _check_listed(out: Folder, name: str, receipt: dict, progress: Progress) -> None:
    entry = receipt["files"][name]
    size = out.files().get(str(inside(name, RECEIPT)))
    if size != entry["size"]:
        problem = "no such file" if size is None else f"{size} bytes"
        raise Damaged(
            problem, expected=f"{entry['size']} bytes", where=name, hint=AGAIN, code="AK607"
        )
    check_file(out, name, entry["sha256"], receipt["keys"].get(name), progress)


def check_file(
    out: Folder, name: str, sha: str | None, marks: dict | None, progress: Progress
) -> None:
    """Hash a file once; the marks at the tensors' ends show the first damaged tensor. `marks`: for
    weights only."""
    problem: AdapterkitError | None = None
    ends: list[tuple[str, int]] = []
    if marks is not None:
        try:
            ends = _ends(out, name, marks, hashed=sha is not None)
        except AdapterkitError as error:
            problem = error
    where, is_changed = name, False
    if sha is not None and name in out.hashes:
        progress(out.files()[name])
        is_changed = out.hashes[name] != sha
    elif sha is not None:
        actual = _hash(out, name, ends, progress)
        is_changed = actual.hexdigest() != sha
        if is_changed and problem is None:
            keys = list(actual.marks)
            wrong = next((key for key in keys if actual.marks[key] != (marks or {})[key]), None)
            if wrong is not None:
                where += f": {'its header or ' * (wrong == keys[0])}{shown(wrong)}"
    if problem is not None:
        raise problem
    if is_changed:
        raise Damaged(
            CHANGED, expected="the receipt's sha256", where=where, hint=AGAIN, code="AK607"
        )


def stored_tensors(folder: Folder, name: str) -> list[TensorSpec]:
    """Return the tensors of a file that this package wrote, in any container."""
    for ending, container in CONTAINERS.items():
        if name.endswith(ending):
            return load(container["tensors"])(folder, name)
    return list(read_header(folder, name).tensors)


def _ends(out: Folder, name: str, marks: dict, *, hashed: bool) -> list[tuple[str, int]]:
    """Return the keys of a weights file, which must be the receipt's, and the ends of their
    tensors."""
    tensors = stored_tensors(out, name)
    different = sorted({spec.key for spec in tensors} ^ set(marks)) if hashed else []
    if different:
        raise Damaged(
            f"keys {', '.join(map(shown, different[:4]))}",
            expected="the receipt's keys",
            where=name,
            hint=AGAIN,
            code="AK607",
        )
    return [(spec.key, spec.stop) for spec in tensors]


def _hash(out: Folder, name: str, ends: list[tuple[str, int]], progress: Progress) -> RunningHash:
    """Return a file's hash and marks, read from the disk and not from the system's cache."""
    running, size, at = RunningHash(ends), out.files()[name], 0
    block = memoryview(bytearray(min(BLOCK, size)))
    try:
        with out.path(name).open("rb", buffering=0) as file:
            with contextlib.suppress(OSError):
                system.drop_cache(file.fileno())
            while at < size:
                count = file.readinto(block[: min(BLOCK, size - at)])
                if not count:
                    raise Damaged(
                        f"the file ends at byte {at}",
                        expected=f"{size} bytes",
                        where=name,
                        hint=AGAIN,
                        code="AK607",
                    )
                running.update(block[:count])
                at += count
                progress(count)
    except OSError as error:
        raise Failed(
            f"cannot read at byte {at}: {error.strerror}",
            where=name,
            hint="check the disk, then verify again",
            code="AK607",
        ) from error
    return running
