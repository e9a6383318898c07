"""Storage that fails, lies, fills up or goes away, and inputs that change: a message, status 1, no final name that is not whole."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

WRITING = ["pwrite", "write", "copy_file_range", "fallocate", "ftruncate"]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts file systems")


@pytest.fixture(scope="module")
def whole(shared) -> dict[str, str]:
    return shared.undisturbed()


@pytest.fixture(scope="module")
def older(shared) -> dict[str, str]:
    return shared.undisturbed(weight="0.5")


def check_failure(bench, whole, *words: str, ended=None, resumes: bool = True) -> None:
    """After a failure: a message, nothing published, and a run that resumes."""
    ended.failed_cleanly(*words)
    assert not bench.out.exists()
    bench.check_stage(whole)
    if resumes:
        bench.merge("--resume").succeeded()
        bench.check_done(whole)


# -- writes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_the_nth_write_fails(shared, whole, error: str, step: int):
    """Once, or from then on (a disk that is full stays full)."""
    words = {"EIO": "check the disk", "ENOSPC": "free some space", "EDQUOT": "of your quota"}
    for when in itertools.count(random.Random(error).randrange(step) + 1, step):
        shared.clear()
        ended = shared.merge(
            fault={"calls": WRITING, "when": when, "error": error, "sticky": when % 2 == 0}
        )
        if ended.status == 0:
            break
        assert ended.seconds < 10
        check_failure(shared, whole, words[error], ended=ended)
    # an EIO of copy_file_range alone is no failure: the bytes are then read and written
    assert when > 10 or error == "EIO"
    shared.check_done(whole)


@pytest.mark.parametrize("error", ["EIO", pytest.param("ENOSPC", marks=pytest.mark.slow)])
def test_each_small_thing_fails(shared, whole, error: str):
    """Names and folders: mkdir, open, rename, link, journal."""
    calls = ["open", "mkdir", "rename", "link"]
    for when in itertools.count(1):
        shared.clear()
        ended = shared.merge(fault={"calls": calls, "when": when, "error": error})
        if ended.status == 0:
            # hard links have a substitute
            if "link" in ended.last or ended.calls >= when:
                continue
            break
        check_failure(shared, whole, "cannot write", ended=ended)
    assert when > 15


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_a_failing_fsync_is_final(shared, whole, call: str):
    """Never tried again (the kernel reports once and forgets), and the file never gets its name."""
    failed = 0
    for when in itertools.count(1):
        shared.clear()
        fault = {"calls": [call], "when": when, "error": "EIO"}
        ended = shared.merge(fault=fault)
        if ended.status == 0 and ended.calls < when:
            break
        if ended.status == 0:  # lock and journal are closed when nothing depends on it any more
            assert call == "close"
            continue
        failed += 1
        if ".part" in ended.last:
            part = Path(ended.last.partition(" ")[2])
            assert not part.with_suffix("").exists()
        ended.failed_cleanly("Input/output error")
        assert (
            not shared.out.exists() or shared.digests() == whole
        )  # the last one is of the folder that holds the output
        shared.merge("--resume").succeeded()
        shared.check_done(whole)
    assert failed >= 10


def test_a_shard_is_synced_once(shared):
    shared.clear()
    fault = {"calls": ["fsync"], "match": "00002-of", "when": 1, "error": "EIO"}
    ended = shared.merge(fault=fault)
    ended.failed_cleanly("model-00002-of-00003.safetensors.part: cannot write: Input/output error")
    assert ended.calls == 1


@pytest.mark.parametrize("call", ["pwrite", "write", "copy_file_range", "preadv"])
def test_short_reads_and_writes(shared, whole, call: str):
    shared.clear()
    ended = shared.merge(fault={"calls": [call], "short": True})
    ended.succeeded()
    assert ended.calls > 10
    shared.check_done(whole)


@pytest.mark.parametrize("answer", ["zero", "EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EIO"])
@pytest.mark.parametrize("when", [0, 2])
def test_without_copy_file_range(shared, whole, answer: str, when: int):
    """The bytes are the same when the kernel cannot copy, or stops after a while."""
    shared.clear()
    fault = {"calls": ["copy_file_range"], "when": when, "sticky": True}
    ended = shared.merge(fault=fault | ({"zero": True} if answer == "zero" else {"error": answer}))
    ended.succeeded()
    assert ended.calls > 2
    shared.check_done(whole)


@pytest.mark.parametrize("call", ["fallocate", "sync_file_range", "link"])
@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_without_other_calls(shared, whole, call: str, error: str):
    shared.clear()
    shared.merge(fault={"calls": [call], "error": error}).succeeded()
    shared.check_done(whole)


def test_a_write_of_nothing(shared, whole):
    shared.clear()
    check_failure(
        shared,
        whole,
        "nothing was written",
        ended=shared.merge(fault={"calls": ["pwrite"], "zero": True, "when": 4}),
    )


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range"])
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_lost_writes_are_found(shared, whole, call: str, step: int):
    """A write that is acknowledged and lost: --verify finds it before the output gets its name, `verify` finds it later."""
    for when in itertools.count(1, step):
        fault = {"calls": [call], "lost": True, "when": when}
        shared.clear()
        ended = shared.merge("--verify", fault=fault)
        if ended.status == 0:
            break
        ended.failed_cleanly("model-0000")
        assert (
            "bytes that are not those" in ended.stderr or "not a safetensors file" in ended.stderr
        )
        assert not shared.out.exists()
        shared.merge().succeeded()  # nothing of it is used again
        shared.check_done(whole)
        shared.clear()
        shared.merge(fault=fault).succeeded()
        shared.run(["verify", str(shared.out)]).failed_cleanly("model-0000")
    assert when > step


@pytest.mark.parametrize("limit", [2000, 5000, 20000])
def test_a_limit_on_the_size_of_files(shared, whole, limit: int):
    shared.clear()
    ended = shared.merge(limits={"FSIZE": limit})
    if limit == 20000:
        ended.succeeded()
    else:
        check_failure(shared, whole, "File too large", "--max-shard-size", ended=ended)


def test_interrupted_system_calls(shared, whole):
    """EINTR, by strace: Python and we go on."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs strace")
    calls = "pwrite64,write,copy_file_range,fsync,preadv,fallocate,ftruncate"
    shared.clear()
    pid = shared.start(shared.argv(), held=True)
    options = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EINTR:when=2+3"]
    tracer = subprocess.Popen(
        [program, "-f", "-qq", "-o", str(shared.root / "trace"), "-p", str(pid), *options],
        stderr=subprocess.DEVNULL,
    )
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text() and tracer.poll() is None:
        time.sleep(0.01)
    attached = tracer.poll() is None
    shared.driver.ask(release=pid)
    ended = shared.wait(pid)
    if not attached:
        pytest.skip("strace cannot attach to processes here")
    tracer.wait()
    assert (shared.root / "trace").read_text().count("(INJECTED)") > 10
    (shared.root / "trace").unlink()
    ended.succeeded()
    shared.check_done(whole)


