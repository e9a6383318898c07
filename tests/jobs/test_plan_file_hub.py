"""Plan files whose sources are on the Hub, and whose output goes there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_client import TOKEN, Client
from tests.support.hub_models import CALLS, adapter_files, base_files
from tests.support.hub_server import Hub

MERGE = "['org/base', ['org/adapter=0.5']]"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Hub, Client]]:
    with Hub(token=TOKEN) as hub:
        variables = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        client = Client(variables, tmp_path / "stderr")
        client(CALLS)
        yield hub, client
        client.close()


def test_ranks_read_the_commits_of_the_plan_and_finish_pushes(
    place: tuple[Hub, Client], tmp_path: Path
):
    hub, client = place
    commits = [hub.commit("org/base", base_files()), hub.commit("org/adapter", adapter_files())]
    file, out, here = tmp_path / "plan.json", tmp_path / "out", tmp_path / "here"
    client(f"adapterkit.merge(*{MERGE}, out={str(here)!r}).data")
    client(f"adapterkit.write_plan({str(file)!r}, 'merge', *{MERGE}, out={str(out)!r}).verb")
    text = file.read_text()
    assert TOKEN not in text
    arguments = json.loads(text)["arguments"]
    base, (adapter, weight) = arguments["base"], *arguments["adapters"]
    assert [base, adapter] == [f"org/base@{commits[0]}", f"org/adapter@{commits[1]}"]
    assert weight == 0.5
    hub.commit("org/adapter", adapter_files(seed=9))  # its branch moves: the plan's commit counts
    for rank in ("1/2", "0/2"):
        client(f"adapterkit.run({str(file)!r}, worker={rank!r}).made")
    pushed = client(f"adapterkit.finish({str(file)!r}, push='org/merged').data['pushed']['repo']")
    assert pushed == "org/merged"
    there = hub.files("org/merged")
    for path in here.iterdir():
        if path.name != "adapterkit.json":
            assert there[path.name] == path.read_bytes() == (out / path.name).read_bytes()
    assert TOKEN not in (out / "adapterkit.json").read_text()
