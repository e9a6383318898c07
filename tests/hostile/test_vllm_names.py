"""Names that a stranger asks vLLM's resolver for, and what its answers take of the disk."""

import asyncio
import importlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.core.errors import Refused
from tests.integrations.conftest import vllm  # noqa: F401, a fixture
from tests.support.raw_files import AdapterFiles, base, plain

LONG_AGO = 100_000  # seconds


class Server:
    """A folder that is served, and what the plugin answers."""

    def __init__(self, root: Path, registry: dict):
        self.root, self.registry = root, registry
        self.cache, self.folder = root / "cache", root / "adapters"
        self.base = base().write(root / "base")
        self.add("mine")

    def add(self, name: str, scale: float = 1.0) -> None:
        files = plain()
        config = files.config | {"lora_alpha": 2 * scale}
        AdapterFiles(config, files.tensors).folder().write(self.folder / name)

    def start(self) -> "Server":
        importlib.import_module("adapterkit.integrations.vllm").register()
        return self

    @property
    def resolver(self):
        return self.registry["adapterkit"]

    def resolve(self, name):
        return asyncio.run(self.resolver.resolve_lora(str(self.base), name))


@pytest.fixture
def server(vllm, tmp_path, monkeypatch) -> Server:  # noqa: F811
    for name in list(os.environ):
        if name.startswith("ADAPTERKIT_LORA"):
            monkeypatch.delenv(name)
    made = Server(tmp_path, vllm)
    monkeypatch.setenv("ADAPTERKIT_LORA_DIR", str(made.folder))
    monkeypatch.setenv("ADAPTERKIT_LORA_HUB", "good, other-org")
    monkeypatch.setenv("ADAPTERKIT_LORA_CACHE", str(made.cache))
    return made


NO_NAMES = [
    "a\0b", "\0", "x" * 5000, "x/" * 3000 + "x", "a/" + "y" * 299, "\ud800", "a\nb", "\x1b[2J", "",
    " ", ".", "..", "mine/..", "mine/../mine", "./mine", "mine/", "/", "//host/share", "\\\\h\\s",
    "C:mine", "C:\\x", "~", "mine\u202e", "out", "loop", "hf://good/repo", "good", "good/", "/repo",
    None, 7, b"mine", ["mine"],
]  # fmt: skip


def refuses_nothing(server: Server, names) -> None:
    for name in names:
        assert server.resolver._source(name) is None, name
        assert server.resolve(name) is None, name


def test_invalid_names_resolve_to_no_adapter(server):
    """Not an exception either: links out of the folder and in a circle, absolute paths, letters
    that no file has."""
    (server.root / "elsewhere").mkdir()
    plain().folder().write(server.root / "elsewhere" / "adapter")
    (server.folder / "out").symlink_to(server.root / "elsewhere" / "adapter")
    (server.folder / "loop").symlink_to("loop")
    server.start()
    absolute = str(server.folder / "mine")
    refuses_nothing(server, [*NO_NAMES, absolute, "../adapters/mine", "../elsewhere/adapter"])
    assert server.resolver._source("mine") == absolute


def test_names_made_at_random_are_answered_or_nobody_s(server):
    server.start()
    rng, letters = random.Random(7), "ab./\\:@~-_ \0\n\ud800\u202e%*?[="
    for _ in range(3000):
        name = "".join(rng.choices(letters, k=rng.choice((1, 3, 9, 400, 5000))))
        found = server.resolver._source(name)
        assert found is None or Path(found).is_relative_to(server.folder.resolve()), name


REVISIONS = ["v1.0", "main", "a" * 40]
PULLS = ["refs/pr/7", "refs/heads/main", "Refs/pr/7", "pr/7", "heads/main", "refs%2Fpr%2F7"]


@pytest.mark.parametrize("asked, served", [
    ("good/repo", True), ("good/repo:sub/folder", True), ("other-org/x", True),
    ("evil/repo", False), ("Good/repo", False), ("good.evil/repo", False), ("goo/d", False),
    *((f"good/repo@{name}", False) for name in (*REVISIONS, *PULLS)),
    ("good/repo@refs/pr/7:sub", False),
])  # fmt: skip
def test_ids_of_the_hub_are_of_an_organization_and_have_no_revision(server, asked, served):
    server.start()
    assert server.resolver._source(asked) == (asked if served else None)