# -- reads and inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/base/", "/adapter/"])
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_nth_read_fails(shared, whole, place: str, step: int):
    words = ["cannot read at byte", "safetensors: ", "_proj." if place == "/adapter/" else "model"]
    for when in itertools.count(1, step):
        shared.clear()
        ended = shared.merge(
            fault={"calls": ["preadv"], "match": place, "when": when, "error": "EIO"}
        )
        if ended.status == 0:
            break
        check_failure(shared, whole, *words, ended=ended)
    assert when > 6


SHARD = "model-00002-of-00003.safetensors"


def change(path: Path, what: str) -> None:
    data = path.read_bytes()
    if what == "a byte":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif what == "a byte, the time put back":
        times = path.stat()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "a copy in its place":
        path.with_suffix(".new").write_bytes(data)
        path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("what", ["a byte", "a byte, the time put back", "a copy in its place"])
@pytest.mark.parametrize("place", ["base/" + SHARD, "adapter/adapter_model.safetensors"])
def test_an_input_changed_between_runs(bench, what: str, place: str):
    """A resumed run would mix two inputs: refused, with the name of the file."""
    assert (
        bench.merge(fault={"kill": True, "calls": ["rename"], "when": 2}).status == -signal.SIGKILL
    )
    time.sleep(0.02)  # a tick of the clock of file times
    change(bench.root / place, what)
    bench.merge("--resume").failed_cleanly(
        "an interrupted run of another job", place.partition("/")[2], "identity."
    )
    assert not bench.out.exists()
    bench.merge("--overwrite").succeeded()
    assert bench.digests() == bench.undisturbed()


