"""Reads that fail, inputs that change, journals that are torn."""

import bisect
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.reader import identity
from adapterkit.core.engine.planned_folder import converted_folder
from adapterkit.core.inputs.input_identity import identities
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.journal import line_of, read_entry
from adapterkit.core.output.stage import Stage
from adapterkit.core.receipt import public_recipe
from tests.support.faults import check_failure

# -- reads and inputs --


@pytest.mark.parametrize("place", ["/base/", "/adapter/"])
@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
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
        "the interrupted run was of another job", place.partition("/")[2], "identity."
    )
    assert not bench.out.exists()
    bench.merge("--overwrite").succeeded()
    assert bench.digests() == bench.undisturbed()


def test_a_source_of_an_adapter_changed_between_runs(bench):
    """Of one that is converted to be read."""
    plain = bench.adapter.rename(bench.root / "plain")
    adapterkit.convert(plain, to="mlx", out=bench.adapter)
    source = bench.adapter / "adapters.safetensors"
    ended = bench.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    assert ended.status == -signal.SIGKILL
    time.sleep(0.02)
    change(source, "a copy in its place")
    ended = bench.merge("--resume")
    assert ended.status == 1 and not bench.out.exists()
    assert f"of another job: inputs.1.files.source/0/{source.name}.identity." in ended.stderr
    bench.merge("--overwrite").succeeded()
    recipe = json.loads((bench.out / "adapterkit.json").read_text())["recipe"]
    assert all("source" not in name for entry in recipe["inputs"] for name in entry["files"])


def test_the_tokenizer_next_to_a_converted_adapter(tmp_path, bench):
    """It is copied through two plans."""
    tokenizer = bench.adapter / "tokenizer_config.json"
    tokenizer.write_text("{}")
    plan = adapterkit.convert(bench.adapter, to="vllm", out=tmp_path / "out", dry_run=True)
    folder = converted_folder(LocalFolder(bench.adapter), "peft", "adapter_model.safetensors", plan)
    found = identities((folder,), [(0, tokenizer.name)])
    assert found[0, f"source/0/{tokenizer.name}"] == identity(tokenizer.stat())
    assert (0, f"source/0/{tokenizer.name}") not in identities((folder,), [(0, "other")])


def test_a_replaced_pickle_changes_the_recipe_but_not_the_public_one(tmp_path, bench):
    weights = bench.adapter / "adapter_model.safetensors"
    source = weights.with_name("adapter_model.bin")
    torch.save(load_file(weights), source)
    weights.unlink()
    how = {"to": "mlx", "out": tmp_path / "out", "allow_pickle": True, "dry_run": True}
    plan = lambda: adapterkit.convert(bench.adapter, **how)
    before = plan().recipe()
    change(source, "a copy in its place")
    assert plan().recipe() != before
    assert public_recipe(plan().recipe()) == public_recipe(before)


@pytest.mark.parametrize(
    ("field", "argv"),
    [
        ("options.dtype", ["--dtype", "fp32"]),
        ("options.weights.0", ["=0.7"]),
        ("options.exclude", ["--exclude", "q_proj"]),
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
    shared.merge().failed_cleanly("was interrupted", "--resume", "--overwrite")
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
    """Poked, replaced, or cut short (a mapping would die of SIGBUS): nothing of what was made of it
    is used."""
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


# -- the journal --


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


ENTRIES = [
    {"fingerprint": "f", "recipe": {}},
    {"shard": {"file": "a", "marks": {"\r\x0b": "\u2028"}, "metrics": {"m": {"delta": 0.5}}}},
    {"crc32": "00000000", "x": {"crc32": ""}},
    {"publish": "c"},
]


def noted(stage: Stage, *entries: dict) -> bytes:
    """The journal's bytes with these entries."""
    stage.begin()
    for entry in entries:
        stage.note(entry)
    stage._close_journal()
    return (stage.control / "journal.jsonl").read_bytes()


@pytest.fixture
def journaled(tmp_path) -> tuple[Stage, list[bytes]]:
    """A stage, and the lines of its journal."""
    stage = Stage(FolderOutput(tmp_path / "out"))
    stage.control.mkdir()
    lines = noted(stage, *ENTRIES).splitlines(keepends=True)
    assert stage.journal() == ENTRIES and [json.loads(line) | {"crc32": 0} for line in lines] == [
        entry | {"crc32": 0} for entry in ENTRIES
    ]
    return stage, lines


def is_read_as(stage: Stage, data: bytes, entries: list[dict]) -> None:
    """The journal is these entries, and goes on behind them."""
    path = stage.control / "journal.jsonl"
    path.write_bytes(data)
    assert stage.journal() == entries
    noted(stage, {"more": 1})
    assert stage.journal() == [*entries, {"more": 1}]


TAILS = (b"", b"\0\0\0", b"\n", b"5\n", b"[]\n", b"{}\n", b'{"publish":"c"}\n', b"\xff\xfe\n",
         b'{"shard":', b"[" * 100_000 + b"\n", b',"crc32":"00000000"}\n')  # fmt: skip


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
def test_every_prefix_of_a_journal_gives_its_complete_lines(journaled, tail: bytes):
    stage, lines = journaled
    text = b"".join(lines)
    ends = [0, *itertools.accumulate(map(len, lines))]
    for cut in range(len(text) + 1):
        whole = bisect.bisect_right(ends, cut) - 1
        lacks_end = tail == b"\n" and cut + 1 in ends  # which comes with the tail
        is_read_as(stage, text[:cut] + tail, ENTRIES[: whole + lacks_end])


def test_every_flipped_byte_ends_a_journal_at_its_line(journaled):
    stage, lines = journaled
    for number, line in enumerate(lines):
        for at in range(len(line)):
            for flip in (1, 2, 32, 128, 255):
                bad = line[:at] + bytes([line[at] ^ flip]) + line[at + 1 :]
                data = b"".join([*lines[:number], bad, *lines[number + 1 :]])
                (stage.control / "journal.jsonl").write_bytes(data)
                assert stage.journal() == ENTRIES[:number], bad
        is_read_as(stage, data, ENTRIES[:number])


def test_a_marker_or_a_word_of_a_rank_that_is_damaged_is_none(tmp_path):
    """Each prefix and flipped byte of it; a link and a pipe, too."""
    path, line = tmp_path / "x.json", line_of(ENTRIES[1])
    for at in range(len(line)):
        for data in (line[:at], line[:at] + bytes([line[at] ^ 8]) + line[at + 1 :]):
            path.write_bytes(data)
            assert read_entry(path) == {}
    path.write_bytes(line)
    assert read_entry(path) == ENTRIES[1]
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    assert not any(read_entry(tmp_path / name) for name in ("link", "pipe", "nothing"))
