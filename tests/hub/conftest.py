"""A Hub on 127.0.0.1 and its clients."""

import os
from pathlib import Path

import pytest

from tests.support.hub_client import FILES, OUTPUT, PRELUDE, REPO, TOKEN, Client
from tests.support.hub_models import CALLS, adapter_files, base_files, write
from tests.support.hub_server import Hub


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(params=["lfs", "xet"])
def each_hub(request):
    """A Hub that keeps large files as Git-LFS does, and one with Xet."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")
    with Hub(xet=request.param == "xet") as hub:
        yield hub


@pytest.fixture
def connect(tmp_path):
    """Start a client of a hub; a folder of the test holds its cache."""
    clients = []

    def start(hub: Hub, **environment: str) -> Client:
        variables = os.environ | hub.environment(tmp_path / "home") | environment
        clients.append(Client(variables, tmp_path / f"stderr{len(clients)}"))
        clients[-1](PRELUDE)
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(hub, connect):
    hub.commit(REPO, FILES)
    return connect(hub)


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A hub and a client for the many small tests that only read."""
    home = tmp_path_factory.mktemp("standing")
    with Hub() as hub:
        hub.commit(REPO, FILES)
        hub.repo("org/gated", gated=True)
        hub.commit("org/gated", FILES)
        hub.repo("org/disabled", disabled=True)
        client = Client(os.environ | hub.environment(home), home / "stderr")
        client(PRELUDE)
        yield hub, client
        client.close()


@pytest.fixture
def reading(standing):
    hub, client = standing
    hub.faults = lambda asked: None
    hub.log.clear()
    return hub, client


@pytest.fixture(scope="module")
def writing(tmp_path_factory):
    """A hub that asks for its token, and a client for the many small tests that write to it."""
    home = tmp_path_factory.mktemp("writing")
    with Hub(token=TOKEN) as hub:
        client = Client(os.environ | hub.environment(home), home / "stderr")
        client(CALLS)
        yield hub, client
        client.close()


@pytest.fixture
def place(writing, tmp_path) -> tuple[Hub, Client, Path]:
    """An empty hub, a client, and its folder with a base and an adapter."""
    hub, client = writing
    hub.repos.clear()
    hub.log.clear()
    hub.faults = lambda asked: None
    write(tmp_path / "base", base_files())
    write(tmp_path / "adapter", adapter_files())
    client(f"import os\nos.chdir({str(tmp_path)!r})\nos.environ['HF_TOKEN'] = {TOKEN!r}")
    return hub, client, tmp_path


@pytest.fixture
def output(tmp_path) -> Path:
    """A finished output of two shards, as a job leaves it."""
    folder = tmp_path / "output"
    folder.mkdir()
    for name, data in OUTPUT.items():
        (folder / name).write_bytes(data)
    (folder / ".journal").write_text("not for others")
    return folder