@pytest.mark.parametrize(
    ("field", "argv"),
    [
        ("options.dtype", ["--dtype", "fp32"]),
        ("options.weights.0", ["=0.7"]),
        ("options.exclude", ["--exclude", "layers.0"]),
        ("options.max_shard_size", ["--max-shard-size", "5KB"]),
    ],
)
def test_another_job_does_not_resume(shared, whole, field: str, argv: list):
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    weight = argv[0][1:] if argv[0].startswith("=") else ""
    shared.merge("--resume", *([] if weight else argv), weight=weight).failed_cleanly(
        f"of another job: {field} differs"
    )
    shared.merge().failed_cleanly("an interrupted run", "--resume", "--overwrite")
    shared.merge("--resume").succeeded()
    shared.check_done(whole)


def test_an_edited_config_does_not_resume(bench):
    bench.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    config = bench.base / "config.json"
    config.write_text(
        config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4')
    )
    bench.merge("--resume").failed_cleanly("config.json", "differs")


@pytest.mark.parametrize(
    "act", [["poke", 900, [1, 2, 3]], ["replace"], ["truncate", 1000], ["truncate", 0]]
)
@pytest.mark.parametrize("place", ["base/" + SHARD, "adapter/adapter_model.safetensors"])
def test_an_input_changed_during_a_run(bench, act: list, place: str):
    """Poked, replaced, or cut short (a mapping would die of SIGBUS): nothing of what was made of it is used."""
    path = bench.root / place
    act = [[act[0], str(path), *act[1:]]]
    for when in (2, 12, 25):
        time.sleep(0.02)
        kept = path.read_bytes()
        ended = bench.merge(fault={"calls": ["preadv"], "when": when, "act": act}, workers=1)
        if ended.calls < when:
            break
        ended.failed_cleanly(path.name)
        assert "file changed" in ended.stderr or "file ends" in ended.stderr, ended.stderr
        assert not bench.out.exists() and not (bench.control / "journal.jsonl").exists()
        path.write_bytes(kept)
    bench.merge().succeeded()
    assert bench.digests() == bench.undisturbed()


def test_a_small_file_that_shrinks(bench):
    """Files that are copied whole are checked too."""
    act = [["truncate", str(bench.base / "tokenizer.json"), 3]]
    ended = bench.merge(fault={"calls": ["fallocate"], "when": 3, "act": act})
    ended.failed_cleanly("tokenizer.json: the file changed")
    assert not bench.out.exists()


def test_files_of_an_earlier_attempt_are_not_published(bench):
    """A file of the base that was there when the job began, and is gone when it resumes."""
    extra = bench.base / "vocab.txt"
    extra.write_text("a")
    bench.merge(fault={"kill": True, "calls": ["open"], "match": "README.md", "when": 1})
    assert (bench.control / "out" / "vocab.txt").exists()
    extra.unlink()
    bench.merge("--resume").succeeded()
    assert bench.digests() == bench.undisturbed()


# -- the journal ---------------------------------------------------------------------------------------------------------------


