"""Pipelines whose steps read from the Hub and write to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_client import TOKEN, Client
from tests.support.hub_models import CALLS, adapter_files, base_files
from tests.support.hub_server import Hub

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
RUN = "__import__('adapterkit.jobs.pipeline', fromlist=['']).run_pipeline({!r}, **{!r})"


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
