"""The files of an output against its receipt: several at a time, all that is wrong together."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.hashes import sha256_of_file
from adapterkit.core.errors import MultipleErrors
from adapterkit.core.verify import file_checks
from adapterkit.core.verify.file_checks import check_files

SIZES = {"small": 10, "large": 5000, "empty": 0, "middle": 900}


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LocalFolder, dict]:
    """A folder of files, read by blocks of 100 bytes by two threads, and its receipt."""
    monkeypatch.setattr(file_checks, "BLOCK", 100)
    monkeypatch.setattr(file_checks, "cores", lambda: 2)
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(bytes(size))
    sums = {name: sha256_of_file(tmp_path / name) for name in SIZES}
    files = {name: {"size": SIZES[name], "sha256": sums[name]} for name in SIZES}
    return LocalFolder(tmp_path), {"files": files, "keys": {}, "hash": "sha256"}


def test_two_files_are_read_at_the_same_time(output: tuple[LocalFolder, dict]):
    """The first block of each of the two largest comes while the other is not through."""
    both, names = threading.Barrier(2, timeout=20), set()

    def progress(done: int) -> None:
        if threading.current_thread() not in names:
            names.add(threading.current_thread())
            both.wait()

    seen = check_files(*output, progress)
    assert seen == {"files": 4, "bytes": sum(SIZES.values()), "hash": "sha256"}
    assert len(names) == 2


def test_wrong_files_are_listed_in_the_order_of_the_receipt(output: tuple[LocalFolder, dict]):
    folder, receipt = output
    (folder.root / "large").write_bytes(b"1" * 5000)
    (folder.root / "small").unlink()
    (folder.root / "middle").write_bytes(b"1" * 900)
    (folder.root / "more.safetensors").write_bytes(b"")
    with pytest.raises(MultipleErrors) as caught:
        check_files(LocalFolder(folder.root), receipt)
    wrong = [(error.where, error.problem) for error in caught.value.errors]
    changed = "bytes that are not those that were written"
    assert wrong == [
        ("small", "no such file"),
        ("large", changed),
        ("middle", changed),
        ("more.safetensors", "the receipt does not list these weights"),
    ]


def test_an_interrupt_ends_all_threads(output: tuple[LocalFolder, dict]):
    """No file is read to its end."""
    blocks, arrived = list[int](), threading.Event()

    def progress(done: int) -> None:
        blocks.append(done)
        if len(blocks) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        if len(blocks) >= 3:
            arrived.wait(20)
        time.sleep(0.05)

    def interrupt(*_: object) -> None:
        arrived.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            check_files(*output, progress)
    finally:
        signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 20
    while any(thread.name.startswith("compute") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(blocks) < 40