def test_a_journal_torn_at_every_byte(shared, whole):
    """Whole lines count, the rest is cut off, whatever stands there: the output is the same."""
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 4})
    kept = shared.root / "torn"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(shared.control, kept)
    journal = (kept / "journal.jsonl").read_bytes()
    ends = {i for i, byte in enumerate(journal) if byte == 10}
    near = {end + d for end in ends for d in (-1, 0, 1)} | set(
        range(0, len(journal), len(journal) // 12)
    )
    for cut in sorted(c for c in near if 0 <= c <= len(journal)):
        for tail in (b"", b"\0" * 40) if cut in ends else (b"",):
            shared.clear()
            shutil.copytree(kept, shared.control)
            (shared.control / "journal.jsonl").write_bytes(journal[:cut] + tail)
            shared.merge("--resume").succeeded()
            shared.check_done(whole)


def test_a_journal_torn_at_every_byte_is_read_as_its_whole_lines(tmp_path):
    """The same in process, at every byte and with every kind of rubbish behind."""
    from adapterkit.checkpoint.stage import Stage

    entries = [
        {"fingerprint": "f", "recipe": {}},
        {"shard": {"file": "a"}},
        {"shard": {"file": "b"}},
        {"publish": "c"},
    ]
    lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
    stage = Stage(tmp_path / "out")
    stage.control.mkdir()
    path = stage.control / "journal.jsonl"
    text = b"".join(lines)
    for cut in range(len(text) + 1):
        whole = sum(1 for i in range(len(lines)) if len(b"".join(lines[: i + 1])) <= cut)
        for tail in (
            b"",
            b"\0\0\0",
            b"\n",
            b"5\n",
            b"[]\n",
            b"null\n",
            b"\xff\xfe\n",
            b'{"shard":',
        ):
            path.write_bytes(text[:cut] + tail)
            read = stage.journal()
            assert read == entries[: len(read)] and len(read) in (whole, whole + (tail == b"\n"))
            stage.path.mkdir(exist_ok=True)
            stage.begin()
            stage._close_journal()
            assert path.read_bytes() == b"".join(lines[: len(read)])


# -- places --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    ["base", "base/merged", "base/x/y", "adapter", "adapter/out", ".", "link", "dangling", "file"],
)
def test_outputs_that_are_inputs(bench, out: str):
    (bench.root / "link").symlink_to(bench.base)
    (bench.root / "dangling").symlink_to(bench.root / "nowhere")
    (bench.root / "file").write_text("a file")
    before = {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()}
    for more in ((), ("--overwrite",), ("--resume",)):
        bench.run(
            ["merge", str(bench.base), str(bench.adapter), "--out", str(bench.root / out), *more]
        ).failed_cleanly()
    assert {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()} == before


def test_a_hard_linked_input_is_not_written_to(bench):
    """An older output whose files are hard links of the base's: replacing it leaves the base alone."""
    bench.merge(weight="0.5").succeeded()
    for path in bench.base.glob("*.safetensors"):
        (bench.out / path.name).unlink()
        os.link(path, bench.out / path.name)
    before = {p: p.read_bytes() for p in bench.base.iterdir()}
    bench.merge("--overwrite").succeeded()
    assert {p: p.read_bytes() for p in bench.base.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "sub/notes.txt", "model-00009-of-00009.safetensors"]
)
def test_files_of_others_are_not_replaced(bench, name: str):
    bench.merge(weight="0.5").succeeded()
    (bench.out / name).parent.mkdir(exist_ok=True)
    (bench.out / name).write_text("mine")
    before = bench.digests()
    bench.merge("--overwrite").failed_cleanly(name)
    bench.merge().failed_cleanly("files in the output folder")
    assert bench.digests() == before


