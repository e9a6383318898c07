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

from adapterkit.receipt import seal_receipt
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
        lines = (self.control / "journal.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines]

    def write(self, entries: Any) -> None:
        lines = entries if isinstance(entries, list) else [entries]
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (self.control / "journal.jsonl").write_text(text)

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


def changed(kind: str, **more: Any) -> Change:
    def change(journal: list[dict]) -> None:
        entry = entry_of(journal, kind)
        entry[kind] = entry[kind] | more if isinstance(entry[kind], dict) else more

    return change


def replaced(kind: str, value: Any) -> Change:
    return lambda journal: entry_of(journal, kind).update({kind: value})


def uploaded(**more: Any) -> Change:
    """Another entry: a file that the Hub has, under a name of the writer's choice."""

    def change(journal: list[dict]) -> None:
        journal.insert(1, {"uploaded": entry_of(journal, "uploaded")["uploaded"] | more})

    return change


FORGED: dict[str, Change] = {
    "pins that are none": lambda j: j[0].update(pins="x"),
    "pins of numbers": lambda j: j[0].update(pins={"org/base": 7}),
    "pins of branches": lambda j: j[0].update(pins={"org/base": "main"}),
    "a sent file without a size": replaced("uploaded", {"file": SHARDS[0], "sha256": "0" * 64}),
    "a sent file with more": changed("uploaded", another=1),
    "a sent file that is a list": replaced("uploaded", [SHARDS[0], 1, "0" * 64]),
    "a sent file of another hash": changed("uploaded", sha256="0" * 64),
    "a hash that is none": changed("uploaded", sha256="x"),
    "a size that is none": changed("uploaded", size=-1),
    "a name that is none": changed("uploaded", file=["x"]),
    "a file that is not of the plan": uploaded(file="pytorch_model.bin"),
    "a file above the folder": uploaded(file="../x"),
    "another file for the card": uploaded(file="README.md"),
    "another file for the receipt": uploaded(file="adapterkit.json"),
    "another file for a shard": lambda j: j.append(
        {"uploaded": entry_of(j, "uploaded")["uploaded"] | {"file": SHARDS[5]}}
    ),
    "a copy from elsewhere": replaced("copied", {
        "file": SHARDS[3], "size": 1, "sha256": "0" * 64, "repo": "org/adapter",
        "revision": "main", "path": "adapter_model.safetensors",
    }),
    "a copy of what is not copied": lambda j: j.append({"copied": SHARDS[0]}),
    "a copy that is none": replaced("copied", [1]),
    "metrics that are none": changed("shard", metrics={"x": {"delta": "x"}}),
    "a result that is none": replaced("shard", "x"),
    "all of them gone": lambda j: j.__delitem__(slice(1, None)),
    "a publish that is none": replaced("publish", {}),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGED)
def test_what_is_forged_is_done_again(bench: Bench, forgery: str):
    journal = bench.journal
    FORGED[forgery](journal)
    bench.write(journal)
    assert not bench.resume()


@pytest.mark.parametrize("head", [
    {"recipe": []}, {"fingerprint": 7}, {"device": 7}, {"device": "\x1b[31m"},
    {"device": "cuda x, torch 2"}, {"ranks": True},
])  # fmt: skip
def test_a_head_that_is_none(bench: Bench, head: dict):
    """Then there is no interrupted run, or it is refused."""
    journal = bench.journal
    journal[0] |= head
    bench.write(journal)
    error = bench.resume()
    assert not error or "another device" in error or "a plan file" in error


@pytest.mark.parametrize("line", ["[" * 100_000 + "\n", "9" * 5000 + "\n", "{}\n", "\0\n", "x"])
def test_lines_that_are_none(bench: Bench, line: str):
    bench.write([*bench.journal[:2], line, *bench.journal[2:]])
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
