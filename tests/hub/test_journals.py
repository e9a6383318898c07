"""Journals of jobs to the Hub that others wrote in HF_HOME: what is forged counts as not done, and
nothing but the output's own files is in the commit."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapterkit.core.output.journal import entries_of, line_of, read_lines
from adapterkit.core.receipt import seal_receipt
from tests.support.hub_client import TOKEN, Client, ClientError, during
from tests.support.hub_models import CALLS, SHARDS, adapter_files, base_files
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault, Repo

OUT = "org/merged"
MERGE = f"adapterkit.merge('org/base', ['org/adapter'], out='hf://{OUT}'"
SECRET = b"nobody's business"
Change = Callable[[list[dict]], Any]


@dataclass
class Bench:
    """A run whose commit was refused: all large files are with the Hub, the journal is here."""

    hub: Hub
    client: Client
    home: Path
    expected: dict[str, bytes]
    repos: list[Repo]  # all that there were: the ids of their commits are not used again

    def reset(self) -> None:
        """As the refused commit left it."""
        shutil.rmtree(self.control, ignore_errors=True)
        shutil.copytree(self.home / "kept", self.control, symlinks=True)
        self.repos.append(self.hub.repos.pop(OUT))
        self.hub.repo(OUT).objects |= self.repos[0].objects
        self.hub.log.clear()

    @property
    def control(self) -> Path:
        return self.home / "adapterkit" / f".{OUT.replace('/', '--')}.adapterkit"

    @property
    def journal(self) -> list[dict]:
        return [entry for _, entry in entries_of(read_lines(self.control / "journal.jsonl"))]

    def write(self, entries: list[dict]) -> None:
        (self.control / "journal.jsonl").write_bytes(b"".join(map(line_of, entries)))

    def resume(self) -> str:
        """The error of a resumed run; "" where it ended as if nothing had happened."""
        try:
            self.client(f"{MERGE}, resume=True).data['hash']")
        except ClientError as error:
            assert error.kind in ("Refused", "Failed") and all(error.parts.values()), error.trace
            assert "\x1b" not in error.text
            self.check_nothing_else()
            return error.text
        there = self.hub.files(OUT)
        assert there.keys() == self.expected.keys()
        assert {name for name in there if there[name] != self.expected[name]} <= {"adapterkit.json"}
        self.client(f"adapterkit.verify('{OUT}')['files']")
        return ""

    def check_nothing_else(self) -> None:
        """No commit was made, nor anything sent that is not of the output."""
        assert self.hub.repos[OUT].refs["main"] == self.first
        assert not any(SECRET in blob for blob in self.hub.files(OUT).values())

    @property
    def first(self) -> str:
        return next(iter(self.hub.repos[OUT].trees))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    home = tmp_path_factory.mktemp("home")
    with Hub(token=TOKEN) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files(layers=range(2)))
        client = Client(os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}, home / "stderr")
        client(CALLS)
        client(f"{MERGE}).data['hash']")
        bench = Bench(hub, client, home, hub.files(OUT), [hub.repos.pop(OUT)])
        hub.faults = during(Fault(status=400), "POST", "/commit/")
        client.refusal(f"{MERGE})", "Failed")
        hub.faults = lambda asked: None
        shutil.copytree(bench.control, home / "kept", symlinks=True)
        yield bench
        client.close()


@pytest.fixture
def bench(interrupted: Bench) -> Bench:
    interrupted.reset()
    return interrupted


def entry_of(journal: list[dict], kind: str) -> dict:
    return next(entry for entry in journal if kind in entry)


def uploaded(**more: Any) -> Change:
    """Another entry: a file that the Hub has, under a name of the writer's choice."""

    def change(journal: list[dict]) -> None:
        journal.insert(1, {"uploaded": entry_of(journal, "uploaded")["uploaded"] | more})

    return change


FORGED: dict[str, Change] = {
    "a sent file of another hash": lambda j: entry_of(j, "uploaded")["uploaded"].update(
        sha256="0" * 64
    ),
    "a file that is not of the plan": uploaded(file="pytorch_model.bin"),
    "a file above the folder": uploaded(file="../x"),
    "another file for the card": uploaded(file="README.md"),
    "another file for the receipt": uploaded(file="adapterkit.json"),
    "another file for a shard": lambda j: j.append(
        {"uploaded": entry_of(j, "uploaded")["uploaded"] | {"file": SHARDS[5]}}
    ),
    "a copy of what is not copied": lambda j: j.append({"copied": SHARDS[0]}),
    "all of them gone": lambda j: j.__delitem__(slice(1, None)),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_entries_of_a_journal_are_made_again(bench: Bench, forgery: str):
    journal = bench.journal
    FORGED[forgery](journal)
    bench.write(journal)
    assert not bench.resume()


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_damaged_line_is_done_again(bench: Bench, number: int):
    """And what follows it."""
    path = bench.control / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = lines[number].replace(b"0", b"1", 1)
    path.write_bytes(b"".join(lines))
    assert not bench.resume()


def forged_receipts(good: dict, secret: str) -> Iterator[bytes]:
    yield from (b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'"x"')
    for name in (secret, f"../{secret}", "pytorch_model.bin", f"/{secret}"):
        more = {name: {"size": len(SECRET), "sha256": None}}
        yield seal_receipt(good | {"files": good["files"] | more, "timings": good["timings"]})
    for key in ("files", "recipe", "keys", "notes", "totals", "timings"):
        yield json.dumps(good | {key: 7}).encode()


def test_a_receipt_that_others_wrote(bench: Bench):
    """The journal is theirs as well: it has that receipt's hash."""
    kept = bench.home / "kept"
    good = json.loads((kept / "out" / "adapterkit.json").read_bytes())
    del good["timings"]["seal"]
    (bench.home / "secret").write_bytes(SECRET)
    for data in forged_receipts(good, str(bench.home / "secret")):
        bench.reset()
        (bench.control / "out" / "adapterkit.json").write_bytes(data)
        entries = bench.journal
        entry_of(entries, "publish")["publish"] = hashlib.sha256(data).hexdigest()
        bench.write(entries)
        assert not bench.resume(), data


@pytest.mark.parametrize("name", ["README.md", "config.json", "adapterkit.json"])
def test_links_are_not_sent(bench: Bench, name: str):
    secret = bench.home / "secret"
    secret.write_bytes(SECRET)
    if name == "adapterkit.json":  # a receipt that is all right, elsewhere
        (bench.control / "out" / name).rename(secret)
    (bench.control / "out" / name).unlink(missing_ok=True)
    (bench.control / "out" / name).symlink_to(secret)
    before = secret.read_bytes()
    assert not bench.resume()
    assert secret.read_bytes() == before


def test_a_journal_that_is_no_file(bench: Bench):
    path = bench.control / "journal.jsonl"
    path.rename(bench.home / "journal")
    os.mkfifo(path)
    assert not bench.resume()
    bench.reset()
    path.unlink()
    path.symlink_to(bench.home / "journal")
    assert not bench.resume() and (bench.home / "journal").is_file()