def test_files_that_appear_during_a_run(bench, whole):
    """Somebody puts a file where the output will be: it is not replaced, and the work is kept."""
    for older_output in (False, True):
        bench.clear()
        if older_output:
            bench.merge(weight="0.5").succeeded()
        pid = bench.start(
            bench.argv(*["--overwrite"] * older_output),
            held=False,
            fault={"calls": ["pwrite"], "delay": 0.02},
        )
        while not bench.begun():
            time.sleep(0.005)
        bench.out.mkdir(exist_ok=True)
        (bench.out / "mine.txt").write_text("mine")
        bench.wait(pid).failed_cleanly(
            "mine.txt" if older_output else "1 files in the output folder"
        )
        assert (bench.out / "mine.txt").read_text() == "mine"
        (bench.out / "mine.txt").unlink()
        bench.merge("--resume").succeeded()
        assert bench.digests() == whole


def test_an_exchange_never_takes_what_it_did_not_check(bench):
    """--overwrite of a folder without a receipt, or with a receipt that names other files."""
    bench.out.mkdir()
    (bench.out / "model.safetensors").write_text("mine")
    bench.merge("--overwrite").failed_cleanly("no receipt of adapterkit")
    assert (bench.out / "model.safetensors").read_text() == "mine"


@root
@pytest.mark.parametrize("out", ["out", "sub/out"])
def test_a_parent_without_permission(bench, out: str):
    """As an ordinary user."""
    for path in [bench.root, *bench.root.rglob("*")]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    opened = [p for p in bench.root.parents if p.stat().st_uid == 0 and not p.stat().st_mode & 1]
    try:
        for path in opened:
            path.chmod(path.stat().st_mode | 0o1)
        argv = ["merge", str(bench.base), str(bench.adapter), "--out", str(bench.root / out)]
        bench.run(argv, user=65534).failed_cleanly("Permission denied", "choose another --out")
        assert not (bench.root / out).exists()
        # the folder is there and writable, its parent is not: the files move into it
        bench.out.mkdir()
        os.chown(bench.out, 65534, 65534)
        bench.merge(user=65534).succeeded()
        assert bench.digests() == bench.undisturbed()
        bench.out.chmod(0o555)
        bench.merge("--overwrite", user=65534, weight="0.5").failed_cleanly("Permission denied")
    finally:
        for path in opened:
            path.chmod(path.stat().st_mode & ~0o1)


def test_the_umask_decides(bench):
    for umask in (0o022, 0o077, 0o000):
        bench.clear()
        bench.merge(umask=umask).succeeded()
        assert {p.stat().st_mode & 0o777 for p in bench.out.iterdir()} == {0o666 & ~umask}
        assert bench.out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_limit_of_64_open_files(many_shards):
    """Small shards are begun faster than the disk takes them: not all of them are open at once."""
    bench = many_shards
    bench.merge(
        limits={"NOFILE": 64}, fault={"calls": ["fsync"], "delay": 0.003}, workers=8
    ).succeeded()
    assert len(list(bench.out.glob("*.safetensors"))) == 300
    bench.run(["verify", str(bench.out)], limits={"NOFILE": 64}).succeeded()


# -- two at once ---------------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(shared, whole):
    shared.clear()
    pid = shared.start(shared.argv(), fault={"calls": ["pwrite"], "delay": 0.05})
    while not shared.begun():
        time.sleep(0.005)
    for more in (("--resume",), ("--overwrite",)):
        shared.merge(*more).failed_cleanly("another process is at work there", str(pid))
    shared.merge().failed_cleanly("an interrupted run")
    shared.wait(pid).succeeded()
    shared.check_done(whole)


def test_many_processes_one_output(shared, whole):
    """Started together over the lock of a dead one: one does the job, the others are refused or find it done."""
    for _ in range(3):
        shared.clear()
        shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
        assert (shared.control / "lock").exists()
        pids = [shared.start(shared.argv("--resume"), held=True) for _ in range(6)]
        for pid in pids:
            shared.driver.ask(release=pid)
        ends = [shared.wait(pid) for pid in pids]
        assert any(e.status == 0 for e in ends)
        for ended in ends:
            if ended.status:
                ended.failed_cleanly("another process is at work there")
        shared.check_done(whole)


