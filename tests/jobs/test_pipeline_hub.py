"""Pipelines whose steps read from the Hub and write to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub.test_statistics import base_files as llama_files
from tests.support.forks import command
from tests.support.hub_client import TOKEN, Client
from tests.support.hub_models import CALLS, adapter_files, base_files, differing
from tests.support.hub_server import Hub
from tests.support.texts import write_rows
from tests.support.usual import usual

STEPS = """
[[step]]
verb = "combine"
inputs = ["org/adapter", "org/other=0.5"]
out = "hf://org/both"
options = { method = "linear" }

[[step]]
verb = "merge"
inputs = ["org/base", "org/both"]
out = "merged"
"""
STATISTICS = """
[[step]]
verb = "stats"
inputs = ["org/llama"]
out = "hf://org/seen:deep/s.safetensors"
options = { data = "ids.jsonl" }

[[step]]
verb = "init"
inputs = ["org/llama"]
out = "started"
options = { method = "corda", rank = 2, stats = "org/seen:deep/s.safetensors" }
"""
RUN = "__import__('adapterkit.many.workflows.workflow', fromlist=['']).run_pipeline({!r}, **{!r})"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Hub, Client]]:
    with Hub(token=TOKEN) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files())
        hub.commit("org/other", adapter_files(seed=2))
        variables = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        client = Client(variables, tmp_path / "stderr")
        client(CALLS)
        yield hub, client
        client.close()


def test_steps_on_the_hub(place: tuple[Hub, Client], tmp_path: Path):
    hub, client = place
    file = tmp_path / "steps.toml"
    file.write_text(STEPS)

    def rows(**options: Any) -> list[dict[str, Any]]:
        options = {"allow_push": True} | options
        return client(RUN.format(str(file), options))["steps"]

    def states(**options: Any) -> list[str]:
        return [row["state"] for row in rows(**options)]

    planned = rows(dry_run=True)
    assert [row["state"] for row in planned] == ["planned"] * 2
    assert all("totals" in row for row in planned)  # the second from what is not there yet
    assert "org/both" not in hub.repos and not (tmp_path / "merged").exists()
    assert states() == ["done", "done"]
    assert "adapter_model.safetensors" in hub.files("org/both")
    commits = len(hub.repos["org/both"].trees)
    assert states() == ["done before"] * 2
    assert len(hub.repos["org/both"].trees) == commits
    hub.commit("org/other", adapter_files(seed=3))
    assert states() == ["done", "done"]
    hub.commit("org/both", adapter_files())  # as somebody else would
    (file.parent / "other.toml").write_text(STEPS.replace("0.5", "0.25"))
    file = file.parent / "other.toml"
    assert states() == ["refused"] * 2


def test_statistics_on_the_hub(place: tuple[Hub, Client], tmp_path: Path):
    hub, client = place
    hub.commit("org/llama", llama_files())
    write_rows(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]})
    file = tmp_path / "steps.toml"
    file.write_text(STATISTICS)

    def states(**options: Any) -> list[str]:
        options = {"allow_push": True} | options
        return [row["state"] for row in client(RUN.format(str(file), options))["steps"]]

    assert states(dry_run=True) == ["planned"] * 2 and "org/seen" not in hub.repos
    assert states() == ["done"] * 2
    assert states() == ["done before"] * 2
    assert len(hub.repos["org/seen"].trees) == 2
    write_rows(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]})
    assert states(overwrite=True) == ["done"] * 2


ON_HUB = STEPS.replace('out = "merged"', 'out = "hf://org/merged"')


def outputs(folder: Path, system: str) -> dict[str, bytes]:
    """The files of an adapter and of a model that a pipeline puts on a Hub of its own, and of a
    model in a folder that is pushed."""
    folder.mkdir()
    (folder / "steps.toml").write_text(ON_HUB, "utf-8")
    with Hub(token=TOKEN) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files())
        hub.commit("org/other", adapter_files(seed=2))
        environment = os.environ | hub.environment(folder / "home") | {"HF_TOKEN": TOKEN}
        for words in (
            ["run", "steps.toml", "--allow-push"],
            ["merge", "org/base", "org/adapter", "--out", "local", "--push", "org/pushed"],
        ):
            done = command(*words, env=environment, cwd=folder, system=system)
            assert done.returncode == 0, done.stderr
        assert not differing(hub.files("org/pushed"), folder / "local")
        return {
            f"{name}/{file}": data
            for name in ("both", "merged", "pushed")
            for file, data in hub.files(f"org/{name}").items()
            if file != "adapterkit.json"
        }


@pytest.fixture(scope="module")
def those_of_linux(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return outputs(tmp_path_factory.mktemp("linux") / "hub", "linux")


@pytest.mark.parametrize("system", usual(["windows", "macos"], {"windows"}))
def test_the_bytes_of_linux(those_of_linux: dict[str, bytes], tmp_path: Path, system: str):
    found = outputs(tmp_path / "hub", system)
    assert found.keys() == those_of_linux.keys() and len(found) > 20
    assert [name for name, data in found.items() if data != those_of_linux[name]] == []