def test_revisions_are_an_option_and_never_pull_requests(server, monkeypatch):
    monkeypatch.setenv("ADAPTERKIT_LORA_REVISIONS", "1")
    server.start()
    for name in REVISIONS:
        assert server.resolver._source(f"good/repo@{name}") == f"good/repo@{name}"
        assert server.resolver._source(f"evil/repo@{name}") is None
    for name in PULLS:
        assert server.resolver._source(f"good/repo@{name}:sub") is None, name


# -- the cache ----------------------------------------------------------------------------------


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def bounded(server, monkeypatch) -> Callable[[float], Server]:
    """A server whose cache holds so many adapters of one size, all of them used long ago."""

    def make(count: float) -> Server:
        for number in range(4):
            server.add(f"n{number}", number + 1)
        one = size_of(Path(server.start().resolve("mine").lora_path))
        shutil.rmtree(server.cache)
        monkeypatch.setenv("ADAPTERKIT_LORA_CACHE_SIZE", str(int(count * one)))
        return server.start()

    return make


def aged(path: Path, seconds: int) -> None:
    for one in (*path.rglob("*"), path):
        os.utime(one, (0, time.time() - seconds))


def test_those_used_longest_ago_make_way(bounded):
    server = bounded(2.5)
    first, second = (Path(server.resolve(name).lora_path) for name in ("n0", "n1"))
    aged(first, LONG_AGO)
    aged(second, 2 * LONG_AGO)
    again = server.resolve("n1")  # used again: now the first one is the oldest
    assert Path(again.lora_path) == second
    third = Path(server.resolve("n2").lora_path)
    assert {*server.cache.iterdir()} == {second, third}


def test_a_just_returned_adapter_stays_cached_and_the_next_is_refused(bounded):
    server = bounded(1.5)
    first = Path(server.resolve("n0").lora_path)
    with pytest.raises(Refused, match="ADAPTERKIT_LORA_CACHE_SIZE") as caught:
        server.resolve("n1")
    error = caught.value
    assert error.expected and error.where and error.hint
    assert {*server.cache.iterdir()} == {first}
    aged(first, LONG_AGO)
    second = Path(server.resolve("n1").lora_path)
    assert {*server.cache.iterdir()} == {second}


def test_one_that_is_larger_than_the_cache_is_refused_and_removes_none(bounded):
    server = bounded(0.5)
    server.cache.mkdir(exist_ok=True)
    old = server.cache / ("0" * 64)
    old.mkdir()
    (old / "x").write_bytes(b"x")
    aged(old, LONG_AGO)
    with pytest.raises(Refused, match="ADAPTERKIT_LORA_CACHE_SIZE"):
        server.resolve("n1")
    assert old.exists()


def test_stages_that_were_left_count_and_other_files_stay(bounded):
    server = bounded(1.5)
    stage = server.cache / f".{'a' * 64}.adapterkit" / "out"
    stage.mkdir(parents=True)
    (stage / "x.part").write_bytes(bytes(10_000_000))
    for other in ("notes", "b" * 63):
        (server.cache / other).mkdir()
        (server.cache / other / "big").write_bytes(bytes(10_000_000))
        aged(server.cache / other, LONG_AGO)
    with pytest.raises(Refused, match="ADAPTERKIT_LORA_CACHE_SIZE"):
        server.resolve("n1")  # the stage may be a job at work
    aged(stage.parent, LONG_AGO)
    made = Path(server.resolve("n1").lora_path)
    assert {path.name for path in server.cache.iterdir()} == {made.name, "notes", "b" * 63}


@pytest.mark.parametrize("text", ["many", "-1", "0", "1e999GB", "GB"])
def test_a_size_that_is_none_is_refused_at_the_start(server, monkeypatch, text):
    monkeypatch.setenv("ADAPTERKIT_LORA_CACHE_SIZE", text)
    with pytest.raises(Refused, match="ADAPTERKIT_LORA_CACHE_SIZE"):
        server.start()


def test_an_adapter_that_was_trained_on_is_converted_again(server):
    """Of the same shapes and settings: only its values are others."""
    before = server.start().resolve("mine")
    weights = server.folder / "mine" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (0, time.time() + 5))
    after = server.resolve("mine")
    assert after.lora_path != before.lora_path and after.lora_int_id != before.lora_int_id