@pytest.mark.parametrize(
    "holder", ["", "garbage", "{host} {pid}", "{host} {me} 0:1", "{host} 999999999 boot:5"]
)
def test_stale_locks(shared, whole, holder: str):
    """Torn, of another age, or of a process whose number lives on in another (containers begin at 1 again)."""
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    text = holder.format(host=os.uname().nodename, pid=os.getpid(), me=os.getpid())
    (shared.control / "lock").write_text(text)
    shared.merge("--resume").succeeded()
    shared.check_done(whole)


def test_a_lock_of_another_host(shared):
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    (shared.control / "lock").write_text("elsewhere 17 boot:5")
    shared.merge("--resume").failed_cleanly("(elsewhere 17)", "remove the file lock")
    (shared.control / "lock").unlink()
    shared.merge("--resume").succeeded()


# -- file systems --------------------------------------------------------------------------------------------------------------


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def mounted(bench):
    """Mounts that are taken away at the end."""
    points: list[Path] = []

    def add(point: Path, *arguments: str) -> Path:
        point.mkdir(exist_ok=True)
        mount(*arguments, str(point))
        points.append(point)
        return point

    yield add
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


@root
@pytest.mark.parametrize("size", ["24k", "1000k"])
def test_a_disk_that_is_too_small(bench, mounted, size: str):
    """Refused before anything is written, with both numbers; nothing is left."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    bench.out = disk / "out"
    bench.merge().failed_cleanly("bytes free", "free some space")
    assert list(disk.iterdir()) == []
    argv = [
        "merge",
        str(bench.base),
        str(bench.adapter),
        "--out",
        str(bench.out),
        "--dry-run",
        "--json",
    ]
    assert json.loads(bench.run(argv).stdout)["totals"]["disk_needed"] > 24_000


@root
def test_what_an_interrupted_run_holds_counts_as_free(bench, mounted):
    """The half-written shards of a killed run take the space that its resumed run needs."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "size=1200k", "tmpfs")
    bench.out = disk / "out"
    assert (
        bench.merge(fault={"kill": True, "calls": ["fsync"], "match": ".part", "when": 1}).status
        == -signal.SIGKILL
    )
    free = os.statvfs(disk)
    part = next((bench.control / "out").glob("*.part"))
    with part.open("r+b") as file:  # as if it were a large one
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 65536)
    bench.merge("--resume").succeeded()


@root
def test_a_disk_that_fills_up(bench, mounted, whole):
    """Space that was there at the start is gone later: a message, and a resumed run once there is some again."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "size=1200k", "tmpfs")
    bench.out = disk / "out"
    filler = disk / "filler"
    pid = bench.start(bench.argv(), fault={"calls": ["fallocate", "open"], "delay": 0.02})
    while not bench.begun():
        time.sleep(0.002)
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    bench.wait(pid).failed_cleanly("No space left on device", "free some space")
    assert not bench.out.exists()
    filler.unlink()
    bench.merge("--resume").succeeded()
    assert bench.digests() == whole


@root
def test_a_read_only_file_system(bench, mounted):
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs")
    bench.out = disk / "out"
    bench.merge().failed_cleanly("Read-only file system", "choose another --out")


def inner_clear(bench) -> None:
    for path in bench.out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_inner(bench, whole, older) -> None:
    """Every file is whole; with a config they are of one output."""
    found = {
        name: sha for name, sha in bench.digests().items() if not name.startswith("lost+found")
    }
    for name, sha in found.items():
        assert sha in (whole.get(name), (older or {}).get(name)), name
    if (
        "config.json" in found
        or "adapterkit.json" in found
        or "model.safetensors.index.json" in found
    ):
        shards = {name: sha for name, sha in found.items() if name.endswith(".safetensors")}
        outputs = [
            {n: s for n, s in o.items() if n.endswith(".safetensors")} for o in (whole, older) if o
        ]
        assert shards in outputs


@root
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_an_output_that_is_a_mount_point(
    bench, mounted, whole, older, kind: str, step: int, options: tuple
):
    """No rename replaces it: the files move in one by one. Killed at every step, nothing that loads is mixed, and it resumes."""
    (bench.root / "real").mkdir()
    mounted(
        bench.out,
        *(["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(bench.root / "real")]),
    )
    control = bench.out / ".adapterkit"
    for when in itertools.count(1, step if kind == "tmpfs" else step * 2):
        inner_clear(bench)
        if options:
            bench.merge(weight="0.5").succeeded()
        else:
            (bench.out / "lost+found").mkdir()  # ext4 puts it there
        ended = bench.merge(*options, fault={"kill": True, "when": when})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        try:
            check_inner(bench, whole, older if options else None)
            bench.check_stage(whole, control)
            ended = bench.merge("--resume")
            if "differs" in ended.stderr and options:
                ended = bench.merge("--resume", *options)
            ended.succeeded()
            assert bench.digests() == whole and not control.exists()
        except AssertionError as error:
            raise AssertionError(f"killed at call {when}, {ended.last}") from error
    assert when > 30
    assert bench.digests() == whole and not control.exists()


@root
def test_a_mount_point_keeps_what_is_not_ours(bench, mounted, whole):
    mounted(bench.out, "-t", "tmpfs", "tmpfs")
    (bench.out / "notes.txt").write_text("mine")
    bench.merge().failed_cleanly("1 files in the output folder")
    (bench.out / "notes.txt").unlink()
    (bench.base / "vocab.txt").write_text("a")
    bench.merge(weight="0.5").succeeded()
    (bench.base / "vocab.txt").unlink()
    bench.merge("--overwrite").succeeded()
    assert bench.digests() == whole  # and not the older output's vocab.txt


# -- power loss ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["ext4", "xfs"])
def disk(request, bench):
    """A file system on a loop device that can lose power: (its folder, a function that takes the power away and mounts again)."""
    kind = request.param
    make = shutil.which(f"mkfs.{kind}", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if make is None:
        pytest.skip(f"needs mkfs.{kind}")
    image, point = bench.root / "image", bench.root / "disk"
    with image.open("wb") as file:
        file.truncate(320 << 20 if kind == "xfs" else 32 << 20)
    subprocess.run([make, "-q", str(image)], check=True)
    point.mkdir()
    mount("-o", "loop", str(image), str(point))

    def again() -> None:
        subprocess.run(["umount", str(point)], check=True)
        mount("-o", "loop", str(image), str(point))

    yield point, again
    subprocess.run(["umount", "-l", str(point)], check=True)


@root
@pytest.mark.parametrize("step", [53, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flag", [1, 2], ids=["log-flushed", "nothing-flushed"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_power_loss(bench, disk, whole, older, step: int, flag: int, options: tuple):
    """The file system stops at the N-th call. Log flushed: names survive, data that was not synced does not (files of the right
    size full of zeros). After the power is back nothing whole is missing, nothing that has its name is damaged, and it resumes."""
    point, again = disk
    bench.out = point / "out"
    if options:
        bench.merge(weight="0.5").succeeded()
        shutil.copytree(bench.out, bench.root / "kept")
    for when in itertools.count(1 + flag, step):
        bench.clear()
        if options:
            shutil.copytree(bench.root / "kept", bench.out)
        os.sync()
        ended = bench.merge(*options, fault={"when": when, "act": [["shutdown", str(point), flag]]})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended
        again()
        try:
            found = bench.digests() if bench.out.exists() else None
            assert found in ((whole, older) if options else (None, whole))
            if found != whole:
                bench.check_stage(whole)
            ended = bench.merge("--resume")
            if "differs" in ended.stderr and options:
                ended = bench.merge("--resume", *options)
            ended.succeeded()
            assert bench.digests() == whole and not bench.control.exists()
        except AssertionError as error:
            raise AssertionError(f"power lost at call {when}, {ended.last}") from error
    assert when > 100
